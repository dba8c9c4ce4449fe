"""Checkpoints that are not plain causal language models: dequantised exactly, or named in one line before scoring."""

import base64
import json
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from conftest import CONTEXT, GATED, N_LAYERS, TINY_MODELS, make_tokenizer, special_tokens
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    WhisperConfig,
)

from lib import builder, checkpoint, source_checks
from lib.errors import UserError

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def copied(tiny_model, tmp_path):
    """`copied(family)` -> a copy of a tiny model, to be changed."""
    return lambda family="llama": shutil.copytree(tiny_model(family), tmp_path / family)


def configure(folder, **fields):
    """Set fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reweigh(folder, change):
    """Replace a folder's weights by `change(weights)`."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file({k: w.contiguous() for k, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, *saying, sees=False):
    """Loading `folder` ends in one line with these words."""
    with pytest.raises(UserError) as caught:
        builder.load(str(folder), "float32", sees=sees)
    line = str(caught.value)
    assert line.startswith(f"--model {folder}: ") and "\n" not in line and len(line) < 700
    for words in saying:
        assert words in line, line


def loaded(folder):
    return builder.load(str(folder))


# --- quantised --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["modelopt", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "torchao",
                                    "aqlm", "exl2", "fbgemm_fp8", "quark", "no_such_method"])  # fmt: skip
def test_a_quantised_checkpoint_is_refused_by_its_method(method, copied):
    folder = copied()
    configure(folder, quantization_config={"quant_method": method})
    reweigh(folder, lambda held: held | {f"{UP}.qweight": torch.zeros(4, 4, dtype=torch.int32)})
    refused(folder, "quantised", f"({method}", "unquantised checkpoint", "dequantise")


@pytest.mark.parametrize(
    "field, value",
    [
        ("quantization_config", {"load_in_4bit": True}),
        ("quantization_config", {}),
        ("compression_config", {"format": "pack-quantized"}),
        ("quantization", {"group_size": 64, "bits": 4}),
        ("quantization_config", None),  # in a nested configuration
    ],
)
def test_a_configuration_that_says_quantised_of_plain_weights_says_what_to_remove(field, value, copied):
    folder = copied()
    nested = {"text_config": {field: {"quant_method": "fp8"}}}
    configure(folder, **({field: value} if value is not None else nested))
    refused(folder, "says it is quantised", "its weights are not", f"remove {field} from config.json")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_that_only_quantised_checkpoints_have_is_enough(name, copied):
    folder = copied()
    (folder / name).write_text("{}")
    refused(folder, "quantised", name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_in_a_narrow_type_are_never_taken_for_their_values(dtype, form, copied):
    folder = copied()
    reweigh(folder, lambda held: held | {f"{UP}.weight": held[f"{UP}.weight"].to(dtype)})
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    refused(folder, "quantised", f"{UP}.weight")


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "qzeros", "SCB", "weight.absmax",
                                  "weight.quant_state.bitsandbytes__nf4", "weight_packed"])  # fmt: skip
def test_scales_beside_weights_are_never_left_aside(name, copied):
    folder = copied()
    reweigh(folder, lambda held: held | {f"{UP}.{name}": torch.ones(1)})
    refused(folder, "quantised", f"{UP}.{name}")


