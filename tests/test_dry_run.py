"""What would refuse a run at its end refuses it before scoring, and a dry run that succeeds leaves no trace."""

import argparse
import inspect
import json

import pytest
import torch
from conftest import GATED, files_below, sentences, special_tokens, write_model
from transformers import (
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MiniCPM3Config,
    RecurrentGemmaConfig,
    ZambaConfig,
)

from lib import builder, checkpoint, dry_run, evaluate, prune, steps
from lib.summary import Run


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(sentences(200)))
    return tmp_path / "text.txt"


@pytest.fixture
def scored(monkeypatch):
    """The numbers of calibration batches that were scored, dry runs left out."""
    found, score = [], prune.score

    def watched(model, layers, batches, *args, **kwargs):
        if not kwargs.get("alone"):
            found.append(len(batches))
        return score(model, layers, batches, *args, **kwargs)

    monkeypatch.setattr(prune, "score", watched)
    return found


def arguments(model, text, *more):
    return ["--model", model, "--dataset", text, "--seqlen", 16, "--nsamples", 4, "--pruning_ratio", 0.25,
            "--dtype", "float32", *more]  # fmt: skip


def test_a_failure_of_the_library_is_one_line_before_scoring(tiny_model, text, run_cli, scored, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ValueError("no\nsuch layout")

    monkeypatch.setattr(checkpoint, "save_folder", fail)
    before = set(tmp_path.iterdir())
    done = run_cli(*arguments(tiny_model("llama"), text, "--save_model", tmp_path / "out"))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "before scoring (ValueError: no such layout)" in done.err and "'llama'" in done.err
    assert scored == [] and set(tmp_path.iterdir()) == before


def test_a_model_that_cannot_be_run_is_refused_before_scoring(text, run_cli, scored, tmp_path):
    # Keys and values have a head for each query, whatever the configuration says, so attention cannot repeat them.
    sizes = GATED | dict(num_hidden_layers=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8)
    model = write_model(MiniCPM3Config(**sizes, v_head_dim=8, **special_tokens()), tmp_path / "model")
    done = run_cli(*arguments(model, text))
    assert done.code == 2 and done.err.count("\n") == 1 and "cannot be run" in done.err
    assert scored == []


def test_a_form_that_does_not_load_back_is_refused_at_once(tiny_model, text, run_cli, scored, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "load_bin", lambda path: 1 / 0)
    done = run_cli(*arguments(tiny_model("llama"), text, "--save_model", tmp_path / "out", "--save_format", "bin"))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "bin form" in done.err and "(a dry run, before scoring)" in done.err
    assert scored == [] and not (tmp_path / "out").exists()
    done = run_cli(
        *arguments(tiny_model("llama"), text, "--save_model", tmp_path / "out", "--save_format", "bin", "--no_verify")
    )
    assert done.code == 0 and scored == [4]


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), torch.OutOfMemoryError()])
def test_want_of_room_in_the_dry_run_alone_refuses_nothing(tiny_model, text, run_cli, monkeypatch, tmp_path, error):
    write = steps.write

    def short(args, folder, *rest):
        if "dry-run" in str(folder):
            raise error
        return write(args, folder, *rest)

    monkeypatch.setattr(steps, "write", short)
    done = run_cli(*arguments(tiny_model("llama"), text, "--save_model", tmp_path / "out"))
    assert done.code == 0 and (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset", "self_generated", "--global_pruning", "--compensate", "auto", "--rounds", 2, "--nsamples", 16],
        ["--prune_method", "afr", "--batch_size", 2],
        ["--prune_method", "random"],
        ["--prune_method", "structured_wanda", "--offload", "disk"],
    ],
    ids=lambda flags: flags[1],
)
def test_results_are_the_same_bytes_with_and_without_a_dry_run(tiny_model, text, run_cli, monkeypatch, tmp_path, flags):
    def result(folder):
        done = run_cli(*arguments(tiny_model("llama"), text, *flags, "--save_model", folder))
        assert done.code == 0, done.err
        return {name: held for name, held in files_below(folder).items() if name.endswith(".safetensors")}

    ran = []
    run = dry_run._run
    with monkeypatch.context() as patch:
        patch.setattr(dry_run, "_run", lambda *args: ran.append(run(*args)))
        with_one = result(tmp_path / "with")
    monkeypatch.setattr(dry_run, "dry_run", lambda *args: None)
    assert ran == [None] and with_one == result(tmp_path / "without")


def loaded_of(config, tmp_path):
    folder = write_model(config, tmp_path / "model")
    return builder.load(str(folder), "float32")


