"""The refit against plain least squares, what it does to a layer's output, and that it survives saving."""

import copy
import json

import pytest
import torch
from conftest import files_below, sentences
from families import FAMILIES, build
from safetensors.torch import load_file
from test_llava_score import batches as llava_batches
from test_llava_score import tiny_llava
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import checkpoint, compensate
from lib.compensate import Gram
from lib.errors import UserError
from lib.mlp import find_layers, only_towers
from lib.offload import Placement, Resources
from lib.prune import Selection, blocks_of, remove
from lib.tape import HiddenStates, collate, hidden_of, record

TOKENS, WIDTH, D = 200, 12, 5
KEPT = torch.tensor([0, 2, 3, 5, 8, 9, 11])


def piece_of(activations, weight, kept=KEPT, missing=0.0):
    """What the kept neurons put out, and what the output lacks without the others."""
    gone = compensate.complement(kept, len(weight))
    return activations[:, kept], activations[:, gone] @ weight[gone] + missing


def gram_of(activations, weight, kept=KEPT, missing=0.0):
    gram = Gram(len(kept), weight.shape[1], torch.device("cpu"))
    for rows in zip(*(part.split(64) for part in piece_of(activations, weight, kept, missing))):
        gram.add(*rows)
    return gram


def fit_of(train, held, weight, kept, kind, biased):
    return compensate.fit(
        [piece_of(train, weight, kept)], [piece_of(held, weight, kept)], weight[kept], kind, biased
    )


