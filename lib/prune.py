"""The pruning methods: one table, the formulas, the selection of what is kept, and its removal.

Every formula works on `lib.vectors.ModelVector`: one value per neuron (or per weight) of the whole model. Those of
other authors' methods stand in `lib.baselines`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lib import baselines, parallel
from lib.errors import UserError
from lib.mlp import Block, Layer, of_tower, set_width, tower_config, towers_of, width_field
from lib.offload import Placement
from lib.score import CROSS_ENTROPY, FIRST_ORDER, Walk, saliency_sums
from lib.sums import InMemory, ScoreFile, Shapes, tensor_name
from lib.tape import Batch, HiddenStates
from lib.vectors import ModelVector, z

# --- neuron scores: Q of one layer and one sample, [d_ff, d] per projection -> [d_ff] ----------------

TRIM = 0.02  # share of a neuron's values dropped at each end


def trimmed_mean(saliencies: list[Tensor]) -> Tensor:
    """`|mean|` of each row of `M = Q_down^T + Q_up + Q_gate` without its lowest and highest 2%."""
    return trimmed_moments(added(saliencies))[0].abs()


def snr(saliencies: list[Tensor]) -> Tensor:
    """`|mean| / (std + 1e-8)` of each trimmed row of M: signal to noise."""
    mean, std = trimmed_moments(added(saliencies), with_std=True)
    return mean.abs() / (std + 1e-8)


def abs_sum(saliencies: list[Tensor]) -> Tensor:
    """`sum(|Q_down| + |Q_up| + |Q_gate|)` over each row: group Taylor (Ma et al. 2023)."""
    return sum(q.abs().sum(-1) for q in saliencies)


def each_weight(saliencies: list[Tensor]) -> Tensor:
    """`|Q|` of every weight, `[projections, d_ff, d]` (Lee et al. 2019)."""
    return torch.stack(saliencies).abs_()


def added(saliencies: list[Tensor]) -> Tensor:
    """`M = Q_down^T + Q_up + Q_gate`, in the memory of the first."""
    total, *others = saliencies
    for saliency in others:
        total.add_(saliency)
    return total


def trimmed_moments(rows: Tensor, with_std: bool = False) -> tuple[Tensor, Tensor | None]:
    """Mean, and standard deviation, of each row `[d_ff, d]` without its lowest and highest 2%. May reorder the rows."""
    drop = int(TRIM * rows.shape[-1])
    if rows.is_cuda:
        return moments_by_selection(rows, drop, with_std)
    # NumPy sorts rows with vector instructions: faster on a CPU than any selection of torch.
    rows = rows.contiguous()
    rows.numpy().sort(-1)
    middle = rows[..., drop : rows.shape[-1] - drop]
    return middle.mean(-1), middle.std(-1) if with_std else None


def moments_by_selection(rows: Tensor, drop: int, with_std: bool) -> tuple[Tensor, Tensor | None]:
    """The same, from the `drop` lowest and highest values of each row taken away from the whole: no sort."""
    left = rows.shape[-1] - 2 * drop
    extremes = torch.cat([rows.topk(drop, -1, largest, sorted=False).values for largest in (False, True)], -1)
    mean = (rows.sum(-1) - extremes.sum(-1)) / left
    if not with_std:
        return mean, None
    squares = [(x - mean[..., None]).square().sum(-1) for x in (rows, extremes)]
    return mean, ((squares[0] - squares[1]).clamp_min(0) / (left - 1)).sqrt()


def token_fisher(activations: Tensor, left_grad: Tensor, weight: Tensor) -> Tensor:
    """`sum_t (h_j dL/dh_j)^2` of every neuron, `[d_ff]`, float32: twice what its removal costs, to second order.

    `activations` `[tokens, d_ff]` enter the output projection `weight` `[d_ff, d]`, `left_grad` `[tokens, d]` is dL/d
    of what leaves it. With a gate on the neuron's output, `h_j dL/dh_j` is a token's slope along it, and the sum, over
    labels that the model itself predicts, the Fisher information: the curvature of the divergence from the model as it
    is (Theis et al. 2018; Kunstner et al. 2019).
    """
    return (activations.float() * (left_grad @ weight.t().to(left_grad.dtype)).float()).square().sum(0)


NEURON_SCORES = {function.__name__: function for function in (trimmed_mean, snr, abs_sum)}
NEURON_SCORES[token_fisher.__name__] = abs_sum  # of the first-order objective, which has no loss per token
# Neuron scores of single tokens' slopes. Their labels are drawn from the model: those of the data do worse.
OF_TOKENS = {token_fisher.__name__: {CROSS_ENTROPY: token_fisher}}


# --- the formulas: sums over the samples -> scores --------------------------------------------------


def snip(ce: ModelVector) -> ModelVector:
    """Sensitivity of the cross-entropy to each weight."""
    return ce


def refer_svd(fo: ModelVector) -> ModelVector:
    """Sensitivity of the mean singular value of the MLP activations to each weight."""
    return fo


def afr(fo: ModelVector, ce: ModelVector) -> ModelVector:
    """Both, each standardised over all MLP weights."""
    return z(fo) + z(ce)


def afr_squared(fo: ModelVector, ce: ModelVector) -> ModelVector:
    """Both, each standardised over all neurons, the cross-entropy's trimmed means squared first."""
    return z(fo) + z(ce**2)


