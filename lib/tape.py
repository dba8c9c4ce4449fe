"""What every layer of a model is called with: recorded layer by layer, so that one's weights serve all samples.

The model's own code runs once per batch with layers that only hand on what they get; that gives what enters the
first layer, and the arguments of every other. The layers are then called one after another, each for all batches.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib.attention import own_attention
from lib.errors import UserError
from lib.mlp import Layer
from lib.offload import Placement, moved

IGNORE = -100  # the label of a position that counts nowhere
# How far layers called one by one may end from the model as a whole, relative to its hidden states.
SAME_COMPUTATION = 0.05


class NotFinite(UserError):
    """What the model computes is NaN or infinite in the dtype of scoring."""


# --- calibration batches ----------------------------------------------------------------------------


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


# --- hidden states ----------------------------------------------------------------------------------


class HiddenStates:
    """Tensors by key, in the memory of the CPU up to `limit` bytes and beyond it in files that vanish with them.

    `pinned` memory is what a GPU copies from without waiting.
    """

    def __init__(self, limit: float = float("inf"), pinned: bool = False):
        self.limit, self.pinned, self.used = limit, pinned, 0
        self._held: dict[tuple, Tensor | tuple] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def __setitem__(self, key: tuple, hidden: Tensor) -> None:
        size = hidden.numel() * hidden.element_size()
        if self.used + size > self.limit:
            self._held[key] = self._write(key, hidden)
            return
        self.used += size
        if self.pinned:
            self._held[key] = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden)
        else:
            self._held[key] = hidden.to("cpu")

    def __getitem__(self, key: tuple) -> Tensor:
        held = self._held[key]
        if isinstance(held, Tensor):
            return held
        path, dtype, shape = held
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).view(shape)

    def drop(self, key: tuple) -> None:
        """Forget what is held under this key."""
        held = self._held.pop(key)
        if isinstance(held, Tensor):
            self.used -= held.numel() * held.element_size()
        else:
            held[0].unlink()

    def __enter__(self) -> "HiddenStates":
        return self

    def __exit__(self, *_) -> None:
        self._held.clear()
        if self._folder:
            self._folder.cleanup()

    def _write(self, key: tuple, hidden: Tensor) -> tuple:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="afr-st-hidden-")
        path = Path(self._folder.name) / "-".join(map(str, key))
        try:
            path.write_bytes(hidden.detach().cpu().contiguous().view(torch.uint8).numpy())
        except OSError as error:
            raise UserError(
                f"--max_memory: the hidden states do not fit into {tempfile.gettempdir()} ({error.strerror}); "
                "set TMPDIR to a folder with more room, or lower --nsamples or --seqlen"
            ) from error
        return path, hidden.dtype, hidden.shape


# --- the tape ---------------------------------------------------------------------------------------


@dataclass
class Tape:
    """What every layer is called with: its hidden state `[batch, tokens, d]` and the rest, per layer and batch."""

    hidden: HiddenStates
    ends: set[int]  # the last layer of each tower
    calls: dict[tuple[int, int], tuple[tuple, dict]] = field(default_factory=dict)
    returned: int = 0  # how many values a layer returns in a tuple; 0 for the hidden state alone

    def input(self, layer: int, batch: int) -> Tensor:
        """What enters a layer, on the CPU."""
        return self.hidden["input", layer, batch]

    def output(self, layer: int, batch: int) -> Tensor:
        """What a layer computes: the next one's input, or the end of its tower."""
        return self.hidden["end", layer, batch] if layer in self.ends else self.input(layer + 1, batch)

    def put_output(self, layer: int, batch: int, hidden: Tensor) -> None:
        """Keep what a layer computes."""
        self.hidden[("end", layer, batch) if layer in self.ends else ("input", layer + 1, batch)] = hidden


def tower_ranges(layers: Sequence[Layer]) -> list[range]:
    """The indices of each tower's layers, in the order in which data flows."""
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer.tower != layers[i - 1].tower]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True)]


@torch.no_grad()
def record(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    placement: Placement,
    store: HiddenStates,
    stop: int | None = None,
    bar: tqdm | None = None,
    watch: Callable[[int, int], AbstractContextManager] | None = None,
) -> Tape:
    """Record what enters the layers before `stop` (all), and what leaves a tower that ends there, for every batch.

    A layer works on a batch within `watch(layer index, batch number)`, so that hooks can see it.

    Raises UserError for a model that computes something between its layers, does not call each of them exactly
    once, or produces NaN or infinity.
    """
    stop = len(layers) if stop is None else stop
    tape = Tape(store, {tower.stop - 1 for tower in tower_ranges(layers)})
    for tower in tower_ranges(layers):
        if tower.start >= stop:
            break
        enter(model, layers, tower, batches, placement, tape)
        for index in range(tower.start, tower.stop if stop >= tower.stop else stop - 1):
            with placement.at_work(index, index + 1 if index + 1 < stop else None) as device:
                for number in range(len(batches)):
                    with watch(index, number) if watch else nullcontext():
                        tape.put_output(index, number, call(layers[index], tape, index, number, device))
                    if bar is not None:
                        bar.update()
        if stop >= tower.stop:
            _refuse_not_finite(layers, tower, tape, len(batches))
            if placement.resident and batches:
                _refuse_other_computation(model, layers, tower, batches[0], tape, placement)
    return tape


def call(layer: Layer, tape: Tape, index: int, number: int, device: torch.device, hidden: Tensor | None = None):
    """Run a layer as it was called for a batch -> its hidden state. `hidden` stands in for what was recorded."""
    args, kwargs = tape.calls[index, number]
    hidden = tape.input(index, number).to(device, non_blocking=True) if hidden is None else hidden
    return hidden_of(layer.module(hidden, *moved(args, device), **moved(kwargs, device)))