@pytest.fixture
def data():
    """Activations whose neurons predict each other, with means, and an output projection."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    activations = torch.randn(TOKENS, WIDTH, generator=generator) @ mixing + torch.arange(WIDTH) / 3
    return activations, torch.randn(WIDTH, D, generator=generator)


def removed(width=WIDTH, kept=KEPT):
    return compensate.complement(kept, width)


# --- the mathematics --------------------------------------------------------------------------------


def test_ridge_without_damping_is_least_squares(data):
    activations, weight = data
    wanted = torch.linalg.lstsq(activations[:, KEPT].double(), (activations @ weight).double()).solution
    gained, shift = compensate.ridge(gram_of(activations, weight), 1e-9, intercept=False)
    torch.testing.assert_close((weight[KEPT] + gained).double(), wanted, rtol=1e-3, atol=1e-4)
    assert shift is None


@pytest.mark.parametrize("block", [1, 3, 7])
def test_the_gram_matrix_is_whole_up_to_its_diagonal_whatever_the_blocks(data, block, monkeypatch):
    activations, weight = data
    at_once = gram_of(activations, weight)
    monkeypatch.setattr(compensate, "BLOCK", block)
    gram = gram_of(activations, weight)
    wanted = activations[:, KEPT].t() @ activations[:, KEPT]
    torch.testing.assert_close(gram.products.tril(), wanted.tril(), rtol=1e-4, atol=1e-3)
    solutions = [compensate.ridge(g, 30.0, intercept=True) for g in (gram, at_once)]
    torch.testing.assert_close(*solutions, rtol=1e-4, atol=1e-5)


def test_ridge_with_damping_is_least_squares_with_rows_that_hold_the_old_weights(data):
    activations, weight = data
    damping = 30.0
    rows = torch.cat([activations[:, KEPT], damping**0.5 * torch.eye(len(KEPT))]).double()
    targets = torch.cat([activations @ weight, damping**0.5 * weight[KEPT]]).double()
    gained, _ = compensate.ridge(gram_of(activations, weight), damping, intercept=False)
    wanted = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close((weight[KEPT] + gained).double(), wanted, rtol=1e-3, atol=1e-4)


def test_an_intercept_is_a_neuron_that_always_puts_out_one(data):
    activations, weight = data
    damping = 30.0
    ones = torch.cat([activations[:, KEPT], torch.ones(TOKENS, 1)], dim=1)
    pull = torch.cat([damping**0.5 * torch.eye(len(KEPT)), torch.zeros(len(KEPT), 1)], dim=1)
    targets = torch.cat([activations @ weight, damping**0.5 * weight[KEPT]]).double()
    wanted = torch.linalg.lstsq(torch.cat([ones, pull]).double(), targets).solution
    gained, shift = compensate.ridge(gram_of(activations, weight), damping, intercept=True)
    torch.testing.assert_close((weight[KEPT] + gained).double(), wanted[:-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shift.double(), wanted[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("intercept", [False, True])
def test_what_the_stream_lacks_is_fitted_too(data, intercept):
    activations, weight = data
    missing = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1)) + activations[:, :1]
    columns = torch.cat([activations[:, KEPT], torch.ones(TOKENS, intercept)], dim=1).double()
    targets = (activations @ weight + missing).double()
    wanted = torch.linalg.lstsq(columns, targets).solution
    gained, shift = compensate.ridge(gram_of(activations, weight, missing=missing), 1e-9, intercept)
    torch.testing.assert_close((weight[KEPT] + gained).double(), wanted[: len(KEPT)], rtol=1e-3, atol=1e-3)
    lost = (targets - columns @ wanted).square().sum()
    found = compensate.Fit(gained, shift, "ridge")
    piece = piece_of(activations, weight, missing=missing)
    assert compensate.lost_energy(*piece, found) == pytest.approx(lost.item(), rel=1e-3)


def test_a_huge_damping_leaves_the_weights_as_they_were(data):
    activations, weight = data
    gained, _ = compensate.ridge(gram_of(activations, weight), 1e12, intercept=False)
    torch.testing.assert_close(gained, torch.zeros_like(gained))


def test_a_neuron_that_is_a_multiple_of_another_is_handed_over_in_full():
    activations = torch.randn(50, 1) * torch.tensor([[1.0, 3.0]])
    weight = torch.tensor([[2.0], [5.0]])
    gained, _ = compensate.ridge(gram_of(activations, weight, torch.tensor([0])), 1e-6, intercept=False)
    assert gained.item() == pytest.approx(3 * 5, rel=1e-4)


def test_the_shift_is_the_mean_of_what_was_removed(data):
    activations, weight = data
    wanted = (activations[:, removed()] @ weight[removed()]).mean(0)
    torch.testing.assert_close(compensate.mean_shift(gram_of(activations, weight)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [None, torch.linspace(-1, 1, D)])
def test_what_is_lost_is_what_the_outputs_themselves_lose(data, shift):
    activations, weight = data
    gained = weight[KEPT] * 0.1
    lost = activations @ weight - activations[:, KEPT] @ (weight[KEPT] + gained) - (0 if shift is None else shift)
    found = compensate.lost_energy(*piece_of(activations, weight), compensate.Fit(gained, shift, "ridge"))
    assert found == pytest.approx(lost.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n_train", [4, 30, 190])
def test_auto_is_never_worse_than_none_on_what_was_held_out(data, n_train, biased):
    activations, weight = data
    held = activations[n_train:]
    found = fit_of(activations[:n_train], held, weight, KEPT, "auto", biased)
    none = (held[:, removed()] @ weight[removed()]).square().sum() / (held @ weight).square().sum()
    assert found.error_before == pytest.approx(none.item(), rel=1e-4)
    assert found.error <= found.error_before * (1 + 1e-6)


def test_the_fit_that_was_chosen_is_made_again_with_what_was_held_out(data):
    activations, weight = data
    found = fit_of(activations[:150], activations[150:], weight, KEPT, "ridge", False)
    unit = activations[:150, KEPT].square().sum(0).mean()
    wanted, _ = compensate.ridge(gram_of(activations, weight), float(found.damping * unit), intercept=False)
    torch.testing.assert_close(found.gained, wanted, rtol=1e-3, atol=1e-4)


def test_auto_keeps_the_weights_where_every_fit_does_harm():
    train, held = torch.tensor([[1.0, 1.0]] * 4), torch.tensor([[1.0, -1.0]] * 4)  # what was learned is reversed
    found = fit_of(train, held, torch.ones(2, 1), torch.tensor([0]), "auto", False)
    assert (found.kind, found.gained, found.shift) == ("none", None, None)


def test_neurons_that_never_fire_are_no_trouble():
    silent = torch.zeros(10, 3)
    found = fit_of(silent, silent, torch.ones(3, 2), torch.tensor([1]), "ridge", False)
    assert found.gained.tolist() == [[0.0, 0.0]]


# --- whole models -----------------------------------------------------------------------------------


def batches_of(n=16, length=20, size=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    # An uneven use of the vocabulary, so that neurons predict each other; uneven lengths, so that there is padding.
    highest = [5 + 10 * (i % 5) for i in range(n)]
    return collate([torch.randint(3, h, (length - i % 3,), generator=generator) for i, h in enumerate(highest)], size)


def selection_for(layers, differing):
    generator = torch.Generator().manual_seed(2)
    shares = [0.5, 0.7, 0.6] if differing else [0.6] * 3
    widths = [block.width for block in blocks_of(layers)]
    orders = [torch.randperm(width, generator=generator) for width in widths]
    return Selection(True, tuple(o[: round(s * w)].sort().values for o, s, w in zip(orders, shares, widths)))


def hidden_after(model, index, batches):
    """What layer `index` puts out at real tokens, `[tokens, d]`."""
    layer, held = find_layers(model)[index].module, []
    hook = layer.register_forward_hook(lambda m, _, y: held.append(hidden_of(y)))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs, use_cache=False)
    hook.remove()
    held = [h if h.ndim == 3 else h[0] for h in held]  # the first of several streams is the one that is read
    return torch.cat([h[b.real] for h, b in zip(held, batches)])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_comes_closer_to_the_dense_one_on_batches_never_seen(family):
    dense, _ = build(family)
    unseen = batches_of(seed=9)
    wanted = hidden_after(dense, 0, unseen)
    lost = {}
    for kind in ("none", "ridge", "auto"):
        model = copy.deepcopy(dense)
        layers = find_layers(model)
        selection = selection_for(layers, differing=True)
        if kind != "none":
            compensate.compensate(model, layers, selection, batches_of(60), kind)
        remove(model, layers, selection)
        lost[kind] = (hidden_after(model, 0, unseen) - wanted).square().sum().item()
    assert lost["ridge"] < 0.95 * lost["none"]
    assert lost["auto"] < 0.95 * lost["none"]


def mlp_inputs(model, block_name, batches):
    """What the last projection of an MLP receives at real tokens, `[tokens, d_ff]`."""
    block = next(b for b in blocks_of(find_layers(model)) if b.name == block_name)
    held = []
    hook = block.modules[-1].register_forward_pre_hook(lambda m, a: held.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs, use_cache=False)
    hook.remove()
    return torch.cat([h[b.real.flatten()] for h, b in zip(held, batches)])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gemma2"])
def test_every_layer_is_fitted_on_what_the_pruned_layers_before_it_put_out(family):
    """Oracle: fit layer after layer with lstsq on activations of the whole model, pruned so far."""
    model, _ = build(family)
    batches, layers = batches_of(40), find_layers(model)
    dense, oracle, selection = copy.deepcopy(model), copy.deepcopy(model), selection_for(layers, differing=True)
    fits = compensate.compensate(model, layers, selection, batches, "ridge")
    for index, (block, kept, found) in enumerate(zip(blocks_of(find_layers(oracle)), selection.kept, fits)):
        lacking = 0.5 * (hidden_after(dense, index, batches) - hidden_after(oracle, index, batches)).double()
        if family == "gemma2":  # a norm behind the MLP: what the stream lacks is not what the MLP lacks
            lacking *= 0
        activations = mlp_inputs(oracle, block.name, batches).double()
        weight = block.projections[-1].weight.double()
        damping = found.damping * damping_unit(activations[:, kept], batches)
        rows = torch.cat([activations[:, kept], damping**0.5 * torch.eye(len(kept), dtype=torch.float64)])
        targets = torch.cat([activations @ weight + lacking, damping**0.5 * weight[kept]])
        if found.shift is not None:
            ones = torch.cat([torch.ones(len(activations)), torch.zeros(len(kept))]).double()[:, None]
            rows = torch.cat([rows, ones], dim=1)
        wanted = torch.linalg.lstsq(rows, targets).solution
        fitted = weight[kept] + found.gained.double()
        torch.testing.assert_close(fitted, wanted[: len(kept)], rtol=5e-3, atol=5e-4)
        compensate.write_layer(block, kept, found)


def damping_unit(activations, batches):
    """Mean diagonal of the kept neurons' Gram matrix over the batches that are fitted on."""
    sizes = [int(batch.real.sum()) for batch in batches]
    train = [rows for i, rows in enumerate(activations.split(sizes)) if i % 8 != 7]
    return torch.cat(train).square().sum(0).mean()