def afr_root(fo: ModelVector, ce: ModelVector) -> ModelVector:
    """Both, each standardised over all neurons, of the cross-entropy's squared slopes the root first."""
    return z(fo) + z(ce**0.5)


OWN_FORMULAS = {"trimmed_mean": afr_squared, "token_fisher": afr_root}


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    structured: removes whole neurons (else single weights);  objectives: the arguments of `formula`, in order, which
    are sums of saliencies or statistics of `lib.baselines`;  by_neuron_score: formulas that replace `formula` for some
    neuron score;  sees: for models with a vision tower;  fixed_score: the neuron score that the method always has.
    """

    name: str
    structured: bool
    objectives: tuple[str, ...]
    formula: Callable[..., ModelVector]
    summary: str
    by_neuron_score: dict[str, Callable[..., ModelVector]] | None = None
    sees: bool = False
    fixed_score: str | None = None

    @property
    def summed(self) -> tuple[str, ...]:
        """What comes from calibration samples, of the arguments of the formula."""
        return tuple(o for o in self.objectives if o not in baselines.OF_WEIGHTS)

    @property
    def by_gradients(self) -> bool:
        """Whether that takes gradients."""
        return any(o in BOTH for o in self.objectives)

    @property
    def takes_neuron_score(self) -> bool:
        """Whether `--neuron_score` has a say in it."""
        return self.structured and self.by_gradients and not self.fixed_score

    def reduction_name(self, neuron_score: str) -> str:
        """How saliencies are reduced before they are summed."""
        if not self.by_gradients:
            return "none, activations"
        return self.fixed_score or neuron_score if self.structured else "none, single weights"

    def reduction(self, neuron_score: str) -> Callable[[list[Tensor]], Tensor]:
        """What is summed over the samples."""
        return NEURON_SCORES[self.reduction_name(neuron_score)] if self.structured else each_weight

    def scores(self, sums: dict[str, ModelVector], neuron_score: str) -> ModelVector:
        """The formula, applied to what was summed over the samples."""
        formula = (self.by_neuron_score or {}).get(neuron_score, self.formula)
        return formula(*(sums[objective] for objective in self.objectives))


BOTH = (FIRST_ORDER, CROSS_ENTROPY)
METHODS = {
    method.name: method
    for method in (
        Method("structured_afr", True, BOTH, afr, "neurons by z(A_FO) + z(A_CE^2)", OWN_FORMULAS),
        Method(
            "structured_afr_llava",
            True,
            BOTH,
            afr,
            "structured_afr for LLaVA, on the language and on the vision tower",
            OWN_FORMULAS,
            sees=True,
        ),
        Method("structured_snip", True, (CROSS_ENTROPY,), snip, "neurons by A_CE"),
        Method("structured_refer_svd", True, (FIRST_ORDER,), refer_svd, "neurons by A_FO"),
        Method("afr", False, BOTH, afr, "weights by z(sum|Q_FO|) + z(sum|Q_CE|)"),
        Method("snip", False, (CROSS_ENTROPY,), snip, "weights by sum|Q_CE|"),
        Method("refer_svd", False, (FIRST_ORDER,), refer_svd, "weights by sum|Q_FO|"),
        *(
            Method(b.name, b.structured, b.statistics, b.formula, b.summary, fixed_score=abs_sum.__name__)
            for b in baselines.BASELINES
        ),
    )
}


# --- selection: scores -> what is kept --------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What stays, per MLP: sorted neuron indices `[n]`, or a packed bit per weight (neuron-major, see `lib.mlp`)."""

    structured: bool
    kept: tuple[Tensor, ...]
    unused: tuple[str, ...] = ()  # names of MLPs that influence nothing, whose scores are 0

    def n_kept(self) -> int:
        """Neurons or weights that stay, over all MLPs."""
        if self.structured:
            return sum(map(len, self.kept))
        return sum(int(np.unpackbits(packed.numpy()).sum()) for packed in self.kept)


