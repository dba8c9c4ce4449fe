"""Results on disk: a Hugging Face folder or `model.bin`, what was kept, and a report beside them."""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, ProcessorMixin

from lib import modeling_pruned, remote_code, safe_pickle
from lib.errors import OutOfMemory, UserError, is_out_of_memory
from lib.inert_pickle import RefusedPickleError
from lib.memory import GIB
from lib.mlp import Layer, describe_widths, has_widths, skeleton
from lib.prune import Selection, blocks_of
from lib.rebuild import fitting, harmless, rebuild

KEPT_NEURONS = "kept_neurons.safetensors"
KEPT_WEIGHTS = "kept_weights.safetensors"
REPORT = "pruning.json"
PAGE = "report.html"
MODEL_BIN = "model.bin"


def choose_formats(requested: str, across_layers: bool) -> list[str]:
    """The forms to save in, "hf" and "bin", for a value of `--save_format`."""
    if requested == "auto":
        requested = "both" if across_layers else "hf"
    return ["hf", "bin"] if requested == "both" else [requested]


def save(folder: Path, model: nn.Module, layers: Sequence[Layer], processor, formats: Sequence[str]) -> None:
    """Write the model, with its tokenizer or processor, in each of `formats` ("hf", "bin").

    Code that the checkpoint named is forgotten. Raises OSError when the disk does not take it.
    """
    remote_code.forget(model.config, getattr(model, "generation_config", None), processor)
    try:
        if "hf" in formats:
            save_folder(folder, model, layers)
            processor.save_pretrained(folder)
        if "bin" in formats:
            drop_recorders(model)
            sees = isinstance(processor, ProcessorMixin)
            beside = {"tokenizer": processor.tokenizer, "processor": processor} if sees else {"tokenizer": processor}
            with _data_alone(model):
                torch.save({"model": model} | beside, folder / MODEL_BIN)
    except (SafetensorError, RuntimeError) as error:  # how these libraries report a full disk
        raise OSError(str(error).splitlines()[0]) from error


def drop_recorders(model: nn.Module) -> None:
    """Remove the hooks that transformers leaves after recording hidden states; they do not pickle.

    It installs them again when they are needed.
    """
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        for key, hook in list(module._forward_hooks.items()):
            if hook.__module__ == "transformers.utils.output_capturing":
                del module._forward_hooks[key]


@contextmanager
def _data_alone(model: nn.Module) -> Iterator[None]:
    """Within this context no module keeps what would pickle as a call that no reader should allow.

    These are methods of classes in a dictionary (Gemma 4 has them; every module makes its own when it is built), and
    the patterns by which transformers renamed the weights of the checkpoint that was read.
    """
    conversions = vars(model).pop("_weight_conversions", None)
    taken = []
    for module in model.modules():
        for name, held in vars(module).items():
            if type(held) is dict and not name.startswith("_"):
                methods = {key: f for key, f in held.items() if "." in getattr(f, "__qualname__", "")}
                taken.append((held, dict(held), methods))
                for key in methods:
                    del held[key]
    try:
        yield
    finally:
        for held, before, methods in taken:
            if methods:
                held.clear()
                held.update(before)
        if conversions is not None:
            model._weight_conversions = conversions


def save_folder(folder: Path, model: nn.Module, layers: Sequence[Layer]) -> None:
    """Write a Hugging Face folder that plain `from_pretrained` loads where one width in the configuration says all.

    Where layers differ in width, or the family fixes it in its code, `lib/modeling_pruned.py` goes with it and
    loading takes `trust_remote_code=True`.
    """
    if follows_configuration(model):
        model.save_pretrained(folder)
        return
    # In the model's own names for its weights: transformers renames those of its own classes only.
    model.save_pretrained(folder, save_original_format=False)
    config = copy.deepcopy(model.config)
    describe_widths(config, layers, [block.width for block in blocks_of(layers)])
    name = "Pruned" + type(model).__name__.removeprefix("Pruned")
    config.architectures = [name]
    config.auto_map = {auto_class(config).__name__: f"{Path(modeling_pruned.__file__).stem}.{name}"}
    config.save_pretrained(folder)
    shutil.copy(modeling_pruned.__file__, folder)


