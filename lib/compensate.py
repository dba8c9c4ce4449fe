"""What the removed neurons did is handed to those that stay: `down` is refitted, layer by layer, without training.

The pruned model's own layers feed each other: layer i is fitted on what the layers before it, already pruned and
refitted, put out. Its target is its own dense output there and, beside it, a share of what the stream lacks of the
dense model's. All that a fit keeps of the samples is one Gram matrix of the layer's kept neurons; those held out are
checked on as they pass, and then added. Only one layer's weights are at work at a time, wherever they are kept. The
model changes in place, and `lib.prune.remove` then cuts off what has become zero.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from lib.attention import scoring_attention
from lib.errors import UserError
from lib.mlp import LANGUAGE, Block, Layer, find_layers, of_tower, skeleton, tower_config
from lib.offload import Placement
from lib.prune import Selection, blocks_of, complement, pruned_towers
from lib.tape import Batch, HiddenStates, Tape, call, enter, tower_ranges

KINDS = ("none", "bias", "ridge", "auto")
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)  # shares of the Gram matrix's mean diagonal
BIAS_FIELD = "mlp_bias"  # of a configuration that leaves biases in the MLPs to choice
SMALLEST = 1e-12  # damping of neurons that are silent throughout
CORRECTION = 0.5  # share of the earlier layers' errors that a layer is to make good
HELD_OUT = 8  # one batch in so many is not fitted on: it decides the damping, and between kinds
LARGEST_BATCH = 8  # samples in a batch
BLOCK = 256  # rows of a Gram matrix at once, up to its diagonal: what lies above it is not computed


# --- the mathematics of one layer -------------------------------------------------------------------


class Gram:
    """What least squares needs of the kept neurons' activations `H [tokens, kept]` and of what they are to make good,
    `E [tokens, d]`: added up in float32, piece by piece.
    """

    def __init__(self, kept: int, d_model: int, device: torch.device):
        self.products = torch.zeros(kept, kept, device=device)  # H^T H, [kept, kept]; right of the diagonal not whole
        self.crossed = torch.zeros(kept, d_model, device=device)  # H^T E, [kept, d]
        self.sums = torch.zeros(kept, device=device)  # of H over the tokens, [kept]
        self.lacking = torch.zeros(d_model, device=device)  # of E over the tokens, [d]
        self.count = 0  # tokens

    def add(self, activations: Tensor, lacking: Tensor, means_only: bool = False) -> None:
        """Add activations `[tokens, kept]` and what the output lacks `[tokens, d]`, both float32.

        With `means_only`, to what `mean_shift` takes and no more.
        """
        if not means_only:
            for start in range(0, len(self.products), BLOCK):
                rows, columns = slice(start, start + BLOCK), slice(start + BLOCK)
                self.products[rows, columns].addmm_(activations[:, rows].t(), activations[:, columns])
            self.crossed.addmm_(activations.t(), lacking)
        self.sums += activations.sum(0)
        self.lacking += lacking.sum(0)
        self.count += len(activations)


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


def ridge(gram: Gram, damping: float, intercept: bool) -> tuple[Tensor, Tensor | None]:
    """What the kept neurons' weights gain `[kept, d]` to make up for what the output lacks, and an intercept `[d]`.

    Minimises `||E - H V - 1 s^T||^2 + damping ||V||^2` over V (and s, where there is to be an intercept). The damping
    pulls towards the old weights: whatever the activations do not determine stays as it was. Solved in float64, by a
    Cholesky factor, which is made from the lower triangle alone.
    """
    normal, crossed = gram.products.double(), gram.crossed.double()
    sums, lacking = gram.sums.double(), gram.lacking.double()
    if intercept:
        normal -= torch.outer(sums, sums) / gram.count
        crossed -= torch.outer(sums, lacking) / gram.count
    normal.diagonal().add_(damping)
    gained = torch.cholesky_solve(crossed, torch.linalg.cholesky(normal))
    return gained.float(), ((lacking - sums @ gained) / gram.count).float() if intercept else None


def mean_shift(gram: Gram) -> Tensor:
    """The mean over the tokens of what the output lacks, `[d]` (FLAP, An et al. 2024)."""
    return gram.lacking / gram.count


def solve(gram: Gram, kind: str, damping: float | None, biased: bool) -> Fit:
    """The fit of one kind; `damping` is absolute, `biased` says that the projection has a bias to shift."""
    if kind == "ridge":
        return Fit(*ridge(gram, damping, biased), kind, damping)
    return Fit(None, mean_shift(gram) if kind == "bias" else None, kind)


def options(kind: str, biased: bool) -> list[tuple[str, float | None]]:
    """The kinds of fit, and shares of damping, that are compared on what is held out."""
    found: list[tuple[str, float | None]] = [("none", None)] if kind == "auto" else []
    if kind == "bias" or (kind == "auto" and biased):
        found.append(("bias", None))
    if kind in ("ridge", "auto"):
        found.extend(("ridge", share) for share in DAMPINGS)
    return found


def lost_energy(activations: Tensor, lacking: Tensor, fit: Fit) -> float:
    """`||E - H V - 1 s^T||^2` of activations `[tokens, kept]` and what the output lacks `[tokens, d]`."""
    if fit.gained is not None:
        lacking = lacking - activations @ fit.gained
    if fit.shift is not None:
        lacking = lacking - fit.shift
    return float(lacking.square().sum(dtype=torch.float64))


Piece = tuple[Tensor, Tensor]
"""Activations of the kept neurons `[tokens, kept]`, and what the output lacks with the old weights `[tokens, d]`."""


def fit(train: Iterable[Piece], held_out: Iterable[Piece], weight: Tensor, kind: str, biased: bool) -> Fit:
    """The best of what `kind` allows by the error on `held_out`, then fitted on all the pieces together.

    `weight` `[kept, d]` are the kept neurons' dense weights, float32; `biased` says that the projection has a bias to
    shift. With the damping fixed, data that is added to a fit cannot raise its error there: so "auto", which may also
    choose "none", never does worse than "none" on `held_out`. Every piece is asked for once, those held out last.
    """
    gram = Gram(*weight.shape, weight.device)
    for piece in train:
        gram.add(*piece, means_only=kind == "bias")
    scale = max(float(gram.products.diagonal().double().mean()), SMALLEST)
    tried = options(kind, biased)
    fits = [solve(gram, option, share and share * scale, biased) for option, share in tried]
    errors, before, energy = [0.0] * len(fits), 0.0, 0.0
    for activations, lacking in held_out:
        errors = [e + lost_energy(activations, lacking, f) for e, f in zip(errors, fits, strict=True)]
        before += lost_energy(activations, lacking, Fit(None, None, "none"))
        energy += float((lacking + activations @ weight).square().sum(dtype=torch.float64))
        gram.add(activations, lacking, means_only=kind == "bias")
    best = errors.index(min(errors))
    option, share = tried[best]
    found = solve(gram, option, share and share * scale, biased)
    energy = max(energy, SMALLEST)
    return replace(found, damping=share, error=errors[best] / energy, error_before=before / energy)


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
    dense: Tape | None = None,
) -> list[Fit]:
    """Refit the output projection of every MLP that loses neurons; the removed neurons' weights in it become 0.

    `kind` is one of `KINDS`: "bias" moves the mean of what was removed into the bias, "ridge" refits the weights
    (and the bias, where there is one), "auto" takes for every layer what does best on held-out batches. The shapes
    stay: `lib.prune.remove` comes afterwards. `dense` is what the dense model's layers compute on these batches; where
    it was not recorded, that is computed again beside what the pruned ones compute. Returns the fits in the order of
    the MLPs, on the CPU in `dtype`; `write` puts them into another copy of the model.

    Raises UserError when there is nothing to hold out, and for "bias" where the family has no biases.
    """
    if len(batches) < 2:
        raise UserError(
            f"--compensate {kind}: needs at least 2 calibration batches, one of them to check on; raise --nsamples"
        )
    if kind == "bias":
        give_biases(model, layers)
    placement = placement or Placement(layers)
    beside = dense is None and kind != "bias"
    tape = Tape(hidden or HiddenStates(), {tower.stop - 1 for tower in tower_ranges(layers)})
    kept_of = dict(zip((i for i, layer in enumerate(layers) if layer.block), selection.kept, strict=True))
    last, fits = max(kept_of), []
    with tqdm(total=last + 1, desc="compensating", unit="layer", disable=None) as bar, scoring_attention(model):
        for tower in tower_ranges(layers):
            if tower.start > last:
                break
            enter(model, layers, tower, batches, placement, tape)
            for number in range(len(batches) if beside else 0):
                tape.hidden["dense", tower.start, number] = tape.input(tower.start, number)
            for index in range(tower.start, min(tower.stop, last + 1)):
                layer, kept = layers[index], kept_of.get(index)
                with placement.at_work(index, index + 1 if index < min(tower.stop - 1, last) else None) as device:
                    if beside:
                        _advance_dense(layer, tape, index, len(batches), device)
                    if kept is not None:
                        wanted = partial(_dense_output, dense, tape, index)
                        found = _fit_layer(layer, kept, tape, index, batches, kind, device, wanted)
                        fits.append(_stored(found, dtype))
                        write_layer(layer.block, kept, fits[-1])
                    if index < last:
                        _advance_pruned(layer, tape, index, len(batches), device, keep=last >= tower.stop)
                if kept is not None and not placement.resident:  # what was at work was a copy
                    write_layer(layer.block, kept, fits[-1])
                bar.update()
            for number in range(len(batches) if beside else 0):
                tape.hidden.drop(("dense", index + 1, number))
    return fits


def _dense_output(dense: Tape | None, tape: Tape, index: int, number: int) -> Tensor:
    """What the dense model's layer computes on a batch."""
    return dense.output(index, number) if dense else tape.hidden["dense", index + 1, number]


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


