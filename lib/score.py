"""The engine: calibration batches -> weight saliencies of every MLP, one layer at a time, backwards.

A forward pass records what enters every layer (`lib.tape`). Then, from the last layer to the first, each layer is
run again with gradients and the cotangents of the objectives are pulled through it. So at most one
layer's activations and weight gradients exist at a time. No method's name is known here: a method says
which objectives it needs and how the saliencies of one layer are reduced.
"""

import inspect
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib.attention import scoring_attention
from lib.memory import GIB, peak_bytes
from lib.mlp import LANGUAGE, Block, Layer
from lib.offload import Placement
from lib.tape import (
    IGNORE,
    Batch,
    HiddenStates,
    NotFinite,
    Tape,
    call,
    handing_on,
    other_dtype,
    record,
    tower_ranges,
    without_head,
)

CROSS_ENTROPY = "ce"
FIRST_ORDER = "fo"

# The logits that may exist at once, in float32 elements: the head is run in pieces of this size.
LOGITS_AT_ONCE = 2**26
# float16 loses gradients below 6e-8; a power of two shifts the cross-entropy's into its range.
FLOAT16_LOSS_SCALE = 2.0**12

# Elements of a projection's saliencies that are reduced at once: on a CPU they should stay in its caches.
AT_ONCE_IN_CACHE = 2**17
AT_ONCE_ON_GPU = 2**26

Reduce = Callable[[list[Tensor]], Tensor]
"""Saliencies Q of some neurons of a layer, one `[neurons, d]` per projection -> what the method sums over the samples,
`[neurons]` or `[projections, neurons, d]`. Each neuron is reduced by itself. What is given may be overwritten."""

OfTokens = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What enters a layer's output projection `[tokens, d_ff]`, dL/d of what leaves it `[tokens, d]`, its weight
`[d_ff, d]` -> what the method sums over the samples, `[d_ff]`; of one sample, or of a batch."""


@dataclass
class Walk:
    """How far the way back has come: all that is needed to go on with layer `index - 1`.

    pulled: per objective and batch the cotangent at the input of layer `index`;  arriving: cotangents that enter
    the same tower further down;  reached: the highest of the tower's layers that the model makes use of.
    """

    index: int
    pulled: dict[str, list[Tensor | None]]
    arriving: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)
    reached: int = -1

    @classmethod
    def start(cls, n_layers: int, n_batches: int, objectives: Sequence[str]) -> "Walk":
        """Nothing is done yet."""
        return cls(n_layers, {objective: [None] * n_batches for objective in objectives})


def saliency_sums(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    objectives: Sequence[str],
    reduce: Reduce,
    placement: Placement | None = None,
    store: HiddenStates | None = None,
    walk: Walk | None = None,
    of_tokens: dict[str, OfTokens] | None = None,
    draws: int | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield `(layer index, {objective: sum over samples of reduce(Q)})` from the last layer to the first.

    `Q = W * dL/dW` for the projections of the layer's MLP, in float32. `CROSS_ENTROPY` is the mean
    next-token cross-entropy of each sample (Lee et al. 2019), always one sample at a time whatever the
    batch size. `FIRST_ORDER` is the mean singular value of each projection's output, summed over all
    projections of `layers`, with one gradient per batch; of both towers' where both are pruned. A vision tower's
    gradients then hold the norms of the language model too, which it reaches through the projector: pruned alone it
    keeps other neurons. The sums are on the CPU.

    The objectives in `of_tokens` are summed by what stands there instead of `reduce`. With `draws`, a seed, the
    cross-entropy is that of labels drawn from what the model itself predicts: its slopes' squares are then the
    curvature of the divergence from the model as it is (Kunstner et al. 2019).

    `walk` is brought up to date before every yield; one that was kept goes on where it stood. Without batches the
    sums are zero.

    Raises UserError when the model computes something between its layers or produces NaN or infinity.
    """
    placement = placement or Placement(layers)
    store = store or HiddenStates(pinned=placement.main.type == "cuda")
    walk = walk or Walk.start(len(layers), len(batches), objectives)
    first = next(index for index, layer in enumerate(layers) if layer.block)  # nothing is needed from those before it
    model.requires_grad_(False)
    reductions = reduce, of_tokens or {}
    steps = len(batches) * max(2 * walk.index - first, 0)
    with tqdm(total=steps, desc="scoring", unit="layer", disable=None) as bar, scoring_attention(model):
        tape = record(model, layers, batches, placement, store, walk.index, bar) if batches else None
        for tower in reversed(tower_ranges(layers)):
            if tower.stop <= first or tower.start >= walk.index:
                continue
            if walk.index == tower.stop:
                _arrive(model, layers, tower, batches, tape, walk, placement, draws)
            for index in reversed(range(max(tower.start, first), walk.index)):
                bar.set_postfix_str(f"{layers[index].name.rpartition('.')[0]} {index}, {_peak(placement.main)}")
                if index > walk.reached:  # the model does not use what this layer computes
                    bar.update(len(batches))
                    sums = _zeros(layers[index], objectives, reduce)
                else:
                    _add(walk.pulled, walk.arriving.pop(index, {}))
                    with placement.at_work(index, index - 1 if index > first else None) as device:
                        sums = _walk_layer(layers[index], tape, index, batches, walk.pulled, reductions, device, bar)
                walk.index = index
                if sums:
                    yield index, sums