@pytest.mark.parametrize("kind", ["ridge", "auto", "bias"])
def test_removed_neurons_are_silent_before_they_are_cut_off(kind):
    model, _ = build("llama_bias")
    layers = find_layers(model)
    selection = selection_for(layers, differing=False)
    compensate.compensate(model, layers, selection, batches_of(), kind)
    for block, kept in zip(blocks_of(layers), selection.kept):
        assert not block.projections[-1].weight[removed(block.width, kept)].any()
    ids = torch.randint(3, 60, (2, 9))
    before = model(ids).logits
    remove(model, layers, selection)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    """The same samples one by one and in padded batches, the same of them held out."""
    singly, padded = batches_of(16, size=1), batches_of(16, size=2)
    singly = [*singly[:7], singly[14], *singly[7:14], singly[15]]
    found = []
    for batches in (singly, padded):
        model, _ = build("llama")
        layers = find_layers(model)
        found.append(compensate.compensate(model, layers, selection_for(layers, True), batches, "ridge"))
    for one, other in zip(*found):
        assert one.damping == pytest.approx(other.damping, rel=1e-3)
        torch.testing.assert_close(one.gained, other.gained, rtol=2e-3, atol=2e-4)


def test_bfloat16_weights_are_fitted_in_float32():
    model, _ = build("llama")
    layers = find_layers(model.bfloat16())
    selection = selection_for(layers, differing=True)
    dense = blocks_of(layers)[0].projections[-1].weight[selection.kept[0]].float()
    fits = compensate.compensate(model, layers, selection, batches_of(), "ridge")
    assert all(f.gained.dtype == torch.float32 and f.gained.isfinite().all() for f in fits)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    stored = blocks_of(layers)[0].projections[-1].weight[selection.kept[0]]
    assert torch.equal(stored, (dense + fits[0].gained).bfloat16())


