"""What a checkpoint says of itself before its weights are read: quantised, an adapter, for another task, incomplete.

Looked at are its configuration, the names of its files, and the names, dtypes and shapes of its tensors: for a local
folder from the headers of its files, for a Hub name from the cache or, over the network, from the first bytes of each.
"""

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from lib.errors import UserError

WEIGHT_FILES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OTHER_FORMS = (  # files of weights that transformers does not read, and what to do with each
    (r"adapter_model\.(safetensors|bin)", "it is an adapter; merge it into its model first (peft: merge_and_unload())"),
    (r".+\.gguf", "give the file itself: --model {folder}/{file}"),
    (r"consolidated.*\.(pth|safetensors)", "name the form of the model for transformers, or convert it to that"),
    (r"tf_model\.h5|flax_model\.msgpack|model\.ckpt.*", "save it with torch (from_tf or from_flax in transformers 4)"),
    (r".+\.onnx", "name the torch checkpoint it was exported from"),
    (r"qmodel\.pt", "it is quantised (HQQ); name the unquantised checkpoint"),
    (r"model\.bin", "it is a result of this tool in the form for test.sh; prune the model it was made from"),
    (r"(model|pytorch_model)\..+\.(safetensors|bin)(\.index\.json)?", "rename the variant to model.safetensors"),
    (r".+\.(safetensors|bin|pt|pth|ckpt)", "name the form of the model for transformers, or convert it to that"),
)

QUANTISED_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
QUANTISED_FIELDS = ("quantization_config", "compression_config", "quantization")
QUANTISED_DTYPES = re.compile(r"(F8|F6|F4)(_\w+)?|[IU](4|8|16|32)")  # of safetensors; no plain model has weights in it
QUANTISED_NAMES = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|weight_(packed|shape|zero_point|scale(_2|_inv)?)"
    r"|(input|activation|output|[kv])_scale|scale_inv|absmax|nested_absmax|(nested_)?quant_map|quant_state\.\w+"
    r"|SCB|weight_format|W_q|codebooks"
    r"|(gate_up|down)_proj_(blocks|scales))$"
)
LIBRARIES = {
    "bitsandbytes": "AutoModelForCausalLM.from_pretrained(...).dequantize().save_pretrained(...)",
    "compressed-tensors": "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))",
    "mxfp4": "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True))",
}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Buffers that older versions saved, which are computed anew.
COMPUTED = re.compile(
    r"(inv_freq|(cos|sin)_cached|position_ids|position_embeddings\._float_tensor|_float_tensor|rope\.freqs"
    r"|(attn|attention)\.(bias|masked_bias|causal_mask)|masked_bias|causal_mask|decoder\.version"
    r"|embed_positions\.weights|_extra_state|num_batches_tracked)$"
)
ADAPTER = re.compile(r"lora_|(^|\.)base_layer\.|modules_to_save|^base_model\.model\.|ia3_l|prompt_embeddings|hada_w")
PREDICTS_MORE = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.|eh_proj|shared_head")
# What weights without a place in the model are, and what to do.
LEFT_OVER = (
    (ADAPTER, "an adapter that was not merged; merge it first (peft: model.merge_and_unload(), then save_pretrained)"),
    (
        re.compile(r"(^|\.)(score|classifier|classification_head|v_head|value_head|reward_head|rm_head|qa_outputs|"
                   r"regression_head|logits_proj|summary|pooler|dense_out|linear_head|embedding_head)\."),
        "the head of another task than language modelling (classifier, reward or value model); use the causal model it "
        "was made from",
    ),
    (
        re.compile(r"vision|visual|image|audio|speech|mm_projector|multi_modal|multimodal|patch_embed"),
        "the tower or projector of a model for images or sound, of which only the language model would stay; use a "
        "language model",
    ),
    (re.compile(r"(^|\.)encoder\."), "an encoder, of which nothing would stay; use a causal language model"),
)  # fmt: skip
CAUSAL = re.compile(r"CausalLM|LMHead|LanguageModeling|ConditionalGeneration|WithLM|GenerationDecoder")
TASK = re.compile(r"For[A-Z]\w+|Reward\w*|Classifi\w*|ValueHead|Eagle\w*|Medusa\w*")


