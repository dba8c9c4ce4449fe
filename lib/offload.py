"""Where the weights of the layers are, and where they work: on one device, on several, or fetched when they are needed.

A layer whose weights are kept on the host comes to the device for all samples at once, while the next one's weights
are fetched. So each weight crosses the bus once per pass over the layers, whatever the number of samples.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.errors import UserError
from lib.memory import available_bytes
from lib.mlp import Layer

WHERE = ("auto", "none", "cpu", "disk")
# Share of the free memory that weights, or hidden states, may take; the rest is for one layer at work.
USABLE = 0.8


class Placement:
    """The device on which each layer works, and whether its weights stay there.

    main: device of everything that is not a layer (embeddings, projector, head) and of whole forwards' inputs and
    outputs;  resident: weights stay on their device; else they stay where they are, in memory or mapped from a file,
    and are copied, in `dtype`, while their layer is at work.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        devices: Sequence[torch.device] | None = None,
        resident: bool = True,
        dtype: torch.dtype | None = None,
        main: torch.device | None = None,
    ):
        self.layers, self.resident, self.dtype = layers, resident, dtype
        self.devices = list(devices or [next(layer.module.parameters()).device for layer in layers])
        self.main = main or self.devices[0]
        self._pool = None if resident else ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._coming: dict[int, Future] = {}
        self._working: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    @contextmanager
    def at_work(self, index: int, following: int | None = None) -> Iterator[torch.device]:
        """Within this context the layer's weights are on its device, which is returned.

        Those of `following`, the layer that works next, are fetched meanwhile.
        """
        if self.resident or index in self._working:
            yield self.devices[index]
            return
        fetched = self._coming.pop(index, None)
        fetched = fetched.result() if fetched else self._fetch(index)
        parameters = list(self.layers[index].module.parameters())
        self._working[index] = [(parameter, parameter.data) for parameter in parameters]
        for parameter, weight in zip(parameters, fetched, strict=True):
            if weight.is_cuda:  # it was allocated for the stream that copied it
                weight.record_stream(torch.cuda.current_stream(weight.device))
            parameter.data = weight
        del fetched
        if following is not None and following not in self._coming:
            self._coming[following] = self._pool.submit(self._fetch, following)
        try:
            yield self.devices[index]
        finally:
            for parameter, at_home in self._working.pop(index):
                parameter.data = at_home

    def _fetch(self, index: int) -> list[Tensor]:
        """Copies of a layer's weights on its device; complete when this returns."""
        device = self.devices[index]
        weights = [parameter.data for parameter in self.layers[index].module.parameters()]
        if device.type != "cuda":
            return [weight.to(device, self.dtype, copy=True) for weight in weights]
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            copies = [weight.to(device, non_blocking=True).to(self.dtype) for weight in weights]
            torch.cuda.current_stream(device).synchronize()
        return copies

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this context the model can be called as a whole, wherever its weights are."""
        if self.resident and set(self.devices) == {self.main}:
            yield
            return
        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                work = ExitStack()
                hooks.callback(work.close)

                def before(module, args, kwargs, index=index, work=work):
                    device = work.enter_context(self.at_work(index))
                    return moved(args, device), moved(kwargs, device)

                def after(module, args, output, work=work):
                    work.close()
                    return moved(output, self.main)

                hooks.callback(layer.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(layer.module.register_forward_hook(after).remove)
            yield


def moved(value, device: torch.device):
    """The same arguments, or outputs, of a layer with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(v, device) for v in value)
    return {key: moved(v, device) for key, v in value.items()} if type(value) is dict else value


