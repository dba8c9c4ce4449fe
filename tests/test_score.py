"""The engine against plain autograd over the whole model, and its pieces against their definitions."""

import pytest
import torch
from families import FAMILIES, build
from oracle import saliencies

from lib.errors import UserError
from lib.mlp import find_layers
from lib.prune import abs_sum, each_weight, snr, trimmed_mean
from lib.score import CROSS_ENTROPY, FIRST_ORDER, cross_entropy_cotangent, mean_singular_value, saliency_sums
from lib.tape import collate, without_head

BOTH = (FIRST_ORDER, CROSS_ENTROPY)


def samples(lengths, vocabulary=60):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]


def engine_sums(model, batches, objectives=BOTH, reduce=torch.stack):
    return dict(saliency_sums(model, find_layers(model), batches, objectives, reduce))


def oracle_sums(model, mlps, batches, reduce):
    """Sum over batches (fo) or samples (ce) of `reduce(Q)`, per layer."""
    sums = [{"fo": 0, "ce": 0} for _ in mlps]
    for batch in batches:
        found = saliencies(model, mlps, batch.inputs["input_ids"], batch.inputs.get("attention_mask"))
        for index, total in enumerate(sums):
            total["fo"] = total["fo"] + reduce(found["fo"][index])
            for q in found["ce"]:
                total["ce"] = total["ce"] + reduce(q[index])
    return sums


def assert_matches(found, wanted, tolerance=2e-5):
    for index, sums in enumerate(wanted):
        for objective, value in sums.items():
            error = (found[index][objective] - value).abs().max() / value.abs().max()
            assert error < tolerance, (index, objective, float(error))


@pytest.mark.parametrize("family", FAMILIES)
def test_saliencies_equal_autograd_over_the_whole_model(family):
    model, mlps = build(family)
    batches = collate(samples([11, 11]), 1)
    assert_matches(engine_sums(model, batches), oracle_sums(model, mlps, batches, torch.stack))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (12, 5, 8)])
def test_batches_with_padding_equal_autograd(family, lengths):
    model, mlps = build(family)
    batches = collate(samples(lengths), 3)
    assert_matches(engine_sums(model, batches), oracle_sums(model, mlps, batches, torch.stack))


@pytest.mark.parametrize("reduce", [trimmed_mean, snr, abs_sum, each_weight])
def test_reductions_are_summed_over_the_samples(reduce):
    model, mlps = build("llama")
    batches = collate(samples([11, 7, 11]), 1)
    assert_matches(engine_sums(model, batches, reduce=reduce), oracle_sums(model, mlps, batches, reduce), 1e-4)


def test_cross_entropy_does_not_depend_on_the_batch_size():
    model, _ = build("qwen2")
    drawn = samples([12, 5, 8, 3])
    one, four = (engine_sums(model, collate(drawn, n), (CROSS_ENTROPY,), abs_sum) for n in (1, 4))
    for index in one:
        torch.testing.assert_close(one[index]["ce"], four[index]["ce"], rtol=1e-4, atol=1e-8)


def test_padding_counts_nowhere():
    model, _ = build("llama")
    short = samples([6])
    (plain,) = collate(short, 1)
    padded = collate([short[0], *samples([13])], 2)[0]
    padded = type(padded)({name: value[:1] for name, value in padded.inputs.items()}, padded.labels[:1])
    for index, sums in engine_sums(model, [padded]).items():
        for objective, value in sums.items():
            wanted = engine_sums(model, [plain])[index][objective]
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-6)


def test_only_the_objectives_asked_for_are_computed():
    model, _ = build("llama")
    for objective in BOTH:
        assert all(
            set(sums) == {objective} for sums in engine_sums(model, collate(samples([8]), 1), (objective,)).values()
        )


def test_layers_come_from_the_last_to_the_first():
    model, _ = build("llama")
    walk = saliency_sums(model, find_layers(model), collate(samples([8]), 1), BOTH, abs_sum)
    assert [index for index, _ in walk] == [2, 1, 0]


def test_the_head_in_pieces_equals_the_head_at_once(monkeypatch):
    model, _ = build("llama")
    layers, (batch,) = find_layers(model), collate(samples([12, 5]), 2)
    hidden = torch.randn(2, 12, 24)
    whole = cross_entropy_cotangent(model, layers, batch, hidden)
    monkeypatch.setattr("lib.score.LOGITS_AT_ONCE", 64 * 2 * 5)
    torch.testing.assert_close(cross_entropy_cotangent(model, layers, batch, hidden), whole, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_head_a_model_returns_what_enters_it(family):
    model, _ = build(family)
    ids, head = samples([9])[0][None], model.get_output_embeddings()
    wrapped = head.forward = head.forward  # as accelerate does
    with without_head(model):
        assert model(ids, use_cache=False).logits.shape == (1, 9, head.in_features)
    assert head.forward is wrapped
    assert model(ids, use_cache=False).logits.shape == (1, 9, head.out_features)


def test_the_model_is_as_it_was_after_scoring():
    model, _ = build("opt")
    ids = samples([9])[0][None]
    before, weights = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    engine_sums(model, collate(samples([8]), 1))
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_mean_singular_value_agrees_with_svdvals(batch, scale):
    torch.manual_seed(batch)
    output = (torch.randn(batch, 7, 30) * scale).requires_grad_(True)
    wanted = torch.linalg.svdvals(output.flatten(1)).mean()
    (slope,) = torch.autograd.grad(wanted, output)
    value, found = mean_singular_value(output.detach())
    torch.testing.assert_close(value.float(), wanted.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-5)


def test_mean_singular_value_of_one_sample_is_the_frobenius_norm():
    output = torch.randn(1, 4, 6)
    assert mean_singular_value(output)[0].item() == pytest.approx(output.norm().item(), rel=1e-6)


@pytest.mark.parametrize("output", [torch.zeros(1, 3, 4), torch.zeros(3, 3, 4), torch.ones(2, 3, 4)])
def test_mean_singular_value_is_finite_where_samples_are_zero_or_equal(output):
    value, slope = mean_singular_value(output)
    assert value.isfinite() and slope.isfinite().all()
    assert value.item() == pytest.approx(torch.linalg.svdvals(output.flatten(1)).mean().item(), rel=1e-5)


def test_infinite_activations_name_the_layer_and_another_dtype():
    model, mlps = build("llama")
    with torch.no_grad():
        for module in mlps[1][0]:
            module.weight.mul_(1e30)
    with pytest.raises(UserError, match=r"model\.layers\.1: .* not finite in float32"):
        engine_sums(model, collate(samples([8]), 1))


def test_one_sample_of_a_single_token_has_no_cross_entropy_gradient():
    model, _ = build("llama")
    sums = engine_sums(model, collate(samples([1]), 1), reduce=abs_sum)
    assert all(not s["ce"].any() and s["fo"].all() for s in sums.values())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.08), (torch.float16, 0.02)])
def test_half_precision_stays_near_float32(dtype, tolerance):
    model, _ = build("llama")
    batches = collate(samples([16, 16]), 1)
    wanted = engine_sums(model, batches, reduce=abs_sum)
    found = engine_sums(model.to(dtype), batches, reduce=abs_sum)
    for index, sums in wanted.items():
        for objective, value in sums.items():
            assert found[index][objective].dtype == torch.float32
            assert (found[index][objective] - value).norm() < tolerance * value.norm()
