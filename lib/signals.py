"""SIGTERM and SIGHUP end a run the way Ctrl-C does: what is half-written is cleaned up, one line is said."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CTRL_C = signal.SIGINT
ENDING = (signal.SIGTERM, signal.SIGHUP)  # a scheduler or `kill`; a terminal that was closed


class Terminated(KeyboardInterrupt):
    """The process was asked to end by the signal `number`."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def as_interrupts() -> Iterator[None]:
    """Within this context SIGTERM and SIGHUP raise `Terminated`.

    A signal that is ignored (`nohup`) or has a handler already keeps it; only the main thread can set any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def at_once() -> Iterator[None]:
    """Within this context SIGTERM and SIGHUP end the process as if nothing handled them: for calls into libraries
    that return only when another process answers."""
    taken = [number for number in ENDING if signal.getsignal(number) is _raise]
    for number in taken:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, _raise)


def number_of(interrupt: BaseException | None) -> int:
    """The signal that an interrupt comes from: SIGINT (Ctrl-C), or that of a `Terminated` it followed."""
    while interrupt is not None:
        if isinstance(interrupt, Terminated):
            return interrupt.number
        interrupt = interrupt.__context__
    return CTRL_C


def _raise(number: int, frame) -> None:
    raise Terminated(number)