def quantise(weight, block):
    """Float8 of blocks `[block, block]`, the last ones cut off at the edges, and the scale of each block."""
    rows, columns = (-(-size // block) for size in weight.shape)
    scale = torch.empty(rows, columns)
    values = torch.empty_like(weight.float())
    for i in range(rows):
        for j in range(columns):
            place = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale[i, j] = weight[place].abs().max() / 448
            values[place] = weight[place].float() / scale[i, j]
    return values.to(torch.float8_e4m3fn), scale


def dequantise(values, scale, block):
    grown = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return values.float() * grown[: values.shape[0], : values.shape[1]]


@pytest.fixture
def fp8(copied):
    """`fp8(block)` -> a tiny Llama in fine-grained float8 (None: one scale per weight), and its true weights."""

    def write(block):
        folder, true = copied(), {}

        def change(held):
            new = {}
            for name, weight in held.items():
                if "proj" not in name:
                    new[name] = true[name] = weight.bfloat16()
                    continue
                values, scale = quantise(weight, block or max(weight.shape))
                true[name] = dequantise(values, scale, block or max(weight.shape))
                new |= {name: values, f"{name}_scale_inv": scale if block else scale[0, 0].clone()}
                if not block:
                    new[name.replace("weight", "activation_scale")] = torch.tensor(0.01)
            return new

        reweigh(folder, change)
        settings = {"quant_method": "fp8", "weight_block_size": [block, block] if block else None, "fmt": "e4m3",
                    "activation_scheme": "dynamic" if block else "static",
                    "modules_to_not_convert": ["lm_head"]}  # fmt: skip
        configure(folder, dtype="bfloat16", quantization_config=settings)
        return folder, true

    return write


@pytest.mark.parametrize("block", [8, 16, None])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_fine_grained_float8_is_dequantised_exactly(block, dtype, fp8):
    folder, true = fp8(block)
    source = builder.find_source(str(folder), "")
    model = source.model(builder.DTYPES.get(dtype, "auto"))
    wanted = torch.bfloat16 if dtype == "auto" else torch.float32
    held = model.state_dict()
    assert set(held) == set(true)
    for name, weight in held.items():
        assert weight.dtype == wanted and torch.equal(weight, true[name].to(wanted)), name
    assert "quantization_config" not in model.config.to_dict()


def test_float8_blocks_that_an_edge_cuts_off_are_refused(fp8):
    folder, _ = fp8(32)  # of 48 rows the second block has 16; transformers takes two of 24
    refused(folder, "fp8", "proj.weight [", "whole blocks of [32, 32]", "dequantise")


@pytest.mark.parametrize("change", [lambda scale: None, lambda scale: scale.to(torch.float8_e8m0fnu)])
def test_float8_without_a_plain_scale_is_refused(change, fp8):
    folder, _ = fp8(16)
    name = f"{UP}.weight_scale_inv"
    reweigh(folder, lambda held: {k: v for k, v in (held | {name: change(held[name])}).items() if v is not None})
    refused(folder, "fp8", f"{UP}.weight", "no scale")


@pytest.mark.parametrize("scope", [["--global_pruning"], ["--save_format", "both"]])
def test_every_form_of_a_pruned_float8_checkpoint_holds_the_dequantised_weights(
    scope, fp8, data_dir, run_cli, tmp_path
):
    folder, true = fp8(16)
    done = run_cli("--model", folder, "--data_dir", data_dir, "--nsamples", 4, "--seqlen", 32, "--pruning_ratio", 0.25,
                   *scope, "--save_model", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    kept = load_file(tmp_path / "out" / checkpoint.KEPT_NEURONS)
    for model in (checkpoint.load_folder(tmp_path / "out"), checkpoint.load_bin(tmp_path / "out")[0]):
        for name, rows in kept.items():
            wanted = true[f"{name}.up_proj.weight"][rows].bfloat16()
            assert torch.equal(model.get_submodule(name).up_proj.weight, wanted)
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight,
                           true["model.layers.0.self_attn.q_proj.weight"].bfloat16())  # fmt: skip
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- adapters, other forms, incomplete ---------------------------------------------------------------


def test_an_adapter_is_to_be_merged_first(copied, tmp_path):
    folder = copied()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    refused(folder, "adapter", "beside a model", "merge", "merge_and_unload", "delete adapter_config.json")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    refused(folder, "adapter", "some/base", "merge_and_unload")


def test_an_adapter_within_the_weights_is_to_be_merged_first(copied):
    folder = copied()
    reweigh(folder, lambda held: held | {f"{UP}.lora_A.default.weight": torch.ones(2, 32)})
    refused(folder, "lora_A", "adapter", "merge")


@pytest.mark.parametrize(
    "name, saying",
    [
        ("consolidated.00.pth", "convert"),
        ("tf_model.h5", "torch"),
        ("flax_model.msgpack", "torch"),
        ("model.onnx", "torch checkpoint"),
        ("mine.gguf", "mine.gguf"),
        ("qmodel.pt", "HQQ"),
        ("model.bin", "result of this tool"),
        ("model.fp16.safetensors", "rename"),
        ("adapter_model.safetensors", "merge"),
    ],
)
def test_weights_in_another_form_alone_are_named(name, saying, copied):
    folder = copied()
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, name, saying)


@pytest.fixture
def sharded(copied):
    folder = copied()
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder.parent / "whole.safetensors")
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def test_shards_load_as_they_were_saved(sharded, tiny_model):
    wanted, found = load_file(tiny_model("llama") / "model.safetensors"), builder.find_source(str(sharded), "").model()
    assert all(torch.equal(wanted[name], weight) for name, weight in found.state_dict().items())


