"""Several processes that share the calibration samples (`accelerate launch main.py ...`); alone, nothing to share.

Every process holds the model and scores its share; what the shares add up to is the same in all, up to the order in
which float32 numbers are summed. The main process does the rest.
"""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

WAIT = timedelta(hours=12)  # others wait while the main process measures the dense model


def rank() -> int:
    """The number of this process; 0 is the main one."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process selects, prunes, saves and speaks."""
    return rank() == 0


def start(cuda: bool) -> None:
    """Meet the other processes, where there are any."""
    if world() == 1 or dist.is_initialized():
        return
    from accelerate import InitProcessGroupKwargs, PartialState

    PartialState(cpu=not cuda, **InitProcessGroupKwargs(timeout=WAIT).to_kwargs())


def device(cuda: bool) -> torch.device:
    """The device of this process."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


def share(items: Sequence) -> list:
    """This process's part of the items."""
    return list(items[rank() :: world()])


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each CPU tensor, in place, by its sum over all processes."""
    if world() == 1:
        return
    on_gpu = dist.get_backend() == "nccl"
    for tensor in tensors:
        held = tensor.to(device(True)) if on_gpu else tensor
        dist.all_reduce(held)
        if on_gpu:
            tensor.copy_(held)


def lowest_and_highest(value: int) -> tuple[int, int]:
    """The least and the greatest of the processes' values."""
    if world() == 1:
        return value, value
    held = [None] * world()
    dist.all_gather_object(held, value)
    return min(held), max(held)


def wait() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        dist.barrier()


def stop() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