def _fit_layer(
    layer: Layer,
    kept: Tensor,
    tape: Tape,
    index: int,
    batches: Sequence[Batch],
    kind: str,
    device: torch.device,
    wanted: Callable[[int], Tensor],
) -> Fit:
    """Run the layer, its MLP still dense, on every batch of the pruned model's hidden states, and fit.

    `wanted` gives what the dense model's layer computes on a batch.
    """
    output = layer.block.projections[-1]
    weight = output.weight.float()
    if len(kept) == len(weight):
        return Fit(None, None, "none")
    kept = kept.to(device)
    removed = complement(kept, len(weight))
    gone = weight[removed]
    corrects = kind != "bias" and _adds_up(layer, tape, index, device)

    def pieces(numbers: Iterable[int]) -> Iterator[Piece]:
        for number in numbers:
            with _watched(layer.block) as seen:
                reached = call(layer, tape, index, number, device)
            real = batches[number].real.flatten()
            # Images are not padded; tokens may be.
            real = real.to(device) if layer.tower == LANGUAGE and not real.all() else slice(None)
            activations = seen[0][real]
            lacking = activations[:, removed].float() @ gone
            if corrects:
                missing = wanted(number).to(device).float() - reached.float()
                lacking.add_(missing.flatten(0, -2)[real], alpha=CORRECTION)
            yield activations[:, kept].float(), lacking

    held_out = set(range(HELD_OUT - 1, len(batches), HELD_OUT)) or {len(batches) - 1}
    train = (number for number in range(len(batches)) if number not in held_out)
    return fit(pieces(train), pieces(sorted(held_out)), weight[kept], kind, output.module.bias is not None)


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
    if hidden.ndim > 3:  # several streams (Gemma 3n), of which the MLP sees a mixture
        return False
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
    rebuilt = blocks_of(of_tower(find_layers(skeleton(type(model), config)), tower))
    if any(module.bias is None for block in rebuilt for module in block.modules):
        raise UserError(
            f"--compensate bias: the MLPs of the family '{tower_config(config, tower).model_type}' have no biases, "
            "and its configuration cannot give them any; use --compensate ridge"
        )
