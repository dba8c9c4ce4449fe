"""What a model is on disk or on the Hub -> model and tokenizer, ready to be scored."""

import hashlib
import logging
import math
import re
import warnings
from dataclasses import dataclass, field, replace
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
    LlavaConfig,
    PreTrainedConfig,
    ProcessorMixin,
)

from lib import gguf_file, llava, modeling_pruned, parallel, remote_code, source_checks, tokenizer_files
from lib.config_checks import building, check_raw, refuse_short_context
from lib.errors import UserError
from lib.gguf_file import GgufFile
from lib.memory import GIB
from lib.mlp import VISION, Layer, find_layers, forget_widths, only_towers, skeleton, towers_of
from lib.offload import Placement, Resources, cast
from lib.storage import unshare
from lib.tape import HiddenStates

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_SQUARED = torch.finfo(torch.float32).max ** 0.5
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the arguments that every `from_pretrained` of it takes."""

    name: str
    arguments: dict
    gguf: GgufFile | None = None  # read dequantised, as float32

    @property
    def files(self) -> source_checks.Files:
        """The checkpoint's files (of a `.gguf`, those beside it)."""
        return source_checks.Files(self.name, self.arguments.get("cache_dir"))

    def config(self):
        """The model's configuration, without its writer's choice of kernels.

        The raw one is looked at first: transformers does not know the original LLaVA's, or takes it for another one.
        Raises UserError when it cannot be read, has more layers than any model, and for a family that is only code.
        """
        if self.gguf:
            return self.gguf.config()
        fields = self._raw_config()
        if llava.is_original(fields):
            llava.refuse_other_originals(self.name, fields, self.arguments.get("cache_dir"))
            return LlavaConfig()  # that it is a LLaVA; its own values are read when it is converted
        config = self._load(AutoConfig)
        remote_code.forget(config)
        source_checks.make_ours(config)
        return config

    def _raw_config(self) -> dict:
        """What config.json holds. Raises UserError for what no class of the library should be given, or would know."""
        fields = self._try(PreTrainedConfig.get_config_dict)[0]
        if not isinstance(fields, dict):
            raise UserError(f"--model {self.name}: its config.json holds no JSON object; fetch it again")
        check_raw(self.name, fields)
        if fields.get("model_type") and not llava.is_llava(fields):
            remote_code.refuse_unknown_family(
                f"--model {self.name}", fields, "give a checkpoint of a family that transformers has"
            )
        return fields

    def model(self, dtype: torch.dtype | str = "auto") -> nn.Module:
        """The model on the CPU, in `dtype` or ("auto") in the checkpoint's own. Raises UserError."""
        return self.load(dtype)[0]

    def load(self, dtype: torch.dtype | str = "auto") -> tuple[nn.Module, object]:
        """The model as `model()` gives it, and its tokenizer or processor. Raises UserError.

        No two weights share memory but those that the configuration ties, so that each can be pruned alone.
        """
        if self.gguf:
            model = self.gguf.model(torch.float32 if dtype == "auto" else dtype)
            tokenizer = self.gguf.tokenizer()
            self.gguf.forget()
            return unshare(model).eval().requires_grad_(False), tokenizer
        config = self.config()
        if llava.is_llava(config):
            model, processor = llava.load(self.name, self.arguments.get("cache_dir"), dtype)
            return unshare(model), processor
        tokenizer = tokenizer_files.read(self.files) or self._load(AutoTokenizer)
        self._refuse_mute(tokenizer)
        dtype = self._own_dtype(config) if dtype == "auto" else dtype
        if hasattr(config, "pruned_mlp"):
            # Such a folder names code beside it; the same code stands here, and is the one that is trusted.
            model_class = modeling_pruned.pruned(causal_class(config))
            model = forget_widths(self._load_whole(model_class, dtype=dtype, config=config))
        else:
            model = self._load_whole(AutoModelForCausalLM, dtype=dtype, config=config)
        if source_checks.is_fine_grained_fp8(config.to_dict()):
            source_checks.refuse_uneven_blocks(self.files)  # of a name on the Hub, there is more to see now
            model.to(dtype)  # transformers leaves what was no float8 in bfloat16
            vars(model).pop("_weight_conversions", None)  # by which it would be quantised again when it is saved
        model.config.return_dict = True  # some old checkpoints say otherwise
        return unshare(model).eval().requires_grad_(False), tokenizer

    def _refuse_mute(self, tokenizer) -> None:
        """transformers makes an empty tokenizer where files are missing."""
        if not tokenizer("word", add_special_tokens=False).input_ids:
            raise UserError(f"--model {self.name}: its tokenizer makes no tokens of a word; {tokenizer_files.ADVICE}")

    def _own_dtype(self, config) -> torch.dtype | str:
        """The dtype of the checkpoint's weights; "auto", which is what its configuration says, where they differ."""
        if source_checks.is_fine_grained_fp8(config.to_dict()):
            return config.dtype if config.dtype in DTYPES.values() else torch.bfloat16
        return self.files.dtype or "auto"

    def _load_whole(self, model_class, **extra) -> nn.Module:
        """The model, unless the checkpoint lacks a weight, which transformers would make up, or has one left over."""
        model, found = self._load(model_class, output_loading_info=True, ignore_mismatched_sizes=True, **extra)
        source_checks.refuse_differences(self.name, model, found)
        source_checks.refuse_own_head(self.name, model)
        return model

    def _load(self, auto_class, **extra):
        return self._try(auto_class.from_pretrained, trust_remote_code=False, **extra)

    def _try(self, read, **extra):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an error is one line
                return read(**self.arguments, **extra)
        except KeyboardInterrupt:
            raise
        except Exception as error:
            raise UserError(f"--model {self.name}: {self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if remote_code.is_refusal(error):
            return remote_code.NOT_RUN
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
    notes: dict[str, str] = field(default_factory=dict)  # weights that were left out or rounded

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
    """Keep the libraries' own chatter, and their questions, off the terminal."""
    remote_code.never_ask()
    transformers.logging.set_verbosity(logging.CRITICAL)  # its errors are raised as well
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="huggingface_hub|transformers|datasets")


