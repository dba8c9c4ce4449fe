"""What test.sh and lmms-eval.sh ask of a harness: the arguments that load a result, dense beside pruned as a table.

python -m lib.tasks arguments pruned_model/llama --dtype bfloat16
python -m lib.tasks arguments pruned_model/llava --harness lib.lmms
python -m lib.tasks table logs/dense logs/pruned
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.checkpoint import MODEL_BIN, check_folder
from lib.errors import UserError
from lib.gguf_file import is_gguf

# Of a task's measures, the first of these that it has, else its first one that is a number.
MEASURES = ("acc_norm", "acc", "exact_match", "word_perplexity")


@dataclass(frozen=True)
class Harness:
    """How a program calls the models that load a folder, one whose widths differ by layer, and a `model.bin`.

    `argument` is the last one's, which takes the file.
    """

    program: str
    folder: str
    widths: str
    bin: str
    argument: str


HARNESSES = {
    "lib.lm_harness": Harness("lm-eval", "hf", "pruned_folder", "custom_checkpoint", "checkpoint"),
    "lib.lmms": Harness("lmms-eval", "llava", "llava", "llava", "pruned"),
}


def arguments(
    model: str, form: str | None = None, dtype: str = "auto", trust: bool = False, harness: str = "lib.lm_harness"
) -> list[str]:
    """The arguments of `harness` that load `model`.

    `model` is a Hugging Face folder, a `model.bin`, a folder that holds one of them or both (`form` "hf" or "bin"
    decides, else the Hugging Face folder), a `.gguf` file, or a Hub name. `trust` runs code that lies in a folder
    and unpickles anything. Raises UserError for what cannot be loaded, as far as that shows without loading it.
    """
    path = Path(model).expanduser()
    names = HARNESSES[harness]
    kind = names.folder
    if path.name.endswith(".bin") or form == "bin" or (form is None and _only_bin(path)):
        file = path / MODEL_BIN if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file}: no such file; give a {MODEL_BIN} or the folder that holds one")
        values, kind = {names.argument: file.resolve(), "trust_checkpoint": trust or None}, names.bin
    elif is_gguf(path) and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if harness == "lib.lmms":
            raise UserError(f"{path}: a .gguf file holds no vision tower; give a folder or a {MODEL_BIN}")
        # The harness's own loading would drop rope scaling and take a tokenizer that lies beside the file.
        values, kind = {names.argument: path.resolve()}, names.bin
    elif path.is_dir():
        # Where widths differ, the code here takes the place of its copy in the folder.
        if check_folder(path, trust) and not trust:
            kind = names.widths
        values = {"pretrained": path.resolve(), "trust_remote_code": trust or None}
    elif path.is_absolute() or model.startswith("."):
        raise UserError(f"{model}: no such folder; give what main.py saved")
    else:
        values = {"pretrained": model, "trust_remote_code": trust or None}
    values = {name: value for name, value in (values | {"dtype": dtype}).items() if value is not None}
    if any("," in str(value) or "=" in str(value) for value in values.values()):
        raise UserError(f"{model}: {names.program} cannot take a name with ',' or '=' in it; rename or link the folder")
    return ["--model", kind, "--model_args", ",".join(f"{name}={value}" for name, value in values.items())]


def _only_bin(path: Path) -> bool:
    return (path / MODEL_BIN).is_file() and not (path / "config.json").is_file()


def results(folder: str | Path) -> dict:
    """The newest results file that a harness wrote below `folder`. Raises UserError when there is none."""
    names = ("results_*.json", "*_results.json")  # lm-eval's, lmms-eval's
    found = [path for name in names for path in Path(folder).rglob(name)]
    if not found:
        raise UserError(f"{folder}: no results there; evaluate again")
    found.sort(key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text(encoding="utf-8"))


def table(dense: dict, pruned: dict) -> str:
    """Markdown: every task that is no part of another one, the dense model beside the pruned one.

    The error is the harness's standard error of the pruned model's figure. Perplexities, and what is on another scale
    than 0 to 1, are left out of the mean.
    """
    parts = {part for parts in dense.get("group_subtasks", {}).values() for part in parts}
    rows, averaged = [], []
    for task, before in dense["results"].items():
        after = pruned["results"].get(task)
        measure = _measure(before)
        if task in parts or measure is None or after is None:
            continue
        values = before[f"{measure},none"], after[f"{measure},none"]
        error = after.get(f"{measure}_stderr,none")
        rows.append(_row(task, measure, *values, error if isinstance(error, float) else None, _questions(dense, task)))
        if not measure.endswith("perplexity") and max(values) <= 1:
            averaged.append(values)
    if len(averaged) > 1:
        mean = [sum(column) / len(averaged) for column in zip(*averaged, strict=True)]
        rows.append(_row("mean", "", *mean, None, ""))
    header = "| task | measure | questions | dense | pruned | change | +- |\n|---|---|---:|---:|---:|---:|---:|"
    return "\n".join([header, *rows])


def _measure(figures: dict) -> str | None:
    """Which of a task's figures to show; their keys are like "acc,none" and "acc_stderr,none"."""
    numbers = [key.removesuffix(",none") for key, value in figures.items() if isinstance(value, int | float)]
    found = [name for name in numbers if f"{name},none" in figures and "_stderr" not in name]
    return next((name for name in (*MEASURES, *found) if name in found), None)


def _questions(found: dict, task: str) -> int:
    """How many questions a task, with all its parts, asked."""
    parts = found.get("group_subtasks", {}).get(task, [])
    return sum(_questions(found, part) for part in parts) or found["n-samples"].get(task, {}).get("effective", 0)


def _row(task, measure, before, after, error, count) -> str:
    spread = "" if error is None else f"{error:.4f}"
    return f"| {task} | {measure} | {count} | {before:.4f} | {after:.4f} | {after - before:+.4f} | {spread} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m lib.tasks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    loading = commands.add_parser("arguments", help="print the arguments that load a model, one a line")
    loading.add_argument("model", help="a folder that main.py saved, a model.bin, a .gguf file or a Hub name")
    loading.add_argument("--harness", choices=HARNESSES, default="lib.lm_harness", help="the module that is run")
    loading.add_argument("--form", choices=["hf", "bin"], help="which form, where a folder holds both")
    loading.add_argument("--dtype", default="auto", help="of the weights [default: as saved]")
    loading.add_argument("--trust", action="store_true", help="run the code that lies in the folder, unpickle anything")
    comparing = commands.add_parser("table", help="print dense beside pruned")
    comparing.add_argument("dense", help="folder with the dense model's results")
    comparing.add_argument("pruned", help="folder with the pruned model's results")
    args = parser.parse_args(argv)
    try:
        if args.command == "arguments":
            print("\n".join(arguments(args.model, args.form, args.dtype, args.trust, args.harness)))
        else:
            print(table(results(args.dense), results(args.pruned)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
