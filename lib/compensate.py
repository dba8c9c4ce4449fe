"""What the removed neurons did is handed to those that stay: `down` is refitted, layer by layer, without training.

The pruned model's own layers feed each other: layer i is fitted on what the layers before it, already pruned and
refitted, put out. Its target is its own dense output there and, beside it, a share of what the stream lacks of the
dense model's. What a fit and its check need is in two Gram matrices of the layer's neurons, one of them of what is held
out; no others exist. Only one layer's weights are at work at a time, wherever they are kept. The model changes in
place, and `lib.prune.remove` then cuts off what has become zero.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from lib.errors import UserError
from lib.mlp import LANGUAGE, Block, Layer, find_layers, of_tower, tower_config
from lib.offload import Placement
from lib.prune import Selection, blocks_of, pruned_towers
from lib.tape import Batch, HiddenStates, Tape, call, enter, tower_ranges

KINDS = ("none", "bias", "ridge", "auto")
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)  # shares of the Gram matrix's mean diagonal
BIAS_FIELD = "mlp_bias"  # of a configuration that leaves biases in the MLPs to choice
SMALLEST = 1e-12  # damping of neurons that are silent throughout
CORRECTION = 0.5  # share of the earlier layers' errors that a layer is to make good
HELD_OUT = 8  # one batch in so many is not fitted on: it decides the damping, and between kinds
LARGEST_BATCH = 8  # samples in a batch


# --- the mathematics of one layer -------------------------------------------------------------------


class Gram:
    """What least squares needs of activations `H [tokens, d_ff]`, added up in float32, piece by piece.

    And of `M [tokens, d]`: what the output is to be besides `H W`, so that errors of earlier layers are corrected.
    """

    def __init__(self, width: int, d_model: int, device: torch.device):
        self.products = torch.zeros(width, width, device=device)  # H^T H, [d_ff, d_ff]
        self.crossed = torch.zeros(width, d_model, device=device)  # H^T M, [d_ff, d]
        self.sums = torch.zeros(width, device=device)  # of H over the tokens, [d_ff]
        self.missing = torch.zeros(d_model, device=device)  # of M over the tokens, [d]
        self.energy = 0.0  # ||M||^2
        self.count = 0  # tokens

    def add(self, activations: Tensor, missing: Tensor | None = None) -> None:
        """Add activations `[tokens, d_ff]` and, where there is any, what is missing `[tokens, d]`."""
        activations = activations.float()
        self.products.addmm_(activations.t(), activations)
        self.sums += activations.sum(0)
        self.count += len(activations)
        if missing is not None:
            self.crossed.addmm_(activations.t(), missing)
            self.missing += missing.sum(0)
            self.energy += float(missing.square().sum())

    def merge(self, other: "Gram") -> None:
        """Add what another one holds."""
        for name, held in vars(other).items():
            setattr(self, name, getattr(self, name) + held)


@dataclass(frozen=True)
class Fit:
    """What the output projection of a pruned MLP gains: `gained` `[kept, d]`, and its bias: `shift` `[d]`.

    `kind` is what it came to ("none", "bias" or "ridge"); `damping` (of "ridge") is a share of the mean diagonal of
    the Gram matrix. `error` is the share of the held-out output's energy that is lost (by the fit before the held-out
    data were added to it), `error_before` the same without compensation.
    """

    gained: Tensor | None
    shift: Tensor | None
    kind: str
    damping: float | None = None
    error: float = 0.0
    error_before: float = 0.0


def ridge(gram: Gram, weight: Tensor, kept: Tensor, damping: float, intercept: bool) -> tuple[Tensor, Tensor | None]:
    """The weight `[kept, d]` that best makes up for the neurons that are not in `kept`, and its intercept `[d]`.

    Minimises `||H W + M - H_kept V - 1 s^T||^2 + damping ||V - W_kept||^2` over V (and s, where there is to be an
    intercept), with W = `weight` `[d_ff, d]`. Towards the old weights, not towards zero: whatever the activations
    do not determine stays as it was. Solved in float64.
    """
    removed = complement(kept, len(weight))
    lost = weight[removed].double()
    products, crossed, sums = gram.products.double(), gram.crossed.double(), gram.sums.double()
    if intercept:
        products = products - torch.outer(sums, sums) / gram.count
        crossed = crossed - torch.outer(sums, gram.missing.double()) / gram.count
    normal = products[kept][:, kept]
    normal.diagonal().add_(damping)
    # What W_kept gains: the regression of what the output lacks on the kept neurons, [kept, d].
    gained = torch.cholesky_solve(products[kept][:, removed] @ lost + crossed[kept], torch.linalg.cholesky(normal))
    fitted = (weight[kept].double() + gained).float()
    if not intercept:
        return fitted, None
    return fitted, ((sums[removed] @ lost + gram.missing - sums[kept] @ gained) / gram.count).float()


def mean_shift(gram: Gram, weight: Tensor, kept: Tensor) -> Tensor:
    """The mean over the tokens of what the output lacks, `[d]` (FLAP, An et al. 2024)."""
    removed = complement(kept, len(weight))
    return (gram.sums[removed] @ weight[removed] + gram.missing) / gram.count


def lost_share(gram: Gram, weight: Tensor, kept: Tensor, fit: Tensor, shift: Tensor | None) -> float:
    """`||H W + M - H_kept V - 1 s^T||^2 / ||H W + M||^2` on the activations of a Gram matrix."""

    def energy(difference: Tensor) -> Tensor:  # ||H D + M||^2
        return (difference * (gram.products @ difference + 2 * gram.crossed)).sum(dtype=torch.float64) + gram.energy

    difference = weight.clone()
    difference[kept] -= fit
    lost = energy(difference)
    if shift is not None:
        lost += gram.count * shift.double().square().sum()
        lost -= 2 * (shift @ (gram.sums @ difference + gram.missing)).double()
    return float(lost / energy(weight).clamp_min(1e-30))


def complement(kept: Tensor, width: int) -> Tensor:
    """The indices below `width` that are not in `kept`, sorted."""
    gone = torch.ones(width, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero()[:, 0]


def fit(train: Gram, held: Gram, weight: Tensor, kept: Tensor, kind: str, biased: bool) -> Fit:
    """The best of what `kind` allows by the error on `held`, then fitted on both Gram matrices together.

    `weight` `[d_ff, d]` is the dense output projection, float32; `biased` says that it has a bias to shift.
    With the damping fixed, data that is added to a fit cannot raise its error there: so "auto", which may also
    choose "none", never does worse than "none" on `held`. `train` then holds both.
    """
    before = lost_share(held, weight, kept, weight[kept], None)
    scale = float(train.products.diagonal().double().mean())
    options: list[tuple[str, float | None]] = []
    if kind == "auto":
        options.append(("none", None))
    if kind == "bias" or (kind == "auto" and biased):
        options.append(("bias", None))
    if kind in ("ridge", "auto"):
        options.extend(("ridge", share) for share in DAMPINGS)

    def solve(gram: Gram, option: str, share: float | None) -> tuple[Tensor, Tensor | None]:
        if option == "ridge":
            return ridge(gram, weight, kept, max(share * scale, SMALLEST), biased)
        return weight[kept], mean_shift(gram, weight, kept) if option == "bias" else None

    errors = [lost_share(held, weight, kept, *solve(train, *option)) for option in options]
    best, share = options[errors.index(min(errors))]
    train.merge(held)
    fitted, shift = solve(train, best, share)
    gained = fitted - weight[kept] if best == "ridge" else None
    return Fit(gained, shift, best, share, min(errors), before)


# --- the walk through the model ---------------------------------------------------------------------


def batch_size(n_samples: int) -> int:
    """How many samples make a batch: as many as leave enough batches to hold one out."""
    return max(1, min(LARGEST_BATCH, n_samples // HELD_OUT))


@torch.no_grad()
def compensate(
    model: nn.Module,
    layers: Sequence[Layer],
    selection: Selection,
    batches: Sequence[Batch],
    kind: str,
    placement: Placement | None = None,
    hidden: HiddenStates | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Fit]:
    """Refit the output projection of every MLP that loses neurons; the removed neurons' weights in it become 0.

    `kind` is one of `KINDS`: "bias" moves the mean of what was removed into the bias, "ridge" refits the weights
    (and the bias, where there is one), "auto" takes for every layer what does best on held-out batches. The shapes
    stay: `lib.prune.remove` comes afterwards. Returns the fits in the order of the MLPs, on the CPU in `dtype`;
    `write` puts them into another copy of the model.

    Raises UserError when there is nothing to hold out, and for "bias" where the family has no biases.
    """
    if len(batches) < 2:
        raise UserError(
            f"--compensate {kind}: needs at least 2 calibration batches, one of them to check on; raise --nsamples"
        )
    if kind == "bias":
        give_biases(model, layers)
    placement = placement or Placement(layers)
    tape = Tape(hidden or HiddenStates(), {tower.stop - 1 for tower in tower_ranges(layers)})
    kept_of = dict(zip((i for i, layer in enumerate(layers) if layer.block), selection.kept, strict=True))
    last, fits = max(kept_of), []
    with tqdm(total=last + 1, desc="compensating", unit="layer", disable=None) as bar:
        for tower in tower_ranges(layers):
            if tower.start > last:
                break
            _enter_both(model, layers, tower, batches, placement, tape)
            for index in range(tower.start, min(tower.stop, last + 1)):
                with placement.at_work(index, index + 1 if index < min(tower.stop - 1, last) else None) as device:
                    _advance_dense(layers[index], tape, index, len(batches), device)
                    if index in kept_of:
                        found = _fit_layer(layers[index], kept_of[index], tape, index, batches, kind, device)
                        fits.append(_stored(found, dtype))
                        write_layer(layers[index].block, kept_of[index], fits[-1])
                    if index < last:
                        _advance_pruned(layers[index], tape, index, len(batches), device, keep=last >= tower.stop)
                if index in kept_of and not placement.resident:  # what was at work was a copy
                    write_layer(layers[index].block, kept_of[index], fits[-1])
                bar.update()
            for number in range(len(batches)):
                tape.hidden.drop(("dense", index + 1, number))
    return fits


def _enter_both(model, layers, tower: range, batches, placement: Placement, tape: Tape) -> None:
    """Record what enters a tower: there the dense model's hidden states are still those of the pruned one."""
    enter(model, layers, tower, batches, placement, tape)
    for number in range(len(batches)):
        tape.hidden["dense", tower.start, number] = tape.input(tower.start, number)