def _peak(device: torch.device) -> str:
    return f"peak {peak_bytes(device) / GIB:.1f} GiB"


def _arrive(model, layers, tower: range, batches, tape: Tape, walk: Walk, placement: Placement, draws) -> None:
    """Bring the cotangents to the outputs of a tower's layers, from outside it."""
    main, walk.arriving = placement.main, {}
    behind = layers[tower.stop :]
    for number, batch in enumerate(batches):
        if behind:
            outputs = [tape.output(index, number).to(main) for index in tower]
            above = {o: p[number].to(main) for o, p in walk.pulled.items() if p[number] is not None}
            found = bridge_cotangents(model, layers, tower, batch.to(main), outputs, above, tape.returned)
        elif CROSS_ENTROPY in walk.pulled:
            last = tape.output(tower.stop - 1, number).to(main)
            cotangent = cross_entropy_cotangent(model, layers, batch.to(main), last, tape.returned, draws)
            found = {tower.stop - 1: {CROSS_ENTROPY: cotangent}}
        else:
            found = {tower.stop - 1: {}}
        for index, by_objective in found.items():
            for objective, cotangent in by_objective.items():
                walk.arriving.setdefault(index, {}).setdefault(objective, []).append(cotangent.to("cpu"))
    for objective in walk.pulled:
        walk.pulled[objective] = [None] * len(batches)
    walk.reached = max(walk.arriving, default=tower.start - 1 if behind else tower.stop - 1)


def _add(pulled: dict[str, list], arriving: dict[str, list[Tensor]]) -> None:
    for objective, cotangents in arriving.items():
        pulled[objective] = [c if p is None else p + c for p, c in zip(pulled[objective], cotangents, strict=True)]


def _zeros(layer: Layer, objectives: Sequence[str], reduce: Reduce) -> dict[str, Tensor]:
    if layer.block is None:
        return {}
    one = reduce([torch.zeros(1, p.weight.shape[1]) for p in layer.block.projections])  # what a single neuron gives
    shape = (layer.block.width,) if one.ndim == 1 else (len(one), layer.block.width, *one.shape[2:])
    return {objective: torch.zeros(shape) for objective in objectives}


def _walk_layer(layer, tape, index, batches, cotangents, reductions, device, bar) -> dict[str, Tensor]:
    """Pull every batch's cotangents through one layer, in place, and return the layer's sums."""
    reduce, of_tokens = reductions
    sums = {objective: total.to(device) for objective, total in _zeros(layer, cotangents, reduce).items()}
    weights = [p.weight.float() for p in layer.block.projections] if layer.block else []
    dtype = next(layer.module.parameters()).dtype
    scale = FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0
    for number, batch in enumerate(batches):
        hidden = tape.input(index, number).to(device, non_blocking=True).requires_grad_()
        tape.hidden.drop(("input", index, number))
        # Images are not padded; tokens may be.
        real = batch.real.to(device) if layer.tower == LANGUAGE and "attention_mask" in batch.inputs else None
        with _captured(layer.block) as seen, torch.enable_grad():
            output = call(layer, tape, index, number, device, hidden)
        entered, outputs = [x for x, _ in seen], [y for _, y in seen]
        n = len(batch) if layer.tower == LANGUAGE else len(hidden)  # a language model's may stand in several streams
        for objective, pulled in cotangents.items():
            roots, grads = ([output], [pulled[number].to(device)]) if pulled[number] is not None else ([], [])
            if objective == FIRST_ORDER:
                roots = roots + outputs
                grads = grads + _output_norm_cotangents(layer.block, outputs, n, real)
            if not roots:
                continue
            into, *left_grads = torch.autograd.grad(roots, [hidden, *outputs], grads, retain_graph=True)
            pulled[number] = into.to("cpu")
            per_sample = objective == CROSS_ENTROPY
            groups, unscaled = (len(batch), 1 / scale) if per_sample else (1, 1)
            if layer.block and objective in of_tokens:
                for x, g in zip(*(_grouped(y[-1], groups) for y in (entered, left_grads)), strict=True):
                    g = g if unscaled == 1 else g.float() * unscaled
                    sums[objective] += of_tokens[objective](x, g, weights[-1])
            elif layer.block:
                for gradients in _gradients(layer.block, entered, left_grads, groups):
                    _reduce(weights, gradients, reduce, sums[objective], unscaled)
        bar.update()
    for objective, total in sums.items():
        if not total.isfinite().all():
            raise NotFinite(f"{layer.name}: the {objective} saliency is not finite; {other_dtype(dtype)}")
    return {objective: total.cpu() for objective, total in sums.items()}