def verify(folder: Path, model: nn.Module, inputs: dict[str, torch.Tensor], formats: Sequence[str]) -> None:
    """Load what was saved as its users will; compare its weights, bit by bit, and its logits on model inputs.

    Moves `model` to the CPU. Raises UserError when a form does not load or is not the same model; an error that says
    that memory ran out says nothing about the form, and passes.
    """
    model.to("cpu")
    wanted, dtype = _finite_logits(model, inputs)
    for form in formats:
        try:
            found = load_folder(folder) if form == "hf" else load_bin(folder)[0]
            reason = _different_weights(found, model)
            reason = reason or _different_logits(logits_in(found, inputs, dtype), wanted, dtype)
        except Exception as error:
            if is_out_of_memory(error):  # says nothing of the result
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if reason:
            raise UserError(
                f"--save_model: the saved {form} form, loaded back, is not the pruned model ({reason}); "
                "nothing was kept. Another --save_format may work; please report the model family"
            )


def _finite_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.dtype]:
    """The model's logits and the dtype they are computed in: its own, or float32 where that overflows, as float16 may.

    Raises UserError for a model that computes no numbers in float32 either.
    """
    for dtype in dict.fromkeys((model.dtype, torch.float32)):
        logits = logits_in(model, inputs, dtype)
        if logits.isfinite().all():
            return logits, dtype
    if logits.isnan().any():  # a model may forbid tokens by logits of minus infinity
        raise UserError(
            "--save_model: the pruned model's logits are NaN on a calibration sample, in float32 too; nothing was "
            "kept. Lower --pruning_ratio, or add --no_verify to keep it as it is"
        )
    return logits, dtype


@torch.no_grad()
def logits_in(model: nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Logits `[batch, tokens, vocabulary]` as float32, computed in `dtype`; then the model has its own dtypes again.

    The weights are unchanged if `dtype` holds all values of their own.
    """
    own = {tensor: tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    if dtype == model.dtype:
        return model(**inputs, use_cache=False).logits.float()
    try:
        model.to(dtype)
        return model(**inputs, use_cache=False).logits.float()
    finally:
        for tensor, dtype in own.items():
            tensor.data = tensor.data.to(dtype)


def _different_weights(found: nn.Module, model: nn.Module) -> str:
    """The first weight that is not the same in both models; empty when all are."""
    weights = found.state_dict()
    for name, weight in model.state_dict().items():
        if name not in weights or not torch.equal(weights[name], weight):
            return f"{name} differs"
    return ""


def _different_logits(logits: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> str:
    """Says so when logits `[batch, tokens, vocabulary]` differ by more than rounding in `dtype`; else empty."""
    # The layout of a weight in memory decides how its products are rounded, so equal weights give logits
    # that are equal only up to the precision of their dtype.
    allowed = 8 * torch.finfo(dtype).eps * math.sqrt(wanted.numel())
    finite = wanted.isfinite()
    difference = torch.where(logits == wanted, 0, logits - wanted)  # infinity equals infinity
    return "" if difference.norm() <= allowed * wanted[finite].abs().max() else "its logits differ"


def load_folder(folder: str | Path, dtype: torch.dtype | str = "auto", trust: bool = False) -> nn.Module:
    """A model from a Hugging Face folder of ours, on the CPU, the way that users load it.

    The folder's copy of `modeling_pruned.py` is run, other code only with `trust`: raises UserError when it names any.
    """
    trust = trust or remote_code.names_own_code(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    model = auto_class(config).from_pretrained(folder, dtype=dtype, trust_remote_code=trust)
    return model.eval().requires_grad_(False)


def check_folder(folder: str | Path, trust: bool = False) -> bool:
    """Whether the MLP widths of a Hugging Face folder differ by layer, as `lib/modeling_pruned.py` builds them.

    Reads no weights. Raises UserError for a folder without configuration or weights and for weights cut short; unless
    `trust`, also for a result of ours that names foreign code, and for a family that exists only as code.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        differ = has_widths(config)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: holds no config.json, so it is not a saved model; copy the whole folder") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder}: its config.json is damaged; copy the folder again") from error
    if not trust and (differ or (folder / REPORT).is_file()):
        remote_code.names_own_code(folder)
    if not trust and config.get("auto_map"):
        remote_code.refuse_unknown_family(str(folder), config, "read that code and then set TRUST=1")
    weights = sorted(folder.glob("*.safetensors"))
    if not any(file.name.startswith("model") for file in weights) and not list(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: holds no weights (model.safetensors); copy the whole folder")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: is cut short or damaged; copy it again ({error})") from error
    return differ


