"""Wrong input, full disks and Ctrl-C: one line that says what to do, the right exit code, and nothing left on disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    GATED,
    ROOT,
    files_below,
    fresh_environment,
    save_made_up_set,
    save_set,
    special_tokens,
    write_model,
)
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    T5Config,
)

from lib import filesystem


@pytest.fixture
def scratch(tmp_path_factory, monkeypatch) -> Path:
    """An empty folder for temporary files, so that what is left there shows."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def flags(tiny_model, data_dir, tmp_path) -> list:
    """A command that works; flags given after these count."""
    return [
        "--model",
        tiny_model("llama"),
        "--data_dir",
        data_dir,
        "--dtype",
        "float32",
        "--nsamples",
        4,
        "--seqlen",
        32,
        "--pruning_ratio",
        0.2,
        "--save_model",
        tmp_path / "result",
    ]


@pytest.fixture
def fails(run_fresh, scratch, flags, tmp_path):
    """`fails(*more flags, saying=words)`: the command ends in one line with these words, and no file has changed."""

    def check(*more, saying, using=None, largest_file=None):
        before = files_below(tmp_path)
        done = run_fresh(
            *(flags if using is None else using), *more, env={"TMPDIR": str(scratch)}, largest_file=largest_file
        )
        assert_one_line(done, 2, "error: ")
        for words in saying:
            assert words in done.err
        assert files_below(tmp_path) == before
        assert not list(scratch.iterdir())

    return check


def assert_one_line(done, code, start):
    assert done.err.startswith(start), done.err
    assert done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert len(done.err) < 700
    assert (done.code, done.out) == (code, "")


def test_the_command_that_all_these_change_works(run_fresh, flags, scratch, tmp_path):
    done = run_fresh(*flags, env={"TMPDIR": str(scratch)})
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "result" / "model.safetensors").exists()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_model_that_takes_one_token_is_refused_unread(length, tiny_model, data_dir, run_cli, tmp_path):
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": length}))
    done = run_cli("--model", copy, "--data_dir", data_dir)
    assert_one_line(done, 2, "error: ")
    assert "--model" in done.err and f"max_position_embeddings {length};" in done.err and "next token" in done.err


@pytest.mark.parametrize("record", ['{"text": "cut off \\ud83d"}', '{"text": null}', '{"text": 7}', '{"text": "a'])
def test_a_record_that_is_no_text_is_named_before_the_model_is_read(record, run_cli, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "one"}\n' * 17 + record)
    done = run_cli("--model", tmp_path / "no-model-here", "--dataset", tmp_path / "own.jsonl")
    assert_one_line(done, 2, "error: ")
    assert "row 17 (line 18)" in done.err


def test_a_null_row_of_a_set_is_named_before_the_model_is_read(run_cli, tmp_path):
    DatasetDict({"train": Dataset.from_dict({"text": ["one", None]})}).save_to_disk(tmp_path / "data" / "wikitext2")
    done = run_cli("--model", tmp_path / "no-model-here", "--data_dir", tmp_path / "data")
    assert_one_line(done, 2, "error: ")
    assert "row 1: 'text' is null" in done.err


