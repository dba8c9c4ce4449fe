"""Values of flags that are names in the file system: read as a shell would, and refused before anything is loaded."""

import errno
import glob
import os

from lib.errors import UserError

HARMLESS = (errno.ENOENT, errno.ENOTDIR)  # who uses the path says what is missing, and where it was looked for


def checked(flag: str, value: str) -> str:
    """The path `value` of `flag` with `~` expanded.

    Raises UserError for an empty value, and for a name that no file can have or nobody may look up.
    """
    if not value.strip():
        raise UserError(f"--{flag} '{value}': is empty (a shell variable that is not set?); give a name")
    refuse_unwritable_characters(flag, value)
    path = os.path.expanduser(value)
    look_up(f"--{flag} {value}", path)
    return path


def refuse_unwritable_characters(flag: str, value: str) -> None:
    """Raise UserError for characters that cannot be written as UTF-8, or stand in no name of a file."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"--{flag} {value}: holds bytes that are not UTF-8, which libraries cannot write; rename it, or set "
            "LC_ALL=C.UTF-8 where the shell's encoding is another"
        ) from error
    if "\0" in value:
        raise UserError(f"--{flag} {value}: holds a character that no name can have")


def refuse_locked(flag: str, value: str, *needed: str) -> None:
    """Raise UserError for a folder that may not be listed or entered, and for what is `needed` of it (patterns; ""
    is the path itself) and may not be read."""
    if os.path.isdir(value) and not os.access(value, os.R_OK | os.X_OK):
        raise UserError(f"--{flag} {value}: {os.strerror(errno.EACCES)}; the folder must be yours to list and to enter")
    for pattern in needed:
        for path in glob.glob(os.path.join(glob.escape(value), pattern)) if pattern else [value]:
            look_up(f"--{flag} {value}", path)
            if os.path.exists(path) and not os.access(path, os.R_OK):
                raise UserError(f"--{flag} {value}: {path} may not be read ({os.strerror(errno.EACCES)})")


def look_up(given: str, path: str) -> None:
    """Raise UserError, which begins with `given`, for a path that nobody may ask about or that is too long."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in HARMLESS:
            what = "" if given.endswith(f" {path}") else f"{path} "
            raise UserError(f"{given}: {what}cannot be looked up ({error.strerror})") from error
