"""A `.txt`, `.jsonl` or `.parquet` file of the user's -> its text."""

import codecs
import json
import os
from collections.abc import Iterator

import pyarrow.parquet

from lib.errors import UserError
from lib.rows import RowError, field, of_row, text_column

FILE_TYPES = (".txt", ".jsonl", ".parquet")
# What a file may begin with; UTF-32's marks begin as UTF-16's do, so they come first.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_text_file(name: str) -> bool:
    """Whether a value of `--dataset` names a file of a kind that can be read."""
    return name.lower().endswith(FILE_TYPES)


def read_file(name: str) -> str:
    """Return the text of a file; records (column `text`) are joined by blank lines.

    Raises UserError when the file is missing, damaged, empty or has no such column, and that names the row that holds
    no text.
    """
    path = os.path.expanduser(name)
    try:
        kind = path.lower()
        if kind.endswith(".parquet"):
            text = "\n\n".join(text_column(pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()))
        else:
            text = read_text(path)
            text = "\n\n".join(_records(text)) if kind.endswith(".jsonl") else text
    except FileNotFoundError as error:
        raise UserError(f"--dataset {name}: no such file") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, RowError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"--dataset {name}: cannot be read ({' '.join(reason.split())[:150]}); expected UTF-8 text, or records "
            "with a string column 'text'"
        ) from error
    if not text:
        raise UserError(f"--dataset {name}: holds no text (0 tokens)")
    return text


def read_text(path: str) -> str:
    """Return a file as text, in the encoding that its byte-order mark names, else UTF-8; the mark is no part of it.

    All line ends become "\\n". Raises OSError and UnicodeError.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")
    with open(path, encoding=encoding) as file:
        return file.read()


def _records(text: str) -> Iterator[str]:
    """The texts of JSON records, one a line."""
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for place, (number, line) in enumerate(lines):
        yield of_row(_record, line, f"row {place} (line {number})")


def _record(line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(record, dict):
        raise ValueError(f"is no record but {type(record).__name__}")
    return field(record, "text")