def test_fits_can_be_written_into_another_copy_of_the_model():
    model, _ = build("gpt2")
    other = copy.deepcopy(model)
    layers = find_layers(model)
    selection = selection_for(layers, differing=False)
    fits = compensate.compensate(model, layers, selection, batches_of(), "auto")
    compensate.write(other, find_layers(other), selection, fits)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family, kind", [("llama", "auto"), ("llama", "bias"), ("gpt2", "ridge"), ("opt", "auto")])
def test_offloaded_weights_are_fitted_alike(family, kind, where):
    found = []
    for offload in ("none", where):
        model, _ = build(family)
        layers = find_layers(model)
        placement = Resources(torch.device("cpu"), torch.float32, offload).place(model, layers)
        selection = selection_for(layers, differing=True)
        hidden = HiddenStates(limit=3000)  # bytes: most of them go to files
        compensate.compensate(model, layers, selection, batches_of(), kind, placement, hidden)
        remove(model, layers, selection)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_weights_of_another_dtype_at_home_keep_their_values_where_nothing_is_fitted():
    """Scored in bfloat16, kept in float32: what no fit changes is not rounded."""
    model, _ = build("llama")
    layers = find_layers(model)
    dense = copy.deepcopy(model)
    placement = Resources(torch.device("cpu"), torch.bfloat16, "disk").place(model, layers)
    selection = selection_for(layers, differing=False)
    compensate.compensate(model, layers, selection, batches_of(), "bias", placement)
    for block, wanted, kept in zip(blocks_of(layers), blocks_of(find_layers(dense)), selection.kept):
        assert torch.equal(block.projections[-1].weight[kept], wanted.projections[-1].weight[kept])
        assert block.modules[-1].bias.any()


def test_only_a_few_layers_hidden_states_are_held_at_a_time():
    model, _ = build("llama")
    layers, hidden, batches = find_layers(model), HiddenStates(), batches_of()
    compensate.compensate(model, layers, selection_for(layers, False), batches, "ridge", hidden=hidden)
    assert len(hidden._held) == len(batches)  # what entered the last layer


def test_what_was_recorded_of_the_dense_model_is_not_computed_again():
    found = []
    for recorded in (False, True):
        model, _ = build("llama")
        layers, batches = find_layers(model), batches_of()
        dense = record(model, layers, batches, Placement(layers), HiddenStates()) if recorded else None
        compensate.compensate(model, layers, selection_for(layers, True), batches, "auto", dense=dense)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_one_batch_is_too_few():
    model, _ = build("llama")
    layers = find_layers(model)
    with pytest.raises(UserError, match="--compensate ridge: .*2 calibration batches"):
        compensate.compensate(model, layers, selection_for(layers, False), batches_of(2), "ridge")


@pytest.mark.parametrize("towers", ["language", "both"])
def test_a_model_that_sees_is_compensated_tower_by_tower(towers):
    dense, seen = tiny_llava(), llava_batches(24)
    wanted = features(dense, seen[16:])
    lost = {}
    for kind in ("none", "auto"):
        model = copy.deepcopy(dense)
        layers = only_towers(find_layers(model), towers)
        kept = tuple(torch.arange(0, block.width, 2) for block in blocks_of(layers))
        selection = Selection(True, kept)
        if kind != "none":
            fits = compensate.compensate(model, layers, selection, seen[:16], kind)
            assert all(fit.error <= fit.error_before for fit in fits)
        remove(model, layers, selection)
        lost[kind] = [(f - w).square().sum().item() for f, w in zip(features(model, seen[16:]), wanted)]
    assert all(a < n or a == n == 0 for a, n in zip(lost["auto"], lost["none"]))


