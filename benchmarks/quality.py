"""What is left of a model: every method, ratio and compensation, over several seeds, beside the dense model.

A model is pruned again and again and measured: perplexity on wikitext2 test and on text of another kind, and accuracy
on multiple-choice sets. Each finished row stands in OUT/quality.csv; a run that was stopped goes on after it, and runs
with other seeds may fill the same file at the same time. OUT/quality.md and OUT/quality.png show the rows that the
command asks for, mean and spread over the seeds.

A row is METHOD, with what is to be fixed behind colons: a neuron score, `layer` or `global`, a compensation, `2` (or
more) for rounds. What is left open is run in every way that --scopes and --compensate name, in one round:

    python benchmarks/quality.py --model MODEL --methods structured_flap:bias structured_afr:token_fisher:global
"""

import argparse
import copy
import fcntl
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from lib import builder, choices, compensate, data, evaluate, memory, prune, steps, tape  # noqa: E402
from lib.attention import scoring_attention  # noqa: E402
from lib.errors import UserError  # noqa: E402
from lib.mlp import find_layers  # noqa: E402
from lib.offload import Placement  # noqa: E402
from lib.sums import InMemory, open_scores  # noqa: E402
from lib.vectors import ModelVector  # noqa: E402

SCOPES = ("layer", "global")
KEY = ["method", "neuron_score", "scope", "ratio", "compensation", "rounds", "seed", "nsamples", "seqlen"]
FACTS = ["mlp_sparsity", "model_sparsity", "narrowest", "widest", "score_seconds", "compensate_seconds", "peak_mib"]
DEFAULT_METHODS = [m.name for m in prune.METHODS.values() if m.structured and not m.sees]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name of the Hub, a folder, or a .gguf file")
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, metavar="METHOD[:...]")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--compensate", nargs="+", choices=compensate.KINDS, default=["none"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="draws of the calibration samples")
    parser.add_argument("--dataset", default="wikitext2", help="calibration set")
    parser.add_argument("--data_dir", default="data_local")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval_seqlen", type=int, default=1024)
    parser.add_argument("--eval_windows", type=int, help="of each text [default: all]")
    parser.add_argument("--text", default="hellaswag", choices=list(choices.SETS), help="text of another kind")
    parser.add_argument("--tasks", nargs="*", default=[], choices=list(choices.SETS))
    parser.add_argument("--task_seeds", type=int, help="measure accuracies with the first seeds only, to save time")
    parser.add_argument("--limit", type=int, help="questions of each task [default: all]")
    parser.add_argument("--show", action="store_true", help="measure nothing: show what OUT knows of these rows")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--out", default="logs/quality", type=Path)
    return parser.parse_args(argv)


# --- what is asked for ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One pruned model, by the names of `KEY`. The dense one has no seed."""

    method: str
    neuron_score: str
    scope: str
    ratio: float
    compensation: str
    rounds: int
    seed: int
    nsamples: int
    seqlen: int

    @property
    def name(self) -> str:
        """How the tables call the method."""
        parts = [self.method]
        if self.neuron_score not in ("", "trimmed_mean"):
            parts.append(self.neuron_score)
        return ", ".join(parts + [f"{self.rounds} rounds"] * (self.rounds > 1))


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The dense model, then every row that is asked for, seed by seed. Raises UserError for an unknown word."""
    found = [Row("dense", "", "", 0.0, "none", 1, -1, 0, 0)]
    for seed, written, ratio in itertools.product(args.seeds, args.methods, args.ratios):
        name, *fixed = written.split(":")
        if name not in prune.METHODS:
            raise UserError(f"--methods {written}: unknown; choose {', '.join(prune.METHODS)}")
        scopes, kinds = ([word for word in fixed if word in known] for known in (SCOPES, compensate.KINDS))
        neuron_scores = [word for word in fixed if word in prune.NEURON_SCORES]
        rounds = [int(word) for word in fixed if word.isdecimal()] or [1]
        unknown = [word for word in fixed if word not in (*scopes, *kinds, *neuron_scores) and not word.isdecimal()]
        if unknown:
            raise UserError(f"--methods {written}: '{unknown[0]}' is no neuron score, scope or compensation")
        if neuron_scores and not prune.METHODS[name].takes_neuron_score:
            raise UserError(f"--methods {written}: {name} has a score of its own; leave {neuron_scores[0]} out")
        if not prune.METHODS[name].structured:
            kinds = ["none"]
        if not prune.METHODS[name].by_gradients or prune.METHODS[name].fixed_score:
            neuron_scores = [""]
        for choice in itertools.product(
            neuron_scores or ["trimmed_mean"], scopes or args.scopes, [ratio], kinds or args.compensate, rounds
        ):
            found.append(Row(name, *choice, seed, args.nsamples, args.seqlen))
    return list(dict.fromkeys(found))


def conditions(args: argparse.Namespace) -> dict[str, object]:
    """What all rows of a folder have in common, beside the names of `KEY`, by flag."""
    shared = {name: getattr(args, name) for name in ("dataset", "eval_seqlen", "eval_windows", "text", "dtype")}
    return {"model": Path(args.model).name} | shared | ({"limit": args.limit} if args.tasks else {})


# --- what is measured -------------------------------------------------------------------------------


def _widest(row: Row) -> prune.Method:
    """Of the methods whose sums are of the row's kind the one that takes the most, so that all are served."""
    own, kind = prune.METHODS[row.method], prune.METHODS[row.method].reduction_name(row.neuron_score)
    alike = [m for m in prune.METHODS.values() if not m.sees and m.summed and m.structured == own.structured]
    return max((m for m in alike if m.reduction_name(row.neuron_score) == kind), key=lambda m: len(m.summed))


