"""Perplexity of every method, ratio and scope on one model, beside the dense model; nothing is compensated.

What methods have in common (sums of saliencies, means of activations) is computed once and serves all ratios.

    python benchmarks/quality.py --model MODEL --nsamples 32 --seqlen 512 --eval_seqlen 1024 --eval_windows 12
"""

import argparse
import copy
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import baselines, builder, data, evaluate, prune, tape  # noqa: E402
from lib.mlp import find_layers  # noqa: E402
from lib.sums import open_scores  # noqa: E402
from lib.vectors import ModelVector  # noqa: E402


def parse() -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--data_dir", default="data_local")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--weight_ratios", type=float, nargs="*", default=[0.5])
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval_seqlen", type=int, default=1024)
    parser.add_argument("--eval_windows", type=int)
    parser.add_argument("--neuron_score", choices=list(prune.NEURON_SCORES), default="trimmed_mean")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    return parser.parse_args()


def all_scores(args, loaded, samples, methods: list[prune.Method], stores: ExitStack) -> dict[str, ModelVector]:
    """The scores of every method by its name; methods with the same sums share them."""
    sums = {}
    for kind in dict.fromkeys(m.reduction_name(args.neuron_score) for m in methods):
        alike = [m for m in methods if m.reduction_name(args.neuron_score) == kind]
        widest = max(alike, key=lambda m: len(m.summed))
        kept = stores.enter_context(open_scores(None, {}, prune.sum_shapes(loaded.layers, widest)))
        sums[kind] = baselines.of_weights(prune.blocks_of(loaded.layers), args.seed) | prune.score(
            loaded.model, loaded.layers, tape.collate(samples, 1), widest, args.neuron_score, kept, loaded.placement
        )
    return {m.name: m.scores(sums[m.reduction_name(args.neuron_score)], args.neuron_score) for m in methods}


def pruned_perplexity(model, scores, structured: bool, ratio: float, across: bool, windows) -> tuple[float, float]:
    """Perplexity, and the sparsity of the whole model, of a copy pruned by these scores."""
    pruned = copy.deepcopy(model)
    layers = find_layers(pruned)
    before = evaluate.size(pruned, layers)
    if structured:
        selection = prune.select_neurons(list(scores), ratio, across)
    else:
        selection = prune.select_weights(scores, ratio, across)
    prune.remove(pruned, layers, selection)
    gone = before.total - evaluate.size(pruned, layers).total if structured else before.mlp - selection.n_kept()
    return evaluate.perplexity(pruned, windows), gone / before.total


def main() -> None:
    """Score once per kind, prune and measure every combination, print one Markdown table per kind."""
    args = parse()
    builder.quiet_libraries()
    calibration = data.Calibration(args.dataset, args.data_dir)
    loaded = builder.load(args.model, args.dtype, args.cuda, seqlen=args.seqlen)
    samples = calibration.samples(loaded.model, loaded.tokenizer, args.nsamples, loaded.seqlen, args.seed)
    windows, source = data.held_out_windows(
        calibration, loaded.model, loaded.tokenizer, args.eval_seqlen, args.eval_windows, args.seed
    )
    dense = evaluate.perplexity(loaded.model, windows)
    print(
        f"{Path(args.model).name}, {loaded.model.dtype}; calibration: {args.dataset}, {len(samples)} samples of "
        f"{loaded.seqlen} tokens, seed {args.seed}; perplexity on {source}, {len(windows)} windows of "
        f"{windows.shape[1]} tokens; dense {dense:.2f}\n"
    )
    for structured, ratios in ((True, args.ratios), (False, args.weight_ratios)):
        if ratios:
            print_table(args, loaded, samples, windows, structured, ratios)


def print_table(args, loaded, samples, windows, structured: bool, ratios: list[float]) -> None:
    """One Markdown table: a row per method of this kind, a column per ratio and scope."""
    columns = [(ratio, across) for ratio in ratios for across in (False, True)]
    methods = [m for m in prune.METHODS.values() if m.structured == structured and not m.sees]
    with ExitStack() as stores:
        rows = all_scores(args, loaded, samples, methods, stores)
        scope = ("per layer" if structured else "per matrix", "global")
        print("| method | " + " | ".join(f"{ratio:.0%} {scope[across]}" for ratio, across in columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for name, scores in rows.items():
            found = [pruned_perplexity(loaded.model, scores, structured, *column, windows) for column in columns]
            print(f"| `{name}` | " + " | ".join(f"{value:.2f}" for value, _ in found) + " |", flush=True)
    print("| sparsity of the whole model | " + " | ".join(f"{share:.1%}" for _, share in found) + " |\n", flush=True)


if __name__ == "__main__":
    main()