def features(model, batches):
    """What the first layer of each tower puts out, `[images or samples, tokens, d]` each."""
    modules = [model.model.vision_tower.encoder.layers[0], model.model.language_model.layers[0]]
    held = {module: [] for module in modules}
    hooks = [m.register_forward_hook(lambda m, _, y: held[m].append(hidden_of(y))) for m in modules]
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(outputs) for outputs in held.values()]


# --- biases, and saving -----------------------------------------------------------------------------


def test_llama_gets_biases_that_its_configuration_knows_of():
    model, _ = build("llama")
    layers = find_layers(model)
    ids = torch.randint(3, 60, (2, 9))
    before = model(ids).logits
    compensate.give_biases(model, layers)
    assert model.config.mlp_bias
    assert torch.equal(model(ids).logits, before)
    assert type(model)(copy.deepcopy(model.config)).load_state_dict(model.state_dict())


def test_a_family_without_biases_says_so():
    model, _ = build("qwen2")
    layers = find_layers(model)
    with pytest.raises(UserError, match="--compensate bias: .*'qwen2'.*ridge"):
        compensate.compensate(model, layers, selection_for(layers, False), batches_of(), "bias")


@pytest.mark.parametrize("differing", [False, True])
@pytest.mark.parametrize("family, kind", [("llama", "bias"), ("llama", "auto"), ("qwen2", "ridge"), ("gpt2", "auto")])
def test_a_compensated_model_is_saved_and_loaded_back(family, kind, differing, tmp_path):
    model, _ = build(family)
    layers = find_layers(model)
    selection = selection_for(layers, differing)
    compensate.compensate(model, layers, selection, batches_of(), kind)
    remove(model, layers, selection)
    checkpoint.save_folder(tmp_path, model, layers)
    ids = torch.randint(3, 60, (2, 9))
    loaded = checkpoint.load_folder(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory):
    """A tiny model that was trained for a moment on sentences, so that its neurons do something worth keeping."""
    folder = tmp_path_factory.mktemp("learned") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).train()
    ids = torch.tensor([i for line in sentences(400) for i in tokenizer(line)["input_ids"]])
    ids = ids[: len(ids) // 24 * 24].view(-1, 24)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        rows = ids[torch.randint(len(ids), (16,), generator=torch.Generator().manual_seed(step))]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pruned(run_cli, learned, data_dir, tmp_path):
    """`pruned(*flags, to=...)` -> the report of a run that saved a result, and what was printed."""

    def run(*flags, to="result"):
        done = run_cli("--model", learned, "--data_dir", data_dir, "--nsamples", 24, "--seqlen", 24,
                       "--pruning_ratio", 0.5, "--dtype", "float32", "--eval_ppl", "--eval_windows", 6,
                       "--save_model", tmp_path / to, *flags)  # fmt: skip
        assert done.code == 0, done.err
        return json.loads((tmp_path / to / "pruning.json").read_text()), done.out

    return run


@pytest.mark.parametrize("across", [[], ["--global_pruning"]])
def test_a_compensated_model_predicts_better_and_loads_back_in_both_forms(across, pruned, tmp_path):
    flags = [*across, "--save_format", "both"]
    plain, out = pruned(*flags, to="plain")
    assert plain["compensation"] is None and "held-out" not in out
    for kind in ("bias", "ridge", "auto"):
        report, out = pruned(*flags, "--compensate", kind, to=kind)
        assert report["verified"]
        assert report["widths"] == plain["widths"]
        assert report["arguments"]["compensate"] == kind and report["seconds"]["compensate"] > 0
        found = report["compensation"]
        assert len(found["kind"]) == 3 and "held-out" in out
        if kind != "bias":
            assert report["perplexity"]["pruned"] < plain["perplexity"]["pruned"]
        if kind == "auto":
            assert all(a <= b * (1 + 1e-6) for a, b in zip(found["error_after"], found["error_before"]))
        assert ("bias" in found["kind"]) == (kind == "bias")
        folder, bin_form = checkpoint.load_folder(tmp_path / kind), checkpoint.load_bin(tmp_path / kind)[0]
        ids = torch.randint(3, 60, (2, 9))
        torch.testing.assert_close(folder(ids).logits, bin_form(ids).logits)
        assert (folder.model.layers[0].mlp.down_proj.bias is not None) == (kind == "bias")


@pytest.mark.parametrize("kind", ["ridge", "bias"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_an_offloaded_run_saves_what_a_resident_one_saves(kind, dtype, own, run_cli, tiny_model, data_dir, tmp_path):
    saved, before = [], files_below(tiny_model("llama", own))
    for where in ("none", "disk"):
        done = run_cli("--model", tiny_model("llama", own), "--data_dir", data_dir, "--nsamples", 8, "--seqlen", 24,
                       "--pruning_ratio", 0.25, "--dtype", dtype, "--compensate", kind, "--offload", where,
                       "--save_model", tmp_path / where)  # fmt: skip
        assert done.code == 0, done.err
        saved.append(load_file(tmp_path / where / "model.safetensors"))
    tolerance = 0 if dtype == "auto" or own == torch.float32 else 1e-2  # what lies on disk is rounded to its dtype
    for name, value in saved[0].items():
        assert value.dtype == saved[1][name].dtype
        torch.testing.assert_close(saved[1][name], value, rtol=tolerance, atol=tolerance)
    assert files_below(tiny_model("llama", own)) == before  # its weights were mapped, and are only read


def test_a_model_scored_in_another_dtype_keeps_the_checkpoint_s_own_values(run_cli, tiny_model, data_dir, tmp_path,
                                                                            monkeypatch):  # fmt: skip
    monkeypatch.setattr("lib.builder.scoring_dtype", lambda device: torch.bfloat16)
    done = run_cli("--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 8, "--seqlen", 24,
                   "--pruning_ratio", 0.25, "--compensate", "bias", "--save_model", tmp_path / "result")  # fmt: skip
    assert done.code == 0, done.err
    saved = load_file(tmp_path / "result" / "model.safetensors")
    dense = load_file(tiny_model("llama") / "model.safetensors")
    kept = load_file(tmp_path / "result" / "kept_neurons.safetensors")
    for name, indices in kept.items():
        assert torch.equal(saved[f"{name}.down_proj.weight"], dense[f"{name}.down_proj.weight"][:, indices])
        assert saved[f"{name}.down_proj.bias"].any() and not saved[f"{name}.up_proj.bias"].any()


def test_a_sweep_compensates_every_ratio_as_a_single_run_does(run_cli, learned, data_dir, tmp_path):
    flags = ["--model", learned, "--data_dir", data_dir, "--nsamples", 8, "--seqlen", 24, "--compensate", "auto"]
    sweep = run_cli(*flags, "--pruning_ratio", "0,0.5,0.25", "--save_model", tmp_path / "sweep")
    assert sweep.code == 0, sweep.err
    assert sweep.out.count("compensated") == 2  # at ratio 0 there is nothing to make up for
    for ratio in ("0.5", "0.25"):
        assert run_cli(*flags, "--pruning_ratio", ratio, "--save_model", tmp_path / ratio).code == 0
        saved, wanted = (load_file(tmp_path / at / "model.safetensors") for at in (f"sweep/{ratio}", ratio))
        assert all(torch.equal(value, wanted[name]) for name, value in saved.items())


@pytest.mark.parametrize("flags, saying", [
    (["--prune_method", "wanda", "--compensate", "ridge"], "wanda removes single weights"),
    (["--compensate", "auto", "--nsamples", 1], "--nsamples"),
    (["--compensate", "much"], "--compensate"),
])  # fmt: skip
def test_what_cannot_be_compensated_is_one_line(flags, saying, run_cli, tiny_model):
    done = run_cli("--model", tiny_model("llama"), "--pruning_ratio", 0.5, *flags)
    assert done.code == 2 and done.err.count("\n") == 1 and "--compensate" in done.err and saying in done.err


def test_biases_that_a_family_cannot_have_are_refused_before_anything_is_scored(run_cli, tiny_model, data_dir,
                                                                                 monkeypatch):  # fmt: skip
    monkeypatch.setattr("lib.prune.saliency_sums", None)
    done = run_cli("--model", tiny_model("qwen2"), "--data_dir", data_dir, "--pruning_ratio", 0.5, "--compensate",
                   "bias")  # fmt: skip
    assert done.code == 2 and done.err.count("\n") == 1 and "'qwen2'" in done.err and "ridge" in done.err
