"""Run the program in a pickle without importing, looking up or calling anything that it names.

A pickle is a program for a small stack machine; what makes it dangerous is that it may call whatever it can name.
Here a name stays a name (`Name`), a call stays a record of the call (`Built`), and only lists, tuples, dictionaries,
numbers and texts come into being. Only what `torch.save` writes is understood (protocol 2, binary). Time and memory
are linear in the length of the pickle.
"""

import pickle
import struct
from dataclasses import dataclass

MOST_OPCODES = 10_000_000  # a tokenizer with 256,000 tokens and its merges takes 5 million
LARGEST_KEY = 2**60  # larger whole numbers may be chosen so that all have the same hash
DICTIONARIES = {("collections", "OrderedDict"), ("collections", "defaultdict")}


class RefusedPickleError(ValueError):
    """A pickle that holds what no saved model holds. The text completes "the file ..."."""


@dataclass(frozen=True, slots=True)
class Name:
    """A module and what is in it. Nobody has looked whether it exists."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Built:
    """An object that the pickle would make: by calling `of` with `arguments`, and giving it `state`.

    filled: whether items were put into it besides, which are not kept.
    """

    of: object
    arguments: object
    state: object = None
    filled: bool = False


@dataclass(eq=False, slots=True)
class Persistent:
    """What the pickle leaves to its reader: for `torch.save` a storage in the same archive."""

    identifier: object


def run(data: bytes) -> tuple[object, set[Name]]:
    """The object that a pickle describes, inert, and every name in it.

    Raises RefusedPickleError for what is not understood, IndexError or KeyError for a damaged one.
    """
    machine = _Machine(data)
    return machine.run(), machine.names


class _Machine:
    def __init__(self, data: bytes):
        self.data, self.position = data, 0
        self.stack, self.marks, self.memo = [], [], {}
        self.names: set[Name] = set()

    def run(self) -> object:
        """Run the program; return what it leaves. Raises RefusedPickleError."""
        for _ in range(MOST_OPCODES):
            code = self.take(1)
            if code == pickle.STOP:
                return self.stack.pop()
            if code not in OPCODES:
                raise RefusedPickleError(f"holds the pickle opcode {code!r}, which torch.save does not write")
            OPCODES[code](self)
        raise RefusedPickleError(f"holds a pickle of more than {MOST_OPCODES} steps, more than any model needs")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes of the program. Raises RefusedPickleError at its end."""
        piece = self.data[self.position : self.position + count]
        self.position += count
        if len(piece) < count:
            raise RefusedPickleError("holds a pickle that ends too early")
        return piece

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def since_mark(self) -> list:
        """Pop what was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> tuple:
        """Pop the last values."""
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def name(self) -> None:
        """Push the name that stands in the program, unresolved."""
        end = self.data.index(b"\n", self.data.index(b"\n", self.position) + 1)
        module, name = self.take(end - self.position).decode("utf-8").split("\n")
        self.position += 1
        found = Name(module, name)
        self.names.add(found)
        self.push(found)

    def build(self) -> None:
        """Push the record of a call, of which the function and its arguments are popped."""
        of, arguments = self.last(2)
        # An ordered dictionary is made empty and then filled; any other call stays a record.
        is_dictionary = isinstance(of, Name) and (of.module, of.name) in DICTIONARIES
        self.push({} if is_dictionary else Built(of, arguments))

    def give_state(self) -> None:
        """Pop the state of the record below it."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Built):
            self.stack[-1].state = state

    def append(self, items: list) -> None:
        """Add to the list on top; that an object was filled is only noted."""
        target = self.stack[-1]
        if isinstance(target, Built):
            target.filled = True
        else:
            _of_kind(target, list).extend(items)

    def set_items(self, items: list) -> None:
        """Add keys and values in turn to the dictionary on top; that an object was filled is only noted."""
        target = self.stack[-1]
        if isinstance(target, Built):
            target.filled = True
            return
        target = _of_kind(target, dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value


def checked_key(key: object) -> object:
    """The same, if a dictionary or a set takes it in bounded time. Raises RefusedPickleError."""
    kind = type(key)
    fits = (
        kind in (str, bool, float, Name, Built)
        or key is None
        or (kind is int and abs(key) < LARGEST_KEY)
        or (kind is tuple and len(key) <= 4 and all(type(part) in (str, int) for part in key))
    )
    if not fits:
        raise RefusedPickleError(f"uses a {kind.__name__} as the key of a dictionary, which no saved model does")
    return key


def _of_kind(value: object, kind: type):
    if type(value) is not kind:
        raise RefusedPickleError("holds a pickle that is damaged")
    return value


OPCODES = {
    pickle.PROTO: lambda machine: machine.take(1),
    pickle.NONE: lambda machine: machine.push(None),
    pickle.NEWTRUE: lambda machine: machine.push(True),
    pickle.NEWFALSE: lambda machine: machine.push(False),
    pickle.BININT: lambda machine: machine.push(machine.number(4, signed=True)),
    pickle.BININT1: lambda machine: machine.push(machine.number(1)),
    pickle.BININT2: lambda machine: machine.push(machine.number(2)),
    pickle.LONG1: lambda machine: machine.push(machine.number(machine.number(1), signed=True)),
    pickle.BINFLOAT: lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    pickle.BINUNICODE: lambda machine: machine.push(str(machine.take(machine.number(4)), "utf-8", "surrogatepass")),
    pickle.EMPTY_TUPLE: lambda machine: machine.push(()),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.TUPLE1: lambda machine: machine.push(machine.last(1)),
    pickle.TUPLE2: lambda machine: machine.push(machine.last(2)),
    pickle.TUPLE3: lambda machine: machine.push(machine.last(3)),
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.since_mark())),
    pickle.MARK: lambda machine: machine.marks.append(len(machine.stack)),
    pickle.POP: lambda machine: machine.stack.pop(),
    pickle.BINPUT: lambda machine: machine.remember(machine.number(1)),
    pickle.LONG_BINPUT: lambda machine: machine.remember(machine.number(4)),
    pickle.BINGET: lambda machine: machine.push(machine.memo[machine.number(1)]),
    pickle.LONG_BINGET: lambda machine: machine.push(machine.memo[machine.number(4)]),
    pickle.APPEND: lambda machine: machine.append([machine.stack.pop()]),
    pickle.APPENDS: lambda machine: machine.append(machine.since_mark()),
    pickle.SETITEM: lambda machine: machine.set_items(list(machine.last(2))),
    pickle.SETITEMS: lambda machine: machine.set_items(machine.since_mark()),
    pickle.GLOBAL: _Machine.name,
    pickle.REDUCE: _Machine.build,
    pickle.NEWOBJ: _Machine.build,
    pickle.BUILD: _Machine.give_state,
    pickle.BINPERSID: lambda machine: machine.push(Persistent(machine.stack.pop())),
}