def test_a_shard_that_the_index_does_not_name_is_named(sharded):
    shutil.copy(next(sharded.glob("model-00001*")), sharded / "model-00009-of-00009.safetensors")
    refused(sharded, "model-00009-of-00009.safetensors", "index", "delete")


def test_a_shard_that_is_missing_is_named(sharded):
    lost = next(sharded.glob("model-00002*"))
    lost.unlink()
    refused(sharded, lost.name)


def test_two_checkpoints_in_one_folder_are_told_apart_only_by_the_user(sharded):
    shutil.copy(sharded.parent / "whole.safetensors", sharded / "model.safetensors")
    loaded(sharded)  # the same weights twice
    reweigh(sharded, lambda held: {name: weight for name, weight in held.items() if ".layers.2." not in name})
    refused(sharded, "both model.safetensors and model.safetensors.index.json", "delete")


# --- weights left over ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, saying",
    [
        ("score.weight", "head of another task"),
        ("v_head.summary.weight", "head of another task"),
        ("classifier.dense.weight", "head of another task"),
        ("model.vision_tower.layers.0.weight", "images or sound"),
        ("model.encoder.layers.0.fc1.weight", "an encoder"),
        ("model.layers.0.self_attn.q_proj.bias", "no such weights"),
        ("model.no_such_part.weight", "no such weights"),
    ],
)
def test_a_weight_left_over_is_named_with_what_it_is(name, saying, copied):
    folder = copied()
    reweigh(folder, lambda held: held | {name: torch.ones(2, 32)})
    refused(folder, name, "left out", saying)


def test_layers_beyond_the_configuration_are_counted(copied):
    folder = copied()
    configure(folder, num_hidden_layers=N_LAYERS - 1)
    refused(folder, "model.layers.2.", f"has {N_LAYERS} layers", f"says {N_LAYERS - 1}", "correct")


def test_a_weight_of_another_shape_is_named_with_both_shapes(copied):
    folder = copied()
    reweigh(folder, lambda held: held | {f"{UP}.weight": torch.ones(40, 32)})
    refused(folder, f"{UP}.weight", "[40, 32]", "[48, 32]")


