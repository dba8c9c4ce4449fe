"""The engine: calibration batches -> weight saliencies of every MLP, one layer at a time, backwards.

One forward pass records what enters every layer. Then, from the last layer to the first, each layer is
run again with gradients and the cotangents of the objectives are pulled through it. So at most one
layer's activations and weight gradients exist at a time. No method's name is known here: a method says
which objectives it needs and how the saliencies of one layer are reduced.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib.errors import UserError
from lib.mlp import LANGUAGE, Block, Layer

CROSS_ENTROPY = "ce"
FIRST_ORDER = "fo"
IGNORE = -100  # the label of a position that counts nowhere

# The logits that may exist at once, in float32 elements: the head is run in pieces of this size.
LOGITS_AT_ONCE = 2**26
# float16 loses gradients below 6e-8; a power of two shifts the cross-entropy's into its range.
FLOAT16_LOSS_SCALE = 2.0**12

Reduce = Callable[[list[Tensor]], Tensor]
"""Saliencies Q of one layer, one `[d_ff, d]` per projection -> what the method sums over the samples."""


@dataclass(frozen=True)
class Batch:
    """Right-padded calibration samples: keyword arguments of the model, and labels `[batch, tokens]`."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def real(self) -> Tensor:
        """Which positions hold a token and not padding, `[batch, tokens]`."""
        mask = self.inputs.get("attention_mask")
        return torch.ones_like(self.labels, dtype=torch.bool) if mask is None else mask.bool()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch({name: value.to(device) for name, value in self.inputs.items()}, self.labels.to(device))


Sample = Tensor | dict[str, Tensor]
"""Token ids `[tokens]`; or `input_ids` and `labels` `[tokens]` with what else the model takes, of one shape in all."""


def collate(samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    """Group samples into right-padded batches; a mask is made only where it is needed."""
    samples = [sample if isinstance(sample, dict) else {"input_ids": sample, "labels": sample} for sample in samples]
    return [_batch(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]


def inputs_of(sample: Sample, tokens: int) -> dict[str, Tensor]:
    """What the model takes for one sample; only its first `tokens`, where it is text alone."""
    return collate([sample if isinstance(sample, dict) else sample[:tokens]], 1)[0].inputs


def _batch(group: Sequence[dict[str, Tensor]]) -> Batch:
    columns = {name: [sample[name] for sample in group] for name in group[0]}
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    ids, labels = pad(columns.pop("input_ids")), pad(columns.pop("labels"), padding_value=IGNORE)
    inputs = {"input_ids": ids} | {name: torch.stack(values) for name, values in columns.items()}
    lengths = torch.tensor([len(sample["input_ids"]) for sample in group])
    if (lengths < ids.shape[1]).any():
        inputs["attention_mask"] = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return Batch(inputs, labels)


def saliency_sums(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], objectives: Sequence[str], reduce: Reduce
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield `(layer index, {objective: sum over samples of reduce(Q)})` from the last layer to the first.

    `Q = W * dL/dW` for the projections of the layer's MLP, in float32. `CROSS_ENTROPY` is the mean
    next-token cross-entropy of each sample (Lee et al. 2019), always one sample at a time whatever the
    batch size. `FIRST_ORDER` is the mean singular value of each projection's output, summed over all
    projections of the model, with one gradient per batch. The sums are on the CPU.

    Raises UserError when the model computes something between its layers or produces NaN or infinity.
    """
    device = next(layers[0].module.parameters()).device
    first = next(index for index, layer in enumerate(layers) if layer.block)  # nothing is needed from those before it
    model.requires_grad_(False)
    with tqdm(total=len(batches) * (1 + len(layers) - first), desc="scoring", unit="layer", disable=None) as bar:
        tape = _record(model, layers, batches, device, bar)
        pulled = {objective: [None] * len(batches) for objective in objectives}
        for tower in reversed(tower_ranges(layers)):
            if tower.stop <= first:
                break
            arriving = _arriving(model, layers, tower, batches, tape, pulled, device)
            reached = max(arriving, default=tower.start - 1 if layers[tower.stop :] else tower.stop - 1)
            for index in reversed(range(max(tower.start, first), tower.stop)):
                if index > reached:  # the model does not use what this layer computes
                    bar.update(len(batches))
                    sums = _zeros(layers[index], objectives, reduce)
                else:
                    _add(pulled, arriving.pop(index, {}))
                    sums = _walk_layer(layers[index], tape, index, batches, pulled, reduce, device, bar)
                if sums:
                    yield index, sums


def tower_ranges(layers: Sequence[Layer]) -> list[range]:
    """The indices of each tower's layers, in the order in which data flows."""
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer.tower != layers[i - 1].tower]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True)]