# --- files ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint: a local folder, or (with `cache_dir`) a Hub name. A network that fails is no error."""

    name: str
    cache_dir: str | None = None

    @cached_property
    def folder(self) -> Path | None:
        """The local folder, or what the Hub's cache holds of the checkpoint; None where that is nothing."""
        path = Path(self.name).expanduser()
        if self.cache_dir is None or path.is_dir():
            return path
        found = try_to_load_from_cache(self.name, "config.json", cache_dir=self.cache_dir)
        return Path(found).parent if isinstance(found, str) else None

    @cached_property
    def names(self) -> set[str]:
        """The files at the top level; on the Hub what it lists, else what its cache holds."""
        if self.cache_dir is not None and not Path(self.name).expanduser().is_dir():
            try:
                return {file for file in HfApi().list_repo_files(self.name) if "/" not in file}
            except Exception:  # offline, gated, unknown: whoever loads the model says so
                pass
        try:
            return {file.name for file in self.folder.iterdir() if file.is_file()} if self.folder else set()
        except OSError:
            return set()

    def json(self, filename: str) -> dict:
        """The JSON object in a file; empty where there is none that can be read."""
        try:
            found = json.loads(self.path(filename).read_text(encoding="utf-8"))
        except Exception:
            return {}
        return found if isinstance(found, dict) else {}

    def path(self, filename: str) -> Path:
        """Where a file is, fetched from the Hub when it has to be. Raises what the Hub's client raises."""
        if self.folder and (self.folder / filename).is_file():
            return self.folder / filename
        if self.cache_dir is None or filename not in self.names:
            raise FileNotFoundError(filename)
        return Path(hf_hub_download(self.name, filename, cache_dir=self.cache_dir))

    @cached_property
    def weights(self) -> str | None:
        """The file that transformers starts from."""
        return next((file for file in WEIGHT_FILES if file in self.names), None)

    @cached_property
    def shards(self) -> list[str]:
        """The files that hold the weights."""
        if self.weights is None or not self.weights.endswith(".index.json"):
            return [self.weights] if self.weights else []
        shards = self.json(self.weights).get("weight_map")
        return sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []

    @cached_property
    def tensors(self) -> dict[str, tuple[str | None, tuple[int, ...] | None]]:
        """Dtype (as safetensors call it) and shape of each tensor, None where only the name is known; no values read.

        Empty where nothing can be known before the weights are there.
        """
        found = {}
        for shard in self.shards:
            path = self.folder / shard if self.folder else None
            if path is None or not path.is_file():
                return self._remote_tensors()
            try:
                found |= _header(path) if path.suffix == ".safetensors" else _pickled_header(path)
            except UserError:
                raise
            except Exception:  # damaged: loading says so
                return {}
        return found

    def _remote_tensors(self) -> dict:
        if self.cache_dir is None:
            return {}
        try:
            files = HfApi().get_safetensors_metadata(self.name).files_metadata.values()
            return {name: (i.dtype, tuple(i.shape)) for file in files for name, i in file.tensors.items()}
        except Exception:
            named = self.json(self.weights).get("weight_map") if self.weights and "index" in self.weights else None
            return dict.fromkeys(named, (None, None)) if isinstance(named, dict) else {}

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of all weights; None where they differ or are not known."""
        dtypes = {dtype for name, (dtype, _) in self.tensors.items() if not COMPUTED.search(name)}
        return FLOATS.get(dtypes.pop()) if len(dtypes) == 1 else None


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor in a `.safetensors` file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        fields = json.loads(file.read(size)) if size <= 100_000_000 else {}
    return {name: (i["dtype"], tuple(i["shape"])) for name, i in fields.items() if name != "__metadata__"}


def _pickled_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of a `.bin` file; nothing of one older than torch 1.6, which would have to be read whole."""
    if not zipfile.is_zipfile(path):
        return {}
    names = {dtype: name for name, dtype in FLOATS.items()}
    names |= {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
    names |= {getattr(torch, name): "F8" for name in dir(torch) if name.startswith("float8_")}
    state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    return {name: (names.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in state.items()}


# --- on sight ---------------------------------------------------------------------------------------


def refuse_without_config(files: Files) -> None:
    """Raise UserError that says what a folder without config.json holds, where that can be told."""
    what = f"--model {files.name}"
    _refuse_adapter(files, what)
    _refuse_other_forms(files, what)


def refuse_on_sight(files: Files, sees: bool = False) -> None:
    """Raise UserError for a checkpoint that is quantised, an adapter, or has its weights in a form that is not read.

    Of quantised ones those in fine-grained float8 are let through (see `make_ours`), unless the model `sees`.
    """
    what, fields = f"--model {files.name}", files.json("config.json")
    if not sees:
        _refuse_adapter(files, what)
    for filename, kind in QUANTISED_FILES.items():
        if filename in files.names:
            raise UserError(_quantised(what, f"{kind}, says its {filename}"))
    _refuse_unknown_dtype(fields, what)
    settings = list(_quantisation(fields))
    if settings and (sees or not is_fine_grained_fp8(fields)):
        _refuse_quantised(files, what, settings[0])
    _refuse_other_forms(files, what)
    _refuse_stray_shards(files, what)
    if settings:
        refuse_uneven_blocks(files)
    else:
        _refuse_quantised_tensors(files, what)
    if not sees and (adapters := [name for name in files.tensors if ADAPTER.search(name)]):
        raise UserError(f"{what}: holds {_some(adapters)}: {LEFT_OVER[0][1]}")


def _refuse_adapter(files: Files, what: str) -> None:
    if "adapter_config.json" not in files.names:
        return
    has_model = "config.json" in files.names and files.weights
    base = files.json("adapter_config.json").get("base_model_name_or_path")
    raise UserError(
        f"{what}: holds an adapter (adapter_config.json), "
        + ("beside a model; " if has_model else f"not a model (its base is {base}); ")
        + "merge the adapter first (peft: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
        + ".save_pretrained(NEW), and the tokenizer likewise) and give the merged model"
        + (", or delete adapter_config.json if that was done" if has_model else "")
    )


def _quantisation(fields: dict) -> Iterator[tuple[str, dict | str]]:
    """Each field of a raw configuration, nested ones included, that says how the weights are quantised."""
    for field, value in fields.items():
        if field in QUANTISED_FIELDS and value is not None:
            yield field, value
        elif isinstance(value, dict):
            yield from _quantisation(value)


def is_fine_grained_fp8(fields: dict) -> bool:
    """Whether the weights are float8 with a scale per block or tensor, which transformers dequantises on any device."""
    settings = fields.get("quantization_config")
    fine_grained = isinstance(settings, dict) and settings.get("quant_method") == "fp8"
    return fine_grained and len(list(_quantisation(fields))) == 1


def refuse_uneven_blocks(files: Files) -> None:
    """Raise UserError for fine-grained float8 that transformers 5 does not dequantise, or not rightly.

    That is a weight whose last block is cut off by its edge, whose scale is no plain float, or that has no scale.
    """
    block = files.json("config.json")["quantization_config"].get("weight_block_size")
    for name, (dtype, shape) in files.tensors.items():
        if not (dtype or "").startswith("F8") or name.endswith("_scale_inv") or shape is None:
            continue
        scale, _ = files.tensors.get(f"{name}_scale_inv", (None, None))
        even = not block or (len(shape) == 2 and not any(size % of for size, of in zip(shape, block, strict=True)))
        if scale not in FLOATS or not even:
            uneven = f"{list(shape)} is not whole blocks of {block}"
            reason = "has no scale beside it in a float type" if even else uneven
            raise UserError(_quantised(f"--model {files.name}", f"fp8, of a form that is not read: {name} {reason}"))


def _refuse_quantised(files: Files, what: str, found: tuple[str, dict | str]) -> None:
    field, settings = found
    settings = settings if isinstance(settings, dict) else {}
    method = settings.get("quant_method") or ("MLX" if field == "quantization" else None)
    if method is None and ("load_in_4bit" in settings or "load_in_8bit" in settings):
        method = "bitsandbytes"
    plain = files.tensors and all(
        dtype in FLOATS and not QUANTISED_NAMES.search(name) for name, (dtype, _) in files.tensors.items()
    )
    if plain:
        raise UserError(
            f"{what}: its config.json says it is quantised ({method or field}), and its weights are not; if they are "
            f"plain weights, remove {field} from config.json"
        )
    raise UserError(_quantised(what, f"{method or 'unknown'}, says {field} in its config.json", method))


def _quantised(what: str, how: str, method: str | None = None) -> str:
    call = LIBRARIES.get(method)
    return (
        f"{what}: is quantised ({how}); name the unquantised checkpoint that it was made from, or dequantise it with "
        f"the library that made it{f' ({call})' if call else ''}"
    )


def _refuse_quantised_tensors(files: Files, what: str) -> None:
    for name, (dtype, _) in files.tensors.items():
        if COMPUTED.search(name):
            continue
        if dtype and QUANTISED_DTYPES.fullmatch(dtype):
            raise UserError(_quantised(what, f"{name} is {dtype}, and nothing in its config.json says how to read it"))
        if QUANTISED_NAMES.search(name):
            raise UserError(_quantised(what, f"it holds {name}, and nothing in its config.json says what that scales"))


def _refuse_unknown_dtype(fields: dict, what: str) -> None:
    """What is written there does not decide, but transformers reads it."""
    for field in ("dtype", "torch_dtype"):
        value = fields.get(field)
        known = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
        if value is not None and not known and not isinstance(value, dict):
            raise UserError(f"{what}: its config.json says {field} {value}; correct it, for instance to bfloat16")


def _refuse_other_forms(files: Files, what: str) -> None:
    """Only where no form is there that transformers reads, and one that it does not."""
    if files.weights or not files.names or files.json("config.json").get("transformers_weights"):
        return
    for pattern, advice in OTHER_FORMS:
        for file in sorted(files.names):
            if re.fullmatch(pattern, file):
                advice = advice.format(folder=files.name, file=file)
                raise UserError(f"{what}: holds no model.safetensors, but {file}, which is not read; {advice}")


def _refuse_stray_shards(files: Files, what: str) -> None:
    """Weights in a shard that no index names would be left out without a word."""
    if files.weights not in ("model.safetensors", "model.safetensors.index.json"):
        return
    index = "model.safetensors.index.json"
    if files.weights.endswith(".json"):
        stray = {f for f in files.names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", f)} - set(files.shards)
        if stray and files.shards:
            raise UserError(
                f"{what}: holds {_some(stray)}, which {index} does not name; delete what is left of an older save, or "
                "fetch the checkpoint again"
            )
        return
    named = files.json(index).get("weight_map") if index in files.names else None
    if isinstance(named, dict) and files.tensors and set(named) - set(files.tensors):
        raise UserError(
            f"{what}: holds both model.safetensors and {index}, with different weights "
            f"({_some(set(named) ^ set(files.tensors))} in one alone); delete the one that is not the model"
        )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


# --- on the configuration ---------------------------------------------------------------------------


def refuse_other_tasks(name: str, config) -> None:
    """Raise UserError for a configuration of an encoder, an encoder-decoder, or a model with another task's head."""
    what = f"--model {name}"
    text = config.get_text_config()
    architectures = config.architectures if isinstance(config.architectures, list) else []
    named = next((a for a in architectures if isinstance(a, str)), None)
    if getattr(config, "is_encoder_decoder", False) is True:
        raise UserError(
            f"{what}: the family '{config.model_type}' is an encoder-decoder, of which the encoder would be lost; use "
            "a causal language model (decoder-only)"
        )
    if named and not CAUSAL.search(named) and (task := TASK.search(named)):
        raise UserError(
            f"{what}: is a {named}: a model for another task ({task[0]}) than language modelling, whose head would be "
            "lost or made up; use the causal model it was made from (a ...ForCausalLM)"
        )
    if named and CAUSAL.search(named) and re.search(r"Eagle|Medusa", named):
        raise UserError(f"{what}: is a {named}, the draft head of another model; give that model")
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False
    bidirectional = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    if masked or bidirectional or getattr(text, "is_causal", True) is False:
        raise UserError(
            f"{what}: is no causal language model ({named or config.model_type} sees the tokens after each one, as "
            "encoders and embedding models do); use a causal language model (decoder-only)"
        )


def make_ours(config) -> None:
    """Replace in a configuration what its writer chose for running the model by our choice; change it in place.

    What computes attention is not the checkpoint's to say: a name there may stand for a package or for code on the
    Hub. Fine-grained float8 weights are dequantised, on any device.
    """
    config.output_attentions = False  # else attention is "eager"
    config._attn_implementation = config._experts_implementation = None  # these reach nested configurations too
    if is_fine_grained_fp8(config.to_dict()):
        config.quantization_config["dequantize"] = True


# --- after loading ----------------------------------------------------------------------------------


def refuse_differences(name: str, model: nn.Module, report: dict) -> None:
    """Raise UserError unless the checkpoint has every weight of the model and no other.

    `report` is as transformers gives it. Let through are weights that predict more than the next token; see `left_out`.
    """
    what = f"--model {name}"
    if missing := sorted(report["missing_keys"]):
        head = model.get_output_embeddings()
        if len(missing) == 1 and head is not None and model.get_submodule(missing[0].rpartition(".")[0]) is head:
            raise UserError(
                f"{what}: the checkpoint has no {missing[0]}: it has no head for language modelling (embedding "
                "models and bare bodies have none), or is incomplete; use the causal model it was made from"
            )
        raise UserError(
            f"{what}: the checkpoint has no {missing[0]}"
            + (f" and lacks {len(missing) - 1} more weights" if missing[1:] else "")
            + "; fetch it again"
        )
    if wrong := sorted(report["mismatched_keys"]):
        key, found, wanted = wrong[0]
        raise UserError(
            f"{what}: {key} has the shape {list(found)} in the checkpoint, and {list(wanted)} by its config.json"
            + (f" ({len(wrong) - 1} more differ)" if wrong[1:] else "")
            + "; fetch config.json and the weights again from one place"
        )
    unused = {key for key in report["unexpected_keys"] if not COMPUTED.search(key)}
    refuse_left_over(what, {key for key in unused if not _predicts_more(key, model.config)}, model.config)


def refuse_left_over(what: str, unused: set[str], config) -> None:
    """Raise UserError that says what weights without a place in the model are."""
    if not unused:
        return
    deepest, layers = max(map(_layer, unused)), _layers(config)
    if deepest >= layers > 0:
        raise UserError(
            f"{what}: the checkpoint has {deepest + 1} layers, and its config.json says {layers}: {_some(unused)} "
            "would be left out; correct the number of layers in config.json, or fetch the checkpoint again"
        )
    for pattern, advice in LEFT_OVER:
        if found := [key for key in unused if pattern.search(key)]:
            raise UserError(f"{what}: {_some(found)} would be left out: {advice}")
    raise UserError(
        f"{what}: {_some(unused)} would be left out: the model that transformers builds from its config.json has no "
        "such weights; use a checkpoint made for transformers, or correct config.json"
    )


def _layers(config) -> int:
    number = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return number if isinstance(number, int) else 0


def _layer(key: str) -> int:
    """The number of the layer that a weight belongs to; -1 for none."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", key)
    return int(found[1]) if found else -1


def _predicts_more(key: str, config) -> bool:
    """Whether a weight serves multi-token prediction (DeepSeek-AI 2024), beside the model proper."""
    text = config.get_text_config()
    extra = getattr(text, "num_nextn_predict_layers", None) or 0
    return bool(PREDICTS_MORE.search(key)) or _layers(config) <= _layer(key) < _layers(config) + extra


def left_out(model: nn.Module, files: Files) -> list[str]:
    """Names of weights that the model has no use for by its authors' word, so that they are not in a result.

    They predict more than the next token, or the model's class in transformers declares that it ignores them.
    """
    patterns = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    own = set(model.state_dict())
    own |= {key.partition(".")[2] for key in own}  # older checkpoints leave the prefix of the body out
    return sorted(
        key
        for key in files.tensors
        if key not in own
        and not COMPUTED.search(key)
        and not (QUANTISED_NAMES.search(key) and is_fine_grained_fp8(files.json("config.json")))
        and (_predicts_more(key, model.config) or any(p.search(key) for p in patterns))
    )


def notes(model: nn.Module, own_dtype: torch.dtype, files: Files) -> dict[str, str]:
    """What a user is to know of how the checkpoint was read, by title: weights left out, or rounded to `own_dtype`."""
    found = {}
    if names := left_out(model, files):
        found["left out"] = f"{_some(names)}: the causal language model makes no use of them"
    wide = [
        name
        for name, (dtype, _) in files.tensors.items()
        if dtype in FLOATS and FLOATS[dtype].itemsize > own_dtype.itemsize and not COMPUTED.search(name)
    ]
    if wide and files.dtype is None and not is_fine_grained_fp8(files.json("config.json")):
        narrow = str(own_dtype).removeprefix("torch.")
        found["rounded"] = f"{_some(wide)}, of a wider type in the checkpoint than the rest, to {narrow}"
    return found


def refuse_own_head(name: str, model: nn.Module) -> None:
    """Raise UserError where the configuration ties the head to the embeddings, and the checkpoint has another head.

    Engines take one or the other without a word.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not tied or head is None or getattr(head, "weight", None) is None or head.weight is embeddings.weight:
        return
    if not torch.equal(head.weight, embeddings.weight):
        raise UserError(
            f"--model {name}: its config.json says tie_word_embeddings true, and the checkpoint has a head of its own, "
            "other than the embeddings; set tie_word_embeddings to false to keep it, or delete it from the weights"
        )
