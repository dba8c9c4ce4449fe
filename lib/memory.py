"""How much memory is in use, at most: of a GPU, else of this process; and what to lower where it does not suffice."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from lib.errors import OutOfMemory, is_out_of_memory, reason

GIB = 2**30
# What to lower where memory runs out, by the phase of a run.
LOWER = {
    "dry run": "--offload disk needs less",
    "load": "--dtype bfloat16 and --offload disk need less, with --cuda also --offload cpu or a lower --max_memory",
    "calibrate": "lower --nsamples or --seqlen",
    "score": "lower --batch_size or --seqlen; --offload (weights) and a lower --max_memory or --nsamples (hidden "
    "states) also need less",
    "prune": "--offload disk needs less",
    "compensate": "lower --seqlen or --nsamples; --offload, a lower --max_memory (hidden states), and --compensate "
    "bias or none also need less",
    "save": "--offload disk and --save_format hf need less",
    "verify": "--no_verify leaves this out",
    "evaluate": "lower --eval_seqlen (or --seqlen), or leave --eval_ppl and --eval_speed out",
    "report": "leave --report out",
}


@contextmanager
def named(phase: str, kept: str = "") -> Iterator[None]:
    """Within this context running out of memory, of the machine or of a GPU, raises OutOfMemory: one line that names
    `phase`, a key of LOWER, what to lower, and what is `kept` of the work so far."""
    try:
        yield
    except OutOfMemory:
        raise  # an inner phase is named already
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The cause says more than what was made of it on the way here.
        raise OutOfMemory(
            f"out of memory in the phase '{phase}' ({reason(_first(error))}); {LOWER[phase]}{kept}"
        ) from error


def _first(error: BaseException) -> BaseException:
    """The first of the errors that led to this one."""
    while earlier := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = earlier
    return error


@contextmanager
def peak_memory(device: torch.device, into: dict[str, int], name: str) -> Iterator[None]:
    """Write to `into[name]` the most memory in use meanwhile, in bytes: of a GPU `device`, else of the process.

    Where the system cannot forget earlier peaks (outside Linux) the process's whole life counts.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    yield
    into[name] = peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since the peak was last forgotten, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes() -> int:
    """Memory that programs can still have without swapping, in bytes."""
    try:
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return 2**63