def _arriving(model, layers, tower: range, batches, tape, pulled, device) -> dict[int, dict[str, list[Tensor]]]:
    """Cotangents that reach the outputs of a tower's layers from outside it: `{layer: {objective: per batch}}`."""
    arriving: dict[int, dict[str, list[Tensor]]] = {}
    behind = layers[tower.stop :]
    for number, batch in enumerate(batches):
        if behind:
            outputs = [tape.output(index, number).to(device) for index in tower]
            above = {o: p[number].to(device) for o, p in pulled.items() if p[number] is not None}
            found = bridge_cotangents(model, layers, tower, batch.to(device), outputs, above, tape.tuples)
        elif CROSS_ENTROPY in pulled:
            last = tape.output(tower.stop - 1, number).to(device)
            found = {
                tower.stop - 1: {
                    CROSS_ENTROPY: cross_entropy_cotangent(model, layers, batch.to(device), last, tape.tuples)
                }
            }
        else:
            found = {tower.stop - 1: {}}
        for index, by_objective in found.items():
            for objective, cotangent in by_objective.items():
                arriving.setdefault(index, {}).setdefault(objective, []).append(cotangent.to(tape.store))
    for objective in pulled:
        pulled[objective] = [None] * len(batches)
    return arriving


def _add(pulled: dict[str, list], arriving: dict[str, list[Tensor]]) -> None:
    for objective, cotangents in arriving.items():
        pulled[objective] = [c if p is None else p + c for p, c in zip(pulled[objective], cotangents, strict=True)]


def _zeros(layer: Layer, objectives: Sequence[str], reduce: Reduce) -> dict[str, Tensor]:
    if layer.block is None:
        return {}
    nothing = [torch.zeros(p.weight.shape) for p in layer.block.projections]
    return {objective: reduce(nothing) for objective in objectives}


def _walk_layer(layer, tape, index, batches, cotangents, reduce, device, bar) -> dict[str, Tensor]:
    """Pull every batch's cotangents through one layer, in place, and return the layer's sums."""
    sums = {}
    scale = FLOAT16_LOSS_SCALE if next(layer.module.parameters()).dtype == torch.float16 else 1.0
    for number, batch in enumerate(batches):
        hidden = tape.inputs[index][number].to(device).requires_grad_()
        tape.inputs[index][number] = None
        args, kwargs = tape.calls[index][number]
        # Images are not padded; tokens may be.
        real = batch.real.to(device) if layer.tower == LANGUAGE else hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        with _captured(layer.block) as seen, torch.enable_grad():
            output = _hidden_of(layer.module(hidden, *args, **kwargs))
        outputs = [y for _, y in seen]
        for objective, pulled in cotangents.items():
            roots, grads = ([output], [pulled[number].to(device)]) if pulled[number] is not None else ([], [])
            if objective == FIRST_ORDER:
                roots = roots + outputs
                grads = grads + _output_norm_cotangents(layer.block, outputs, real)
            if not roots:
                continue
            into, *left_grads = torch.autograd.grad(roots, [hidden, *outputs], grads, retain_graph=True)
            pulled[number] = into.to(tape.store)
            entered = [x for x, _ in seen]
            per_sample = objective == CROSS_ENTROPY
            for q in _saliencies(layer.block, entered, left_grads, len(batch), per_sample):
                part = reduce([x / scale for x in q] if per_sample and scale != 1 else q)
                sums[objective] = sums[objective].add_(part) if objective in sums else part
        bar.update()
    tape.calls[index] = None
    for objective, total in sums.items():
        if not total.isfinite().all():
            raise UserError(
                f"{layer.name}: the {objective} saliency is not finite; "
                f"{_other_dtype(next(layer.module.parameters()).dtype)}"
            )
    return {objective: total.cpu() for objective, total in sums.items()}


