"""Kept scores, sweeps, runs that were killed, offloaded weights and several processes: always the same neurons."""

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, files_below, fresh_environment
from families import FAMILIES, build
from safetensors import safe_open
from safetensors.torch import load_file
from test_score import BOTH, assert_matches, engine_sums, samples

from lib import prune
from lib.errors import UserError
from lib.mlp import find_layers
from lib.offload import Placement, Resources, cast, is_mapped
from lib.prune import METHODS, abs_sum, moments_by_selection, trimmed_moments
from lib.score import Walk, saliency_sums
from lib.sums import InMemory, ScoreFile
from lib.tape import HiddenStates, collate

CPU = torch.device("cpu")


@pytest.fixture
def command(tiny_model, data_dir, tmp_path):
    """The flags of a run that scores in float32."""
    return ["--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 6, "--seqlen", 32,
            "--dtype", "float32", "--pruning_ratio", 0.25, "--save_format", "hf"]  # fmt: skip


@pytest.fixture
def kept(run_cli, command, tmp_path):
    """`kept(*flags)` -> what a run keeps, by MLP, and what it printed."""

    def run(*flags, to="result"):
        done = run_cli(*command, *flags, "--save_model", tmp_path / to, "--overwrite")
        assert done.code == 0, done.err
        return read_kept(tmp_path / to), done.out

    return run


def read_kept(folder) -> dict[str, list[int]]:
    (file,) = folder.glob("kept_*.safetensors")
    return {name: value.tolist() for name, value in load_file(file).items()}


# --- score files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, then", [
    (["--prune_method", "structured_afr"], ["--prune_method", "structured_snip", "--pruning_ratio", 0.5]),
    (["--prune_method", "structured_afr"], ["--prune_method", "structured_refer_svd", "--align", 4]),
    (["--prune_method", "structured_afr"], ["--global_pruning"]),
    (["--prune_method", "afr"], ["--prune_method", "snip", "--global_pruning"]),
    (["--prune_method", "afr"], ["--prune_method", "refer_svd", "--pruning_ratio", 0.6]),
])  # fmt: skip
def test_kept_scores_serve_other_runs(first, then, kept, tmp_path, monkeypatch):
    scores = tmp_path / "scores.safetensors"
    _, out = kept(*first, "--scores", scores)
    assert "kept for the next run" in out
    wanted, _ = kept(*then)
    monkeypatch.setattr("lib.dry_run.dry_run", lambda *_: None)
    monkeypatch.setattr("lib.prune.saliency_sums", None)  # nothing may be scored any more
    found, out = kept(*then, "--scores", scores)
    assert found == wanted and "not computed again" in out
    assert json.loads((tmp_path / "result" / "pruning.json").read_text())["scores"] == {
        "path": str(scores), "reused": True,
    }  # fmt: skip


def test_a_score_file_is_plain_safetensors(kept, tmp_path):
    kept("--scores", tmp_path / "scores")
    with safe_open(tmp_path / "scores", framework="pt") as file:
        assert set(file.keys()) == {f"model.layers.{i}.mlp.{o}" for i in range(3) for o in BOTH}
        assert json.loads(file.metadata()["key"])["seed"] == 0
    assert not list(tmp_path.glob("scores.partial*"))


@pytest.mark.parametrize("flags, difference", [
    (["--seed", 1], "seed"),
    (["--nsamples", 5], "samples"),
    (["--seqlen", 30], "seqlen"),
    (["--dataset", "mmlu"], "set"),
    (["--dtype", "bfloat16"], "dtype"),
    (["--neuron_score", "snr"], "neuron_score"),
    (["--batch_size", 2], "batch_size"),
])  # fmt: skip
def test_scores_of_something_else_are_refused_by_what_differs(flags, difference, run_cli, command, kept, tmp_path):
    kept("--scores", tmp_path / "scores")
    before = files_below(tmp_path)
    done = run_cli(*command, *flags, "--scores", tmp_path / "scores", "--save_model", tmp_path / "other")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "--scores" in done.err and difference in done.err and "delete" in done.err
    assert files_below(tmp_path) == before


