"""Methods of other authors, for comparison at equal ratio: what each needs, and its formula.

Every formula takes statistics, one `lib.vectors.ModelVector` each, and gives a score per neuron `[d_ff]` or per
weight `[projections, d_ff, d]`. No gradient is needed but by `structured_taylor`, whose statistic comes from the
engine like those of AFR.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib import parallel
from lib.mlp import LANGUAGE, Block, Layer
from lib.offload import Placement
from lib.score import CROSS_ENTROPY
from lib.tape import Batch, HiddenStates, NotFinite, other_dtype, record
from lib.vectors import ModelVector, each

# Names of the statistics that need no gradient.
RANDOM = "random"  # a draw from [0, 1) per weight, [projections, d_ff, d]
WEIGHTS = "weights"  # the weights themselves, [projections, d_ff, d]
ENTERED = "entered"  # what enters the MLP: mean and mean square of each feature over the tokens, [2, d]
NEURONS = "neurons"  # what the neurons put out: mean and mean square of each over the tokens, [2, d_ff]
ACTIVATIONS = (ENTERED, NEURONS)
OF_WEIGHTS = (RANDOM, WEIGHTS)


# --- whole neurons: statistics of one model -> [d_ff] per layer --------------------------------------


def structured_random(draws: ModelVector) -> ModelVector:
    """The draw of a neuron's first weight: no criterion at all."""
    return each(lambda u: u[0, :, 0], draws)


def structured_magnitude(weights: ModelVector) -> ModelVector:
    """`sum_p sum_i W_p[j, i]^2` over all projections p: squared L2 norm of what a neuron owns.

    Source: LLM-Pruner's `l2` importance of a group (Ma et al. 2023), after Li et al. 2017.
    """
    return each(lambda w: w.square().sum((0, 2)), weights)


def structured_wanda(weights: ModelVector, neurons: ModelVector) -> ModelVector:
    """`sum_i |W_down[j, i]| * sqrt(mean_t h_j^2)`: Wanda's score summed over a neuron's outgoing weights.

    Source: Wanda-sp (An et al. 2024), after Sun et al. 2024. Of `weights` the last projection counts.
    """
    return each(lambda w, h: w[-1].abs().sum(-1) * h[1].sqrt(), weights, neurons)


def structured_flap(weights: ModelVector, neurons: ModelVector) -> ModelVector:
    """`Var_t(h_j) * sum_i W_down[j, i]^2`, standardised over the neurons of each layer.

    What a neuron's removal costs when its mean goes into the bias (`--compensate bias`): weighted input feature
    variance. Standardised within layers, the scores of all layers are then compared by `--global_pruning`.
    Source: FLAP, WIFV with AL-AM (An et al. 2024).
    """

    def layer(w: Tensor, h: Tensor) -> Tensor:
        score = (h[1] - h[0].square()).clamp_min(0) * w[-1].square().sum(-1)
        return (score - score.mean()) / score.std().clamp_min(torch.finfo(score.dtype).tiny)

    return each(layer, weights, neurons)


def structured_taylor(ce: ModelVector) -> ModelVector:
    """`sum over samples, projections and i of |W_p[j, i] * dL_CE/dW_p[j, i]|`; the sum is the engine's `abs_sum`.

    Source: LLM-Pruner's element-wise first-order importance of a group (Ma et al. 2023), after Molchanov et al.
    2019. The absolute value is taken per sample, as everywhere here.
    """
    return ce


# --- single weights: statistics of one model -> [projections, d_ff, d] per layer ---------------------


def random(draws: ModelVector) -> ModelVector:
    """A draw from [0, 1) per weight: no criterion at all."""
    return draws


def magnitude(weights: ModelVector) -> ModelVector:
    """`|W|` (Han et al. 2015)."""
    return each(torch.Tensor.abs, weights)


def wanda(weights: ModelVector, entered: ModelVector, neurons: ModelVector) -> ModelVector:
    """`|W| * sqrt(mean_t x^2)`, x the weight's input feature, compared among the weights of one output.

    The score is a weight's rank among those of its output, as a share of them. So one threshold over a matrix, or
    over the model, takes the same share from each output: the comparison group of Wanda (Sun et al. 2024).
    """

    def layer(w: Tensor, x: Tensor, h: Tensor) -> Tensor:
        score = w.abs()
        score[:-1] *= x[1].sqrt()  # an input projection's row is one output, its columns are features
        score[-1] *= h[1].sqrt()[:, None]  # the output projection's column is one output, its rows are neurons
        return torch.cat([_ranks(score[:-1], dim=2), _ranks(score[-1:], dim=1)])

    return each(layer, weights, entered, neurons)


def _ranks(values: Tensor, dim: int) -> Tensor:
    """The place of every value among those along `dim`, from 0 to 1 exclusive, the lowest first."""
    order = values.argsort(dim=dim, stable=True)
    places = torch.arange(values.shape[dim], dtype=torch.float32) / values.shape[dim]
    places = places.view([-1 if d == dim % values.ndim else 1 for d in range(values.ndim)]).expand_as(order)
    return torch.empty_like(values).scatter_(dim, order, places)