def _saliencies(block: Block | None, entered, left_grads, n_samples: int, per_sample: bool) -> Iterator[list[Tensor]]:
    """Q of every projection, `[d_ff, d]` each: for the batch as a whole, or for one sample after another."""
    if block is None:
        return
    groups = n_samples if per_sample else 1
    # Some families (OPT) flatten batch and tokens before their MLP, hence the reshape: [groups, tokens, features].
    by_module = {
        id(module): (x.reshape(groups, -1, x.shape[-1]), g.reshape(groups, -1, g.shape[-1]))
        for module, x, g in zip(block.modules, entered, left_grads)
    }
    for group in range(groups):
        saliencies = []
        for projection in block.projections:
            x, g = by_module[id(projection.module)]
            saliencies.append(projection.weight.float() * projection.gradient(x[group], g[group]))
        yield saliencies


# --- the objectives ---------------------------------------------------------------------------------


def cross_entropy_cotangent(
    model: nn.Module, layers: Sequence[Layer], batch: Batch, hidden: Tensor, tuples: bool = False
) -> Tensor:
    """d(sum over samples of the mean next-token cross-entropy) / d(last layer's output), `[batch, tokens, d]`.

    `hidden` is the last layer's output; `tuples` says that layers return tuples. Everything behind the layers
    (final norm, head, soft-capping) is the model's own code: it is called with layers that only hand `hidden`
    on, for a piece of the positions at a time where the model can (`logits_to_keep`).
    """
    hidden = hidden.detach().requires_grad_()
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)  # [batch, tokens]: what each position predicts
    counts = (labels != IGNORE).sum(1, keepdim=True).clamp_min(1)
    total = torch.zeros_like(hidden)
    scale = FLOAT16_LOSS_SCALE if hidden.dtype == torch.float16 else 1.0
    handed = [hidden if layer.tower == layers[-1].tower else None for layer in layers]
    for positions in _positions(model, hidden):
        keep = {} if positions is None else {"logits_to_keep": positions}
        with _handing_on(layers, handed, tuples), torch.enable_grad():
            logits = model(**batch.inputs, use_cache=False, **keep).logits.float()
            targets = labels if positions is None else labels[:, positions]
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
            loss = (losses.view_as(targets) / counts).sum() * scale
        total += torch.autograd.grad(loss, hidden)[0]
    return total


