"""How much memory is in use, at most: of a GPU, else of this process."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

GIB = 2**30


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


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on a device or in the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # How torch's allocator on the CPU, and a failed mapping of a file, say it.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    )