def test_a_body_without_a_head_is_no_language_model(copied):
    folder = copied()
    reweigh(folder, lambda held: {name: weight for name, weight in held.items() if name != "lm_head.weight"})
    refused(folder, "lm_head.weight", "no head", "causal model")


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_is_not_dropped_for_the_embeddings(own, copied):
    folder = copied()
    configure(folder, tie_word_embeddings=True)
    if own:
        refused(folder, "tie_word_embeddings", "head of its own")
        return
    reweigh(folder, lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    model = loaded(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_buffers_of_older_versions_are_passed_over(copied):
    folder = copied()
    reweigh(folder, lambda held: held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                                         "model.rotary_emb.cos_cached": torch.ones(4)})  # fmt: skip
    assert loaded(folder).notes == {}
    folder = copied("gpt2")  # as published: without the prefix, with masks
    reweigh(folder, lambda held: {name.removeprefix("transformer."): weight for name, weight in held.items()}
            | {"h.0.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.uint8),
               "h.0.attn.masked_bias": torch.tensor(-1e4)})  # fmt: skip
    assert loaded(folder).notes == {}


def test_a_head_that_predicts_more_tokens_is_left_out_and_said_so(copied, data_dir, run_cli):
    folder = copied()
    reweigh(folder, lambda held: held | {"mtp.fc.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(4)})
    done = run_cli("--model", folder, "--data_dir", data_dir, "--nsamples", 2, "--seqlen", 16)
    assert done.code == 0, done.err
    assert "left out" in done.out and "mtp.fc.weight and 1 more" in done.out


def test_a_vision_tower_that_the_language_model_leaves_out_is_named(tmp_path):
    text = GATED | special_tokens() | {"head_dim": 8, "layer_types": ["full_attention"] * N_LAYERS}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "num_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(0)
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    whole.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    found = builder.load(str(tmp_path / "model"), "float32")
    assert found.notes["left out"].startswith("model.visual.") and len(found.layers) == N_LAYERS
    wanted = whole.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(found.model.model.layers[1].mlp.up_proj.weight, wanted)


# --- other tasks ------------------------------------------------------------------------------------


def test_a_classifier_is_refused_on_its_configuration(tmp_path):
    config = Qwen2Config(**GATED, **special_tokens(), tie_word_embeddings=True)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    for shard in (tmp_path / "reward").glob("*.safetensors"):
        shard.write_bytes(b"")
    refused(tmp_path / "reward", "Qwen2ForSequenceClassification", "causal model")


@pytest.mark.parametrize(
    "fields, saying",
    [
        ({"architectures": ["InternLM2ForRewardModel"]}, "InternLM2ForRewardModel"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "draft head"),
        ({"use_bidirectional_attention": True}, "no causal language model"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_a_model_for_something_else_is_refused_on_its_configuration(fields, saying, copied):
    folder = copied()
    configure(folder, **fields)
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, saying, "model")


def test_an_encoder_decoder_is_refused_on_its_configuration(tmp_path):
    WhisperConfig().save_pretrained(tmp_path / "whisper")
    refused(tmp_path / "whisper", "'whisper'", "encoder-decoder", "causal language model")


@pytest.mark.parametrize("family", TINY_MODELS)
def test_plain_checkpoints_of_every_family_stay_welcome(family, tiny_model):
    found = loaded(tiny_model(family))
    assert found.notes == {} and not source_checks.left_out(found.model, found.source.files)


# --- dtypes and attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("named, held", [("bfloat16", torch.float32), ("float16", torch.bfloat16)])
def test_the_weights_own_dtype_counts_not_the_one_in_the_configuration(named, held, copied):
    folder = copied()
    reweigh(folder, lambda weights: {name: weight.to(held) for name, weight in weights.items()})
    configure(folder, dtype=named)
    model = builder.find_source(str(folder), "").model()
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], weight) and model.state_dict()[name].dtype == held


def test_weights_that_are_rounded_to_the_others_dtype_are_named(copied):
    folder = copied()
    reweigh(folder, lambda held: {n: w if "norm" in n else w.bfloat16() for n, w in held.items()})
    configure(folder, dtype="bfloat16")
    assert "model.layers.0.input_layernorm.weight and 6 more" in loaded(folder).notes["rounded"]


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bloat16", "auto", 5, ["float32"]])
def test_a_dtype_that_does_not_exist_is_named(field, value, copied):
    folder = copied()
    configure(folder, **{"dtype": None, field: value})
    refused(folder, f"{field} {value}", "bfloat16")


@pytest.mark.parametrize("value", ["flash_attention_2", "some-org/some-kernel", "eager", "nonsense"])
def test_the_attention_is_never_the_configurations_choice(value, copied, data_dir, run_cli, tmp_path):
    folder = copied()
    configure(folder, attn_implementation=value, _attn_implementation=value, _attn_implementation_internal=value,
              experts_implementation=value, output_attentions=value == "eager")  # fmt: skip
    assert loaded(folder).model.config._attn_implementation == "sdpa"
    if value == "flash_attention_2":
        done = run_cli("--model", folder, "--data_dir", data_dir, "--nsamples", 2, "--seqlen", 16, "--save_model",
                       tmp_path / "out")  # fmt: skip
        assert done.code == 0, done.err
        assert value not in (tmp_path / "out" / "config.json").read_text()


# --- tokenizers -------------------------------------------------------------------------------------


def protobuf(number: int, value: bytes | int | float) -> bytes:
    """A field of a protocol buffer message."""

    def varint(rest):
        out = b""
        while rest > 127:
            out, rest = out + bytes([rest & 127 | 128]), rest >> 7
        return out + bytes([rest])

    if isinstance(value, bytes):
        return varint(number * 8 + 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    return varint(number * 8) + varint(value)


def sentencepiece_model(prefix: int = 1, user_defined: bool = False, kind: int = 2) -> bytes:
    """A model of sentencepiece like Llama's: special tokens, bytes, two merges and letters."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(["▁h", "er", *"▁her"])]
    pieces += [("[USER]", 0.0, 4)] if user_defined else []
    message = b"".join(
        protobuf(1, protobuf(1, text.encode()) + protobuf(2, score) + protobuf(3, number))
        for text, score, number in pieces
    )
    return message + protobuf(2, protobuf(3, kind)) + protobuf(3, protobuf(3, prefix) + protobuf(4, 0))


@pytest.fixture
def without_tokenizer(copied):
    folder = copied()
    for file in folder.glob("token*"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    "settings, first",
    [
        (None, [1]),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "", "sp_model_kwargs": {}}, [1]),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, []),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": {"__type": "AddedToken", "content": "<s>"}}, [1]),
    ],
)
def test_llamas_tokenizer_model_alone_gives_sentencepieces_tokens(settings, first, without_tokenizer):
    (without_tokenizer / "tokenizer.model").write_bytes(sentencepiece_model())
    if settings:
        (without_tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    configure(without_tokenizer, vocab_size=320)
    tokenizer = loaded(without_tokenizer).tokenizer
    # By hand: a space before the text, "▁h" and "er" merged by rank, "é" in bytes, pieces from 259 on.
    wanted = [259, 260, 261, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer("her é").input_ids == first + wanted
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    "change", [{"prefix": 0}, {"user_defined": True}, {"kind": 1}], ids=["no prefix", "user-defined", "unigram"]
)
def test_a_sentencepiece_model_of_another_kind_is_refused(change, without_tokenizer):
    (without_tokenizer / "tokenizer.model").write_bytes(sentencepiece_model(**change))
    refused(without_tokenizer, "tokenizer.model", "tokenizer.json")


@pytest.mark.parametrize("name", ["tekken.json", "qwen.tiktoken", "tokenizer.model.v3", "tokenizer.model"])
def test_tokenizers_in_other_forms_are_refused_before_weights_are_read(name, without_tokenizer):
    (without_tokenizer / name).write_text("\n".join(f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)))
    (without_tokenizer / "model.safetensors").write_bytes(b"")
    refused(without_tokenizer, name, "tokenizer.json")


def test_a_checkpoint_without_a_tokenizer_is_not_given_an_empty_one(without_tokenizer):
    (without_tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    refused(without_tokenizer, "no tokenizer", "tokenizer.json")


# --- the Hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repository, some/model, in a folder; headers are served, weights are not."""
    folder = tmp_path / "hub"

    class Api:
        def list_repo_files(self, name):
            assert name == "some/model"
            return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]

        def get_safetensors_metadata(self, name):
            held = source_checks._header(folder / "model.safetensors")
            tensors = {key: SimpleNamespace(dtype=dtype, shape=list(shape)) for key, (dtype, shape) in held.items()}
            return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    def download(name, filename, cache_dir):
        assert (name, cache_dir) == ("some/model", "cache") and not filename.endswith("safetensors")
        return str(folder / filename)

    monkeypatch.setattr(source_checks, "HfApi", Api)
    monkeypatch.setattr(source_checks, "hf_hub_download", download)
    return folder


@pytest.mark.parametrize(
    "change, saying",
    [
        (lambda folder: configure(folder, quantization_config={"quant_method": "awq"}), "awq"),
        (lambda folder: (folder / "hf_quant_config.json").write_text("{}"), "ModelOpt"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}'), "merge"),
        (lambda folder: reweigh(folder, lambda held: held | {"a.weight_scale": torch.ones(1)}), "weight_scale"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"), "tf_model.h5"),
    ],
)
def test_a_name_on_the_hub_is_checked_before_its_weights_are_fetched(change, saying, hub, tiny_model):
    shutil.copytree(tiny_model("llama"), hub)
    files = source_checks.Files("some/model", "cache")
    source_checks.refuse_on_sight(files)
    assert files.dtype == torch.float32
    change(hub)
    with pytest.raises(UserError, match=saying):
        source_checks.refuse_on_sight(source_checks.Files("some/model", "cache"))


def test_the_hubs_cache_is_enough_without_a_network(tiny_model, tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    shutil.copytree(tiny_model("llama"), snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123")
    files = source_checks.Files("some/model", str(tmp_path))
    source_checks.refuse_on_sight(files)
    assert files.dtype == torch.float32 and f"{UP}.weight" in files.tensors
    (snapshot / "quantize_config.json").write_text("{}")
    with pytest.raises(UserError, match="GPTQ"):
        source_checks.refuse_on_sight(source_checks.Files("some/model", str(tmp_path)))


def test_a_hub_out_of_reach_leaves_the_word_to_the_loader(tmp_path):
    files = source_checks.Files("some/other", str(tmp_path))
    source_checks.refuse_on_sight(files)
    assert files.tensors == {} and files.dtype is None and files.json("config.json") == {}
