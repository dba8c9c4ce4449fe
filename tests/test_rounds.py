"""Pruning in several rounds against doing it by hand: cut off a part, score what is left, select among it."""

import json

import pytest
import torch
from families import FAMILIES, build
from safetensors.torch import load_file

from lib import compensate, prune
from lib.builder import load
from lib.data import Calibration
from lib.mlp import find_layers
from lib.prune import METHODS, blocks_of
from lib.sums import InMemory
from lib.tape import collate

RATIO = 0.5


def some_selection(layers):
    generator = torch.Generator().manual_seed(3)
    return prune.Selection(True, tuple(
        torch.randperm(b.width, generator=generator)[: b.width // 2].sort().values for b in blocks_of(layers)
    ))  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silenced_neuron_does_what_a_removed_one_does(family):
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    logits = []
    for cut in (prune.remove, lambda model, layers, selection: prune.silence(layers, selection)):
        model, _ = build(family)
        layers = find_layers(model)
        cut(model, layers, some_selection(layers))
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neuron_score", list(prune.NEURON_SCORES))
@pytest.mark.parametrize("family", ["llama_bias", "phi3", "gpt2", "opt"])
def test_scores_of_silenced_neurons_are_0_and_the_others_those_of_the_smaller_model(family, neuron_score):
    generator = torch.Generator().manual_seed(5)
    batches = collate([torch.randint(3, 60, (12,), generator=generator) for _ in range(3)], 1)
    found = []
    for cut in (True, False):
        model, _ = build(family)
        layers = find_layers(model)
        selection = some_selection(layers)
        if cut:
            prune.remove(model, layers, selection)
        else:
            prune.silence(layers, selection)
        found.append(prune.score(model, layers, batches, METHODS["structured_afr"], neuron_score, InMemory()))
    for name in ("fo", "ce"):
        for smaller, silenced, kept in zip(found[0][name], found[1][name], selection.kept):
            torch.testing.assert_close(silenced[kept], smaller, rtol=1e-3, atol=1e-4 * float(smaller.max()))
            assert silenced.sum() == pytest.approx(silenced[kept].sum().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["none", "ridge"])
def test_two_rounds_are_those_made_by_hand(run_cli, tiny_model, data_dir, tmp_path, kind):
    """Oracle: the parts of the program, put together here, on a model whose neurons are really cut off."""
    name, flags = tiny_model("llama"), ["--nsamples", 8, "--seqlen", 24, "--global_pruning", "--dtype", "float32"]
    done = run_cli("--model", name, "--data_dir", data_dir, "--pruning_ratio", RATIO, "--rounds", 2, "--compensate",
                   kind, "--save_model", tmp_path / "result", *flags)  # fmt: skip
    assert done.code == 0, done.err
    method, loaded = METHODS["structured_afr"], load(str(name), "float32", False, seqlen=24)
    samples = Calibration("wikitext2", str(data_dir)).samples(loaded.model, loaded.tokenizer, 8, 24, 0)
    sums = prune.score(loaded.model, loaded.layers, collate(samples, 1), method, "trimmed_mean", InMemory())
    first = prune.select(loaded.layers, sums, method, RATIO / 2, across_layers=True)
    widths = [b.width for b in blocks_of(loaded.layers)]
    if kind != "none":
        batches = collate(samples, compensate.batch_size(8))
        compensate.compensate(loaded.model, loaded.layers, first, batches, kind)
    prune.remove(loaded.model, loaded.layers, first)
    left = prune.score(loaded.model, loaded.layers, collate(samples, 1), method, "trimmed_mean", InMemory())
    full = {o: [torch.zeros(w).index_put_((k,), v) for w, k, v in zip(widths, first.kept, left[o])] for o in left}
    z = lambda values: (torch.cat(values) - torch.cat(values).mean()) / torch.cat(values).std()  # noqa: E731
    scores = z(full["fo"]) + z([v**2 for v in full["ce"]])
    wanted = scores.topk(round((1 - RATIO) * len(scores))).indices.sort().values
    starts = torch.tensor([0, *widths]).cumsum(0)
    kept = load_file(tmp_path / "result" / "kept_neurons.safetensors")
    found = torch.cat([kept[b] + start for b, start in zip(sorted(kept), starts)])
    assert torch.equal(found.sort().values.long(), wanted)


def test_a_sweep_makes_rounds_for_every_ratio_and_starts_from_the_dense_model(run_cli, tiny_model, data_dir, tmp_path):
    command = ["--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 8, "--seqlen", 24, "--rounds", 2,
               "--compensate", "auto", "--global_pruning"]  # fmt: skip
    swept = run_cli(*command, "--pruning_ratio", "0,0.25,0.5", "--save_model", tmp_path / "sweep")
    alone = run_cli(*command, "--pruning_ratio", "0.5", "--save_model", tmp_path / "alone")
    assert swept.code == alone.code == 0, swept.err + alone.err
    folders = tmp_path / "sweep" / "0.5", tmp_path / "alone"
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "alone" / "pruning.json").read_text())["arguments"]["rounds"] == 2


@pytest.mark.parametrize("flags", [["--rounds", 0], ["--rounds", 2, "--prune_method", "afr"],
                                   ["--rounds", 2, "--prune_method", "structured_wanda"]])  # fmt: skip
def test_rounds_that_cannot_be_made_are_refused(run_cli, tiny_model, flags):
    done = run_cli("--model", tiny_model("llama"), *flags)
    assert done.code == 2 and done.err.startswith(f"error: --rounds {flags[1]}:")


def test_several_processes_are_refused(run_cli, tiny_model):
    done = run_cli("--model", tiny_model("llama"), "--rounds", 2, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.code == 2 and "one process" in done.err