# --- what a run may use -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """Where a model is to work, and what memory it may take there.

    offload: one of WHERE;  max_memory: bytes on the device (on a CPU: of weights and hidden states), None for what is
    free.
    """

    device: torch.device
    dtype: torch.dtype
    offload: str = "auto"
    max_memory: int | None = None
    shared: bool = False  # whether other processes use the other GPUs

    def place(self, model: nn.Module, layers: Sequence[Layer]) -> Placement:
        """Bring the model where it works, in `dtype`. Raises UserError for a GPU that does not hold what it must."""
        where = self._where(sum(p.numel() for p in model.parameters()) * self.dtype.itemsize)
        within = {id(t) for layer in layers for t in (*layer.module.parameters(), *layer.module.buffers())}
        try:
            if where == "disk":
                cast(model, self.dtype, without=within)
            else:
                cast(model, self.dtype)
            if where == "none":
                model.to(self.device)
                return Placement(layers)
            _move(model, self.device, without=within)
            if where == "gpus":
                devices = self._spread(layers)
                for layer, device in zip(layers, devices, strict=True):
                    layer.module.to(device)
                return Placement(layers, devices, main=self.device)
            for layer in layers:
                _keep_on_host(layer, self.device, where)
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--cuda: the model does not fit on the GPU ({reason}); try --offload cpu") from error
        return Placement(layers, [self.device] * len(layers), False, self.dtype, self.device)

    def hidden_bytes(self, model: nn.Module, placement: Placement) -> float:
        """How much of the CPU's memory hidden states may take before they go to files."""
        if self.max_memory is None or self.device.type == "cuda":
            return USABLE * available_bytes()
        held = [p for p in model.parameters() if placement.resident]
        return max(self.max_memory - sum(p.numel() * p.element_size() for p in held), 0)

    def _where(self, size: int) -> str:
        if self.offload != "auto":
            return self.offload
        if self.device.type != "cuda":
            return "none" if self.max_memory is None or size <= USABLE * self.max_memory else "disk"
        if size <= USABLE * self._room(self.device):
            return "none"
        if len(self._gpus()) > 1 and size <= USABLE * sum(map(self._room, self._gpus())):
            return "gpus"
        return "cpu" if size <= USABLE * available_bytes() else "disk"

    def _gpus(self) -> list[torch.device]:
        return [self.device] if self.shared else [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

    def _room(self, gpu: torch.device) -> int:
        free = torch.cuda.mem_get_info(gpu)[0]
        return free if self.max_memory is None else min(free, self.max_memory)

    def _spread(self, layers: Sequence[Layer]) -> list[torch.device]:
        """A GPU for every layer, in order, each GPU filled by the share of the memory it has."""
        gpus = self._gpus()
        rooms = [self._room(gpu) for gpu in gpus]
        filled = [sum(rooms[: i + 1]) / sum(rooms) for i in range(len(gpus) - 1)]
        return [gpus[sum((index + 0.5) / len(layers) > share for share in filled)] for index in range(len(layers))]


def cast(model: nn.Module, dtype: torch.dtype, without: set[int] = frozenset()) -> nn.Module:
    """Bring a model's weights to `dtype`, in place, as if it had been loaded with `from_pretrained(dtype=...)`.

    `model.to(dtype)` would also round what a model computes when it is built, like the frequencies of rotary
    embeddings; here such buffers get the dtype that their family gives them. `without`: ids of tensors left alone.
    """
    with torch.device("meta"):
        skeleton = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    buffers = {name: buffer.dtype for name, buffer in skeleton.named_buffers()}
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        if id(held) not in without and held.is_floating_point():
            held.data = held.data.to(buffers.get(name, dtype))
    return model


def _move(model: nn.Module, device: torch.device, without: set[int]) -> None:
    for held in (*model.parameters(), *model.buffers()):
        if id(held) not in without:
            held.data = held.data.to(device)


def _keep_on_host(layer: Layer, device: torch.device, where: str) -> None:
    """Buffers go to the device; weights into the CPU's memory, or they stay in, or go to, files."""
    for buffer in layer.module.buffers():
        buffer.data = buffer.data.to(device)
    parameters = dict(layer.module.named_parameters())
    if where == "cpu":
        for parameter in parameters.values() if device.type == "cuda" else ():
            parameter.data = parameter.data.pin_memory()
    elif not all(map(is_mapped, parameters.values())):
        for name, weight in _in_a_file(parameters).items():
            parameters[name].data = weight


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file that is mapped into memory."""
    try:
        with open("/proc/self/maps") as file:
            for line in file:
                bounds, _, _, _, _, *path = line.split(maxsplit=5)
                start, end = (int(bound, 16) for bound in bounds.split("-"))
                if start <= tensor.data_ptr() < end:
                    return bool(path) and path[0].startswith("/")
    except OSError:
        pass
    return False


def _in_a_file(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, mapped from a file that has no name any more: it goes when the last of them does."""
    with tempfile.TemporaryDirectory(prefix="afr-st-offload-") as folder:
        path = Path(folder) / "layer.safetensors"
        try:
            save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--offload disk: the weights do not fit into {tempfile.gettempdir()} ({error}); set TMPDIR to a "
                "folder with more room, or take --offload cpu"
            ) from error
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in weights}
