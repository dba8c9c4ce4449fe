"""Several processes that share the calibration samples (`accelerate launch main.py ...`); alone, nothing to share.

Every process holds the model and scores its share; what the shares add up to is the same in all, up to the order in
which float32 numbers are summed. The main process does the rest.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from lib import signals
from lib.errors import UserError, is_out_of_memory, reason

WAIT = timedelta(hours=12)  # others wait while the main process measures the dense model
POLL = 0.002  # seconds between two looks whether all have come
GRACE = 10.0  # seconds within which a launcher ends the others when one process has failed


def rank() -> int:
    """The number of this process; 0 is the main one. Raises UserError for an environment without sense."""
    number = _from_environment("RANK", 0)
    if not 0 <= number < world():
        raise UserError(f"RANK {number}: must be less than WORLD_SIZE, {world()}; {_HOW_TO_START}")
    return number


def world() -> int:
    """How many processes share the work. Raises UserError for an environment without sense."""
    return max(_from_environment("WORLD_SIZE", 1), 1)


_HOW_TO_START = "start with torchrun or accelerate launch, or unset both to run one process"


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name) or default
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{name} {value}: must be a number; {_HOW_TO_START}") from error


def is_main() -> bool:
    """Whether this process selects, prunes, saves and prints the results."""
    return rank() == 0


def start(cuda: bool) -> None:
    """Meet the other processes, where there are any. Raises UserError where they cannot meet."""
    rank()
    if world() == 1 or dist.is_initialized():
        return
    if cuda and torch.cuda.is_available() and device(cuda).index >= torch.cuda.device_count():
        raise UserError(f"--cuda: {torch.cuda.device_count()} GPUs are visible here; start no more processes than that")
    from accelerate import InitProcessGroupKwargs, PartialState

    try:
        with signals.at_once():  # nothing is written yet, and a process that never comes cannot be waited for
            PartialState(cpu=not cuda, **InitProcessGroupKwargs(timeout=WAIT).to_kwargs())
    except (ValueError, RuntimeError, OSError) as error:
        PartialState._reset_state()  # what is half there would be taken for whole
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"WORLD_SIZE {world()}: the processes cannot meet ({reason(error)}); {_HOW_TO_START}"
        ) from error


def device(cuda: bool) -> torch.device:
    """The device of this process."""
    return torch.device("cuda", _from_environment("LOCAL_RANK", 0)) if cuda else torch.device("cpu")


def share(items: Sequence) -> list:
    """This process's part of the items."""
    return list(items[rank() :: world()])


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each CPU tensor, in place, by its sum over all processes."""
    for tensor in tensors if world() > 1 else ():
        _reduce(tensor, dist.ReduceOp.SUM)


def lowest_and_highest(value: int) -> tuple[int, int]:
    """The least and the greatest of the processes' values."""
    if world() == 1:
        return value, value
    extremes = torch.tensor([value, -value])
    _reduce(extremes, dist.ReduceOp.MIN)
    return int(extremes[0]), -int(extremes[1])


def wait() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        _together(lambda: dist.barrier(async_op=True))


def stop() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _reduce(tensor: torch.Tensor, operation) -> None:
    on_gpu = dist.get_backend() == "nccl"
    held = tensor.to(device(True)) if on_gpu else tensor
    _together(lambda: dist.all_reduce(held, operation, async_op=True))
    if on_gpu:
        tensor.copy_(held)


def _together(begin: Callable[[], dist.Work]) -> None:
    """Do something that all processes do, within reach of Ctrl-C and SIGTERM.

    Raises UserError when another process has gone.
    """
    try:
        work = begin()
        while not work.is_completed():
            time.sleep(POLL)
        work.wait()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        time.sleep(GRACE)  # a launcher says which process failed, and ends this one without a word of its own
        raise UserError(
            f"another process has ended ({reason(error, 60)}); see what it said, or the system's log"
        ) from error