class Bench:
    """One model, its calibration draws, and what every row is measured on."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.calibration = data.Calibration(args.dataset, args.data_dir)
        self.loaded = builder.load(args.model, args.dtype, args.cuda, seqlen=args.seqlen)
        self.windows = self._windows()
        self.dense = evaluate.size(self.loaded.model, self.loaded.layers)
        self._samples: dict[int, list[Tensor]] = {}
        self._dense: dict[int, tuple[list[tape.Batch], tape.Tape, float]] = {}

    def _windows(self) -> dict[str, Tensor]:
        """The texts, `[windows, tokens]` each."""
        args, loaded = self.args, self.loaded
        seqlen = min(args.eval_seqlen, builder.context_length(loaded.model.config))
        own, source = data.held_out_windows(
            self.calibration, loaded.model, loaded.tokenizer, seqlen, args.eval_windows, 0
        )
        rows = data.open_split(args.text, choices.SETS[args.text].split, args.data_dir)
        text = "\n\n".join(map(data.SETS[args.text].sample, rows))
        other = data.windows_in_order(loaded.tokenizer, text, seqlen, args.eval_windows, f"--text {args.text}: it")
        return {source.split()[0]: own, f"{args.text} text": other}

    def samples(self, seed: int) -> list[Tensor]:
        """The calibration samples of a seed."""
        if seed not in self._samples:
            self._samples = {seed: self.calibration.samples(
                self.loaded.model, self.loaded.tokenizer, self.args.nsamples, self.loaded.seqlen, seed
            )}  # fmt: skip
        return self._samples[seed]

    def dense_outputs(self, seed: int) -> tuple[list[tape.Batch], tape.Tape, float]:
        """Batches to compensate on, what the dense model's layers compute on them, and the seconds that took.

        All rows of a seed share it; each is charged with its seconds.
        """
        if seed not in self._dense:
            self._dense.clear()
            batches = tape.collate(self.samples(seed), compensate.batch_size(self.args.nsamples))
            loaded, start = self.loaded, time.perf_counter()
            with scoring_attention(loaded.model):  # as when it is computed beside the pruned model
                found = tape.record(loaded.model, loaded.layers, batches, loaded.placement, tape.HiddenStates())
            self._dense = {seed: (batches, found, time.perf_counter() - start)}
        return self._dense[seed]

    def sums(self, row: Row) -> tuple[dict[str, ModelVector], dict[str, float]]:
        """What the row's method sums over the samples, computed once per seed and kind; and what that took."""
        took = {"score_seconds": 0.0, "peak_mib": 0.0}
        if not prune.METHODS[row.method].summed:
            return {}, took
        loaded, samples, widest = self.loaded, self.samples(row.seed), _widest(row)
        facts = {"set": self.args.dataset, "samples": len(samples), "sha256": data.fingerprint(samples)}
        asked = argparse.Namespace(neuron_score=row.neuron_score, batch_size=1, towers="both", seed=row.seed)
        key, shapes = steps.score_key(asked, loaded, facts, widest), prune.sum_shapes(loaded.layers, widest)
        kind = f"{'neurons' if widest.structured else 'weights'}-{widest.reduction_name(row.neuron_score).split()[-1]}"
        path = self.args.out / f"{kind}-{row.nsamples}x{row.seqlen}-{row.seed}.scores"
        with open_scores(str(path), key, shapes) as kept, timed(loaded.model.device, took, "score_seconds"):
            done = kept.is_complete
            sums = prune.score(loaded.model, loaded.layers, tape.collate(samples, 1), widest, row.neuron_score, kept,
                               loaded.placement, seed=row.seed)  # fmt: skip
        noted = path.with_suffix(".seconds.csv")
        if not done:
            pd.DataFrame([took]).to_csv(noted, index=False)
        return sums, pd.read_csv(noted).iloc[0].to_dict() if noted.exists() else took

    def measure(self, row: Row, measures: Sequence[str]) -> dict[str, object]:
        """Prune a copy as the row says, and measure it."""
        if row.method == "dense":
            facts = dict.fromkeys(FACTS, 0.0) | {"narrowest": min(self.dense.widths), "widest": max(self.dense.widths)}
            return facts | self.quality(self.loaded.model, measures)
        method = prune.METHODS[row.method]
        sums, took = self.sums(row)
        took["compensate_seconds"] = 0.0
        for number in range(1, row.rounds):
            model, layers, selection = self.selected(row, row.ratio * number / row.rounds, sums, took)
            prune.silence(layers, selection)
            with timed(model.device, took, "score_seconds"):
                batches, placement = tape.collate(self.samples(row.seed), 1), Placement(layers)
                sums = prune.score(model, layers, batches, method, row.neuron_score, InMemory(), placement,
                                   seed=row.seed)  # fmt: skip
        model, layers, selection = self.selected(row, row.ratio, sums, took)
        prune.remove(model, layers, selection)
        after = evaluate.size(model, layers)
        kept = after.mlp if method.structured else selection.n_kept()
        gone = max(self.dense.mlp - kept, self.dense.total - after.total)
        shares = {"mlp_sparsity": 1 - kept / self.dense.mlp, "model_sparsity": gone / self.dense.total}
        widths = {"narrowest": min(after.widths), "widest": max(after.widths)}
        return shares | widths | took | self.quality(model, measures)

    def selected(self, row: Row, ratio: float, sums: dict[str, ModelVector], took: dict[str, float]):
        """A copy of the dense model, compensated for what is about to be removed, its layers, and what is to stay."""
        model = copy.deepcopy(self.loaded.model)
        layers, method, across = find_layers(model), prune.METHODS[row.method], row.scope == "global"
        selection = prune.select(layers, sums, method, ratio, across, row.neuron_score, seed=row.seed)
        if row.compensation != "none":
            batches, outputs, seconds = self.dense_outputs(row.seed)
            with timed(model.device, took, "compensate_seconds"):
                compensate.compensate(model, layers, selection, batches, row.compensation, dense=outputs)
            took["compensate_seconds"] += seconds if row.compensation != "bias" else 0.0
        return model, layers, selection

    def wanted(self, row: Row) -> list[str]:
        """The measures that are asked for: every text, and the tasks unless the seed is spared them."""
        spared = row.method != "dense" and row.seed not in self.args.seeds[: self.args.task_seeds]
        return [*self.windows, *([] if spared else self.args.tasks)]

    def quality(self, model: nn.Module, measures: Sequence[str]) -> dict[str, float]:
        """Perplexity on texts, accuracy on tasks."""
        return {
            name: evaluate.perplexity(model, self.windows[name], name)
            if name in self.windows
            else choices.accuracy(model, self.loaded.tokenizer, name, self.args.data_dir, self.args.limit)
            for name in measures
        }