def _gradients(block: Block, entered, left_grads, groups: int) -> Iterator[list[Tensor]]:
    """dL/dW of every projection, `[d_ff, d]`: for the batch as a whole, or for one of its `groups` after another."""
    by_module = {
        id(module): (_grouped(x, groups), _grouped(g, groups))
        for module, x, g in zip(block.modules, entered, left_grads, strict=True)
    }
    for group in range(groups):
        yield [p.gradient(*(side[group] for side in by_module[id(p.module)])) for p in block.projections]


def _grouped(values: Tensor, groups: int) -> Tensor:
    """`[groups, tokens, features]`. Some families (OPT) flatten batch and tokens before their MLP."""
    return values.reshape(groups, -1, values.shape[-1])


def _reduce(weights: list[Tensor], gradients: list[Tensor], reduce: Reduce, total: Tensor, scale: float) -> None:
    """Add `reduce(Q)` to `total`, `Q = scale * W * dL/dW`, for as many neurons at a time as stay in the cache."""
    width, features = weights[0].shape
    rows = max((AT_ONCE_ON_GPU if total.is_cuda else AT_ONCE_IN_CACHE) // features, 1)
    by_neuron = total if total.ndim == 1 else total.transpose(0, 1)
    for start in range(0, width, rows):
        some = slice(start, min(start + rows, width))
        q = [weight[some] * gradient[some] for weight, gradient in zip(weights, gradients, strict=True)]
        part = reduce(q if scale == 1 else [x.mul_(scale) for x in q])
        by_neuron[some] += part if part.ndim == 1 else part.transpose(0, 1)


# --- the objectives ---------------------------------------------------------------------------------


def cross_entropy_cotangent(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    hidden: Tensor,
    returned: int = 0,
    draws: int | None = None,
) -> Tensor:
    """d(sum over samples of the mean next-token cross-entropy) / d(last layer's output), `[batch, tokens, d]`.

    `hidden` is the last layer's output; for `returned` see `lib.tape.handing_on`. Everything behind the layers
    (final norm, head, soft-capping) is the model's own code: it is called with layers that only hand `hidden`
    on, for a piece of the positions at a time where the model can (`logits_to_keep`). `draws` is the seed of labels
    that take the place of the batch's own.
    """
    hidden = hidden.detach().requires_grad_()
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)  # [batch, tokens]: what each position predicts
    counts = (labels != IGNORE).sum(1, keepdim=True).clamp_min(1)
    total = torch.zeros_like(hidden)
    scale = FLOAT16_LOSS_SCALE if hidden.dtype == torch.float16 else 1.0
    handed = [hidden if layer.tower == layers[-1].tower else None for layer in layers]
    generator = None if draws is None else _generator(draws, batch)
    for positions in _positions(model, batch):
        keep = {} if positions is None else {"logits_to_keep": positions}
        with handing_on(layers, handed, returned), torch.enable_grad():
            logits = model(**batch.inputs, use_cache=False, **keep).logits
        targets = labels if positions is None else labels[:, positions]
        slope = _softmax_cross_entropy_slope(logits.detach(), targets, scale / counts, generator)
        total += torch.autograd.grad(logits, hidden, slope)[0]
    return total


def _generator(seed: int, batch: Batch) -> torch.Generator:
    """Draws that depend on what is in the batch and not on its place, which differs with the number of processes."""
    ids = batch.inputs["input_ids"]
    return torch.Generator(ids.device).manual_seed(zlib.crc32(ids.cpu().numpy().tobytes(), seed))


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """An index drawn from each row of `[..., vocabulary]`, `[...]`."""
    rows = probabilities.flatten(0, -2)
    return torch.multinomial(rows, 1, generator=generator).view(probabilities.shape[:-1])


