"""Peak memory of scoring beside its count: model + recorded hidden states + one layer at work.

Random Llama models that differ only in their number of layers, each in a process of its own. What grows
with the layers must be the model and the hidden states alone; the rest column must not.

    python benchmarks/memory.py --layers 4 8 16
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MIB = 2**20


def parse() -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--intermediate_size", type=int, default=4096)
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Score one random model in this process; MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lib import memory, prune
    from lib.mlp import find_layers
    from lib.sums import InMemory
    from lib.tape import collate

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.one,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config).eval().to("cuda" if args.cuda else "cpu", getattr(torch, args.dtype))
    layers = find_layers(model)
    batches = collate([torch.randint(0, 1024, (args.seqlen,)) for _ in range(args.nsamples)], 1)
    peaks = {}
    with memory.peak_memory(model.device, peaks, "before"):
        model(batches[0].to(model.device).inputs["input_ids"])
    with memory.peak_memory(model.device, peaks, "scoring"):
        prune.score(model, layers, batches, prune.METHODS["structured_afr"], "trimmed_mean", InMemory())
    size = torch.finfo(model.dtype).bits // 8
    layer = sum(p.numel() for p in layers[0].module.parameters()) * size
    hidden = (len(layers) + 1) * args.nsamples * args.seqlen * args.hidden_size * size
    return {
        "peak": peaks["scoring"] / MIB,
        "model": sum(p.numel() for p in model.parameters()) * size / MIB,
        "hidden": hidden / MIB,
        "layer": layer / MIB,
    }


def main() -> None:
    """Print one Markdown row per number of layers."""
    args = parse()
    if args.one:
        print(json.dumps(measure(args)))
        return
    print(
        f"Llama, hidden {args.hidden_size}, MLP {args.intermediate_size}, {args.dtype}, {args.nsamples} samples of "
        f"{args.seqlen} tokens; MiB\n"
    )
    print("| layers | measured peak | model | hidden states | rest | one layer's weights |\n|---|---|---|---|---|---|")
    for layers in args.layers:
        output = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", str(layers)], check=True, capture_output=True, text=True
        ).stdout
        m = json.loads(output.splitlines()[-1])
        rest = m["peak"] - m["model"] - m["hidden"]
        print(f"| {layers} | {m['peak']:.0f} | {m['model']:.0f} | {m['hidden']:.0f} | {rest:.0f} | {m['layer']:.0f} |")


if __name__ == "__main__":
    main()
