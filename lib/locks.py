"""One writer at a time: an exclusive lock on what a run writes, which the system frees when its process ends."""

import errno
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST_NAME = 255  # bytes that the usual file systems take
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # file systems without locks


class Busy(Exception):
    """Another process holds the lock; the text says which, and since when."""


def lock_file(path: Path) -> Path:
    """Where the lock of `path` stands: hidden beside it, so that `path` itself may be replaced while it is held."""
    name = f".{path.name}.lock"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.lock"
    return path.parent / name


@contextmanager
def exclusive(path: str | Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of `path`, whose folder must exist; its file goes when the lock does.

    Where another process holds it: with `waiting`, that is called once with the holder's description and the lock is
    waited for; without, raises Busy. Raises OSError where no file can be made there. Where the file system has no
    locks the block runs without one.
    """
    place = lock_file(Path(path).absolute())
    descriptor = _acquire(place, waiting)
    try:
        yield
    finally:
        with suppress(OSError):
            place.unlink()  # still locked: nobody else can hold a lock on this file
        os.close(descriptor)


def _acquire(place: Path, waiting: Callable[[str], None] | None) -> int:
    """The descriptor of the locked file at `place`."""
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock(descriptor, place, waiting) and _stands_at(descriptor, place):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it meanwhile


def _lock(descriptor: int, place: Path, waiting: Callable[[str], None] | None) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        if waiting is None:
            raise Busy(holder) from None
        waiting(holder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _stands_at(descriptor: int, place: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(place))
    except FileNotFoundError:
        return False
