"""What can go wrong without being a bug, and the one line that is said of it."""

import errno

# How PyTorch, its kernel libraries, safetensors, the dynamic linker and the system say that memory ran out.
OUT_OF_MEMORY = (
    "CUDA out of memory", "out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory",
    "std::bad_alloc", "ALLOC_FAILED", "failed to map segment", "can't start new thread", "could not create a primitive",
)  # fmt: skip


class UserError(Exception):
    """What went wrong and what to do next, in one line. `main.py` prints it and exits with 2."""


class OutOfMemory(UserError):
    """Memory ran out; the text names the phase and what to lower."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory that ran out, of the machine or of a GPU, is the error or its cause."""
    while error is not None:
        # torch's own is told by its name: this file is loaded before any library.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, UserError) and any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def one_line(error: Exception) -> str | None:
    """What to tell of an error that is the user's to mend; None for one that is a bug, whose traceback helps."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory ({reason(error)}); free some, or see --offload and --max_memory in python main.py --help"
    if isinstance(error, OSError):
        named = [] if error.filename is None else [str(error.filename)]
        return ": ".join([*named, error.strerror or reason(error)])
    if isinstance(error, ModuleNotFoundError) and not (error.name or "lib").startswith("lib"):
        return f"the package '{error.name}' is not installed: pip install -r requirements.txt -c constraints.txt"
    return None


def reason(error: BaseException, longest: int = 150) -> str:
    """The beginning of an error's text, on one line, after its type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:longest]}" if text else type(error).__name__