def enter(model, layers, tower: range, batches, placement: Placement, tape: Tape) -> None:
    """Record what enters the tower's first layer, and the other arguments of all of its layers."""
    main = placement.main
    for number, batch in enumerate(batches):
        outputs = [tape.output(i, number).to(main) if i < tower.start else None for i in range(len(layers))]
        inputs = batch.to(main).inputs
        if number == 0:
            with placement.at_work(tower.start):
                tape.returned = _values_returned(model, layers, tower, outputs, inputs)
        seen = _Calls(layers, tower)
        with handing_on(layers, outputs, tape.returned, seen), without_head(model):
            model(**inputs, use_cache=False)
        calls = seen.calls
        if len(calls) != len(tower):
            raise UserError("--model: the model does not call each of its layers exactly once; it cannot be scored")
        tape.hidden["input", tower.start, number] = seen.hidden
        for index, found in calls.items():
            # One copy of masks and position embeddings serves all samples of a length.
            earlier = tape.calls.get((index, number - 1))
            tape.calls[index, number] = earlier if earlier and _same(found, earlier) else found


class _Calls:
    """The arguments of each of a tower's layers, when they are called one after another and only hand on."""

    def __init__(self, layers: Sequence[Layer], tower: range):
        self.layers, self.tower = layers, tower
        self.hidden: Tensor | None = None
        self.calls: dict[int, tuple[tuple, dict]] = {}

    def __call__(self, index: int, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        if index not in self.tower:
            return
        if index in self.calls or (self.calls and hidden is not self.hidden):
            raise UserError(
                f"--model: {self.layers[index].name} is not fed by the layer before it alone; "
                "families that compute something between their layers cannot be scored"
            )
        self.hidden, self.calls[index] = hidden, (args, kwargs)


class _LayerDone(Exception):
    """Ends a forward of the model where nothing more is needed of it."""


def _values_returned(model, layers, tower: range, outputs, inputs) -> int:
    """How many values the tower's layers return in a tuple or list; 0 for a hidden state alone."""
    found = []

    def stop(module, args, output):
        found.append(len(output) if isinstance(output, (tuple, list)) else 0)
        raise _LayerDone

    before, handed = layers[: tower.start], outputs[: tower.start]
    handle = layers[tower.start].module.register_forward_hook(stop)
    try:
        with handing_on(before, handed, 0):
            model(**inputs, use_cache=False)
    except _LayerDone:
        pass
    finally:
        handle.remove()
    return found[0] if found else 0


def _refuse_not_finite(layers, tower: range, tape: Tape, n_batches: int) -> None:
    for number in range(n_batches):
        if tape.output(tower.stop - 1, number).isfinite().all():
            continue
        first = next(index for index in tower if not tape.output(index, number).isfinite().all())
        dtype = tape.output(first, number).dtype
        raise NotFinite(
            f"{layers[first].name}: its output is not finite in {str(dtype).removeprefix('torch.')}; "
            f"{other_dtype(dtype)}"
        )


def _refuse_other_computation(model, layers, tower: range, batch: Batch, tape: Tape, placement: Placement) -> None:
    """Compare the layers, called one by one, with the model as a whole on the first batch."""
    found = []

    def stop(module, args, output):
        found.append(hidden_of(output).to("cpu"))
        raise _LayerDone

    handle = layers[tower.stop - 1].module.register_forward_hook(stop)
    try:
        with placement.running(), own_attention(model):
            model(**batch.to(placement.main).inputs, use_cache=False)
    except _LayerDone:
        pass
    finally:
        handle.remove()
    recorded, real = tape.output(tower.stop - 1, 0).float(), batch.real
    wanted = found[0].float()
    if real.shape == wanted.shape[:2]:
        recorded, wanted = recorded[real], wanted[real]
    if not (recorded - wanted).norm() <= SAME_COMPUTATION * wanted.norm():
        raise UserError(
            "--model: its layers, called one after another, do not compute what the model does; families that "
            "compute something between their layers cannot be scored"
        )


def hidden_of(output) -> Tensor:
    """The hidden state that a layer returns, alone or first of a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def other_dtype(dtype: torch.dtype) -> str:
    """What to try when a value is not finite in `dtype`."""
    wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
    return f"try --dtype {wider}, and check that the checkpoint is intact"


def _same(a, b) -> bool:
    """Whether two calls are equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)))
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


@contextmanager
def handing_on(
    layers: Sequence[Layer], outputs: Sequence[Tensor | None], returned: int, see: Callable | None = None
) -> Iterator[None]:
    """Within this context the layers compute nothing: each returns its tensor of `outputs`, or its input for None.

    `see(index, hidden, args, kwargs)` is told of every call. `returned`: how many values layers return in a tuple, the
    hidden state first; 0 for the hidden state alone.
    """
    with ExitStack() as restore:
        for index, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
            def forward(*args, _index=index, _output=output, **kwargs):
                hidden, *rest = args or (kwargs.pop("hidden_states"),)
                if see:
                    see(_index, hidden, tuple(rest), kwargs)
                handed = hidden if _output is None else _output
                return (handed, *[None] * (returned - 1)) if returned else handed

            restore.enter_context(_stand_in(layer.module, forward))
        yield


@contextmanager
def without_head(model: nn.Module) -> Iterator[None]:
    """Within this context the model returns what enters its head in place of logits, which nothing is asked of."""
    with _stand_in(model.get_output_embeddings(), lambda hidden: hidden):
        yield


@contextmanager
def _stand_in(module: nn.Module, forward: Callable) -> Iterator[None]:
    wrapped = module.__dict__.get("forward")  # accelerate wraps forward this way
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if wrapped is not None:
            module.forward = wrapped
