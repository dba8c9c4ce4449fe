"""Formulas worked out by hand, exact counts, ties, alignment, and what removal does to the model."""

import copy
import math

import numpy as np
import pytest
import torch
from families import FAMILIES, FIXED_WIDTH, build

from lib.errors import UserError
from lib.mlp import find_layers, width_field
from lib.prune import (
    METHODS,
    ModelVector,
    Selection,
    abs_sum,
    blocks_of,
    remove,
    select_neurons,
    select_weights,
    snr,
    top_masks,
    trimmed_mean,
    weight_masks,
    z,
)


def vector(*layers):
    return ModelVector(len(layers), lambda index: torch.as_tensor(layers[index], dtype=torch.float32))


def everything(model_vector):
    return torch.cat([x.flatten() for x in model_vector]).tolist()


# --- neuron scores ----------------------------------------------------------------------------------


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_trimmed_mean_drops_two_percent_at_each_end_and_takes_the_absolute_mean():
    row = torch.full((100,), -3.0)
    row[0], row[1], row[2], row[3] = 1e6, 1e6, -1e6, -1e6
    assert trimmed_mean([row[None]]).item() == 3.0
    row[4] = 1e6  # a third outlier is not dropped
    assert trimmed_mean([row[None]]).item() == pytest.approx((1e6 - 95 * 3) / 96)


def test_projections_are_added_with_their_signs_before_trimming():
    assert trimmed_mean([rows([1, 2, 3]), rows([-1, -2, 6])]).item() == pytest.approx(3.0)


def test_snr_divides_the_mean_by_the_deviation():
    wanted = abs(np.mean([1, 2, -6])) / (np.std([1, 2, -6], ddof=1) + 1e-8)
    assert snr([rows([1, 2, -6])]).item() == pytest.approx(wanted, rel=1e-6)


def test_abs_sum_adds_absolute_values_of_every_projection():
    assert abs_sum([rows([1, -2], [3, 0]), rows([-1, 1], [0, 0])]).tolist() == [5.0, 3.0]


# --- formulas ---------------------------------------------------------------------------------------


def test_standardisation_is_over_all_layers_together():
    found = everything(z(vector([1.0, 2.0], [3.0, 6.0])))
    values = np.array([1, 2, 3, 6.0])
    np.testing.assert_allclose(found, (values - 3) / values.std(ddof=1), rtol=1e-6)


def test_standardisation_of_equal_values_is_zero():
    assert everything(z(vector([2.0, 2.0], [2.0]))) == [0, 0, 0]


@pytest.mark.parametrize(
    "name, neuron_score, power",
    [
        ("structured_afr", "trimmed_mean", 2),
        ("structured_afr", "snr", 1),
        ("structured_afr", "abs_sum", 1),
        ("afr", "trimmed_mean", 1),
    ],
)
def test_afr_adds_both_standardised_parts(name, neuron_score, power):
    fo, ce = np.array([1.0, 4, 2, 9]), np.array([3.0, 1, 2, 2.5])
    sums = {"fo": vector(fo[:2], fo[2:]), "ce": vector(ce[:2], ce[2:])}
    standard = lambda x: (x - x.mean()) / x.std(ddof=1)  # noqa: E731
    np.testing.assert_allclose(
        everything(METHODS[name].scores(sums, neuron_score)), standard(fo) + standard(ce**power), rtol=1e-5
    )


@pytest.mark.parametrize(
    "name, objective", [("structured_snip", "ce"), ("snip", "ce"), ("structured_refer_svd", "fo"), ("refer_svd", "fo")]
)
def test_single_objective_methods_need_and_return_that_objective_alone(name, objective):
    assert METHODS[name].objectives == (objective,)
    assert everything(METHODS[name].scores({objective: vector([3.0, 1.0])}, "trimmed_mean")) == [3, 1]


# --- selection of neurons ---------------------------------------------------------------------------


def widths(selection):
    return [len(kept) for kept in selection.kept]


def random_scores(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, generator=generator) for n in sizes]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.77, 0.999])
def test_every_layer_keeps_exactly_the_rounded_share(ratio):
    assert widths(select_neurons(random_scores(50, 77), ratio)) == [max(round((1 - ratio) * n), 1) for n in (50, 77)]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.77])
def test_global_pruning_keeps_exactly_the_requested_share(ratio):
    kept = widths(select_neurons(random_scores(50, 77, 31), ratio, across_layers=True))
    assert sum(kept) == round((1 - ratio) * 158)


def test_the_highest_scores_stay_in_order_of_index():
    (kept,) = select_neurons([torch.tensor([0.3, 9.0, -1.0, 4.0])], 0.5).kept
    assert kept.tolist() == [1, 3]


def test_equal_scores_keep_the_lower_index():
    assert [k.tolist() for k in select_neurons([torch.zeros(6), torch.ones(6)], 0.5).kept] == [[0, 1, 2], [0, 1, 2]]
    kept = select_neurons([torch.zeros(4), torch.zeros(4)], 0.5, across_layers=True).kept
    assert [k.tolist() for k in kept] == [[0, 1, 2], [0]]


def test_global_pruning_leaves_every_layer_a_unit_however_low_its_scores():
    scores = [torch.arange(8.0) + 100, torch.arange(8.0)]
    assert widths(select_neurons(scores, 0.5, across_layers=True)) == [7, 1]
    assert widths(select_neurons(scores, 0.5, across_layers=True, align=4)) == [4, 4]
    assert widths(select_neurons(scores, 0.95, across_layers=True)) == [1, 1]