def bridge_cotangents(
    model: nn.Module,
    layers: Sequence[Layer],
    tower: range,
    batch: Batch,
    outputs: list[Tensor],
    above: dict[str, Tensor],
    tuples: bool,
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
        with _handing_on(layers, handed, tuples), torch.enable_grad():
            model(**batch.inputs, use_cache=False, **_least_head(model))
    finally:
        handle.remove()
    found: dict[int, dict[str, Tensor]] = {}
    for objective, cotangent in above.items():
        slopes = torch.autograd.grad(entered[0], leaves, cotangent, retain_graph=True, allow_unused=True)
        for index, slope in zip(tower, slopes, strict=True):
            if slope is not None:
                found.setdefault(index, {})[objective] = slope
    return found


def _least_head(model: nn.Module) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _positions(model: nn.Module, hidden: Tensor) -> Sequence[Tensor | None]:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return [None]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    piece = max(1, LOGITS_AT_ONCE // (vocabulary * hidden.shape[0]))
    return torch.arange(hidden.shape[1], device=hidden.device).split(piece)


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


def _output_norm_cotangents(block: Block | None, outputs: list[Tensor], real: Tensor) -> list[Tensor]:
    """d(first-order objective)/d(output) of each module of the block, from the block's own terms alone."""
    cotangents = []
    for module, output in zip(block.modules if block else [], outputs):
        parts = 1 if module is block.modules[-1] else block.layout.parts
        padding = ~real[..., None]
        shaped = output.detach().view(*real.shape, -1).masked_fill(padding, 0)
        slopes = torch.cat([mean_singular_value(part)[1] for part in shaped.chunk(parts, dim=-1)], dim=-1)
        # Masked again: a padded position of one sample has a slope along the others' real tokens.
        cotangents.append(slopes.masked_fill(padding, 0).view_as(output))
    return cotangents


# --- recording --------------------------------------------------------------------------------------


@dataclass
class _Tape:
    """What every layer was called with: hidden states `[batch, tokens, d]` per layer and batch, the rest beside."""

    store: torch.device
    inputs: list[list[Tensor]]
    calls: list[list[tuple[tuple, dict]]]
    outputs: dict[int, list[Tensor]]  # of the last layer of each tower
    tuples: bool = False

    def output(self, layer: int, batch: int) -> Tensor:
        """What a layer computed: the next one's input, or the end of its tower."""
        return (self.outputs[layer] if layer in self.outputs else self.inputs[layer + 1])[batch]


@torch.no_grad()
def _record(model, layers, batches, device, bar) -> _Tape:
    ends = [tower.stop - 1 for tower in tower_ranges(layers)]
    tape = _Tape(torch.device("cpu"), [[] for _ in layers], [[] for _ in layers], {end: [] for end in ends})
    previous = None  # what the layer before handed on

    def before(index):
        def hook(module, args, kwargs):
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            if index and index - 1 not in tape.outputs and hidden is not previous:
                raise UserError(
                    f"--model: {layers[index].name} is not fed by the layer before it alone; "
                    "families that compute something between their layers cannot be scored"
                )
            tape.inputs[index].append(hidden.to(tape.store))
            call = tuple(rest), dict(kwargs)
            earlier = tape.calls[index][-1:]
            tape.calls[index].append(earlier[0] if earlier and _same(call, earlier[0]) else call)
            return (hidden, *rest), kwargs

        return hook

    def after(index):
        def hook(module, args, output):
            nonlocal previous
            previous = _hidden_of(output)
            if index in tape.outputs:
                tape.outputs[index].append(previous.to(tape.store))
                tape.tuples = isinstance(output, tuple)

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.module.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            hooks.callback(layer.module.register_forward_hook(after(index)).remove)
        for batch in batches:
            # With a cache, a layer that is run again would see every key twice.
            model(**batch.to(device).inputs, use_cache=False, **_least_head(model))
            bar.update()
            if not previous.isfinite().all():
                raise _not_finite(layers, tape, previous.dtype)
    if any(len(inputs) != len(batches) for inputs in tape.inputs):
        raise UserError("--model: the model does not call each of its layers exactly once; it cannot be scored")
    return tape


def _not_finite(layers, tape, dtype) -> UserError:
    entered = [inputs[-1].isfinite().all() for inputs in tape.inputs] + [False]
    first = max(entered.index(False) - 1, 0)
    return UserError(
        f"{layers[first].name}: its output is not finite in {str(dtype).removeprefix('torch.')}; {_other_dtype(dtype)}"
    )


def _other_dtype(dtype: torch.dtype) -> str:
    return (
        "try --dtype "
        + ("bfloat16 or float32" if dtype == torch.float16 else "float32")
        + ", and check that the checkpoint is intact"
    )


def _hidden_of(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _same(a, b) -> bool:
    """Whether two calls are equal, so that one copy of masks and position embeddings serves all samples."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)))
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


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


@contextmanager
def _handing_on(layers: Sequence[Layer], outputs: Sequence[Tensor | None], tuples: bool) -> Iterator[None]:
    """Within this context the layers compute nothing: each returns its tensor of `outputs`, or its input for None."""
    with ExitStack() as restore:
        for layer, output in zip(layers, outputs, strict=True):
            module = layer.module
            if "forward" in module.__dict__:  # accelerate wraps forward this way
                restore.callback(setattr, module, "forward", module.forward)
            else:
                restore.callback(module.__dict__.pop, "forward", None)

            def forward(*args, _output=output, hidden_states=None, **kwargs):
                handed = _output if _output is not None else args[0] if args else hidden_states
                return (handed, None, None) if tuples else handed

            module.forward = forward
        yield
