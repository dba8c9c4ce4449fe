"""Results on disk: a Hugging Face folder or `model.bin`, what was kept, and a report beside them."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lib.errors import UserError
from lib.mlp import Layer, width_field
from lib.prune import Selection, blocks_of

KEPT_NEURONS = "kept_neurons.safetensors"
KEPT_WEIGHTS = "kept_weights.safetensors"
REPORT = "pruning.json"


def choose_formats(requested: str, widths_differ: bool) -> list[str]:
    """The forms to save in, "hf" and "bin". Raises UserError for a form that cannot hold the result."""
    if requested == "auto":
        return ["bin"] if widths_differ else ["hf"]
    formats = ["hf", "bin"] if requested == "both" else [requested]
    if widths_differ and "hf" in formats:
        raise UserError(f"--save_format {requested}: a Hugging Face folder cannot hold widths that differ by layer "
                        "(--global_pruning) yet; use --save_format bin")
    return formats


def refuse_fixed_width(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise UserError when the family's configuration cannot say how wide a pruned MLP is."""
    if width_field(model, layers) is None:
        raise UserError(f"--save_format: the family '{model.config.model_type}' fixes its MLP width in its code, so a "
                        "Hugging Face folder cannot hold the pruned model; use --save_format bin")


def check_target(target: str, overwrite: bool) -> None:
    """Raise UserError unless a result can be written to the folder `target` later on. Leaves nothing behind."""
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise UserError(f"--save_model {target}: is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--save_model {target}: the folder is not empty; name another, or add --overwrite")
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=ancestor))
    except OSError as error:
        raise UserError(f"--save_model {target}: cannot write to {ancestor} ({error.strerror})") from error


@contextmanager
def complete_or_absent(target: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error."""
    path = Path(target).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        _share(partial)
        replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        if path.exists():
            os.rename(path, replaced / "old")
        os.rename(partial, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--save_model {target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give the files the permissions that the user's umask asks for; safetensors and mkdtemp make them private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def save(folder: Path, model: nn.Module, tokenizer, formats: Sequence[str]) -> None:
    """Write the model in each of `formats` ("hf", "bin")."""
    if "hf" in formats:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if "bin" in formats:
        torch.save({"model": model, "tokenizer": tokenizer}, folder / "model.bin")


def save_selection(folder: Path, layers: Sequence[Layer], selection: Selection) -> None:
    """Write what was kept, under the name of each MLP.

    Neurons: sorted indices, int32. Weights: one packed bit each (`numpy.packbits`), projections in the order
    of the metadata, each `[d_ff, d]`.
    """
    blocks = blocks_of(layers)
    if selection.structured:
        save_file({b.name: kept.int() for b, kept in zip(blocks, selection.kept)}, folder / KEPT_NEURONS)
        return
    shapes = {b.name: json.dumps({p.name: list(p.weight.shape) for p in b.projections}) for b in blocks}
    save_file({b.name: kept for b, kept in zip(blocks, selection.kept)}, folder / KEPT_WEIGHTS, metadata=shapes)


def save_report(folder: Path, report: dict) -> None:
    """Write `pruning.json`, each list on one line."""
    text = json.dumps(report, indent=2)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