def test_scores_of_another_model_or_kind_and_damaged_files_are_refused(run_cli, command, kept, tiny_model, tmp_path):
    kept("--scores", tmp_path / "scores", "--prune_method", "structured_snip")
    refused = [
        (["--model", tiny_model("qwen3")], "model"),
        (["--prune_method", "structured_afr"], "fo"),
        (["--prune_method", "snip"], "neuron_score"),
    ]
    for flags, saying in refused:
        done = run_cli(*command, *flags, "--scores", tmp_path / "scores")
        assert done.code == 2 and done.err.count("\n") == 1 and saying in done.err
    (tmp_path / "scores").write_bytes(b"no scores")
    done = run_cli(*command, "--scores", tmp_path / "scores")
    assert done.code == 2 and "damaged" in done.err


def test_changed_weights_under_the_same_name_are_noticed(run_cli, tiny_model, data_dir, tmp_path):
    import shutil

    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    flags = ["--model", model, "--data_dir", data_dir, "--nsamples", 2, "--seqlen", 16, "--pruning_ratio", 0.25]
    assert run_cli(*flags, "--scores", tmp_path / "scores").code == 0
    shutil.copy(tiny_model("qwen2") / "model.safetensors", model)
    changed = load_file(tiny_model("llama") / "model.safetensors")
    changed["model.layers.0.mlp.up_proj.weight"] += 1
    from safetensors.torch import save_file

    save_file(changed, model / "model.safetensors", {"format": "pt"})
    done = run_cli(*flags, "--scores", tmp_path / "scores")
    assert done.code == 2 and "weights" in done.err


# --- sweeps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["structured_afr", "afr"])
def test_a_sweep_saves_what_single_runs_save(method, kept, run_cli, command, tmp_path):
    done = run_cli(*command, "--prune_method", method, "--pruning_ratio", "0.5,0.1,0.25", "--save_model",
                   tmp_path / "sweep", "--eval_ppl", "--eval_windows", 1)  # fmt: skip
    assert done.code == 0 and done.out.count("sparsity") == 3
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0.1", "0.25", "0.5"]
    for ratio in ("0.1", "0.25", "0.5"):
        folder = tmp_path / "sweep" / ratio
        wanted, _ = kept("--prune_method", method, "--pruning_ratio", ratio)
        assert read_kept(folder) == wanted
        report = json.loads((folder / "pruning.json").read_text())
        assert report["arguments"]["pruning_ratio"] == float(ratio) and report["verified"]
        single = load_file(tmp_path / "result" / "model.safetensors")
        assert all(torch.equal(value, single[n]) for n, value in load_file(folder / "model.safetensors").items())


def test_nothing_is_kept_where_nothing_is_scored(run_cli, command, tmp_path):
    done = run_cli(*command, "--pruning_ratio", 0, "--scores", tmp_path / "scores", "--save_model", tmp_path / "all")
    assert done.code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["all"]


def test_a_folder_is_no_score_file(run_cli, command, tmp_path):
    done = run_cli(*command, "--scores", tmp_path)
    assert done.code == 2 and done.err.count("\n") == 1 and "is a folder" in done.err


def test_the_same_model_under_another_path_is_the_same(kept, run_cli, command, tiny_model, tmp_path):
    kept("--scores", tmp_path / "scores")
    (tmp_path / "link").symlink_to(tiny_model("llama"))
    done = run_cli(*command, "--model", tmp_path / "link", "--scores", tmp_path / "scores")
    assert done.code == 0 and "not computed again" in done.out


@pytest.mark.parametrize("ratios", ["0.1,1.2", "0.1,x", "0.1,0.1", "0.1,"])
def test_a_wrong_ratio_among_several_is_one_line(ratios, run_cli, command):
    done = run_cli(*command, "--pruning_ratio", ratios)
    assert done.code == 2 and done.err.count("\n") == 1 and "--pruning_ratio" in done.err