@dataclass(frozen=True)
class Baseline:
    """What a row of the table of methods (`lib.prune.METHODS`) needs to know."""

    formula: Callable[..., ModelVector]
    structured: bool
    statistics: tuple[str, ...]
    summary: str

    @property
    def name(self) -> str:
        """The value of `--prune_method`."""
        return self.formula.__name__


BASELINES = (
    Baseline(structured_random, True, (RANDOM,), "random neurons"),
    Baseline(structured_magnitude, True, (WEIGHTS,), "neurons by sum W^2"),
    Baseline(structured_wanda, True, (WEIGHTS, NEURONS), "neurons by |W_down| * ||h|| (Wanda-sp)"),
    Baseline(structured_flap, True, (WEIGHTS, NEURONS), "neurons by Var(h) * ||W_down||^2 per layer (FLAP)"),
    Baseline(structured_taylor, True, (CROSS_ENTROPY,), "neurons by sum |Q_CE| (LLM-Pruner)"),
    Baseline(random, False, (RANDOM,), "random weights"),
    Baseline(magnitude, False, (WEIGHTS,), "weights by |W|"),
    Baseline(wanda, False, (WEIGHTS, ENTERED, NEURONS), "weights by |W| * ||x||, per output (Wanda)"),
)


# --- the statistics ---------------------------------------------------------------------------------


def of_weights(blocks: Sequence[Block], seed: int = 0) -> dict[str, ModelVector]:
    """The statistics that take no calibration, `[projections, d_ff, d]`, float32 on the CPU.

    They are made when asked for, a layer at a time. A seed always makes the same draws.
    """
    return {
        RANDOM: ModelVector(len(blocks), lambda index: _draws(blocks[index], seed, index)),
        WEIGHTS: ModelVector(len(blocks), lambda index: _weights(blocks[index])),
    }


def _draws(block: Block, seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + index)
    return torch.rand(len(block.projections), *block.projections[0].weight.shape, generator=generator)


def _weights(block: Block) -> Tensor:
    return torch.stack([p.weight.float().cpu() for p in block.projections])


class Moments:
    """Sums over what enters one MLP `[2, d]` and what its neurons put out `[2, d_ff]`: of values and of squares."""

    def __init__(self, block: Block):
        width, features = block.projections[0].weight.shape
        self.count = torch.zeros((), dtype=torch.float64)
        self.sums = {
            ENTERED: torch.zeros(2, features, dtype=torch.float64),
            NEURONS: torch.zeros(2, width, dtype=torch.float64),
        }

    def add(self, name: str, values: Tensor, real: Tensor) -> None:
        """Add activations `[..., features]`; positions that are not `real` (`[batch, tokens]`) count nowhere."""
        rows = values.reshape(real.numel(), -1)[real.flatten()].float()  # some families flatten batch and tokens
        self.sums[name] += torch.stack([rows.sum(0), rows.square().sum(0)]).cpu()
        self.count += len(rows) if name == NEURONS else 0

    def means(self, alone: bool) -> dict[str, Tensor]:
        """Mean and mean square of each feature, float32; over the tokens of all processes, or of this one `alone`."""
        if not alone:
            parallel.add_up([self.count, *self.sums.values()])
        return {name: (sums / self.count).float() for name, sums in self.sums.items()}


def activation_means(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    placement: Placement | None = None,
    store: HiddenStates | None = None,
    alone: bool = False,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield `(layer index, {ENTERED: [2, d], NEURONS: [2, d_ff]})`, mean and mean square over all real tokens.

    One pass over the layers without gradients, a layer at a time, wherever its weights are. Of several processes each
    gives its share of the batches, unless this one works `alone`.

    Raises UserError for a model whose layers cannot be called one by one, or that produces NaN or infinity.
    """
    placement = placement or Placement(layers)
    moments = {index: Moments(layer.block) for index, layer in enumerate(layers) if layer.block}

    def watch(index: int, number: int):
        return _watched(layers[index], moments.get(index), batches[number].real)

    with tqdm(total=len(layers) * len(batches), desc="scoring", unit="layer", disable=None) as bar:
        if batches:
            record(model, layers, batches, placement, store or HiddenStates(), bar=bar, watch=watch)
    for index, held in moments.items():
        means = held.means(alone)
        if not all(mean.isfinite().all() for mean in means.values()):
            raise NotFinite(f"{layers[index].name}: its activations are not finite; {other_dtype(model.dtype)}")
        yield index, means


@contextmanager
def _watched(layer: Layer, moments: Moments | None, real: Tensor) -> Iterator[None]:
    """Within this context what the MLP's first and last module are given is added to its moments."""
    with ExitStack() as hooks:
        for name, at in zip(ACTIVATIONS, (0, -1)) if moments else ():

            def hook(module, args, name=name):
                # Images are not padded; tokens may be.
                tokens = real if layer.tower == LANGUAGE else real.new_ones(args[0].shape[:2])
                moments.add(name, args[0], tokens.to(args[0].device))

            hooks.callback(layer.block.modules[at].register_forward_pre_hook(hook).remove)
        yield
