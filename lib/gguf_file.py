"""A `.gguf` file, in one piece or in parts, -> configuration, tokenizer and model, as llama.cpp would run it.

transformers reads the names and the values of the tensors. What a file says beside them it partly drops: how rope is
scaled, how much of a head rotates, biases, soft caps, the width of heads. Here every such entry decides, or is refused.
"""

import copy
import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from lib.errors import UserError

PART = re.compile(r"-(\d{5})-of-(\d{5})$")
SAFETENSORS = "give the checkpoint in Hugging Face form that it was made from"
# Entries (after "ARCHITECTURE.") that decide nothing here, or that transformers and `overrides` understand.
UNDERSTOOD = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_attn_factor",
}  # fmt: skip
NEUTRAL = {"attention.causal": True, "rope.scaling.yarn_ext_factor": 1.0}  # others: 0, or an empty list
WINDOW = "attention.sliding_window"
SOFT_CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}
# What an architecture understands beyond that; the architectures that were tested against hand-made files.
ARCHITECTURES = {
    "llama": set(),
    "qwen2": set(),
    "qwen3": set(),
    "phi3": {WINDOW},
    "gemma2": {WINDOW, *SOFT_CAPS},
    "gemma3": {WINDOW, f"{WINDOW}_pattern", "final_logit_softcapping", "rope.freq_base_swa"},
    "starcoder2": set(),
    "stablelm": {"use_parallel_residual"},
    "nemotron": set(),
    "falcon": set(),
    "gpt2": set(),
    "bloom": {"attention.max_alibi_bias"},
}
# Two that transformers reads in full, entry by entry.
BY_TRANSFORMERS = {"qwen35", "lfm2"}
# Where only a part of a head rotates, and transformers can do so.
PARTLY_ROTATED = {"phi3", "stablelm", "nemotron"}
WITHOUT_ROPE = {"gpt2", "bloom"}
PLAIN_HEADS = {"falcon", "gpt2", "bloom", "stablelm", "phi3"}  # as wide as embedding_length / head_count
OWN_HEADS = {"llama", "qwen3", "gemma2", "gemma3", "nemotron"}  # with a field for their width
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# Tokenizers that llama.cpp puts BOS before where the file does not say.
BOS_BY_DEFAULT = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
# Llama 3.1 and 3.2, the models whose rope was scaled in this form.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_gguf(path: Path) -> bool:
    """Whether the name ends as that of a GGUF file does, in letters of either case."""
    return path.suffix.lower() == ".gguf"