def _advance_dense(layer: Layer, tape: Tape, index: int, n_batches: int, device: torch.device) -> None:
    """Send the dense model's hidden states through a layer that is still dense."""
    for number in range(n_batches):
        entering = tape.hidden["dense", index, number].to(device)
        tape.hidden.drop(("dense", index, number))
        tape.hidden["dense", index + 1, number] = call(layer, tape, index, number, device, entering)


def _advance_pruned(layer: Layer, tape: Tape, index: int, n_batches: int, device: torch.device, keep: bool) -> None:
    """Send the pruned model's hidden states through the layer as it is now; `keep` what entered it."""
    for number in range(n_batches):
        tape.put_output(index, number, call(layer, tape, index, number, device))
        if not keep:
            tape.hidden.drop(("input", index, number))


def _fit_layer(layer: Layer, kept: Tensor, tape: Tape, index: int, batches, kind: str, device: torch.device) -> Fit:
    """Run the layer, its MLP still dense, on every batch of the pruned model's hidden states, and fit."""
    output = layer.block.projections[-1]
    weight = output.weight.float()
    if len(kept) == len(weight):
        return Fit(None, None, "none")
    grams = [Gram(*weight.shape, device) for _ in range(2)]
    held_out = set(range(HELD_OUT - 1, len(batches), HELD_OUT)) or {len(batches) - 1}
    corrects = kind != "bias" and _adds_up(layer, tape, index, device)
    for number, batch in enumerate(batches):
        with _watched(layer.block) as seen:
            reached = call(layer, tape, index, number, device)
        # Images are not padded; tokens may be.
        real = batch.real.flatten().to(device) if layer.tower == LANGUAGE else slice(None)
        dense = tape.hidden["dense", index + 1, number].to(device)
        missing = CORRECTION * (dense.float() - reached.float()).flatten(0, -2)[real] if corrects else None
        grams[number in held_out].add(seen[0][real], missing)
    return fit(*grams, weight, kept.to(device), kind, output.module.bias is not None)


