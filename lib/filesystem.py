"""What the file system can do: exchange two names, flush, move trees, say what is mounted and how much is free."""

import ctypes
import errno
import os
import re
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def must_stay(path: Path) -> bool:
    """Return whether no other folder can take the name of this one: a mount point, or its parent is closed to us."""
    if not path.is_dir():
        return False
    parent = path.parent.stat()
    of_others = parent.st_mode & stat.S_ISVTX and os.geteuid() not in (0, parent.st_uid, path.stat().st_uid)
    return bool(of_others) or is_mount(path) or not os.access(path.parent, os.W_OK | os.X_OK)


def is_mount(path: Path) -> bool:
    """Return whether a file system, or a folder of the same one, is mounted at `path`, which has no links in it."""
    if path.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    octal = re.compile(rb"\\(\d{3})")  # how blanks are written
    return os.fsencode(path) in (octal.sub(lambda code: bytes([int(code[1], 8)]), line.split()[4]) for line in lines)


def same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file or folder, or are equal where there is none."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return one == other


def free_bytes(folder: Path) -> int | None:
    """Return what this user may still write; None where the file system does not say."""
    found = os.statvfs(folder)
    blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
    return blocks * found.f_frsize if found.f_blocks else None


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where the system or the file system cannot. Raises OSError."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def move(source: Path, to: Path, last: str, ignored: Sequence[str] = ()) -> None:
    """Move what is in `source`, but for `ignored`, into the folder `to`, file by file; the entry `last` at the end."""
    to.mkdir(exist_ok=True)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name == last):
        if entry.name in ignored:
            continue
        if entry.is_dir(follow_symlinks=False):
            move(Path(entry.path), to / entry.name, last)
            os.rmdir(entry.path)
        else:
            os.replace(entry.path, to / entry.name)


def flush(path: str | Path) -> None:
    """Get a file, or the names in a folder, onto the disk. Raises OSError when the disk does not take it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came[:1]:
            signal.raise_signal(number)
