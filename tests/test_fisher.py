"""Second-order scores of neurons against gates that autograd differentiates."""

import pytest
import torch
from families import build
from torch.nn import functional as F

from lib import prune, score
from lib.mlp import find_layers
from lib.offload import cast
from lib.prune import METHODS, token_fisher
from lib.score import CROSS_ENTROPY, FIRST_ORDER
from lib.sums import InMemory
from lib.tape import collate
from lib.vectors import z


def samples(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (n,), generator=generator) for n in lengths]


@pytest.fixture
def most_likely(monkeypatch):
    """Labels are not drawn: the most likely one is taken, which the oracle can take too."""
    monkeypatch.setattr(score, "draw", lambda probabilities, generator: probabilities.argmax(-1))


def slopes(model, mlps, ids):
    """d(cross-entropy of one sample) / d(a gate per token and neuron of every MLP), `[tokens, d_ff]` each.

    The labels are what the model finds most likely.
    """
    gates, hooks = [], []
    for _, output, _ in mlps:

        def gate(module, args):
            gates.append(torch.ones_like(args[0], requires_grad=True))
            return (args[0] * gates[-1],)

        hooks.append(output.register_forward_pre_hook(gate))
    logits = model(ids[None]).logits[0, :-1]
    for hook in hooks:
        hook.remove()
    return [g.flatten(0, -2) for g in torch.autograd.grad(F.cross_entropy(logits, logits.argmax(-1)), gates)]


def test_the_score_of_a_neuron_is_worked_out_by_hand():
    activations = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # two tokens, two neurons
    left_grad = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    weight = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    # dL/dh = [[2 - 1, -4], [2, 8]]; times h: [[1, -8], [6, 0]]
    assert token_fisher(activations, left_grad, weight).tolist() == [37, 64]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt2", "bloom"])
def test_sums_equal_squared_slopes_along_every_token_s_gate(family, size, most_likely):
    model, mlps = build(family)
    made = samples(12, 5, 8)
    found = prune.score(model, find_layers(model), collate(made, size), METHODS["structured_afr"], "token_fisher",
                        InMemory())  # fmt: skip
    per_sample = [slopes(model, mlps, ids) for ids in made]
    for index in range(len(mlps)):
        wanted = sum(gates[index].square().sum(0) for gates in per_sample)
        torch.testing.assert_close(found[CROSS_ENTROPY][index], wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))


def test_labels_are_drawn_as_often_as_the_model_predicts_them():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.1, 0.9]]).repeat(20000, 1, 1)
    drawn = score.draw(probabilities, torch.Generator().manual_seed(0))
    shares = F.one_hot(drawn, 3).double().mean(0)
    torch.testing.assert_close(shares, probabilities[0].double(), atol=0.02, rtol=0)


def test_draws_depend_on_the_seed_and_not_on_the_order_of_the_samples():
    model, _ = build("llama")
    layers, made = find_layers(model), samples(9, 12, 7)

    def sums(samples, seed):
        kept = prune.score(model, layers, collate(samples, 1), METHODS["structured_snip"], "token_fisher", InMemory(),
                           seed=seed)  # fmt: skip
        return torch.stack(list(kept[CROSS_ENTROPY]))

    torch.testing.assert_close(sums(made, 3), sums(made[::-1], 3))
    assert not torch.allclose(sums(made, 3), sums(made, 4))


def test_padding_draws_no_labels():
    """A batch with padding, on which nothing is to be predicted."""
    logits, targets = torch.randn(1, 3, 5), torch.tensor([[2, score.IGNORE, score.IGNORE]])
    slope = score._softmax_cross_entropy_slope(logits, targets, torch.ones(1, 1), torch.Generator().manual_seed(0))
    assert slope[0, 0].any() and not slope[0, 1:].any()


def test_the_score_is_the_root_beside_the_first_order_part_by_absolute_sums():
    model, _ = build("llama")
    layers, batches, method = find_layers(model), collate(samples(9, 9), 1), METHODS["structured_afr"]
    sums = {name: prune.score(model, layers, batches, method, name, InMemory()) for name in ("token_fisher", "abs_sum")}
    for fisher, absolute in zip(sums["token_fisher"][FIRST_ORDER], sums["abs_sum"][FIRST_ORDER], strict=True):
        assert torch.equal(fisher, absolute)
    found = method.scores(sums["token_fisher"], "token_fisher")
    parts = sums["token_fisher"]
    wanted = z(parts[FIRST_ORDER]) + z(parts[CROSS_ENTROPY] ** 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_about_the_same(dtype, most_likely):
    model, _ = build("llama")
    layers, batches, method = find_layers(model), collate(samples(30, 30), 1), METHODS["structured_snip"]
    wanted = prune.score(model, layers, batches, method, "token_fisher", InMemory())[CROSS_ENTROPY]
    cast(model, dtype)
    found = prune.score(model, layers, batches, method, "token_fisher", InMemory())[CROSS_ENTROPY]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 0.1 * b.norm()


def test_the_command_line_takes_it(run_cli, tiny_model, data_dir, tmp_path):
    done = run_cli("--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 4, "--seqlen", 24,
                   "--pruning_ratio", 0.25, "--neuron_score", "token_fisher", "--global_pruning", "--compensate",
                   "auto", "--save_model", tmp_path / "result")  # fmt: skip
    assert done.code == 0, done.err