@contextmanager
def _watched(block: Block) -> Iterator[list[Tensor]]:
    """Within this context the activations of the block's neurons are collected, `[tokens, d_ff]` a call."""
    seen: list[Tensor] = []
    handle = block.modules[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    try:
        yield seen
    finally:
        handle.remove()


def _adds_up(layer: Layer, tape: Tape, index: int, device: torch.device) -> bool:
    """Whether the layer adds its MLP's output to the stream as it is, without a norm or a factor behind it.

    Only then is what the stream lacks also what the MLP's output lacks.
    """
    hidden = tape.input(index, 0)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(hidden.shape, generator=generator) * hidden.float().std()
    outputs = []
    for sign in (1, -1):
        put = lambda module, args, output, sign=sign: sign * probe.to(output).view_as(output)  # noqa: E731
        handle = layer.block.modules[-1].register_forward_hook(put)
        try:
            outputs.append(call(layer, tape, index, 0, device).float().cpu())
        finally:
            handle.remove()
    return bool(((outputs[0] - outputs[1]) / 2 - probe).norm() < 0.05 * probe.norm())


# --- writing what was found -------------------------------------------------------------------------


def write(model: nn.Module, layers: Sequence[Layer], selection: Selection, fits: Sequence[Fit]) -> None:
    """Put the fits into a dense copy of the model they were made on, in any dtype."""
    blocks = blocks_of(layers)
    if any(f.shift is not None and b.modules[-1].bias is None for b, f in zip(blocks, fits, strict=True)):
        give_biases(model, layers)
    for block, kept, found in zip(blocks, selection.kept, fits, strict=True):
        write_layer(block, kept, found)


@torch.no_grad()
def write_layer(block: Block, kept: Tensor, found: Fit) -> None:
    """Put one fit into a dense MLP: the weights of neurons that are not kept become 0."""
    weight = block.projections[-1].weight
    kept = kept.to(weight.device)
    weight[complement(kept, len(weight))] = 0
    if found.gained is not None:
        weight[kept] = (weight[kept].float() + found.gained.to(weight.device, torch.float32)).to(weight.dtype)
    if found.shift is not None:
        bias = block.modules[-1].bias
        bias.copy_(bias.float() + found.shift.to(bias.device, torch.float32))


def _stored(found: Fit, dtype: torch.dtype) -> Fit:
    gained, shift = (None if x is None else x.to("cpu", dtype) for x in (found.gained, found.shift))
    return replace(found, gained=gained, shift=shift)


def give_biases(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Give the output projections biases of 0 where they have none and the family's configuration allows them.

    Llama's `mlp_bias` gives all projections one. Raises UserError for a family that has no such field.
    """
    for tower in pruned_towers(layers):
        blocks = blocks_of(of_tower(layers, tower))
        if all(block.modules[-1].bias is not None for block in blocks):
            continue
        _refuse_without_biases(model, tower)
        setattr(tower_config(model.config, tower), BIAS_FIELD, True)
        for module in [m for block in blocks for m in block.modules if m.bias is None]:
            outputs = module.nf if isinstance(module, Conv1D) else module.out_features
            module.bias = nn.Parameter(module.weight.new_zeros(outputs), module.weight.requires_grad)


def refuse_impossible(model: nn.Module, layers: Sequence[Layer], kind: str) -> None:
    """Raise UserError for "bias" where the family can have no biases; changes nothing."""
    for tower in pruned_towers(layers) if kind == "bias" else ():
        if any(block.modules[-1].bias is None for block in blocks_of(of_tower(layers, tower))):
            _refuse_without_biases(model, tower)


def _refuse_without_biases(model: nn.Module, tower: str) -> None:
    config = copy.deepcopy(model.config)
    setattr(tower_config(config, tower), BIAS_FIELD, True)
    with torch.device("meta"):
        rebuilt = blocks_of(of_tower(find_layers(type(model)(config)), tower))
    if any(module.bias is None for block in rebuilt for module in block.modules):
        raise UserError(
            f"--compensate bias: the MLPs of the family '{tower_config(config, tower).model_type}' have no biases, "
            "and its configuration cannot give them any; use --compensate ridge"
        )
