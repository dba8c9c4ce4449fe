"""What a model is on disk or on the Hub -> model and tokenizer, ready to be scored."""

import hashlib
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    ProcessorMixin,
)

from lib import llava, modeling_pruned, parallel
from lib.errors import UserError
from lib.memory import GIB
from lib.mlp import VISION, Layer, find_layers, forget_widths, only_towers, skeleton, towers_of
from lib.offload import Placement, Resources, cast
from lib.tape import HiddenStates

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the arguments that every `from_pretrained` of it takes."""

    name: str
    arguments: dict

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are a quantised `.gguf` file; they are read dequantised, as float32."""
        return "gguf_file" in self.arguments

    def config(self):
        """The model's configuration. Raises UserError when it cannot be read."""
        return self._load(AutoConfig)

    def model(self, dtype: torch.dtype | str = "auto") -> nn.Module:
        """The model on the CPU, in `dtype` or ("auto") in the checkpoint's own. Raises UserError."""
        return self.load(dtype)[0]

    def load(self, dtype: torch.dtype | str = "auto") -> tuple[nn.Module, object]:
        """The model as `model()` gives it, and its tokenizer or processor. Raises UserError."""
        config = self.config()
        if llava.is_llava(config):
            return llava.load(self.name, self.arguments.get("cache_dir"), dtype)
        tokenizer = self._load(AutoTokenizer)
        extra = {"quantization_config": GgufConfig(dequantize=True)} if self.is_gguf else {}
        dtype = torch.float32 if self.is_gguf and dtype == "auto" else dtype
        if hasattr(config, "pruned_mlp"):
            # Such a folder names code beside it; the same code stands here, and is the one that is trusted.
            model = forget_widths(self._load_whole(modeling_pruned.pruned(causal_class(config)), dtype=dtype))
        else:
            model = self._load_whole(AutoModelForCausalLM, dtype=dtype, **extra)
        return model.eval().requires_grad_(False), tokenizer

    def _load_whole(self, model_class, **extra) -> nn.Module:
        """The model, unless the checkpoint lacks a weight; transformers would make one up."""
        model, found = self._load(model_class, output_loading_info=True, **extra)
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"--model {self.name}: the checkpoint has no {missing[0]}"
                + (f" and lacks {len(missing) - 1} more weights" if missing[1:] else "")
                + "; fetch it again"
            )
        return model

    def _load(self, auto_class, **extra):
        try:
            return auto_class.from_pretrained(**self.arguments, **extra)
        except KeyboardInterrupt:
            raise
        except Exception as error:
            raise UserError(f"--model {self.name}: {self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, ImportError):
            return f"needs a package that is not installed: {reason}"
        if Path(self.name).exists():
            return f"cannot be loaded, the folder or file may be incomplete ({type(error).__name__}: {reason})"
        if "gated" in reason.lower() or "401" in reason or "403" in reason:
            return "the Hub asks for permission; accept the model's licence there, then run 'hf auth login'"
        return (
            "no such folder here, and the Hub did not serve it; check the name and the network, or give a local "
            f"folder ({type(error).__name__}: {reason[:120]})"
        )


@dataclass(frozen=True)
class Loaded:
    """A model that can be scored, and the dtype its checkpoint is kept in."""

    source: Source
    model: nn.Module
    processor: object  # what makes a sample: a tokenizer, or one and an image processor
    own_dtype: torch.dtype
    seqlen: int
    layers: list[Layer]
    resources: Resources
    placement: Placement

    @property
    def tokenizer(self):
        """What makes tokens of text."""
        return self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor

    def in_own_dtype(self, requested: str) -> nn.Module:
        """The dense model with the checkpoint's own values (in `requested`, unless that is 'auto'), to be saved."""
        if requested != "auto":
            return cast(self.model, DTYPES[requested])
        if all(p.dtype == self.own_dtype for p in self.model.parameters() if p.is_floating_point()):
            return self.model
        return self.source.model()

    def again(self) -> "Loaded":
        """The same, dense again after it was pruned."""
        model = self.source.model()
        layers = [replace(found, block=None) if not held.block else found
                  for found, held in zip(find_layers(model), self.layers, strict=True)]  # fmt: skip
        return replace(self, model=model, layers=layers, placement=self.resources.place(model, layers))

    def hidden_states(self) -> HiddenStates:
        """An empty store, with as much memory as is left for it."""
        device = self.resources.device
        return HiddenStates(self.resources.hidden_bytes(self.model, self.placement), device.type == "cuda")


def quiet_libraries() -> None:
    """Keep the libraries' own chatter off the terminal."""
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="huggingface_hub|transformers|datasets")