# --- going on after a crash -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("finished", [1, 2])
def test_a_walk_that_was_cut_off_ends_with_the_same_scores(family, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.sums.WALK_SHARE", 0)  # layers that take no time would not be noted each
    model, _ = build(family)
    layers, batches, method = find_layers(model), collate(samples([11, 7, 9]), 1), METHODS["structured_afr"]
    shapes = prune.sum_shapes(layers, method)
    wanted = prune.score(model, layers, batches, method, "abs_sum", InMemory())

    file = ScoreFile(tmp_path / "scores", {}, shapes)
    done = []

    class Crash(Exception):
        pass

    def put(sums, walk, put=file.put):
        put(sums, walk)
        done.append(walk.index)
        if len(done) == finished:
            raise Crash

    file.put = put
    with pytest.raises(Crash):
        prune.score(model, layers, batches, method, "abs_sum", file)
    again = ScoreFile(tmp_path / "scores", {}, shapes)
    assert again.earlier(len(batches)).index == len(layers) - finished
    found = prune.score(model, layers, batches, method, "abs_sum", again)
    for objective in BOTH:
        for a, b in zip(found[objective], wanted[objective], strict=True):
            assert torch.equal(a, b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores"]


def test_a_walk_through_two_towers_goes_on_wherever_it_was_cut_off():
    from test_llava_score import batches, tiny_llava

    model = tiny_llava([-3, -2])  # features of two layers, so that cotangents also arrive within the tower
    layers, made = find_layers(model), batches(size=2)
    wanted = dict(saliency_sums(model, layers, made, BOTH, abs_sum))
    for cut in range(1, 7):
        walk, found = Walk.start(len(layers), len(made), BOTH), {}
        walking = saliency_sums(model, layers, made, BOTH, abs_sum, walk=walk)
        for _ in range(cut):
            index, sums = next(walking)
            found[index] = sums
        walking.close()
        found |= dict(saliency_sums(model, layers, made, BOTH, abs_sum, walk=walk))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[i][o], wanted[i][o]) for i in wanted for o in BOTH)


@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.8])
def test_a_run_that_was_killed_is_gone_on_with(seconds, command, kept, tmp_path):
    """kill -9 at whatever point the clock says; the layers are slowed down so that it falls among them."""
    wanted, _ = kept()
    slow = (
        "import sys, time, lib.score\n"
        "walk = lib.score._walk_layer\n"
        "lib.score._walk_layer = lambda *args, **more: (time.sleep(0.7), walk(*args, **more))[1]\n"
        "print('ready', flush=True)\n"
        "import main\nsys.exit(main.main())\n"
    )
    flags = [*map(str, command), "--scores", str(tmp_path / "scores"), "--save_model", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", slow, *flags], cwd=tmp_path, env=fresh_environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while not list(tmp_path.glob("scores.partial")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed").exists() and not (tmp_path / "scores").exists()
    found, _ = kept("--scores", tmp_path / "scores")
    assert found == wanted
    assert not list(tmp_path.glob("scores.partial*"))


# --- offloaded weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt2", "bloom"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_sums(family, where):
    model, _ = build(family)
    batches = collate(samples([11, 7]), 1)
    wanted = engine_sums(model, batches)
    ids = samples([9])[0][None]
    logits = model(ids).logits
    layers = find_layers(model)
    placement = Resources(CPU, torch.float32, where).place(model, layers)
    assert not placement.resident
    store = HiddenStates(limit=3000)  # bytes: most of them go to files
    found = dict(saliency_sums(model, layers, batches, BOTH, torch.stack, placement, store))
    assert_matches(found, [wanted[i] for i in range(len(wanted))], 1e-6)
    with placement.running():
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=0)
    if where == "disk":
        assert all(is_mapped(p) for layer in layers for p in layer.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_the_layer_at_work_and_the_next_are_copied():
    model, _ = build("llama")
    layers = find_layers(model)
    placement = Placement(layers, [CPU] * 3, False, torch.bfloat16)
    with placement.at_work(0, 1) as device:
        assert device == CPU
        assert {p.dtype for p in layers[0].module.parameters()} == {torch.bfloat16}
        assert {p.dtype for layer in layers[1:] for p in layer.module.parameters()} == {torch.float32}
        placement._coming[1].result()
        assert list(placement._coming) == [1]
    assert {p.dtype for layer in layers for p in layer.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("flags", [["--offload", "disk"], ["--offload", "cpu"], ["--max_memory", "0.00005"]])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_offloaded_run_keeps_and_saves_the_same(flags, dtype, kept, tmp_path):
    more = ["--dtype", dtype, "--eval_ppl", "--eval_windows", 1]
    wanted, _ = kept(*more, to="wanted")
    found, _ = kept(*more, *flags, to="found")
    assert found == wanted
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("wanted", "found")]
    assert saved[0].keys() == saved[1].keys()
    assert all(value.dtype == saved[1][n].dtype and torch.equal(value, saved[1][n]) for n, value in saved[0].items())
    perplexities = [json.loads((tmp_path / n / "pruning.json").read_text())["perplexity"] for n in ("wanted", "found")]
    assert perplexities[0] == perplexities[1]


def test_a_disk_that_is_full_of_hidden_states_is_one_line(tmp_path, monkeypatch):
    from pathlib import Path

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="--max_memory.*TMPDIR"):
        HiddenStates(limit=0)["input", 0, 0] = torch.zeros(3)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "much"])