def find_source(name: str, cache_dir: str) -> Source:
    """Tell a `.gguf` file, a local folder and a Hub name apart. Raises UserError for what is none of them."""
    path = Path(name).expanduser()
    if gguf_file.is_gguf(path) and not path.is_dir():
        gguf_file.parts(path)
        return Source(name, {}, GgufFile(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            source_checks.refuse_without_config(source_checks.Files(name))
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
    if not source.gguf:
        source_checks.refuse_on_sight(source.files, sees)
    config = source.config()
    refuse_unsupported(name, config, sees)
    model, processor = source.load(DTYPES.get(dtype, "auto"))
    own_dtype = model.dtype
    notes = {} if source.gguf or sees else source_checks.notes(model, own_dtype, source.files)
    device = parallel.device(cuda)
    limit = None if max_memory is None else int(max_memory * GIB)
    resources = Resources(device, DTYPES.get(dtype) or scoring_dtype(device), offload, limit, parallel.world() > 1)
    layers = only_towers(find_layers(model), towers)
    placement = resources.place(model, layers)
    refuse_nan(model)
    # An original LLaVA's configuration says nothing of its text before it is converted.
    refuse_short_context(name, model.config.get_text_config(), CONTEXT_FIELDS)
    seqlen = min(seqlen or 1024, context_length(model.config))
    return Loaded(source, model, processor, own_dtype, seqlen, layers, resources, placement, notes)


def refuse_unsupported(name: str, config, sees: bool) -> None:
    """Raise UserError unless the MLPs of this configuration can be found; reads no weights."""
    if llava.is_llava(config) != sees:
        raise UserError(
            f"--model {name}: has no vision tower that structured_afr_llava prunes (its family is "
            f"'{config.model_type}', not LLaVA v1.5's); use structured_afr for a language model"
            if sees
            else f"--model {name}: is a LLaVA; use --prune_method structured_afr_llava (--towers language prunes its "
            "language model alone)"
        )
    if sees:
        return  # an original form says too little of itself before it is converted
    refuse_short_context(name, config.get_text_config(), CONTEXT_FIELDS)
    source_checks.refuse_other_tasks(name, config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model {name}: the family '{config.model_type}' is not a causal language model that "
            "transformers can build"
        )
    with building(name):
        model_class = causal_class(config)
        if hasattr(config, "pruned_mlp"):
            model_class = modeling_pruned.pruned(model_class)
        if not isinstance(config, model_class.config_class):
            config = config.get_text_config()  # of a model for images too, transformers builds the language model alone
        layers = find_layers(skeleton(model_class, config))
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
    """Raise UserError that names the first weight with NaN or infinity in it, and for embeddings beyond all norms."""
    largest = max(abs(float(end)) for end in model.get_input_embeddings().weight.aminmax())
    if LARGEST_SQUARED < largest < math.inf:
        raise UserError(
            f"--model: its embeddings hold values of {largest:.0e}, whose squares are beyond float32, so that "
            "norms make nothing of them; the checkpoint is damaged, fetch it again"
        )
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
