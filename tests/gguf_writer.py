"""GGUF files as llama.cpp's converter writes them, of tiny models: what transformers reads is checked against these."""

import json
from pathlib import Path

import gguf
import torch
from conftest import make_tokenizer

ARCHITECTURES = {"gemma3_text": "gemma3"}  # llama.cpp's names, where they differ from the library's
PLUS_ONE = ("gemma2", "gemma3", "nemotron")  # norms that the converter adds 1 to


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of llama.cpp's llama: pairs beside each other."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors(model) -> dict[str, torch.Tensor]:
    """The model's weights under llama.cpp's names."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    written = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        new = f"{names.get_name(stem) or names.get_name(stem.removeprefix('transformer.'))}.{suffix}"
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = permuted(weight, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        if architecture == "gpt2" and weight.ndim == 2 and ".h." in name:
            weight = weight.T
        if architecture == "bloom" and "query_key_value" in name:  # [heads, 3, ...] -> [3, heads, ...]
            shape = (config.n_head, 3, config.hidden_size // config.n_head)
            weight = weight.reshape(*shape, *weight.shape[1:]).swapaxes(0, 1).reshape(weight.shape)
        if architecture in PLUS_ONE and new.endswith("norm.weight"):
            weight = weight + 1
        written[new] = weight.contiguous()
    return written


def entries(model) -> dict:
    """The architecture's entries, as the converter writes them for every model."""
    config = model.config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    found = {
        "context_length": getattr(config, "max_position_embeddings", None) or 128,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head,
        "attention.value_length": head,
    }
    for field in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        if hasattr(config, field):
            found[f"attention.layer_norm_{'rms_' if 'rms' in field else ''}epsilon"] = float(getattr(config, field))
    if rope:
        found["rope.freq_base"] = float(rope["rope_theta"])
        found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
    return found


def write(path: Path, model, more: dict | None = None, extra: dict | None = None, without=(), parts=1, pre="default"):
    """Write `model` with its tokenizer: `more` entries of the architecture's (None leaves one out), `extra` tensors."""
    architecture = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    names = [f"{path.stem}-{number:05d}-of-{parts:05d}{path.suffix}" for number in range(1, parts + 1)]
    paths = [path] if parts == 1 else [path.with_name(name) for name in names]
    every = {name: t for name, t in {**tensors(model), **(extra or {})}.items() if name not in without}
    for number, file in enumerate(paths):
        writer = gguf.GGUFWriter(str(file), architecture)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
        if number == 0:
            for name, value in {**entries(model), **(more or {})}.items():
                if value is not None:
                    add(writer, f"{architecture}.{name}" if "tokenizer" not in name else name, value)
            add_tokenizer(writer, make_tokenizer(), pre)
        for name, tensor in list(every.items())[number::parts]:
            writer.add_tensor(name, tensor.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]


def add(writer, name: str, value) -> None:
    """One entry, in the type that the converter gives it."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(name, value)


def add_tokenizer(writer, tokenizer, pre: str) -> None:
    """A byte-level BPE tokenizer."""
    vocabulary = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