def auto_class(config) -> type:
    """The class of transformers that loads a model of this configuration."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def follows_configuration(model: nn.Module) -> bool:
    """Whether the family's own class, built from the model's configuration, has exactly the model's shapes."""
    rebuilt = skeleton(type(model), model.config)
    return {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in rebuilt.named_parameters()}


def save_selection(folder: Path, layers: Sequence[Layer], selection: Selection) -> None:
    """Write what was kept, under the name of each MLP.

    Neurons: sorted indices, int32. Weights: one packed bit each (`numpy.packbits`), projections in the order
    and the shapes `[d_ff, d]` of the metadata's `projections`.
    """
    blocks = blocks_of(layers)
    if selection.structured:
        kept = {b.name: indices.int() for b, indices in zip(blocks, selection.kept, strict=True)}
        save_file(kept, folder / KEPT_NEURONS)
        return
    shapes = {b.name: {p.name: list(p.weight.shape) for p in b.projections} for b in blocks}
    # One key: safetensors writes several in an order that changes from run to run.
    metadata = {"projections": json.dumps(shapes)}
    save_file({b.name: bits for b, bits in zip(blocks, selection.kept, strict=True)}, folder / KEPT_WEIGHTS, metadata)


def save_report(folder: Path, report: dict) -> None:
    """Write `pruning.json`, each list on one line."""
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def save_page(folder: Path, page: str) -> None:
    """Write `report.html`."""
    (folder / PAGE).write_text(page, encoding="utf-8")


def _finite(value):
    """The same with infinity and NaN as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def bytes_on_disk(folder: str, formats: Sequence[str]) -> dict[str, int]:
    """Size of the weights in each form."""
    path = Path(folder)
    weights = {"hf": path.glob("model*.safetensors"), "bin": path.glob(MODEL_BIN)}
    return {form: sum(file.stat().st_size for file in weights[form]) for form in formats}


# --- reading model.bin ------------------------------------------------------------------------------


def load_bin(path: str | Path, dtype: torch.dtype | str = "auto", trust: bool = False) -> tuple[nn.Module, object]:
    """The model (on the CPU, ready for inference) and the tokenizer, or processor, of a `model.bin`.

    `path` may be the folder that holds one.

    The pickle is never executed (see `lib.safe_pickle`): configuration and weights are taken from it and the model is
    built anew, each weight in `dtype` ("auto": as saved). So nothing hostile runs, and nothing is lost that
    transformers adds only when it builds a model. `trust` unpickles anything, as `torch.load` does.

    Raises UserError for a missing or damaged file, for names that a saved model does not need, for a pickle that
    holds something else than a model and a tokenizer, and where memory does not suffice.
    """
    path = Path(path) / MODEL_BIN if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a {MODEL_BIN} or the folder that holds one")
    try:
        return _trusted(path, dtype) if trust else _untrusted(path, dtype)
    except UserError:
        raise
    except RefusedPickleError as error:
        raise UserError(f"{path}: {error}; copy it again or save the model anew") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"{path}: does not fit into memory ({path.stat().st_size / GIB:.2f} GiB of weights); "
                "free some, or use a machine with more"
            ) from error
        raise UserError(
            f"{path}: is damaged, or was not saved by this tool ({type(error).__name__}); copy it again or "
            "save the model anew"
        ) from error


def _untrusted(path: Path, dtype: torch.dtype | str) -> tuple[nn.Module, object]:
    saved = safe_pickle.read(path)
    config = harmless(saved.model_class, saved.config)
    model_class, config = fitting(saved.model_class, config, saved.state)
    return rebuild(model_class, config, saved.weights(dtype), saved.generation_config, dtype), saved.processor


def _trusted(path: Path, dtype: torch.dtype | str) -> tuple[nn.Module, object]:
    found = torch.load(path, map_location="cpu", weights_only=False)
    model, state = found["model"], found["model"].state_dict()
    model_class, config = fitting(type(model), model.config, state)
    processor = found["processor"] if "processor" in found else found["tokenizer"]
    return rebuild(model_class, config, state, model.generation_config, dtype), processor