def find_source(name: str, cache_dir: str) -> Source:
    """Tell a `.gguf` file, a local folder and a Hub name apart. Raises UserError for what is none of them."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {name}: no such file")
        return Source(name, {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name})
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: the folder holds no config.json; give the folder of a saved model")
        return Source(name, {"pretrained_model_name_or_path": str(path)})
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(
            f"--model {name}: no such folder; give a local folder, a .gguf file, or a Hub name "
            "like meta-llama/Meta-Llama-3-8B"
        )
    return Source(name, {"pretrained_model_name_or_path": name, "cache_dir": cache_dir})


def load(
    name: str,
    dtype: str = "auto",
    cuda: bool = False,
    cache_dir: str = "llm_weights",
    seqlen: int | None = None,
    sees: bool = False,
    towers: str = "both",
    offload: str = "auto",
    max_memory: float | None = None,
) -> Loaded:
    """Load a model and its tokenizer, or with `sees` a LLaVA and its processor, for scoring.

    The family is checked on the configuration alone, before any weight is read. `seqlen` is capped by what
    the model was made for; `towers` names those whose MLPs are pruned; for `offload` and `max_memory` (GiB) see
    `lib.offload.Resources`. Raises UserError for a model that cannot be found, read or pruned, for one that
    sees without `sees` and the other way round, for `cuda` without a GPU, and for weights that are not finite.
    """
    if cuda and not torch.cuda.is_available():
        raise UserError("--cuda: no CUDA GPU is visible; leave the flag out to run on the CPU")
    source = find_source(name, cache_dir)
    config = source.config()
    refuse_unsupported(name, config, sees)
    model, processor = source.load(DTYPES.get(dtype, "auto"))
    own_dtype = model.dtype
    device = parallel.device(cuda)
    limit = None if max_memory is None else int(max_memory * GIB)
    resources = Resources(device, DTYPES.get(dtype) or scoring_dtype(device), offload, limit, parallel.world() > 1)
    layers = only_towers(find_layers(model), towers)
    placement = resources.place(model, layers)
    refuse_nan(model)
    seqlen = min(seqlen or 1024, context_length(model.config))
    return Loaded(source, model, processor, own_dtype, seqlen, layers, resources, placement)


def refuse_unsupported(name: str, config, sees: bool) -> None:
    """Raise UserError unless the MLPs of this configuration can be found; reads no weights."""
    if llava.is_llava(config) != sees:
        raise UserError(
            f"--model {name}: has no vision tower (its family is '{config.model_type}'), which "
            "structured_afr_llava prunes; use structured_afr"
            if sees
            else f"--model {name}: is a LLaVA; use --prune_method structured_afr_llava (--towers language prunes its "
            "language model alone)"
        )
    if sees:
        return  # an original form says too little of itself before it is converted
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model {name}: the family '{config.model_type}' is not a causal language model that "
            "transformers can build"
        )
    try:
        model_class = causal_class(config)
        if hasattr(config, "pruned_mlp"):
            model_class = modeling_pruned.pruned(model_class)
        layers = find_layers(skeleton(model_class, config))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # values that contradict each other, or packages that the family needs
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"--model {name}: transformers cannot build the family '{config.model_type}' from its configuration "
            f"({type(error).__name__}: {reason})"
        ) from error
    if VISION in towers_of(layers):
        raise UserError(
            f"--model {name}: the family '{config.model_type}' has a vision tower, and of such families only LLaVA can "
            "be scored; save its language model on its own and prune that"
        )


def causal_class(config) -> type:
    """The language model class of transformers for this configuration."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def scoring_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU or a CPU with matrix units for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    units = torch.cpu.get_capabilities()
    return torch.bfloat16 if units.get("avx512_bf16") or units.get("amx_bf16") or units.get("bf16") else torch.float32


def context_length(config) -> int:
    """The longest sequence the model was made for, in tokens; unlimited where the configuration names none."""
    text = config.get_text_config()
    return next((value for field in CONTEXT_FIELDS if isinstance(value := getattr(text, field, None), int)), 2**31)


def refuse_nan(model: nn.Module) -> None:
    """Raise UserError that names the first weight with NaN or infinity in it."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"--model: {name} holds NaN or infinity in {str(weight.dtype).removeprefix('torch.')}; "
                "try --dtype float32 (float16 overflows where bfloat16 does not), or fetch the "
                "checkpoint again"
            )


def fingerprint(model: nn.Module, dtype: torch.dtype) -> str:
    """SHA-256 of the model's weights in `dtype`, of 256 values from all over each: other values, another fingerprint.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()
        values = values[:: max(len(values) // 256, 1)].to(dtype).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()