def _softmax_cross_entropy_slope(
    logits: Tensor, targets: Tensor, weights: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """d(weighted sum of the cross-entropies) / d(logits): `weight * (softmax - onehot)`, 0 where a target is IGNORE.

    `[batch, tokens, vocabulary]`, `[batch, tokens]`, `[batch, 1]`. With a generator the targets are drawn. Written
    out, since it takes half the memory traffic of going through `log_softmax` and back.
    """
    slope = torch.softmax(logits, -1, dtype=torch.float32)
    weights = (weights * (targets != IGNORE))[..., None]
    targets = targets if generator is None else draw(slope, generator)
    slope.scatter_add_(-1, targets.clamp_min(0)[..., None], slope.new_tensor(-1.0).expand(*targets.shape, 1))
    return slope.mul_(weights).to(logits.dtype)


def bridge_cotangents(
    model: nn.Module,
    layers: Sequence[Layer],
    tower: range,
    batch: Batch,
    outputs: list[Tensor],
    above: dict[str, Tensor],
    returned: int,
) -> dict[int, dict[str, Tensor]]:
    """Pull cotangents at the input of the next tower back to the outputs of this tower's layers.

    `outputs` are what this tower's layers compute, `above` the cotangents per objective. What lies between the
    towers (feature selection, projector, splicing into the text) is the model's own code, called with layers
    that hand these outputs on. Layers whose output the model does not use are absent from the result.
    """
    leaves = [output.detach().requires_grad_() for output in outputs]
    following = layers[tower.stop]
    entered = []

    def catch(module, args, kwargs):
        entered.append(args[0] if args else kwargs["hidden_states"])

    handle = following.module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        handed = [*[None] * tower.start, *leaves, *[None] * (len(layers) - tower.stop)]
        with handing_on(layers, handed, returned), without_head(model), torch.enable_grad():
            model(**batch.inputs, use_cache=False)
    finally:
        handle.remove()
    found: dict[int, dict[str, Tensor]] = {}
    for objective, cotangent in above.items():
        slopes = torch.autograd.grad(entered[0], leaves, cotangent, retain_graph=True, allow_unused=True)
        for index, slope in zip(tower, slopes, strict=True):
            if slope is not None:
                found.setdefault(index, {})[objective] = slope
    return found


def _positions(model: nn.Module, batch: Batch) -> Sequence[Tensor | None]:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return [None]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    n, tokens = batch.labels.shape
    piece = max(1, LOGITS_AT_ONCE // (vocabulary * n))
    return torch.arange(tokens, device=batch.labels.device).split(piece)


def mean_singular_value(output: Tensor) -> tuple[Tensor, Tensor]:
    """`mean_i sigma_i(mat(O))` and its derivative, for a projection's output `[batch, ...]`.

    `mat` lays the batch out as rows. For one sample this is the Frobenius norm; else the singular values
    are the roots of the eigenvalues of the `[batch, batch]` Gram matrix, and the derivative is the polar
    factor `U V^T / batch`. A zero singular value has the subgradient 0.
    """
    rows = output.flatten(1).float()  # [batch, tokens * features]
    if len(rows) == 1:
        norm = rows.norm()
        slope = rows / norm.clamp_min(torch.finfo(rows.dtype).tiny)
    else:
        # Squares halve the digits of small singular values, so the Gram matrix needs float64.
        gram = sum(piece.double() @ piece.double().t() for piece in rows.split(2**20, dim=1))
        squares, vectors = torch.linalg.eigh(gram)
        sigma = squares.clamp_min(0).sqrt()
        norm = sigma.mean()
        inverse = torch.where(sigma > sigma.max() * 1e-7, 1 / sigma, 0)
        slope = ((vectors * inverse) @ vectors.t()).float() @ rows / len(rows)
    return norm, slope.view_as(output).to(output.dtype)


def _output_norm_cotangents(block: Block | None, outputs: list[Tensor], n: int, real: Tensor | None) -> list[Tensor]:
    """d(first-order objective)/d(output) of each module of the block, from the block's own terms alone.

    `n` samples; `real` `[n, tokens]` tells padding apart, where there is any.
    """
    cotangents = []
    for module, output in zip(block.modules if block else [], outputs):
        parts = 1 if module is block.modules[-1] else block.layout.parts
        shaped = output.detach().reshape(n, -1, output.shape[-1])
        if real is not None:
            shaped = shaped.masked_fill(~real[..., None], 0)
        slopes = [mean_singular_value(part)[1] for part in shaped.chunk(parts, dim=-1)]
        slope = slopes[0] if parts == 1 else torch.cat(slopes, dim=-1)
        if real is not None:  # again: a padded position of one sample has a slope along the others' real tokens
            slope = slope.masked_fill(~real[..., None], 0)
        cotangents.append(slope.view_as(output))
    return cotangents


@contextmanager
def _captured(block: Block | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect `(input, output)` of the block's modules, in the order of `block.modules`."""
    seen = {}
    with ExitStack() as hooks:
        for module in block.modules if block else []:

            def hook(module, args, output):
                seen[id(module)] = (args[0].detach(), output)

            hooks.callback(module.register_forward_hook(hook).remove)
        pairs: list[tuple[Tensor, Tensor]] = []
        yield pairs
        pairs.extend(seen[id(module)] for module in (block.modules if block else []))