LONG_SHORT = ["sliding_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize(
    "config, count",
    [
        (LlamaConfig(**GATED | {"num_hidden_layers": 6}), 2),
        (LlamaConfig(**GATED | {"num_hidden_layers": 1}), 1),
        (GPT2Config(n_embd=24, n_head=4, n_layer=4, n_positions=128), 2),
        # As many heads as layers: only the layers become fewer.
        (LlamaConfig(**GATED | {"num_hidden_layers": 4}), 2),
        (Gemma3TextConfig(**GATED | dict(num_hidden_layers=8, head_dim=8, layer_types=LONG_SHORT * 2)), 4),
        (Gemma4TextConfig(**GATED | dict(num_hidden_layers=8, head_dim=8, global_head_dim=16,
            layer_types=LONG_SHORT * 2, vocab_size_per_layer_input=640,
            hidden_size_per_layer_input=8, num_kv_shared_layers=0)), 4),  # fmt: skip
    ],
    ids=["llama", "one layer", "gpt2", "as many heads", "gemma3", "gemma4"],
)
def test_the_cut_model_has_every_kind_of_layer_with_copies_of_the_models_weights(config, count, tmp_path):
    for name, value in (special_tokens() | {"vocab_size": 640}).items():
        setattr(config, name, value)
    loaded = loaded_of(config, tmp_path)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    cut = dry_run._cut(loaded)
    assert len(cut.layers) == count
    weights = cut.model.state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name][tuple(slice(0, size) for size in weight.shape)])
    for weight in weights.values():
        weight.zero_()
    assert cut.model.get_input_embeddings().weight.shape[0] == dry_run.VOCABULARY
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_dry_run_changes_neither_the_model_nor_random_numbers_nor_peaks(tiny_model, tmp_path):
    loaded = builder.load(str(tiny_model("gpt2")), "float32")
    args = argparse.Namespace(
        model="m", prune_method="structured_snip", pruning_ratio=0.3, neuron_score="snr", rounds=1, batch_size=1,
        nsamples=8, scores=None,
        seed=0, global_pruning=True, align=1, compensate="ridge", report=False, save_model="out", save_format="both",
        dtype="auto", towers="both", no_verify=False, eval_ppl=True, eval_speed=True)  # fmt: skip
    record = Run(vars(args))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    state = torch.random.get_rng_state()
    dry_run.dry_run(args, loaded, [0.0, 0.3], record)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert not record.peak_bytes and not record.speed and set(record.seconds) <= {"dry run"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


# --- what is refused on the configuration -----------------------------------------------------------

GEMMA3N = GATED | dict(
    num_hidden_layers=4, intermediate_size=[48] * 4, head_dim=8, vocab_size_per_layer_input=320,
    hidden_size_per_layer_input=8, laurel_rank=4, layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip


@pytest.mark.parametrize(
    "config, saying",
    [
        (Gemma3nTextConfig(**GEMMA3N, num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4), "share keys"),
        (Gemma3nTextConfig(**GEMMA3N, num_kv_shared_layers=0, activation_sparsity_pattern=[0.9] + [0.0] * 3),
         "model.layers.0.mlp keeps its largest activations"),
        (Gemma4TextConfig(**GATED | dict(num_hidden_layers=4, head_dim=8, global_head_dim=8, num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2)), "share keys"),
        (ZambaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, vocab_size=320,
            num_key_value_heads=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8), "share one MLP"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_layer_by_layer_is_refused_without_weights(config, saying, text, run_cli, tmp_path):
    config.save_pretrained(tmp_path / "model")
    done = run_cli(*arguments(tmp_path / "model", text))
    assert done.code == 2 and done.err.count("\n") == 1 and saying in done.err


# --- speed ------------------------------------------------------------------------------------------

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
SHORT = {
    "gpt2": GPT2Config(n_embd=24, n_head=4, n_layer=2, n_positions=24, **special_tokens()),
    "dynamic": LlamaConfig(**GATED | special_tokens() | dict(max_position_embeddings=24, rope_parameters=DYNAMIC)),
    "no cache": RecurrentGemmaConfig(**GATED | special_tokens() | dict(
        max_position_embeddings=16, num_key_value_heads=1, lru_width=32, attention_window_size=16, head_dim=8,
        block_types=["recurrent", "recurrent", "attention"])),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_speed_is_measured_within_the_context_and_the_result_is_right(name, text, run_cli, tmp_path):
    model = write_model(SHORT[name], tmp_path / "model")
    done = run_cli(*arguments(model, text, "--nsamples", 4, "--eval_speed", "--save_model", tmp_path / "out"))
    assert done.code == 0, done.err
    speeds = json.loads((tmp_path / "out" / "pruning.json").read_text())["tokens_per_second"]
    assert all(speeds[of][what] > 0 for of in ("dense", "pruned") for what in ("prefill", "decode"))


@pytest.mark.parametrize("name", ["gpt2", "dynamic"])
def test_no_sequence_is_longer_than_the_context(name, tmp_path):
    model = loaded_of(SHORT[name], tmp_path).model
    longest, forward = [], model.forward

    def watched(ids, **kwargs):
        past = kwargs.get("past_key_values")
        longest.append(ids.shape[1] + (past.get_seq_length() if past is not None else 0))
        return forward(ids, **kwargs)

    watched.__signature__ = inspect.signature(forward)
    model.forward = watched
    evaluate.speed(model, torch.arange(300) % 300, 24, repeats=1)
    assert max(longest) == 24


def test_a_model_without_a_cache_decodes_what_it_would_with_all_it_wrote(tmp_path):
    model = loaded_of(SHORT["no cache"], tmp_path).model
    read, forward = [], model.forward

    def watched(ids, **kwargs):
        read.append(ids)
        return forward(ids, **kwargs)

    watched.__signature__ = inspect.signature(forward)
    model.forward = watched
    evaluate.speed(model, torch.tensor([5, 6, 7]), 128, decode_tokens=4, repeats=1)
    written = read[-1][0]
    assert len(written) == 4
    for length in range(1, 4):
        assert forward(written[None, :length], use_cache=False).logits[0, -1].argmax() == written[length]
