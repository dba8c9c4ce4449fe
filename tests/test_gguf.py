"""GGUF files are read as llama.cpp runs them: the oracle is the tiny model that a file was written from."""

import math

import gguf_writer
import pytest
import torch
from conftest import CONTEXT, GATED, make_tokenizer, sentences
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    NemotronConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from lib import builder, tasks
from lib.errors import UserError

VOCABULARY = len(make_tokenizer())
SIZES = GATED | {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HEAD = 8
ROTATING = 6  # of 8, where a part of a head rotates


def tiny(config) -> torch.nn.Module:
    """A random model that attends strongly, so that positions matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model, length: int = 100) -> torch.Tensor:
    """Of tokens up to near the end of the context."""
    with torch.no_grad():
        return model(torch.arange(3, 3 + length)[None] % VOCABULARY).logits


def read(path):
    """The model as main.py loads it."""
    return builder.find_source(str(path), "unused").load()


def assert_same(path, model) -> torch.nn.Module:
    """The file gives the model it was written from."""
    found, tokenizer = read(path)
    assert found.dtype == torch.float32 and len(tokenizer) == VOCABULARY
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    return found


FAMILIES = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=16),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES, sliding_window=20),
    "phi3, part of a head": Phi3Config(**SIZES, partial_rotary_factor=0.5),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
    "gemma2, caps": Gemma2Config(
        **SIZES, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7}, head_dim=16, query_pre_attn_scalar=16, sliding_window=16
    ),
    "starcoder2": Starcoder2Config(
        **SIZES, norm_epsilon=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    ),
    "stablelm": StableLmConfig(**SIZES, use_qkv_bias=True, partial_rotary_factor=0.5, layer_norm_eps=1e-4),
    "nemotron": NemotronConfig(**SIZES, partial_rotary_factor=0.25, norm_eps=1e-4),
    "falcon": FalconConfig(
        **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        ffn_hidden_size=48, layer_norm_epsilon=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_head=4, n_layer=3, n_positions=CONTEXT, n_inner=40),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4, n_layer=3),
}  # fmt: skip
MORE = {
    "phi3": {"attention.sliding_window": 20},
    "gemma2": {"attention.sliding_window": 16},
    "gemma2, caps": {"attention.sliding_window": 4096, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {"attention.sliding_window": 16},
    "falcon": {"attention.head_count_kv": 1, "feed_forward_length": 48},
    "gpt2": {"feed_forward_length": 40},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_the_model_it_was_written_from(family, tmp_path):
    model = tiny(FAMILIES[family])
    found = assert_same(gguf_writer.write(tmp_path / "m.gguf", model, MORE.get(family)), model)
    if family.startswith("phi3"):
        assert found.config.sliding_window == model.config.sliding_window


def scaled(kind: str, **more) -> LlamaConfig:
    return LlamaConfig(**SIZES, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **more})


def rope_freqs(config) -> torch.Tensor:
    """What the converter writes for Llama 3: by how much each frequency is divided."""
    plain = 1e4 ** (-torch.arange(0, HEAD, 2) / HEAD)
    return plain / AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (scaled("linear", factor=4.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (scaled("linear", factor=4.0), {"rope.scaling.factor": 4.0}),  # linear is llama.cpp's default
        (scaled("linear", factor=4.0), {"rope.scale_linear": 4.0}),  # older files
        (scaled("default"), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
        (scaled("yarn", factor=4.0, original_max_position_embeddings=32), YARN),
        (
            scaled("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0,
                   attention_factor=1.5 * (1 + 0.1 * math.log(4))),
            YARN
            | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 1.5},
        ),
    ],
)  # fmt: skip
def test_rope_is_scaled_as_the_file_says(config, more, tmp_path):
    model = tiny(config)
    found = assert_same(gguf_writer.write(tmp_path / "m.gguf", model, more), model)
    plain = tiny(LlamaConfig(**SIZES))
    assert (config.rope_parameters["rope_type"] == "default") == torch.allclose(logits(found), logits(plain), atol=1e-3)


def test_yarn_of_qwen2_is_read(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    model = tiny(Qwen2Config(**SIZES, rope_parameters=rope))
    assert_same(gguf_writer.write(tmp_path / "m.gguf", model, YARN), model)


def test_gemma3_scales_its_global_layers_alone(tmp_path):
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    sizes = SIZES | {"num_hidden_layers": 7, "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 16}
    model = tiny(Gemma3TextConfig(**sizes, rope_parameters=rope))
    more = {"attention.sliding_window": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert_same(gguf_writer.write(tmp_path / "m.gguf", model, more), model)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_of_llama_3_is_recognised_in_its_tensor(factor, tmp_path):
    constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    # One of the four frequencies is scaled in full and one in part, with this base.
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, **constants}
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    model = tiny(config)
    factors = 5e5 ** (-torch.arange(0, HEAD, 2) / HEAD) / model.model.rotary_emb.inv_freq
    assert factors[0] == 1 and factors[-1] == pytest.approx(factor)
    found = assert_same(gguf_writer.write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors}), model)
    assert found.config.rope_parameters["rope_type"] == "llama3"
    assert found.config.rope_parameters["factor"] == pytest.approx(factor)


def test_other_factors_of_rope_give_their_frequencies(tmp_path):
    constants = {"low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 64}
    config = scaled("llama3", factor=3.0, **constants)
    model = tiny(config)
    factors = rope_freqs(config)
    assert factors.max() > 2.9
    found = assert_same(gguf_writer.write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors}), model)
    assert not torch.allclose(logits(found), logits(tiny(LlamaConfig(**SIZES))), atol=1e-3)


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_phi3_has_its_two_lists_of_factors(part, tmp_path):
    count = int(HEAD * part) // 2
    short, long = [1.0 + 0.2 * n for n in range(count)], [1.5 + n for n in range(count)]
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": 1e4,
            "partial_rotary_factor": part}  # fmt: skip
    model = tiny(Phi3Config(**SIZES, original_max_position_embeddings=32, rope_parameters=rope))
    more = {"rope.scaling.original_context_length": 32, "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(CONTEXT / 32) / math.log(32))}  # fmt: skip
    extra = {"rope_factors_short.weight": torch.tensor(short), "rope_factors_long.weight": torch.tensor(long)}
    found = assert_same(gguf_writer.write(tmp_path / "m.gguf", model, more, extra), model)
    torch.testing.assert_close(logits(found, 20), logits(model, 20), rtol=1e-4, atol=1e-4)  # the short ones


def test_a_file_without_key_value_heads_has_as_many_as_heads(tmp_path):
    model = tiny(LlamaConfig(**SIZES | {"num_key_value_heads": 4}))
    assert_same(gguf_writer.write(tmp_path / "m.gguf", model, {"attention.head_count_kv": None}), model)


@pytest.mark.parametrize(
    ("more", "extra", "saying"),
    [
        ({"expert_count": 8}, {}, "llama.expert_count = 8"),
        ({"logit_scale": 0.5}, {}, "llama.logit_scale"),
        ({"attention.causal": False}, {}, "attention.causal"),
        ({"attention.scale": 0.1}, {}, "attention.scale"),
        ({"rope.dimension_count": ROTATING}, {}, "6 of the 8 values"),
        ({"rope.scaling.type": "magic", "rope.scaling.factor": 2.0}, {}, "rope scaling (magic, factor 2)"),
        ({"rope.scaling.factor": 2.0}, {"rope_freqs.weight": torch.ones(4) * 2}, "rope scaling"),
        ({"rope.scaling.type": "longrope"}, {"rope_factors_long.weight": torch.ones(4)}, "rope scaling"),
        ({"attention.value_length": 4}, {}, "different lengths"),
        ({"feed_forward_length": [48, 48, 40]}, {}, "given layer by layer"),
    ],
)
def test_what_cannot_be_computed_is_refused_on_the_configuration(more, extra, saying, tmp_path):
    file = gguf_writer.write(tmp_path / "m.gguf", tiny(LlamaConfig(**SIZES)), more, extra)
    with pytest.raises(UserError) as refused:
        builder.find_source(str(file), "unused").config()
    assert saying in str(refused.value) and "\n" not in str(refused.value)


def test_neutral_entries_are_passed_over(tmp_path):
    more = {"expert_count": 0, "attention.causal": True, "rope.scaling.finetuned": False}
    model = tiny(LlamaConfig(**SIZES))
    assert_same(gguf_writer.write(tmp_path / "m.gguf", model, more), model)


def test_a_tensor_without_a_place_and_a_missing_one_are_named(tmp_path):
    model = tiny(LlamaConfig(**SIZES))
    extra = {"blk.3.ffn_up.weight": torch.ones(48, 32)}
    with pytest.raises(UserError, match=r"blk\.3\.ffn_up\.weight \(of 1 such tensors\) has no place"):
        read(gguf_writer.write(tmp_path / "more.gguf", model, extra=extra))
    with pytest.raises(UserError, match=r"the file has no model\.layers\.1\.mlp\.down_proj\.weight"):
        read(gguf_writer.write(tmp_path / "less.gguf", model, without=["blk.1.ffn_down.weight"]))


def test_an_architecture_that_was_never_tested_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    writer = gguf_writer.gguf.GGUFWriter(str(file), "deepseek2")
    writer.add_block_count(2)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match="'deepseek2' cannot be read"):
        builder.find_source(str(file), "unused").config()


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF"])
def test_the_parts_of_a_split_file_are_one_model_whichever_is_named(suffix, tmp_path):
    model = tiny(LlamaConfig(**SIZES))
    first = gguf_writer.write(tmp_path / f"m{suffix}", model, parts=3)
    assert first.name == f"m-00001-of-00003{suffix}"
    assert_same(first, model)
    assert_same(tmp_path / f"m-00002-of-00003{suffix}", model)
    (tmp_path / f"m-00002-of-00003{suffix}").unlink()
    with pytest.raises(UserError, match=f"its part m-00002-of-00003{suffix} is missing"):
        builder.find_source(str(first), "unused")
    with pytest.raises(UserError, match="is one of 3 parts"):
        builder.find_source(str(first.rename(tmp_path / f"alone{suffix}")), "unused").config()


def test_nothing_that_lies_beside_a_file_is_read(tmp_path):
    model = tiny(LlamaConfig(**SIZES))
    foreign = make_tokenizer()
    foreign.add_tokens(["quick"])
    foreign.save_pretrained(tmp_path)
    tiny(LlamaConfig(**SIZES | {"num_hidden_layers": 1})).save_pretrained(tmp_path)
    found = assert_same(gguf_writer.write(tmp_path / "M.GGUF", model), model)
    assert found.config.num_hidden_layers == 3
    text = sentences(1)[0]
    _, tokenizer = read(tmp_path / "M.GGUF")
    own, expected = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, make_tokenizer()))
    assert own == expected


@pytest.mark.parametrize(
    ("entries", "begins"),
    [
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.add_bos_token": False}, False),
        ({}, False),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),  # llama.cpp's own rule for Llama 3
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_bos_is_put_where_llama_cpp_puts_it_also_after_saving(entries, begins, tmp_path):
    pre = entries.get("tokenizer.ggml.pre", "default")
    flags = {name: value for name, value in entries.items() if name != "tokenizer.ggml.pre"}
    _, tokenizer = read(gguf_writer.write(tmp_path / "m.gguf", tiny(LlamaConfig(**SIZES)), flags, pre=pre))
    tokenizer.save_pretrained(tmp_path / "saved")
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert (found("the river").input_ids[0] == 0) == begins


def test_a_pruned_gguf_keeps_its_rope_scaling_in_the_result(run_cli, tmp_path):
    model = tiny(scaled("linear", factor=4.0))
    file = gguf_writer.write(tmp_path / "M.GGUF", model, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    (tmp_path / "text.txt").write_text("\n".join(sentences(200)))
    done = run_cli("--model", file, "--dataset", tmp_path / "text.txt", "--seqlen", 32, "--nsamples", 2,
                   "--prune_method", "afr", "--pruning_ratio", 0.1, "--save_model", tmp_path / "out")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.rope_parameters["rope_type"] == "linear" and saved.config.rope_parameters["factor"] == 4
    with torch.no_grad():  # single weights are zero, all others the file's own
        for name, weight in model.named_parameters():
            kept = saved.get_parameter(name)
            assert torch.equal(kept, torch.where(kept == 0, 0, weight)), name


def test_what_was_read_of_a_file_is_let_go_of_and_can_be_read_again(tmp_path):
    source = builder.find_source(str(gguf_writer.write(tmp_path / "m.gguf", tiny(LlamaConfig(**SIZES)), {})), "")
    first = source.load()[0].state_dict()
    assert set(vars(source.gguf)) == {"path"}
    again = source.load()[0].state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_lm_eval_gets_the_model_with_its_rope_scaling(tmp_path):
    lm_harness = pytest.importorskip("lib.lm_harness")
    model = tiny(scaled("linear", factor=4.0))
    file = gguf_writer.write(tmp_path / "M.GGUF", model, {"rope.scaling.factor": 4.0})
    kind, values = tasks.arguments(str(file))[1::2]
    assert kind == "custom_checkpoint"
    harness = lm_harness.CustomCheckpoint.create_from_arg_string(values, {"device": "cpu", "batch_size": 1})
    torch.testing.assert_close(logits(harness.model), logits(model), rtol=1e-4, atol=1e-4)
    assert harness.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    with pytest.raises(UserError, match="no vision tower"):
        tasks.arguments(str(file), harness="lib.lmms")
