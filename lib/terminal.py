"""What a run says, on streams that may be closed, full or gone: no result is lost because nobody listens.

Loads no library, so that a run can speak before the seconds in which those are imported.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LONGEST_WORD = 200  # characters of a value that a message repeats
LONGEST_LINE = 1500


class Lenient:
    """A text stream that drops what it cannot write. `lost` is the error from which on it drops everything."""

    def __init__(self, stream):
        self._stream, self.lost = stream, None

    def write(self, text: str) -> int:
        """Write what can be written, with escapes for characters that the encoding lacks."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding, getattr(self._stream, "errors", None) or "strict")
        except UnicodeEncodeError:
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Whether somebody watches."""
        with suppress(OSError, ValueError):
            return self.lost is None and self._stream.isatty()
        return False

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def _try(self, act) -> None:
        if self.lost is not None:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.lost = error
            # What is buffered, and what libraries write past this object, has to go somewhere, also at the exit.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Within this context neither stdout nor stderr raises, whatever became of them."""
    _occupy_standard_descriptors()
    earlier = sys.stdout, sys.stderr
    # A stream that was closed when Python started is None.
    sys.stdout, sys.stderr = (Lenient(open(os.devnull, "w") if stream is None else stream) for stream in earlier)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = earlier


def _occupy_standard_descriptors() -> None:
    """Open what was closed of descriptors 0 to 2: else the next file gets its number, and libraries' messages."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != descriptor:
                    os.dup2(nowhere, descriptor)
                    os.close(nowhere)


def watched() -> bool:
    """Whether stderr is a terminal, on which a progress bar makes sense."""
    with suppress(OSError, ValueError, AttributeError):
        return sys.stderr.isatty()
    return False


def say(text: str, elsewhere: bool = False) -> bool:
    """Print a result, and return whether it was seen or stands `elsewhere`.

    What stdout does not take goes to stderr, unless it stands elsewhere and stdout's reader has just had enough.
    """
    print(text, flush=True)
    lost = getattr(sys.stdout, "lost", None)
    if lost is None:
        return True
    if elsewhere and getattr(lost, "errno", None) == errno.EPIPE:
        return True
    print(text, file=sys.stderr, flush=True)
    return elsewhere or getattr(sys.stderr, "lost", None) is None


def complain(kind: str, text: str) -> None:
    """Print one line to stderr: `kind`, of several processes which one, and the text."""
    process = f"process {os.environ.get('RANK', '0')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"{kind}: {shortened(process + printable(text))}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The same on one line: control characters, which could also steer the terminal, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shortened(text: str) -> str:
    """The same without the middle of words, and of a line, that are longer than anybody reads."""
    text = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _without_middle(word[0], LONGEST_WORD), text)
    return _without_middle(text, LONGEST_LINE)


def _without_middle(text: str, longest: int) -> str:
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"