def parts(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of, in order. Raises UserError that names a missing one."""
    match = PART.search(path.stem)
    if not match:
        found = [path]
    else:
        stem, count = path.stem[: match.start()], int(match[2])
        found = [path.with_name(f"{stem}-{n:05d}-of-{match[2]}{path.suffix}") for n in range(1, count + 1)]
    for file in found or [path]:
        if not file.is_file():
            raise UserError(f"--model {path}: {'no such file' if file == path else f'its part {file.name} is missing'}")
    return found or [path]


def _readable(read):
    """`read` with what goes wrong in it told in one line: every number in a file may be any."""

    @wraps(read)
    def told(self, *arguments):
        try:
            return read(self, *arguments)
        except (UserError, MemoryError):
            raise
        except ImportError as error:
            raise UserError(
                f"--model {self.path}: needs gguf: pip install -r requirements-gguf.txt ({error})"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"--model {self.path}: cannot be read, the file may be incomplete ({type(error).__name__}: {reason})"
            ) from error

    return told


@dataclass(frozen=True)
class GgufFile:
    """One model in GGUF form; `path` is its file, or any of its parts."""

    path: Path

    @cached_property
    def _readers(self) -> list:
        from gguf import GGUFReader

        readers = [GGUFReader(part) for part in parts(self.path)]
        count = readers[0].fields.get("split.count")
        if count and count.contents() > len(readers):
            raise UserError(
                f"--model {self.path}: is one of {count.contents()} parts; name them NAME-00001-of-"
                f"{count.contents():05d}.gguf, ... as llama-gguf-split does"
            )
        return readers

    def forget(self) -> None:
        """Let go of the mapped file and the tables of its tokens, which take memory; they are read again when needed."""
        for name in vars(self).keys() - {"path"}:
            del vars(self)[name]

    @cached_property
    def metadata(self) -> dict:
        """The file's entries; of a list of strings (tokens, merges) only its length."""
        entries = {}
        for name, field in self._readers[0].fields.items():
            if name.startswith("tokenizer.") and len(field.data) > 1:
                entries[name] = len(field.data)
            else:
                entries[name] = field.contents()
        return entries

    @cached_property
    def tensors(self) -> dict:
        """Name -> tensor of the reader, of all parts."""
        return {tensor.name: tensor for reader in self._readers for tensor in reader.tensors}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return str(self.metadata.get("general.architecture"))

    def entry(self, name: str, default=None):
        """One entry of the architecture's own."""
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor's values in float32, dequantised; on the CPU."""
        from gguf import dequantize

        tensor = self.tensors[name]
        # A copy: values that are not quantised come as a view of the file, which may not be written to.
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    # --- configuration --------------------------------------------------------------------------------

    @cached_property
    def _values(self) -> dict:
        """The fields of the configuration. Raises UserError for what could not be computed as llama.cpp does."""
        self._refuse_unknown()
        fields = {"model_type": "gemma3_text" if self.architecture == "gemma3" else self.architecture}
        for prefix in (self.architecture, "tokenizer"):
            for entry, field in GGUF_CONFIG_MAPPING[prefix].items():
                value = self.metadata.get(f"{prefix}.{entry}")
                if field and value is not None:
                    fields[field] = value
        return fields | self._overrides()

    @_readable
    def config(self):
        """The configuration. Raises UserError for a file that cannot be read or run as llama.cpp runs it."""
        if self.architecture in BY_TRANSFORMERS:
            return self._config_by_transformers()
        fields = dict(self._values)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    def _config_by_transformers(self):
        if len(self._readers) > 1:
            raise UserError(f"--model {self.path}: join its parts first: llama-gguf-split --merge PART1 MODEL.gguf")
        if self.entry("rope.scaling.type", "none") != "none" or self.tensors.keys() & set(ROPE_TENSORS):
            raise self._refuse("its rope scaling is not read")
        with self._alone() as arguments:
            return AutoConfig.from_pretrained(**arguments)

    def _refuse(self, what: str) -> UserError:
        return UserError(f"--model {self.path}: {what}; {SAFETENSORS}")

    def _refuse_unknown(self) -> None:
        architecture = self.architecture
        if self.metadata.get("general.type", "model") != "model":
            raise self._refuse(f"holds a {self.metadata['general.type']}, not a model")
        if architecture not in ARCHITECTURES:
            raise self._refuse(f"GGUF files of the architecture '{architecture}' cannot be read")
        for name in self.metadata:
            short = name.removeprefix(f"{architecture}.")
            if short == name or short in UNDERSTOOD | ARCHITECTURES[architecture]:
                continue
            value = self.entry(short)
            if value != NEUTRAL.get(short) and (value or short in NEUTRAL):
                raise self._refuse(f"its entry {name} = {str(value)[:40]} is not understood")
        for short in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
            if isinstance(self.entry(short), list):
                raise self._refuse(f"its {short} is given layer by layer")

    def _overrides(self) -> dict:
        """The fields that transformers leaves at their defaults, or reads under another name."""
        architecture, heads = self.architecture, self.entry("attention.head_count")
        width = self.entry("embedding_length") // heads
        head = self.entry("attention.key_length", width)
        if self.entry("attention.value_length", head) != head:
            raise self._refuse("its heads have keys and values of different lengths")
        if head != width and architecture in PLAIN_HEADS:
            raise self._refuse(f"its heads are {head} wide, not embedding_length / head_count = {width}")
        fields = {
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "num_key_value_heads": self.entry("attention.head_count_kv") or heads,
            "vocab_size": int(self.tensors["token_embd.weight"].shape[1]),
        }
        if head != width or architecture in OWN_HEADS:
            fields["head_dim"] = int(head)
        if architecture not in WITHOUT_ROPE:
            fields |= self._rope(int(head))
        return fields | self._of_family(int(head))

    def _of_family(self, head: int) -> dict:
        epsilon = self.entry("attention.layer_norm_epsilon", 1e-5)
        per_head = self.entry("embedding_length") // self.entry("attention.head_count")
        layers = self.entry("block_count")
        match self.architecture:
            case "llama":
                return {"attention_bias": self._has("attn_q.bias"), "mlp_bias": self._has("ffn_up.bias")}
            case "phi3":
                return {"sliding_window": self.entry(WINDOW) or None}
            case "gemma2":  # llama.cpp tells the 27B model, whose queries are scaled otherwise, by its depth
                caps = {name: self.entry(name, default) for name, default in
                        (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))}  # fmt: skip
                return caps | {"query_pre_attn_scalar": per_head if layers == 46 else head}
            case "gemma3":
                pattern = self.entry(f"{WINDOW}_pattern", 6)
                sliding = pattern if isinstance(pattern, list) else [(i + 1) % pattern for i in range(layers)]
                return {"final_logit_softcapping": self.entry("final_logit_softcapping") or None,
                        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
                        "query_pre_attn_scalar": per_head if layers == 62 else head}  # fmt: skip
            case "starcoder2":
                return {"norm_epsilon": epsilon, "sliding_window": None}
            case "nemotron":
                return {"norm_eps": epsilon}
            case "stablelm":
                return {"layer_norm_eps": epsilon, "use_qkv_bias": self._has("attn_q.bias"),
                        "use_parallel_residual": not self._has("ffn_norm.weight")}  # fmt: skip
            case "gpt2":
                return {"n_positions": self.entry("context_length"), "n_inner": self.entry("feed_forward_length"),
                        "layer_norm_epsilon": epsilon}  # fmt: skip
            case "falcon":
                if self.entry("attention.head_count_kv", 1) != 1 or self._has("attn_norm_2.weight"):
                    raise self._refuse("Falcon with more than one key-value head is laid out otherwise in GGUF")
                return {"layer_norm_epsilon": epsilon, "ffn_hidden_size": self.entry("feed_forward_length"),
                        "multi_query": True, "new_decoder_architecture": False}  # fmt: skip
        return {}

    def _has(self, tensor: str) -> bool:
        return f"blk.0.{tensor}" in self.tensors

    # --- rope -----------------------------------------------------------------------------------------

    def _rope(self, head: int) -> dict:
        """`rope_parameters`, and what goes with them. Raises UserError for a scaling that transformers lacks."""
        rotated = self.entry("rope.dimension_count", head)
        if rotated != head and self.architecture not in PARTLY_ROTATED:
            raise self._refuse(f"{rotated} of the {head} values of a head rotate")
        rope, more = self._scaling(rotated)
        rope["rope_theta"] = float(self.entry("rope.freq_base", 1e4))
        if self.architecture in PARTLY_ROTATED:
            rope["partial_rotary_factor"] = rotated / head
        if self.architecture == "gemma3":  # layers with a window are never scaled
            local = {"rope_type": "default", "rope_theta": float(self.entry("rope.freq_base_swa", 1e4))}
            return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
        return {"rope_parameters": rope, **more}

    def _scaling(self, rotated: int) -> tuple[dict, dict]:
        """How rope is scaled, and fields beside it."""
        factor = float(self.entry("rope.scaling.factor") or self.entry("rope.scale_linear") or 1.0)
        kind = self.entry("rope.scaling.type", "linear")  # llama.cpp's own default
        context = self.entry("context_length")
        original = int(self.entry("rope.scaling.original_context_length") or context)
        stretch = float(self.entry("rope.scaling.attn_factor", 1.0)) * self.entry("rope.scaling.yarn_attn_factor", 1.0)
        freqs, short, long = (self.tensor(name).tolist() if name in self.tensors else None for name in ROPE_TENSORS)
        factor = 1.0 if kind == "none" else factor
        if freqs and factor == stretch == 1:
            return self._llama3(freqs, rotated, context), {}
        if short and long and not freqs and factor == 1:
            rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": stretch,
                    "factor": context / original, "original_max_position_embeddings": original}  # fmt: skip
            return rope, {"original_max_position_embeddings": original}
        if not (freqs or short or long) and kind in ("none", "linear", "yarn", "longrope"):
            if factor == stretch == 1:
                return {"rope_type": "default"}, {}
            if kind == "linear" and stretch == 1 and self.architecture != "phi3":
                return {"rope_type": "linear", "factor": factor}, {}
            if kind == "yarn" and self.architecture != "phi3":
                return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                        "attention_factor": stretch * (0.1 * math.log(factor) + 1),
                        "beta_fast": float(self.entry("rope.scaling.yarn_beta_fast", 32.0)),
                        "beta_slow": float(self.entry("rope.scaling.yarn_beta_slow", 1.0))}, {}  # fmt: skip
        raise self._refuse(f"its rope scaling ({kind}, factor {factor:g}) is not understood")

    def _llama3(self, factors: list[float], rotated: int, context: int) -> dict:
        """The rope parameters whose frequencies are divided by `factors`, one for each pair of rotated values."""
        powers = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
        frequencies = float(self.entry("rope.freq_base", 1e4)) ** -powers
        rope = {"rope_type": "llama3", "factor": round(max(factors), 4), **LLAMA3}
        turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = ((turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])).clamp(0, 1)
        if torch.allclose(1 / ((1 - smooth) / rope["factor"] + smooth), torch.tensor(factors).double(), rtol=1e-4):
            return rope
        # Scaled otherwise: the same frequencies in the one form that takes any of them.
        return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
                "factor": 1.0, "original_max_position_embeddings": context}  # fmt: skip

    # --- tokenizer and model --------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[dict]:
        """The arguments of `from_pretrained` that see this file and nothing that lies beside it."""
        with tempfile.TemporaryDirectory(prefix="afr-st-") as folder:
            (Path(folder) / "model.gguf").symlink_to(parts(self.path)[0].resolve())
            yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}

    @_readable
    def tokenizer(self):
        """The file's own tokenizer, with BOS where llama.cpp puts it."""
        with self._alone() as arguments:
            tokenizer = AutoTokenizer.from_pretrained(**arguments)
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(self.path)
        self._drop_added(tokenizer)
        entries = self.metadata
        if "tokenizer.ggml.add_bos_token" not in entries and entries.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT:
            tokenizer.add_bos_token = True
        return tokenizer

    def _drop_added(self, tokenizer) -> None:
        """Take away what the library's class adds of its own (GPT-2's <|endoftext|>): the model has no such token."""
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        own = [token for token in state["added_tokens"] if token["id"] < self.metadata["tokenizer.ggml.tokens"]]
        if own != state["added_tokens"]:
            tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state | {"added_tokens": own}))

    @_readable
    def model(self, dtype: torch.dtype) -> nn.Module:
        """The model in `dtype`, on the CPU. Raises UserError for tensors that are missing, or that nothing uses."""
        if self.architecture in BY_TRANSFORMERS:
            with self._alone() as arguments:
                return AutoModelForCausalLM.from_pretrained(
                    **arguments, quantization_config=GgufConfig(dequantize=True), dtype=dtype
                )
        config = self.config()
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=self._values)
        with torch.device("meta"):
            names = get_gguf_hf_weights_map(model_class(copy.deepcopy(config)), processor)
        if unused := sorted(self.tensors.keys() - names.keys() - set(ROPE_TENSORS)):
            raise self._refuse(f"{unused[0]} (of {len(unused)} such tensors) has no place in {model_class.__name__}")
        state = {}
        for name in self.tensors:
            values, others = self.tensor(name).numpy(), {"tensors": state}
            result = processor.process(values, name, tensor_key_mapping=names, parsed_parameters=others)
            if result.name in names:
                state[names[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights)).to(dtype)
        model, found = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"--model {self.path}: the file has no {missing[0]} (of {len(missing)} that are missing)")
        model.config.name_or_path = str(self.path)
        return model
