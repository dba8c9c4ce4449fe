"""What a row of a data set must hold, checked: what is null, no text or half a character is named with its row."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Found = TypeVar("Found")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can hold it, no tokenizer can


class RowError(ValueError):
    """What is wrong with a row; its message begins with the row's place."""


def text_in(value, what: str) -> str:
    """Return `value` if it is a text. Raises ValueError, with `what` it is, for anything else and half a character."""
    if value is None:
        raise ValueError(f"{what} is null")
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text but {type(value).__name__}")
    if found := SURROGATE.search(value):
        raise ValueError(f"{what} holds half of a surrogate pair (\\u{ord(found[0]):04x})")
    return value


def field(row: dict, name: str) -> str:
    """Return the text in a field of a row. Raises ValueError when the row has no such text."""
    return text_in(row.get(name), f"'{name}'")


def texts(values, what: str) -> list[str]:
    """Return a list of texts. Raises ValueError for a list of something else, and for none."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{what} is no list of texts")
    return [text_in(value, f"{what}[{place}]") for place, value in enumerate(values)]


def place_in(value, n: int, what: str) -> int:
    """Return the place of the right one of `n` choices, a number or its digits.

    Raises ValueError for a label that is empty or hidden (-1), as in test splits, and for one beyond the choices.
    """
    if re.fullmatch(r"\d+", str(value).strip()) and int(value) < n:
        return int(value)
    raise ValueError(f"{what} is {value!r}, expected a number from 0 to {n - 1}")


def place_of(value, values: Iterable, what: str) -> int:
    """Return the place of `value` among labels, whether they are numbers or texts. Raises ValueError for none."""
    labels = [str(label) for label in values or ()]
    if str(value) not in labels:
        raise ValueError(f"{what} is {value!r}, which is none of the labels {', '.join(labels) or '(there are none)'}")
    return labels.index(str(value))


def of_row(make: Callable[..., Found], row, where: str) -> Found:
    """Return `make(row)`. Raises RowError that says `where` the row is when it is not what `make` expects."""
    try:
        return make(row)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"has another form ({type(error).__name__}: {error})"
        raise RowError(f"{where}: {reason}") from error


def text_column(values: Iterable, what: str = "'text'") -> Iterator[str]:
    """Yield the texts of a column. Raises RowError for the first that is none."""
    for place, value in enumerate(values):
        yield of_row(lambda value: text_in(value, what), value, f"row {place}")