def test_no_memory_at_all_is_one_line(value, run_cli, command):
    done = run_cli(*command, "--max_memory", value)
    assert done.code == 2 and done.err.count("\n") == 1 and "--max_memory" in done.err


def test_casting_keeps_rotary_frequencies_as_they_are():
    model, _ = build("llama")
    wanted = model.model.rotary_emb.inv_freq.clone()
    cast(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32 and torch.equal(
        model.model.rotary_emb.inv_freq, wanted
    )


# --- several processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("method, n", [("structured_afr", 6), ("afr", 3), ("structured_afr", 1)])
def test_two_processes_keep_the_same_neurons(method, n, command, kept, tmp_path):
    flags = [*command, "--prune_method", method, "--nsamples", n, "--eval_ppl", "--eval_windows", 1]
    wanted, _ = kept("--prune_method", method, "--nsamples", n)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
              str(ROOT / "main.py")]  # fmt: skip
    done = subprocess.run([*launch, *map(str, flags), "--save_model", str(tmp_path / "two")], cwd=tmp_path,
                          env=fresh_environment(), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sparsity") == 1
    assert read_kept(tmp_path / "two") == wanted
    assert json.loads((tmp_path / "two" / "pruning.json").read_text())["processes"] == 2


def test_accelerate_launch_starts_the_same_command(command, kept, tmp_path):
    wanted, _ = kept()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(ROOT / "main.py")]
    done = subprocess.run([*launch, *map(str, command), "--save_model", str(tmp_path / "one")], cwd=tmp_path,
                          env=fresh_environment(), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_kept(tmp_path / "one") == wanted


# --- the reductions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_moments_by_selection_equal_those_by_sorting(scale):
    torch.manual_seed(0)
    rows = torch.randn(7, 250) * scale
    rows[0] = 0  # ties everywhere
    rows[1, :5] = 1000 * scale
    for found, wanted in zip(moments_by_selection(rows, 5, True), trimmed_moments(rows.clone(), True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=5e-3, atol=1e-6 * scale)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_in_blocks_scores_as_the_fused_kernel_does(family, monkeypatch):
    model, _ = build(family)
    model = cast(model, torch.bfloat16)
    batches = collate(samples([40, 33]), 1)
    monkeypatch.setattr("lib.attention.BLOCK", 16)
    found = engine_sums(model, batches, reduce=abs_sum)
    monkeypatch.setattr("lib.score.scoring_attention", lambda model: nullcontext())
    wanted = engine_sums(model, batches, reduce=abs_sum)
    for index, sums in wanted.items():
        for objective, value in sums.items():
            assert (found[index][objective] - value).norm() < 0.03 * value.norm()
    assert all(getattr(m.config, "_attn_implementation", "sdpa") != "afr_blockwise" for m in model.modules()
               if hasattr(m, "config"))  # fmt: skip


@pytest.mark.parametrize("heads, key_heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 5, 128, 300])
def test_attention_in_blocks_is_causal_attention(heads, key_heads, tokens):
    from torch.nn import functional as F

    from lib.attention import causal_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, tokens, 8, requires_grad=True) for n in (heads, key_heads, key_heads))
    slope = torch.randn(2, heads, tokens, 8)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    found = causal_attention(q, k, v, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(y, (q, k, v), slope) for y in (found, wanted)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
