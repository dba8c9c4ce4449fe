"""The formulas of other methods against numbers worked out by hand, and the statistics against whole activations."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fresh_environment
from families import FAMILIES, build
from safetensors.torch import load_file

from lib import baselines
from lib.baselines import BASELINES, ENTERED, NEURONS, RANDOM, WEIGHTS
from lib.errors import UserError
from lib.mlp import find_layers
from lib.offload import Resources
from lib.prune import METHODS, blocks_of, score, select, select_weights, sum_shapes
from lib.sums import InMemory
from lib.tape import HiddenStates, collate
from lib.vectors import ModelVector


def vector(*layers):
    return ModelVector(len(layers), lambda index: torch.as_tensor(layers[index], dtype=torch.float32))


def lists(model_vector):
    return [layer.tolist() for layer in model_vector]


# One MLP of two projections (in, out), two neurons, three features.
WEIGHT = [[[1, -2, 3], [0, 4, -1]], [[2, 0, -1], [-3, 1, 1]]]
# Neurons put out (1, 4), (3, 0) over two tokens: means 2 and 2, mean squares 5 and 8.
OUT = [[2, 2], [5, 8]]


# --- whole neurons ----------------------------------------------------------------------------------


def test_magnitude_adds_the_squares_of_all_that_a_neuron_owns():
    assert lists(baselines.structured_magnitude(vector(WEIGHT))) == [[1 + 4 + 9 + 4 + 1, 16 + 1 + 9 + 1 + 1]]


def test_wanda_weighs_outgoing_weights_by_the_norm_of_the_neuron():
    (found,) = lists(baselines.structured_wanda(vector(WEIGHT), vector(OUT)))
    assert found == pytest.approx([3 * math.sqrt(5), 5 * math.sqrt(8)])


def test_flap_weighs_squares_by_the_variance_and_standardises_each_layer():
    # Variances 5 - 4 = 1 and 8 - 4 = 4, squares 5 and 11: scores 5 and 44, which are one deviation from 24.5 each.
    (first, second) = lists(baselines.structured_flap(vector(WEIGHT, WEIGHT), vector(OUT, [[0, 0], [2, 1]])))
    half = math.sqrt(0.5)
    assert first == pytest.approx([-half, half])
    assert second == pytest.approx([-half, half])  # scores 10 and 11, standardised on their own


def test_flap_sees_no_variance_in_neurons_that_put_out_a_constant():
    (found,) = lists(baselines.structured_flap(vector(WEIGHT), vector([[3, 2], [9, 4]])))
    assert found == [0, 0]


def test_taylor_is_the_sum_of_absolute_saliencies_that_the_engine_makes():
    assert lists(baselines.structured_taylor(vector([1, 2]))) == [[1, 2]]


def test_random_draws_one_number_per_neuron():
    draws = torch.rand(2, 2, 3)
    assert lists(baselines.structured_random(vector(draws.tolist()))) == [draws[0, :, 0].tolist()]


# --- single weights ---------------------------------------------------------------------------------


def test_magnitude_of_a_weight_is_its_absolute_value():
    assert lists(baselines.magnitude(vector(WEIGHT))) == [[[[1, 2, 3], [0, 4, 1]], [[2, 0, 1], [3, 1, 1]]]]


def test_wanda_ranks_the_weights_of_one_output():
    entered = [[0, 0, 0], [1, 4, 0.25]]  # norms 1, 2, 0.5
    (found,) = baselines.wanda(vector(WEIGHT), vector(entered), vector(OUT))
    # Input projection: |W| * norm = [1, 4, 1.5], [0, 8, 0.5]; an output is a row.
    third = pytest.approx
    assert found[0].tolist() == [third([0, 2 / 3, 1 / 3]), third([0, 2 / 3, 1 / 3])]
    # Output projection: [2, 0, 1] * sqrt(5), [3, 1, 1] * sqrt(8); an output is a column.
    assert found[1].tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize("across", [False, True])
def test_wanda_takes_the_same_share_from_every_output(across):
    weights = [torch.randn(3, 8, 6) * torch.rand(3, 8, 1) * 9 for _ in range(2)]
    scores = baselines.wanda(
        ModelVector(2, lambda i: weights[i]), vector(*[torch.rand(2, 6)] * 2), vector(*[torch.rand(2, 8)] * 2)
    )
    for packed in select_weights(scores, 0.5, across).kept:
        bits = [(byte >> place) & 1 for byte in packed.tolist() for place in range(7, -1, -1)]
        mask = torch.tensor(bits).view(3, 8, 6)
        assert (mask[:2].sum(2) == 3).all()
        assert (mask[2].sum(0) == 4).all()


# --- the statistics ---------------------------------------------------------------------------------


def batches():
    generator = torch.Generator().manual_seed(1)
    return collate([torch.randint(3, 60, (n,), generator=generator) for n in (9, 5, 7, 7)], 2)


def activations(modules, model):
    """What enters each module at real tokens, `[tokens, features]`, by one run per batch."""
    held = {module: [] for module in modules}
    hooks = [m.register_forward_pre_hook(lambda m, args: held[m].append(args[0].flatten(0, -2))) for m in modules]
    with torch.no_grad():
        for batch in batches():
            model(**batch.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {m: torch.cat([x[b.real.flatten()] for x, b in zip(xs, batches())]) for m, xs in held.items()}


def wanted_means(model, mlps):
    """Mean and mean square of what enters each MLP, and of what its neurons put out."""
    held = activations([m for ins, out, _ in mlps for m in (ins[0], out)], model)
    return [
        {
            name: torch.stack([held[module].mean(0), held[module].square().mean(0)])
            for name, module in ((ENTERED, ins[0]), (NEURONS, out))
        }
        for ins, out, _ in mlps
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_the_activations_at_real_tokens(family):
    model, mlps = build(family)
    found = dict(baselines.activation_means(model, find_layers(model), batches()))
    for index, wanted in enumerate(wanted_means(model, mlps)):
        for name in (ENTERED, NEURONS):
            torch.testing.assert_close(found[index][name], wanted[name], rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_means_of_offloaded_weights_are_the_same(family, where):
    model, mlps = build(family)
    wanted = wanted_means(model, mlps)
    layers = find_layers(model)
    placement = Resources(torch.device("cpu"), torch.float32, where).place(model, layers)
    assert not placement.resident
    found = dict(baselines.activation_means(model, layers, batches(), placement, HiddenStates(limit=3000)))
    for index, means in enumerate(wanted):
        torch.testing.assert_close(found[index][NEURONS], means[NEURONS], rtol=1e-4, atol=1e-6)


def test_activations_that_are_not_finite_are_one_line():
    model, _ = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"layers.[12].* not finite"):
        list(baselines.activation_means(model, find_layers(model), batches()))


def test_weights_are_neuron_major_float32_and_not_the_model_s_own():
    model, _ = build("gpt2")
    layers = find_layers(model.bfloat16())
    weights = baselines.of_weights(blocks_of(layers))[WEIGHTS]
    block = blocks_of(layers)[1]
    wanted = torch.stack([block.owner.c_fc.weight.t(), block.owner.c_proj.weight]).float()
    assert torch.equal(weights[1], wanted)
    weights[1].zero_()
    assert block.owner.c_proj.weight.any()


def test_a_seed_always_makes_the_same_draws():
    model, _ = build("llama")
    layers = find_layers(model)
    draws = [baselines.of_weights(blocks_of(layers), seed)[RANDOM] for seed in (4, 4, 5)]
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][1], draws[2][1])
    assert not torch.equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_every_method_of_the_table_keeps_exactly_its_share(baseline):
    model, _ = build("phi3")
    layers, method = find_layers(model), METHODS[baseline.name]
    kept = InMemory()
    sums = score(model, layers, batches(), method, "trimmed_mean", kept)
    assert {name: kept[name].shape for name in sum_shapes(layers, method)} == sum_shapes(layers, method)
    selection = select(layers, sums, method, 0.4)
    assert not selection.unused
    if baseline.structured:
        assert [len(kept) for kept in selection.kept] == [30] * 3
    else:
        assert selection.n_kept() == round(3 * 3 * 50 * 24 * 0.6)


def test_taylor_is_snip_by_absolute_sums():
    model, _ = build("llama")
    layers, found = find_layers(model), []
    for name, neuron_score in (("structured_taylor", "trimmed_mean"), ("structured_snip", "abs_sum")):
        sums = score(model, layers, batches(), METHODS[name], neuron_score, InMemory())
        found.append(select(layers, sums, METHODS[name], 0.5, True, neuron_score).kept)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_model, data_dir):
    """The flags of a small run."""
    return ["--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 4, "--seqlen", 24,
            "--dtype", "float32", "--pruning_ratio", 0.25]  # fmt: skip


@pytest.mark.parametrize("method", [b.name for b in BASELINES])
def test_every_method_is_a_prune_method(method, run_cli, command, tmp_path):
    done = run_cli(*command, "--prune_method", method, "--save_model", tmp_path / "result")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "result" / "pruning.json").read_text())
    assert report["sparsity"]["mlp"] == pytest.approx(0.25, abs=1e-3)
    assert report["unused"] == []
    assert report["verified"]


@pytest.mark.parametrize("first, then", [
    (["structured_wanda"], ["structured_flap"]),
    (["structured_taylor"], ["structured_snip", "--neuron_score", "abs_sum"]),
    (["wanda"], ["structured_wanda"]),
])  # fmt: skip
def test_methods_with_the_same_statistics_share_a_score_file(first, then, run_cli, command, tmp_path, monkeypatch):
    more = ["--scores", tmp_path / "scores"]
    assert run_cli(*command, "--prune_method", *first, *more).code == 0
    monkeypatch.setattr("lib.dry_run.dry_run", lambda *_: None)
    monkeypatch.setattr("lib.prune.saliency_sums", None)
    monkeypatch.setattr("lib.baselines.activation_means", None)
    done = run_cli(*command, "--prune_method", *then, *more, "--global_pruning")
    assert done.code == 0 and "not computed again" in done.out


@pytest.mark.parametrize("method", ["random", "structured_magnitude"])
def test_methods_that_take_no_calibration_keep_no_scores(method, run_cli, command, tmp_path):
    done = run_cli(*command, "--prune_method", method, "--scores", tmp_path / "scores")
    assert done.code == 2 and done.err.count("\n") == 1 and "--scores" in done.err and method in done.err


def test_a_sweep_prunes_the_dense_model_by_magnitude_every_time(run_cli, command, tmp_path):
    flags = [*command, "--prune_method", "structured_magnitude", "--save_format", "hf"]
    sweep = run_cli(*flags, "--pruning_ratio", "0.5,0.25", "--save_model", tmp_path / "sweep")
    single = run_cli(*flags, "--save_model", tmp_path / "single")
    assert (sweep.code, single.code) == (0, 0)
    a, b = (load_file(tmp_path / at / "kept_neurons.safetensors") for at in ("sweep/0.25", "single"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("n", [1, 3])
def test_two_processes_keep_the_same_neurons(n, run_cli, command, tmp_path):
    compensated = ["--compensate", "ridge"] if n > 1 else []
    flags = [*command, "--prune_method", "structured_flap", "--nsamples", n, *compensated, "--save_model"]
    assert run_cli(*flags, tmp_path / "one").code == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
              str(ROOT / "main.py")]  # fmt: skip
    done = subprocess.run([*launch, *map(str, flags), str(tmp_path / "two")], cwd=tmp_path, env=fresh_environment(),
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "pruning.json").read_text())["processes"] == 2
    a, b = (load_file(tmp_path / at / "kept_neurons.safetensors") for at in ("one", "two"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    a, b = (load_file(tmp_path / at / "model.safetensors") for at in ("one", "two"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
