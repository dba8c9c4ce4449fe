"""What a run did: for a person on the terminal, and for a program in `pruning.json`."""

import copy
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version

from lib import memory, parallel, terminal
from lib.builder import Loaded
from lib.compensate import Fit
from lib.data import token_ids
from lib.evaluate import Size, Speed
from lib.memory import GIB
from lib.mlp import LANGUAGE
from lib.prune import METHODS, Selection
from lib.tape import Sample
from lib.target import Target

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors")


@dataclass
class Run:
    """The facts of one run, filled in as it goes."""

    args: dict
    before: Size | None = None
    after: Size | None = None
    kept_mlp: int = 0  # MLP weights that are neither gone nor zero
    unused: list[str] = field(default_factory=list)  # MLPs that do not influence the model's output
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    measured_on: str = ""
    data: dict = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    speed: dict[str, Speed] = field(default_factory=dict)
    score_file: dict = field(default_factory=dict)  # path and whether its scores were there already
    fits: dict[str, list] = field(default_factory=dict)  # what compensation came to, per MLP
    pictures: list = field(default_factory=list)  # what `report.html` draws, per tower (`lib.report.Picture`)
    notes: dict[str, str] = field(default_factory=dict)  # weights of the checkpoint that were left out or rounded
    verified: bool = False
    bytes_on_disk: dict[str, int] = field(default_factory=dict)

    def dense(self, size: Size, loaded: Loaded) -> None:
        """Note the model as it was loaded."""
        self.before = size
        self.dtypes = {"checkpoint": _name(loaded.own_dtype), "scoring": _name(loaded.model.dtype)}
        self.data["seqlen"] = loaded.seqlen
        self.notes = loaded.notes

    def calibrated(self, samples: Sequence[Sample], fingerprint: str, skipped: int) -> None:
        """Note what the model is scored on, and how many rows could not be used."""
        self.data |= {
            "set": self.args["dataset"],
            "samples": len(samples),
            "tokens": sum(len(token_ids(sample)) for sample in samples),
            "sha256": fingerprint,
        }
        if skipped:
            self.data["skipped"] = skipped

    def scores(self, path: str | None, were_there: bool) -> None:
        """Note the file of scores, if one was asked for."""
        if path:
            self.score_file = {"path": path, "reused": were_there}

    def of_ratio(self, ratio: float, target: Target | None) -> "Run":
        """A run of its own for one of several ratios, with all that is known so far."""
        run = copy.deepcopy(self)
        run.args |= {"pruning_ratio": ratio, "save_model": target and target.shown}
        return run

    def compensated(self, fits: Sequence[Fit]) -> None:
        """Note what compensation came to."""
        columns = {"kind": "kind", "damping": "damping", "error_before": "error_before", "error_after": "error"}
        self.fits = {name: [getattr(fit, attribute) for fit in fits] for name, attribute in columns.items()}

    def pruned(self, size: Size, selection: Selection) -> None:
        """Note the model as it is now."""
        self.after = size
        self.kept_mlp = size.mlp if selection.structured else selection.n_kept()
        self.unused = list(selection.unused)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase `name`. Raises OutOfMemory that names it when memory runs out."""
        start = time.perf_counter()
        with memory.named(name, self.kept(name)):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def kept(self, phase: str) -> str:
        """What of the work survives when the phase fails, for the end of a message."""
        path, method = self.args["scores"], METHODS[self.args["prune_method"]]
        if not path or not self.score_file or (phase == "score" and not method.by_gradients):
            return ""
        return f"; what was scored is kept in {path}, and the same command goes on from there"

    def report(self) -> dict:
        """Everything, in plain types, for `pruning.json`."""
        return {
            "command": shlex.join(["python", *sys.argv]),
            "arguments": self.args,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "data": self.data,
            "dtypes": self.dtypes,
            "processes": parallel.world(),
            "widths": {"dense": self.before.widths, "kept": self.after.widths},
            "towers": self.before.towers,
            "unused": self.unused,
            "parameters": {"dense": self.before.total, "kept": self.after.total},
            "macs_per_token": {"dense": self.before.macs, "kept": self.after.macs},
            "sparsity": {"mlp": self.mlp_sparsity, "model": self.model_sparsity},
            "perplexity": {**self.perplexity, "measured_on": self.measured_on} if self.perplexity else None,
            "tokens_per_second": {name: vars(speed) for name, speed in self.speed.items()} or None,
            "scores": self.score_file or None,
            "compensation": self.fits or None,
            "notes": self.notes or None,
            "verified": self.verified,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory_bytes": self.peak_bytes,
        }

    @property
    def mlp_sparsity(self) -> float:
        """Share of the MLP weights that is gone or zero."""
        return 1 - self.kept_mlp / self.before.mlp

    @property
    def model_sparsity(self) -> float:
        """Share of the whole model's parameters that is gone or zero (biases of removed neurons included)."""
        return max(self.before.mlp - self.kept_mlp, self.before.total - self.after.total) / self.before.total

    def text(self) -> str:
        """The summary a person reads in ten seconds."""
        before, after = self.before, self.after
        rows = [
            *self._widths(),
            (
                "parameters",
                f"{_count(before.total)} -> {_count(after.total)}, "
                f"multiply-accumulates per token {_count(before.macs)} -> {_count(after.macs)}",
            ),
            ("sparsity", f"{self.mlp_sparsity:.2%} of the MLP weights, {self.model_sparsity:.2%} of the whole model"),
        ]
        if self.perplexity:
            dense, pruned = self.perplexity["dense"], self.perplexity["pruned"]
            rows.append(("perplexity", f"{dense:.2f} -> {pruned:.2f}  ({self.measured_on})"))
        if self.fits:
            rows.append(("compensated", self._compensation()))
        if self.speed:
            dense, pruned = self.speed["dense"], self.speed["pruned"]
            rows.append(
                (
                    "tokens/s",
                    f"reading {dense.prefill:.0f} -> {pruned.prefill:.0f}, "
                    f"writing {dense.decode:.1f} -> {pruned.decode:.1f}",
                )
            )
        if self.score_file:
            was = "read, not computed again" if self.score_file["reused"] else "kept for the next run"
            rows.append(("scores", f"{self.score_file['path']}  ({was})"))
        rows.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())))
        if self.peak_bytes:
            rows.append(("peak memory", ", ".join(f"{name} {_size(value)}" for name, value in self.peak_bytes.items())))
        rows.extend(self._where())
        width = max(len(name) for name, _ in rows)
        title = f"{self.args['prune_method']}  {self.args['model']}  ratio {self.args['pruning_ratio']}"
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        return "\n".join(["", *map(terminal.printable, lines)])

    def _compensation(self) -> str:
        kinds = ", ".join(f"{kind} in {count}" for kind, count in Counter(self.fits["kind"]).most_common())
        before, after = (sum(self.fits[f"error_{when}"]) / len(self.fits["kind"]) for when in ("before", "after"))
        return f"{kinds} layers; error of the MLPs on held-out samples {before:.2%} -> {after:.2%}"

    def _widths(self) -> Iterator[tuple[str, str]]:
        """One row per tower."""
        towers = list(dict.fromkeys(self.before.towers))
        for tower in towers:
            dense, kept = (
                [width for width, of in zip(size.widths, size.towers, strict=True) if of == tower]
                for size in (self.before, self.after)
            )
            name = f"{tower} MLP" if len(towers) > 1 or tower != LANGUAGE else "MLP width"
            yield name, f"{_range(dense)} -> {_range(kept)}  ({len(dense)} layers)"
        if self.unused:
            yield "scored 0", f"{', '.join(self.unused)}: the model makes no use of what comes out of there"
        yield from self.notes.items()
        if "skipped" in self.data:
            why = "whose image is missing or damaged or whose caption is not trained on"
            yield "skipped", f"{self.data['skipped']} rows, {why}"

    def _where(self) -> list[tuple[str, str]]:
        folder = self.args["save_model"]
        if not folder:
            return [("saved", "nothing; add --save_model DIR to keep the pruned model")]
        forms = {"hf": "Hugging Face folder", "bin": "model.bin"}
        sizes = [f"{forms[form]} {_size(size)}" for form, size in self.bytes_on_disk.items()]
        checked = "loaded back, same logits" if self.verified else "not verified"
        script = "lmms-eval.sh" if METHODS[self.args["prune_method"]].sees else "test.sh"
        page = [("report", f"{folder}/report.html")] if self.args["report"] else []
        return [
            ("saved", f"{folder}  ({', '.join(sizes)}; {checked})"),
            *page,
            ("evaluate", f"PRUNED={shlex.quote(str(folder))} bash {script}"),
        ]


def _range(widths) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(count: int) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)