@contextmanager
def timed(device: torch.device, took: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds of what is done meanwhile, and the peak memory where it is the highest so far."""
    start, peak = time.perf_counter(), {}
    with memory.peak_memory(device, peak, name):
        yield
    took[name] = took.get(name, 0.0) + time.perf_counter() - start
    took["peak_mib"] = max(took["peak_mib"], peak[name] / 2**20)


# --- what is kept -----------------------------------------------------------------------------------


class Results:
    """Rows in a CSV file, which several runs may fill at the same time."""

    def __init__(self, path: Path):
        self.path = path

    def agree(self, asked: dict[str, object], note: bool) -> None:
        """Compare, and `note`, what the rows are measured on. Raises UserError where those there differ in it."""
        path = self.path.with_suffix(".json")
        known = json.loads(path.read_text()) if path.exists() else {}
        for name, value in asked.items():
            if known.get(name, value) != value:
                here, there = ("all" if choice is None else choice for choice in (value, known[name]))
                raise UserError(f"--{name} {here}: {self.path} holds rows measured with {there}; choose another --out")
        if note:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known | asked, indent=1) + "\n")

    def read(self) -> pd.DataFrame:
        """All rows, by their keys."""
        if not self.path.exists():
            return pd.DataFrame(columns=KEY).set_index(KEY)
        return pd.read_csv(self.path, keep_default_na=False, na_values=["nan"]).set_index(KEY).sort_index()

    def put(self, row: Row, measured: dict[str, object]) -> None:
        """Add to what is known of a row."""
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read().to_dict("index")
            found.setdefault(astuple(row), {}).update(measured)
            frame = pd.DataFrame([dict(zip(KEY, key, strict=True)) | values for key, values in found.items()])
            unfinished = self.path.with_suffix(".new")
            frame.to_csv(unfinished, index=False, na_rep="nan", float_format="%.6g")
            unfinished.replace(self.path)

    def known(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the rows that were measured. Raises UserError where there is none beside the dense model."""
        index = self.read().index
        found = [row for row in rows if astuple(row) in index]
        if len(found) < 2:
            raise UserError(f"--show: none of these rows is in {self.path}; leave --show out to measure them")
        return found

    def missing(self, row: Row, wanted: Sequence[str]) -> list[str]:
        """The measures that are not known of a row."""
        found = self.read()
        if astuple(row) not in found.index:
            return list(wanted)
        known = found.loc[[astuple(row)]].iloc[0]
        return [name for name in wanted if pd.isna(known.get(name))]


# --- what is shown ----------------------------------------------------------------------------------


def texts_of(found: pd.DataFrame) -> list[str]:
    """The columns of perplexities."""
    return [name for name in found if name not in (*KEY, *FACTS, *choices.SETS)]


def summary(args: argparse.Namespace, rows: Sequence[Row], results: Results) -> str:
    """Markdown: what was measured on what, a table per measure, a table of sizes and costs."""
    found = results.read()
    dense = found.loc[[astuple(rows[0])]].iloc[0]
    found = found.loc[[astuple(row) for row in rows[1:]]].reset_index()
    found.insert(0, "name", [row.name for row in rows[1:]])
    measures = [name for name in (*texts_of(results.read()), *args.tasks) if name in found]
    found["accuracy"] = found[list(args.tasks)].mean(axis=1, skipna=False) if args.tasks else float("nan")
    asked = f" Accuracy on at most {args.limit} questions of each task." if args.tasks and args.limit else ""
    parts = [
        f"{Path(args.model).name}; calibration: {args.dataset}, {args.nsamples} samples of {args.seqlen} tokens, seeds "
        f"{', '.join(map(str, args.seeds))}: mean ± standard deviation, (n) where only n of them were measured. "
        f"Perplexity on windows of {args.eval_seqlen} tokens.{asked} "
        f"Dense: {', '.join(f'{name} {_number(dense[name], name)}' for name in measures)}."
    ]
    titles = {name: f"{name}, {'accuracy' if name in args.tasks else 'perplexity'}" for name in measures}
    if len(args.tasks) > 1:
        titles["accuracy"] = "accuracy, mean of the tasks"
    parts.extend(f"{title}:\n\n{_pivot(found, name, len(args.seeds))}" for name, title in titles.items())
    about = "memory: of the process, which also holds the dense model and what its layers compute"
    parts.append(f"sizes and costs ({about}):\n\n{_facts(found)}")
    return "\n\n".join(parts) + "\n"


def _number(value: float, name: str) -> str:
    if name in (*choices.SETS, "accuracy"):
        return f"{value:.1%}"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"


def _pivot(found: pd.DataFrame, name: str, seeds: int) -> str:
    """Methods down, ratios and compensations across; the best of a column in bold; fewer `seeds` than asked in ()."""
    across = sorted(set(zip(found["ratio"], found["compensation"])), key=lambda c: (c[0], compensate.KINDS.index(c[1])))
    groups = found.groupby(["name", "scope", "ratio", "compensation"], sort=False)[name]
    mean, spread, count = groups.mean(), groups.std(), groups.count()
    best = mean.groupby(level=["ratio", "compensation"]).agg("max" if name in (*choices.SETS, "accuracy") else "min")
    lines = [["method", "", *(f"{ratio:.0%} {kind}" for ratio, kind in across)]]
    for method, scope in dict.fromkeys(zip(found["name"], found["scope"])):
        cells = []
        for column in across:
            value = mean.get((method, scope, *column), float("nan"))
            text = "" if pd.isna(value) else _number(value, name)
            off = spread.get((method, scope, *column), float("nan"))
            text += "" if pd.isna(off) else f" ± {_number(off, name)}"
            text += f" ({count[method, scope, *column]})" if text and count[method, scope, *column] < seeds else ""
            cells.append(f"**{text}**" if text and value == best[column] else text)
        lines.append([method, scope, *cells])
    return _markdown(lines)


def _facts(found: pd.DataFrame) -> str:
    """A line for every method, ratio and compensation: means over the seeds."""
    head = ["method", "", "removed", "", "of the MLPs", "of the model", "widths", "s scoring", "s fitting", "peak MiB"]
    lines = [head]
    for (method, scope, ratio, kind), rows in found.groupby(["name", "scope", "ratio", "compensation"], sort=False):
        mean = rows[FACTS].mean()
        lines.append([
            method, scope, f"{ratio:.0%}", kind, f"{mean.mlp_sparsity:.1%}", f"{mean.model_sparsity:.1%}",
            f"{rows.narrowest.min():.0f} to {rows.widest.max():.0f}", f"{mean.score_seconds:.0f}",
            f"{mean.compensate_seconds:.0f}", f"{mean.peak_mib:.0f}",
        ])  # fmt: skip
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def plot(rows: Sequence[Row], results: Results, path: Path) -> None:
    """Perplexity of every method as dots, a panel per ratio, a colour per compensation; the dense model as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    found = results.read()
    text = texts_of(found)[0]
    dense = found.loc[[astuple(rows[0])]].iloc[0][text]
    found = found.loc[[astuple(row) for row in rows[1:]]].reset_index()
    found["label"] = [f"{row.name}, {row.scope}" for row in rows[1:]]
    ratios, kinds = sorted(set(found["ratio"])), sorted(set(found["compensation"]), key=compensate.KINDS.index)
    labels = list(found.groupby("label")[text].min().sort_values(ascending=False).index)
    figure = Figure(figsize=(4 + 4 * len(ratios), 1.5 + 0.3 * len(labels)), layout="constrained")
    for axes, ratio in zip(figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0], ratios):
        for number, kind in enumerate(kinds):
            some = found[(found["ratio"] == ratio) & (found["compensation"] == kind)].groupby("label")[text]
            places = [labels.index(label) + 0.15 * (number - (len(kinds) - 1) / 2) for label in some.mean().index]
            axes.errorbar(some.mean(), places, xerr=some.std().fillna(0), fmt="o", markersize=4, label=kind)
        axes.axvline(dense, color="grey", linestyle="--", label="dense")
        axes.set(xscale="log", xlabel=f"perplexity, {text}", title=f"{ratio:.0%} of the MLP neurons removed")
        axes.xaxis.set_major_formatter(LogFormatter())  # 30, not 3 x 10^1
        axes.xaxis.set_minor_formatter(LogFormatter())
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not known yet, then show everything that was asked for."""
    args = parse(argv)
    builder.quiet_libraries()
    rows, results = rows_of(args), Results(args.out / "quality.csv")
    results.agree(conditions(args), note=not args.show)
    if args.show:
        rows = results.known(rows)
    else:
        measure(args, rows, results)
    text = summary(args, rows, results)
    (args.out / "quality.md").write_text(text)
    plot(rows, results, args.out / "quality.png")
    print(text)


def measure(args: argparse.Namespace, rows: Sequence[Row], results: Results) -> None:
    """Add what is not known yet to the results."""
    bench = Bench(args)
    with tqdm(rows, unit="row", desc="quality") as bar:
        for row in bar:
            bar.set_postfix_str(f"{row.name} {row.scope} {row.ratio:.0%} {row.compensation} seed {row.seed}")
            missing = results.missing(row, bench.wanted(row))
            if missing:
                results.put(row, bench.measure(row, missing))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