# --- flags ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, saying",
    [
        (["--pruning_ratio", "1.0"], ["--pruning_ratio 1.0", "less than 1", "0.2 removes 20%"]),
        (["--pruning_ratio", "-0.1"], ["--pruning_ratio -0.1", "at least 0"]),
        (["--pruning_ratio", "nan"], ["--pruning_ratio nan", "less than 1"]),
        (["--pruning_ratio", "inf"], ["--pruning_ratio inf", "less than 1"]),
        (["--pruning_ratio", "half"], ["--pruning_ratio", "half", "--help"]),
        (["--nsamples", "0"], ["--nsamples 0", "at least 1"]),
        (["--nsamples", "-3"], ["--nsamples -3", "at least 1"]),
        (["--nsamples", "2.5"], ["--nsamples", "2.5"]),
        (["--seqlen", "1"], ["--seqlen 1", "at least 2"]),
        (["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
        (["--seed", "-1"], ["--seed -1", "at least 0"]),
        (["--align", "0"], ["--align 0", "at least 1"]),
        (["--eval_windows", "0"], ["--eval_windows 0", "at least 1"]),
        (["--eval_seqlen", "1"], ["--eval_seqlen 1", "at least 2"]),
        (["--align", "64"], ["--align 64", "48"]),
        (["--align", "64", "--global_pruning"], ["--align 64", "48"]),
        (["--align", "4", "--prune_method", "afr"], ["--align 4", "afr"]),
        (["--neuron_score", "snr", "--prune_method", "afr"], ["--neuron_score snr", "afr", "structured_snip"]),
        (["--neuron_score", "snr", "--prune_method", "structured_flap"], ["--neuron_score snr", "structured_flap"]),
        (["--prune_method", "obesity"], ["--prune_method", "obesity", "structured_afr", "refer_svd"]),
        (["--neuron_score", "max"], ["--neuron_score", "max", "trimmed_mean"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--save_format", "onnx"], ["--save_format", "onnx", "both"]),
        (["--prune_ratio", "0.5"], ["--prune_ratio", "--help"]),
        (["--pruning", "0.5"], ["--pruning", "--help"]),
        (["stray"], ["stray", "--help"]),
        (["--dataset", "wikitext3"], ["--dataset wikitext3", "wikitext2", "self_generated", ".jsonl"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_it_takes(more, saying, fails):
    fails(*more, saying=saying)


def test_the_model_is_asked_for(fails):
    fails(using=[], saying=["--model", "--help"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_so(fails):
    fails("--cuda", saying=["--cuda", "no CUDA GPU", "CPU"])


# --- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, saying",
    [
        ("./nowhere", ["no such folder", "Hub name"]),
        ("nowhere/at/all", ["no such folder", "Hub name"]),
        ("/nowhere", ["no such folder", "Hub name"]),
        ("nowhere", ["no such folder", "network"]),
        ("some-company/no-such-model", ["no such folder", "network"]),
        ("nowhere.gguf", ["no such file"]),
        ("", []),
    ],
)
def test_an_unknown_model_says_where_it_was_looked_for(name, saying, fails):
    fails("--model", name, saying=[f"--model {name}", *saying])


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A copy of a tiny Llama, to be damaged."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "broken")


def change_weights(folder, change):
    """Apply `change` to the dictionary of a checkpoint's weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_without_config_is_no_model(broken, fails):
    (broken / "config.json").unlink()
    fails("--model", broken, saying=[str(broken), "config.json"])


def test_a_file_is_no_model(broken, fails):
    fails("--model", broken / "config.json", saying=[str(broken), "give a local folder", ".gguf"])


@pytest.mark.parametrize("text", ["", "{ not json", "[]", "{}", '{"model_type": "no_such_family"}'])
def test_a_damaged_config_is_one_line(text, broken, fails):
    (broken / "config.json").write_text(text)
    fails("--model", broken, saying=[f"--model {broken}"])


def test_a_folder_without_weights_is_one_line(broken, fails):
    (broken / "model.safetensors").unlink()
    fails("--model", broken, saying=[f"--model {broken}", "model.safetensors"])


def test_a_number_in_a_folders_name_is_not_taken_for_a_refusal_of_the_hub(broken, tmp_path, fails):
    (broken / "model.safetensors").unlink()
    broken.rename(tmp_path / "llama-403b")
    fails("--model", tmp_path / "llama-403b", saying=["incomplete", "model.safetensors"])


def test_weights_cut_short_are_one_line(broken, fails):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    fails("--model", broken, saying=[f"--model {broken}", "incomplete"])


def test_a_checkpoint_that_lacks_a_weight_is_not_filled_with_random_numbers(broken, fails):
    change_weights(broken, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    fails("--model", broken, saying=[f"--model {broken}", "model.layers.1.mlp.up_proj.weight"])


def test_a_weight_of_another_shape_is_named(broken, fails):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(broken, lambda weights: weights.update({name: weights[name][:40].clone()}))
    fails("--model", broken, saying=[f"--model {broken}"])


def test_a_folder_without_a_tokenizer_is_one_line(broken, fails):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    fails("--model", broken, saying=[f"--model {broken}", "tokenizer"])


def test_a_damaged_tokenizer_is_one_line(broken, fails):
    (broken / "tokenizer.json").write_text("{ not json")
    fails("--model", broken, saying=[f"--model {broken}"])


def test_a_tokenizer_with_more_tokens_than_the_model_is_one_line(tmp_path, fails):
    small = write_model(LlamaConfig(**GATED, **special_tokens() | {"vocab_size": 64}), tmp_path / "small")
    fails("--model", small, saying=["--model", "tokenizer", "64"])


def test_a_file_that_only_claims_to_be_gguf_is_one_line(tmp_path, fails):
    (tmp_path / "model.gguf").write_bytes(b"GGUF but nothing more")
    fails("--model", tmp_path / "model.gguf", saying=[f"--model {tmp_path / 'model.gguf'}"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named_with_the_dtype_to_try(name, value, broken, fails):
    change_weights(broken, lambda weights: weights[name].view(-1)[5].fill_(value))
    fails("--model", broken, saying=["--model", name, "NaN", "--dtype"])


def test_weights_that_overflow_in_the_chosen_dtype_say_which_one_holds_them(broken, fails):
    change_weights(broken, lambda weights: weights["model.layers.2.mlp.down_proj.weight"].view(-1)[0].fill_(1e6))
    fails(
        "--model",
        broken,
        "--dtype",
        "float16",
        saying=["model.layers.2.mlp.down_proj.weight", "float16", "--dtype float32"],
    )


def test_activations_that_overflow_name_the_layer(broken, fails):
    change_weights(broken, lambda weights: weights["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    fails("--model", broken, saying=["layers.1", "not finite", "--dtype"])


def test_embeddings_beyond_what_norms_can_square_are_named(broken, fails):
    change_weights(broken, lambda weights: weights["model.embed_tokens.weight"][7].fill_(1e38))
    fails("--model", broken, saying=["embeddings", "1e+38", "fetch it again"])


# Configurations alone: the family is refused before any weight is looked for.
MOE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config, saying",
    [
        (MixtralConfig(**MOE, num_local_experts=4), ["'mixtral'", "mixture of experts", "gate_proj/up_proj/down_proj"]),
        (
            Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16),
            ["'qwen3_moe'", "mixture of experts", "gate_proj/up_proj/down_proj"],
        ),
        (T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8), ["'t5'", "causal language model"]),
        (CLIPConfig(), ["'clip'", "causal language model"]),
        (MambaConfig(hidden_size=32, num_hidden_layers=2), ["'mamba'", "no MLP", "gate_proj/up_proj/down_proj"]),
        (
            BertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True
            ),
            ["'bert'", "no MLP", "fc1/fc2"],
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_family_that_cannot_be_pruned_is_named_with_the_layouts_that_work(config, saying, fails, tmp_path):
    config.save_pretrained(tmp_path / "model")
    fails("--model", tmp_path / "model", saying=["--model", *saying])


# --- data -------------------------------------------------------------------------------------------


def test_a_set_that_is_missing_offline_names_both_places(fails, tmp_path):
    fails("--data_dir", "my_data", saying=["--dataset wikitext2", "my_data/wikitext2", "Salesforce/wikitext", "Hub"])


def test_a_damaged_set_says_what_to_delete(fails, tmp_path):
    folder = save_made_up_set(tmp_path / "data", "wikitext2", 40)
    arrow = next((folder / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    fails("--data_dir", tmp_path / "data", saying=["--dataset wikitext2", str(folder), "damaged", "delete"])


@pytest.mark.parametrize(
    "name, content", [("own.jsonl", '{"text": "one"}\nnot json\n'), ("own.parquet", "PAR1"), ("own.txt", None)]
)
def test_a_damaged_or_missing_file_is_named(name, content, fails, tmp_path):
    if content:
        (tmp_path / name).write_text(content)
    fails("--dataset", name, saying=[f"--dataset {name}", "'text'" if content else "no such file"])


@pytest.mark.parametrize(
    "more, saying",
    [
        (["--dataset", "arc_easy", "--nsamples", "41"], ["--nsamples 41", "arc_easy", "40"]),
        (["--nsamples", "1000000"], ["--nsamples 1000000", "wikitext2", "--seqlen 32"]),
    ],
)
def test_more_samples_than_the_set_has_says_how_many_there_are(more, saying, fails):
    fails(*more, saying=saying)


def test_perplexity_without_its_set_fails_before_scoring(fails, tmp_path):
    save_made_up_set(tmp_path / "data", "winogrande", 8)
    fails(
        "--data_dir",
        tmp_path / "data",
        "--dataset",
        "winogrande",
        "--eval_ppl",
        saying=["wikitext2", str(tmp_path / "data" / "wikitext2"), "Salesforce/wikitext"],
    )


def test_a_test_split_shorter_than_one_window_is_one_line(fails, tmp_path):
    save_set(tmp_path / "data", "wikitext2", {"train": [{"text": "grey herons wait " * 40}], "test": [{"text": "a"}]})
    fails("--data_dir", tmp_path / "data", "--eval_ppl", saying=["--eval_ppl", "wikitext2 test", "32"])


# --- targets ----------------------------------------------------------------------------------------


def test_a_target_that_is_not_empty_is_refused(fails, tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "thesis.tex").write_text("years of work")
    fails(saying=["--save_model", "not empty", "--overwrite"])


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_target_that_is_a_file_is_refused(more, fails, tmp_path):
    (tmp_path / "result").write_text("years of work")
    fails(*more, saying=["--save_model", "is a file"])


def test_a_target_below_a_file_is_refused(fails, tmp_path):
    (tmp_path / "file").write_text("years of work")
    fails("--save_model", tmp_path / "file" / "result", saying=["--save_model", "file"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_target_where_nothing_can_be_written_is_refused(fails):
    fails("--save_model", "/proc/result", saying=["--save_model /proc/result", "cannot write"])


def test_a_wrong_target_is_refused_before_the_model_is_looked_for(fails, tmp_path):
    (tmp_path / "result").write_text("")
    fails("--model", "nowhere", saying=["--save_model"])


# --- disks that fill up -----------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


SAVING = [(PreTrainedModel, "save_pretrained", []), (torch, "save", ["--save_format", "bin"])]


@pytest.mark.parametrize("owner, name, more", SAVING)
@pytest.mark.parametrize("old", [False, True])
def test_a_save_that_fails_leaves_things_as_they_were(
    old, owner, name, more, run_cli, flags, scratch, tmp_path, monkeypatch
):
    if old:
        assert run_cli(*flags).code == 0
    before = files_below(tmp_path)
    monkeypatch.setattr(owner, name, raising(FULL))
    done = run_cli(*flags, *more, "--overwrite", "--pruning_ratio", 0.5)
    assert_one_line(done, 2, "error: --save_model")
    assert os.strerror(errno.ENOSPC) in done.err
    assert files_below(tmp_path) == before and not list(scratch.iterdir())


@pytest.mark.parametrize(
    "more", [["--save_format", "hf"], ["--save_format", "bin"], ["--global_pruning", "--save_format", "hf"]]
)
def test_weights_that_do_not_fit_on_the_disk_are_one_line(more, fails):
    fails(*more, largest_file=60_000, saying=["--save_model"])


def test_scores_that_do_not_fit_on_the_disk_are_one_line(fails, scratch):
    fails("--prune_method", "afr", largest_file=10_000, saying=["TMPDIR"])


def test_parents_made_for_a_save_that_fails_are_taken_away_again(run_cli, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", raising(FULL))
    done = run_cli(*flags, "--save_model", tmp_path / "new" / "deep" / "result")
    assert_one_line(done, 2, "error: --save_model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, code", [(OSError(errno.EIO, os.strerror(errno.EIO)), 2), (KeyboardInterrupt(), 130)])
def test_the_old_result_comes_back_when_the_new_one_cannot_take_its_place(
    error, code, run_cli, flags, tmp_path, monkeypatch
):
    assert run_cli(*flags).code == 0
    before = files_below(tmp_path)
    failed = []

    def fail(one, other):
        failed.append(one)
        raise error

    monkeypatch.setattr(filesystem, "exchange", fail)
    assert run_cli(*flags, "--overwrite", "--pruning_ratio", 0.5).code == code
    assert failed
    assert files_below(tmp_path) == before


# --- Ctrl-C -----------------------------------------------------------------------------------------

STEPS = {
    "loading the model": ("transformers.AutoModelForCausalLM.from_pretrained", []),
    "scoring": ("torch.autograd.grad", []),
    "scoring weights": ("lib.sums.ScoreFile.put", ["--prune_method", "afr"]),
    "generating": ("transformers.GenerationMixin.generate", ["--dataset", "self_generated"]),
    "measuring perplexity": ("lib.evaluate.perplexity", ["--eval_ppl"]),
    "saving the folder": ("transformers.PreTrainedModel.save_pretrained", []),
    "saving the tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", []),
    "saving model.bin": ("torch.save", ["--save_format", "bin"]),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("old", [False, True])
def test_ctrl_c_is_one_line_and_changes_nothing(old, step, run_cli, flags, scratch, tmp_path, monkeypatch):
    where, more = STEPS[step]
    if old:
        assert run_cli(*flags).code == 0
    before = files_below(tmp_path)
    monkeypatch.setattr(where, raising(KeyboardInterrupt()))
    done = run_cli(*flags, *more, "--overwrite", "--pruning_ratio", 0.5)
    assert_one_line(done, 130, "interrupted")
    assert files_below(tmp_path) == before and not list(scratch.iterdir())


def test_a_real_ctrl_c_while_scoring_is_one_line_and_leaves_nothing(flags, scratch, tmp_path):
    (tmp_path / "own.txt").write_text("seven grey herons wait for fish under the old stone bridge " * 400)
    before = files_below(tmp_path)
    command = [*flags, "--dataset", tmp_path / "own.txt", "--nsamples", 2000, "--prune_method", "afr"]
    with subprocess.Popen(
        [sys.executable, ROOT / "main.py", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=fresh_environment(),
    ) as process:
        try:
            # Scores of single weights go to a temporary folder, whose appearance says that scoring has begun.
            deadline = time.monotonic() + 120
            while not list(scratch.glob("afr-st-*")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert (out, err.count("\n")) == ("", 1) and err.startswith("interrupted")
    assert files_below(tmp_path) == before and not list(scratch.iterdir())


def test_ctrl_c_while_the_libraries_load_is_one_line(tmp_path):
    # Stands in for the real one: the interrupt arrives in the middle of an import.
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "--model", "x"],
        capture_output=True,
        text=True,
        env=fresh_environment() | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 130
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("interrupted")