def test_global_pruning_takes_the_best_neurons_of_the_whole_model():
    scores = random_scores(40, 40, 40)
    kept = select_neurons(scores, 0.6, across_layers=True).kept
    worst_kept = min(s[k].min() for s, k in zip(scores, kept))
    removed = [np.setdiff1d(np.arange(40), k.numpy()) for k in kept]
    assert all((s[r] <= worst_kept).all() for s, r in zip(scores, removed))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("align", [4, 16])
def test_widths_are_the_nearest_multiples_of_align(align, across):
    selection = select_neurons(random_scores(100, 100, 100), 0.3, across, align)
    assert all(n % align == 0 for n in widths(selection))
    wanted = 210 if across else 3 * 70
    assert abs(sum(widths(selection)) - wanted) <= (align / 2 if across else 3 * align / 2)


def test_aligned_global_pruning_prefers_the_units_with_the_highest_mean():
    scores = [torch.tensor([9.0, 1.0, 0.1, 0.1]), torch.tensor([4.0, 4.0, 3.0, 3.0])]
    assert widths(select_neurons(scores, 0.25, True, 2)) == [2, 4]  # (3 + 3) / 2 beats (0.1 + 0.1) / 2


def test_a_layer_narrower_than_align_is_an_error():
    with pytest.raises(UserError, match="--align 64.*50"):
        select_neurons(random_scores(50), 0.1, align=64)


# --- selection of weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_kept", [0, 1, 7, 500, 1199, 1200])
def test_top_masks_agree_with_a_stable_sort(n_kept):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(1200, generator=generator)
    values[::3] = values[0]  # many ties
    values[1], values[2], values[4], values[5] = 0.0, -0.0, math.inf, 1e-42
    order = values.argsort(descending=True, stable=True)
    wanted = torch.zeros(1200, dtype=torch.bool).scatter(0, order[:n_kept], True)
    found = torch.cat([m.flatten() for m in top_masks([p.view(-1, 4) for p in values.split(400)], n_kept)])
    assert torch.equal(found, wanted)


def unpacked(selection, shapes):
    return [
        torch.from_numpy(np.unpackbits(k.numpy(), count=math.prod(s))).bool().view(s)
        for k, s in zip(selection.kept, shapes)
    ]


def test_every_matrix_loses_exactly_its_share():
    shapes = [(3, 10, 7), (3, 5, 7)]
    scores = vector(*(torch.randn(s) for s in shapes))
    for mask in unpacked(select_weights(scores, 0.3), shapes):
        assert all(matrix.sum() == round(0.7 * matrix.numel()) for matrix in mask)


def test_global_weights_keep_exactly_the_share_of_the_whole_model():
    shapes = [(3, 10, 7), (3, 5, 7)]
    scores = vector(torch.randn(shapes[0]) + 5, torch.randn(shapes[1]))
    selection = select_weights(scores, 0.3, across_layers=True)
    first, second = unpacked(selection, shapes)
    assert selection.n_kept() == int(first.sum() + second.sum()) == round(0.7 * 315)
    assert first.all()


# --- removal ----------------------------------------------------------------------------------------


def logits_with_neurons_silenced(model, mlps, kept, ids):
    """The dense model with the activations of removed neurons set to 0, just before the output projection."""
    hooks = []
    for (_, output, _), keep in zip(mlps, kept):

        def silence(module, args, keep=keep):
            mask = torch.zeros(args[0].shape[-1])
            mask[keep] = 1
            return (args[0] * mask,)

        hooks.append(output.register_forward_pre_hook(silence))
    found = model(ids).logits
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("differing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_neurons_equals_silencing_them(family, differing):
    model, mlps = build(family)
    ids = torch.randint(3, 60, (2, 9))
    layers = find_layers(model)
    scores = [torch.rand(b.width) + (i if differing else 0) for i, b in enumerate(blocks_of(layers))]
    selection = select_neurons(scores, 0.4, across_layers=differing)
    wanted = logits_with_neurons_silenced(model, mlps, selection.kept, ids)
    remove(model, layers, selection)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert [b.width for b in blocks_of(layers)] == widths(selection)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_of_the_pruned_model_rebuilds_it(family):
    model, _ = build(family)
    layers = find_layers(model)
    assert (width_field(model, layers) is None) == (family in FIXED_WIDTH)
    if family not in FIXED_WIDTH:
        remove(model, layers, select_neurons([torch.rand(b.width) for b in blocks_of(layers)], 0.4))
        rebuilt = type(model)(copy.deepcopy(model.config))
        assert rebuilt.load_state_dict(model.state_dict())


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
def test_removed_weights_are_zero_and_the_others_untouched(family):
    model, _ = build(family)
    layers = find_layers(model)
    blocks = blocks_of(layers)
    before = [[p.weight.clone() for p in b.projections] for b in blocks]
    others = {
        n: p.clone() for n, p in model.named_parameters() if not any(p is m.weight for b in blocks for m in b.modules)
    }
    masks = [torch.rand(len(b.projections), b.width, 24) > 0.5 for b in blocks]
    selection = Selection(False, tuple(torch.from_numpy(np.packbits(m.numpy())) for m in masks))
    remove(model, layers, selection)
    for block, matrices, mask in zip(blocks, before, masks):
        for projection, matrix, kept in zip(block.projections, matrices, mask):
            assert torch.equal(projection.weight, matrix * kept)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    assert torch.equal(weight_masks(blocks[0], selection.kept[0]), masks[0])