def select_neurons(scores: Sequence[Tensor], ratio: float, across_layers: bool = False, align: int = 1) -> Selection:
    """Keep the neurons with the highest scores `[d_ff]` of each layer.

    Per layer `round((1 - ratio) * d_ff)` stay; across layers `round((1 - ratio) * total)`, each layer at
    least one unit of `align`. Widths are the nearest possible multiples of `align`. Among equal scores the
    lower index (layer, then neuron) stays.

    Raises UserError when a layer is narrower than `align`.
    """
    widths = [len(s) for s in scores]
    if min(widths) < align:
        raise UserError(f"--align {align}: must be at most the width of the narrowest MLP, {min(widths)}")
    # Units of `align` neurons in the order of their scores; a unit counts by its mean, which falls within a layer.
    ranked = [s.double().cpu().argsort(descending=True, stable=True) for s in scores]
    units = [width // align for width in widths]
    if across_layers:
        means = [
            s.double().cpu()[order[: n * align]].view(n, align).mean(1) for s, order, n in zip(scores, ranked, units)
        ]
        budget = max(_nearest_units((1 - ratio) * sum(widths), align, sum(units)), len(units))
        taken = _most_valuable(means, budget)
    else:
        taken = [_nearest_units((1 - ratio) * width, align, n) for width, n in zip(widths, units)]
    return Selection(True, tuple(order[: n * align].sort().values for order, n in zip(ranked, taken)))


def _nearest_units(neurons: float, align: int, available: int) -> int:
    return min(max(round(round(neurons) / align), 1), available)


def _most_valuable(values: list[Tensor], budget: int) -> list[int]:
    """How many units each layer keeps when the best `budget` stay; every layer's first unit stays."""
    layer = torch.cat([torch.full((len(v),), index) for index, v in enumerate(values)])
    first = torch.cat([torch.arange(len(v)) == 0 for v in values])
    order = torch.cat(values).masked_fill(first, math.inf).argsort(descending=True, stable=True)
    return torch.bincount(layer[order[:budget]], minlength=len(values)).tolist()


def select_weights(scores: ModelVector, ratio: float, across_layers: bool = False) -> Selection:
    """Keep the weights with the highest scores `[projections, d_ff, d]`, in each matrix or across the model.

    Exactly `round((1 - ratio) * n)` stay; among equal scores the lower index stays.
    """
    if across_layers:
        n_kept = round((1 - ratio) * sum(s.numel() for s in scores))
        masks = top_masks(scores, n_kept)
    else:
        masks = (
            torch.stack([next(top_masks([matrix], round((1 - ratio) * matrix.numel()))) for matrix in s])
            for s in scores
        )
    return Selection(False, tuple(torch.from_numpy(np.packbits(mask.numpy())) for mask in masks))


def top_masks(pieces: Sequence[Tensor], n_kept: int) -> Iterator[Tensor]:
    """For every piece a mask of its members among the `n_kept` highest values of all pieces together.

    Exact, ties to the lower index, with one piece in memory at a time: two passes over the pieces find the
    threshold by the upper and the lower 16 bits of the values, a third marks what lies above it.
    """
    above, prefix = 0, 0
    for shift in (16, 0):
        counts = np.zeros(2**16, dtype=np.int64)
        for piece in pieces:
            keys = _ordered_keys(piece)
            if shift == 0:
                keys = keys[keys >> 16 == prefix]
            counts += np.bincount(keys >> shift & 0xFFFF, minlength=2**16)
        # The digit of the threshold: the highest one with which at least n_kept values are reached.
        reached = above + counts[::-1].cumsum()
        digit = 0xFFFF - int(np.searchsorted(reached, max(n_kept, 1)))
        above += int(counts[digit + 1 :].sum())
        prefix = prefix << 16 | digit
    ties = n_kept - above
    for piece in pieces:
        keys = _ordered_keys(piece)
        equal = np.flatnonzero(keys == prefix)[: max(ties, 0)]
        ties -= len(equal)
        mask = keys > prefix if n_kept else np.zeros(len(keys), dtype=bool)
        mask[equal] = True
        yield torch.from_numpy(mask).view(piece.shape)


def _ordered_keys(values: Tensor) -> np.ndarray:
    """Unsigned 32-bit integers in the order of the float32 values."""
    bits = (values.float().flatten() + 0.0).numpy().view(np.uint32)  # + 0.0: one zero, not two
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


# --- the steps together -----------------------------------------------------------------------------


def sum_shapes(layers: Sequence[Layer], method: Method) -> Shapes:
    """The shape of what is summed over the samples, by name, per MLP and objective."""

    def shape(block: Block, objective: str) -> tuple[int, ...]:
        width, features = block.projections[0].weight.shape
        if objective in baselines.ACTIVATIONS:
            return (2, width if objective == baselines.NEURONS else features)
        return (width,) if method.structured else (len(block.projections), width, features)

    return {tensor_name(b.name, o): shape(b, o) for b in blocks_of(layers) for o in method.summed}


def score(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    method: Method,
    neuron_score: str,
    kept: InMemory | ScoreFile,
    placement: Placement | None = None,
    hidden: HiddenStates | None = None,
    seed: int = 0,
    alone: bool = False,
) -> dict[str, ModelVector]:
    """Bring `kept` to the sums that the method's formula takes, and return them: a vector per objective.

    Of several processes each scores its share of the batches, unless this one works `alone`. What `kept` holds already
    is not computed again. `seed` is of labels that are drawn (see `OF_TOKENS`).
    """
    names = [layer.name if layer.block is None else layer.block.name for layer in layers]
    if not kept.is_complete:
        own = batches if alone else parallel.share(batches)
        if method.by_gradients:
            walk = kept.earlier(len(own)) or Walk.start(len(layers), len(own), method.summed)
            reduction = method.reduction(neuron_score)
            of_tokens = OF_TOKENS.get(method.reduction_name(neuron_score))
            draws = seed if of_tokens else None
            walking = saliency_sums(
                model, layers, own, method.summed, reduction, placement, hidden, walk, of_tokens, draws
            )
            for index, sums in walking:
                if not alone:
                    parallel.add_up(sums[objective] for objective in method.summed)
                kept.put({tensor_name(names[index], objective): value for objective, value in sums.items()}, walk)
        elif method.summed:
            for index, means in baselines.activation_means(model, layers, own, placement, hidden, alone):
                kept.put({tensor_name(names[index], name): means[name] for name in method.summed})
        kept.complete()
    blocks = [block.name for block in blocks_of(layers)]
    return {o: ModelVector(len(blocks), lambda i, o=o: kept[tensor_name(blocks[i], o)]) for o in method.summed}


def select(
    layers: Sequence[Layer],
    sums: dict[str, ModelVector],
    method: Method,
    ratio: float,
    across_layers: bool = False,
    neuron_score: str = "trimmed_mean",
    align: int = 1,
    seed: int = 0,
) -> Selection:
    """What the method keeps at this ratio. Towers are standardised and thresholded each on its own.

    The model is dense; `seed` is of random methods' draws.
    """
    kept, unused = [], ()
    if method.structured and method.by_gradients:
        silent = (not any(v[i].any() for v in sums.values()) for i in range(len(blocks_of(layers))))
        unused = tuple(b.name for b, nothing in zip(blocks_of(layers), silent, strict=True) if nothing)
    sums = baselines.of_weights(blocks_of(layers), seed) | sums
    for tower in pruned_towers(layers):
        scores = method.scores(sums_of_tower(sums, layers, tower), neuron_score)
        if method.structured:
            kept.extend(select_neurons(list(scores), ratio, across_layers, align).kept)
        else:
            kept.extend(select_weights(scores, ratio, across_layers).kept)
    return Selection(method.structured, tuple(kept), unused)


def everything(layers: Sequence[Layer]) -> Selection:
    """All neurons: what stays at ratio 0, for which nothing needs to be scored."""
    return Selection(True, tuple(torch.arange(block.width) for block in blocks_of(layers)))


def sums_of_tower(sums: dict[str, ModelVector], layers: Sequence[Layer], tower: str) -> dict[str, ModelVector]:
    """The part of the sums that belongs to one tower's MLPs."""
    places = [place for place, layer in enumerate(layer for layer in layers if layer.block) if layer.tower == tower]
    return {o: ModelVector(len(places), lambda i, v=vector: v[places[i]]) for o, vector in sums.items()}


@torch.no_grad()
def remove(model: nn.Module, layers: Sequence[Layer], selection: Selection) -> None:
    """Take everything that is not selected out of the model: neurons are cut off, weights set to 0.

    The configuration gets the new widths where it can say them (see `lib.mlp.width_field`).
    """
    fields = {t: width_field(model, layers, t) for t in pruned_towers(layers)} if selection.structured else {}
    for block, kept in zip(blocks_of(layers), selection.kept, strict=True):
        if selection.structured:
            block.keep_neurons(kept)
        else:
            for projection, mask in zip(block.projections, weight_masks(block, kept)):
                projection.weight.mul_(mask.to(projection.weight.device))
    for tower, field in fields.items():
        if field:
            widths = [block.width for block in blocks_of(of_tower(layers, tower))]
            set_width(tower_config(model.config, tower), field, widths)


def silence(layers: Sequence[Layer], selection: Selection) -> None:
    """Set every neuron that is not selected to 0 in all of its weights, so that what is scored next is without it."""
    for block, kept in zip(blocks_of(layers), selection.kept, strict=True):
        block.silence_neurons(complement(kept, block.width))


def complement(kept: Tensor, width: int) -> Tensor:
    """The indices below `width` that are not in `kept`, sorted."""
    gone = torch.ones(width, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero()[:, 0]


def pruned_towers(layers: Sequence[Layer]) -> list[str]:
    """The towers that have MLPs to prune."""
    return towers_of([layer for layer in layers if layer.block])


def blocks_of(layers: Sequence[Layer]) -> list[Block]:
    """The MLPs of the layers that have one."""
    return [layer.block for layer in layers if layer.block]


def weight_masks(block: Block, packed: Tensor) -> Tensor:
    """Unpack one entry of a weight selection: bool `[projections, d_ff, d]`."""
    shape = (len(block.projections), *block.projections[0].weight.shape)
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=math.prod(shape))).bool().view(shape)
