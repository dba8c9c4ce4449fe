"""Read a pickled model without executing the pickle: weights and configuration come out, code does not run.

`lib.inert_pickle` turns the pickle into records of what it would build. Of these, only data are built here: plain
values, the configurations, tokenizers and processors of transformers (looked up by name among its public classes;
their own code is not called with anything from the file), and the weights, as they stand in the archive.
"""

import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import SizeDict
from transformers.tokenization_python import Trie

from lib import inert_pickle
from lib.errors import UserError
from lib.inert_pickle import Built, Name, Persistent, RefusedPickleError, checked_key

PACKAGES = ("torch", "transformers", "tokenizers")  # whose names may occur, as records
OTHER_NAMES = inert_pickle.DICTIONARIES | {
    ("functools", "partial"),
    ("_codecs", "encode"),
    ("PIL.Image", "Resampling"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "object", "slice")),
}
# Kinds of objects that hold data, made anew with the attributes that the file gives, without their `__init__`.
DATA_CLASSES = (
    PreTrainedConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ImageProcessingMixin,
    SizeDict,
)
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
PIECE = 2**22  # elements that are read at once
LARGEST_PROGRAM = 2**28  # bytes of pickle; a tokenizer with 256,000 tokens takes a quarter of it
DEEPEST = 64
LONGEST_NAME = 256


@dataclass(frozen=True)
class StoredTensor:
    """Where a weight is in the archive; nothing of it is read yet. Sizes are in elements."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """The number of elements that its storage must have."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset + last + 1 if all(self.shape) else 0


@dataclass(frozen=True)
class Saved:
    """What a `model.bin` holds. `state` has what `nn.Module.state_dict` would have, not read yet."""

    path: Path
    folder: str  # in the archive
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    processor: object
    state: dict[str, StoredTensor]

    def weights(self, dtype: torch.dtype | str = "auto") -> dict[str, Tensor]:
        """The weights, floating ones in `dtype` ("auto": as saved). Those that share a storage share memory.

        No weight is ever in memory twice. Raises RefusedPickleError where the archive does not hold what it should.
        """
        with zipfile.ZipFile(self.path) as archive:
            storages = {}
            for stored in self.state.values():
                if stored.end and (stored.key, stored.dtype) not in storages:
                    storages[stored.key, stored.dtype] = self._storage(archive, stored, dtype)
            return {name: _view(stored, storages) for name, stored in self.state.items()}

    def _storage(self, archive: zipfile.ZipFile, stored: StoredTensor, dtype: torch.dtype | str) -> Tensor:
        """All elements of a storage; it is read and converted in pieces, so that it never exists twice."""
        record = archive.getinfo(f"{self.folder}data/{stored.key}")
        dtype = dtype if stored.dtype.is_floating_point and dtype != "auto" else stored.dtype
        elements = torch.empty(record.file_size // stored.dtype.itemsize, dtype=dtype)
        with archive.open(record) as file:
            for piece in elements.split(PIECE):
                data = bytearray(file.read(len(piece) * stored.dtype.itemsize))
                piece.copy_(torch.frombuffer(data, dtype=stored.dtype))
        return elements


def _view(stored: StoredTensor, storages: dict[tuple[str, torch.dtype], Tensor]) -> Tensor:
    if not stored.end:
        return torch.empty(stored.shape, dtype=stored.dtype)
    elements = storages[stored.key, stored.dtype]
    if stored.end > len(elements):
        raise RefusedPickleError(f"holds a weight that goes beyond its storage {stored.key}")
    return elements.as_strided(stored.shape, stored.stride, stored.offset)


def read(path: Path) -> Saved:
    """What `torch.save({"model": model, "tokenizer": tokenizer})` wrote, its weights left in the file.

    Raises UserError that lists names that are not allowed, RefusedPickleError for other things that no saved model
    holds. Other exceptions mean a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        folder, program = _program(path, archive)
    held, names = inert_pickle.run(program)
    if refused := sorted({f"{n.module}.{n.name}"[:80] for n in names if not _is_allowed(n)}):
        raise UserError(
            f"{path}: names {', '.join(map(_printable, refused[:5]))}, which a saved model does not need and which "
            "may run code; use the Hugging Face folder, or trust the checkpoint explicitly if you made it"
        )
    if not (isinstance(held, dict) and isinstance(held.get("model"), Built)):
        raise RefusedPickleError("does not hold a model")
    # A value takes several bytes of the pickle, so this leaves room for those that are shared; bombs need far more.
    model, build = held["model"], _Builder(len(program))
    attributes = _attributes(model)
    return Saved(
        path,
        folder,
        _class_of(model, PreTrainedModel),
        build.object(attributes["config"], PreTrainedConfig),
        build.object(attributes["generation_config"], GenerationConfig) if attributes["generation_config"] else None,
        build.value(held["processor"] if "processor" in held else held["tokenizer"]),
        dict(_state(model, len(program))),
    )


def _is_allowed(name: Name) -> bool:
    return name.module.split(".")[0] in PACKAGES or (name.module, name.name) in OTHER_NAMES


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _program(path: Path, archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """The folder in the archive and its pickle. Raises RefusedPickleError for an archive that torch did not write.

    torch compresses nothing and stores nothing twice, so what the archive unpacks to is never larger than its file.
    """
    records = archive.infolist()
    if any(r.compress_type != zipfile.ZIP_STORED or r.compress_size != r.file_size for r in records):
        raise RefusedPickleError("is compressed, which torch.save does not do")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise RefusedPickleError("claims to hold more than the file does")
    programs = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(programs) != 1 or len({record.filename for record in records}) != len(records):
        raise RefusedPickleError("holds the same record more than once, or no data.pkl")
    if programs[0].file_size > LARGEST_PROGRAM:
        raise RefusedPickleError(f"holds a pickle of more than {LARGEST_PROGRAM >> 20} MiB, more than any model needs")
    folder = programs[0].filename.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder").decode() != sys.byteorder:
        raise RefusedPickleError("was saved on a machine with the other byte order; use the Hugging Face folder")
    return folder, archive.read(programs[0])


# --- objects ----------------------------------------------------------------------------------------


class _Builder:
    """Builds data from records, at most as many values as `budget`.

    Shared values are built, and counted, wherever they occur, so that nothing that walks through the result later takes
    longer than this did.
    """

    def __init__(self, budget: int):
        self.left = budget

    def value(self, node: object, depth: int = 0) -> object:
        """The value of a record. Raises RefusedPickleError for what is no data, or too much of it."""
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise RefusedPickleError("holds values that are nested or repeated more than in any saved model")
        kind = type(node)
        if node is None or kind in (bool, int, float, str):
            return node
        if kind in (list, tuple):
            return kind(self.value(item, depth + 1) for item in node)
        if kind is dict:
            return {self.value(key, depth + 1): self.value(item, depth + 1) for key, item in node.items()}
        if kind is Name and node.module == "torch" and isinstance(vars(torch).get(node.name), torch.dtype):
            return vars(torch)[node.name]
        if kind is Built and isinstance(node.of, Name) and not node.filled:
            return self.built(node, depth)
        raise RefusedPickleError(f"holds {_printable(_described(node))} where only data belong")

    def built(self, node: Built, depth: int) -> object:
        """An object that is more than a plain value."""
        path = node.of.module, node.of.name
        if path == ("_codecs", "encode"):
            return self.bytes(node)
        if path[1] in ("set", "frozenset") and path in OTHER_NAMES:
            return set(map(checked_key, self.value(node.arguments[0], depth + 1)))
        if path == ("tokenizers", "AddedToken"):
            return AddedToken(**self.value(node.state, depth + 1))
        if path == ("tokenizers", "Tokenizer"):
            return _tokenizer(self.bytes(node.state))
        if path == ("transformers.tokenization_python", "Trie"):
            return Trie(sorted(self.value(node.state["_tokens"], depth + 1)))
        if path == ("PIL.Image", "Resampling"):
            return Image.Resampling(self.value(node.arguments[0], depth + 1))
        return self.object(node, (*DATA_CLASSES, *_plain_classes(), Enum), depth)

    def object(self, node: Built, kinds, depth: int = 0) -> object:
        """An instance of a class of transformers that is one of `kinds`, its `__init__` not called."""
        found = _class_of(node, kinds)
        if issubclass(found, Enum):
            return found(self.value(node.arguments[0], depth + 1))
        state = self.value(node.state, depth + 1)
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise RefusedPickleError(f"holds a {found.__name__} without attributes")
        made = object.__new__(found)
        vars(made).update(state)
        return made

    def bytes(self, node: object) -> bytes:
        """Bytes, which protocol 2 writes as a call that encodes a text."""
        if not isinstance(node, Built) or node.of != Name("_codecs", "encode") or type(node.arguments) is not tuple:
            raise RefusedPickleError("holds something else where bytes belong")
        text, encoding = node.arguments
        self.left -= len(text) // 16
        if self.left < 0 or encoding != "latin1":
            raise RefusedPickleError("holds bytes that are repeated more than in any saved model")
        return text.encode("latin1")


def _plain_classes() -> list[type]:
    """What newer transformers keep settings that differ by layer in; not public, and loaded with the configuration."""
    module = sys.modules.get("transformers.integrations.heterogeneity.configuration_utils")
    found = getattr(module, "_HeterogeneitySpec", None)
    return [found] if found else []


def _tokenizer(data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(data.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the library is no Exception
        raise RefusedPickleError("holds a tokenizer that cannot be read") from error


def _class_of(node: object, kinds) -> type:
    """The class of transformers that a record is an instance of: a public one, or one of a module that is loaded.

    So a module is imported only for the public names that transformers itself says it has.
    """
    of = node.of if isinstance(node, Built) else None
    if isinstance(of, Name) and of.module.split(".")[0] == "transformers":
        found = getattr(transformers, of.name, None) or getattr(sys.modules.get(of.module), of.name, None)
        if isinstance(found, type) and issubclass(found, kinds):
            return found
    raise RefusedPickleError(f"holds {_printable(_described(node))} where only data belong")


def _described(node: object) -> str:
    while isinstance(node, Built) and isinstance(node.of, Name):
        node = node.of
    return f"{node.module}.{node.name}"[:80] if isinstance(node, Name) else f"a {type(node).__name__}"


# --- weights ----------------------------------------------------------------------------------------


def _attributes(module: Built) -> dict:
    if not isinstance(module, Built) or type(module.state) is not dict:
        raise RefusedPickleError("does not hold a model")
    return module.state


def _state(model: Built, budget: int) -> Iterator[tuple[str, StoredTensor]]:
    """The weights and persistent buffers of a model by name, as `nn.Module.state_dict` has them."""
    left, waiting = budget, [("", 0, model)]
    while waiting:
        prefix, depth, module = waiting.pop()
        attributes = _attributes(module)
        transient = _transient(attributes.get("_non_persistent_buffers_set"))
        members = [attributes.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules")]
        left -= 1 + len(transient) + sum(map(len, members))
        if left < 0 or depth > DEEPEST:
            raise RefusedPickleError("holds more modules than any model has")
        for name in (name for group in members for name in group):
            if type(name) is not str or len(name) > LONGEST_NAME:
                raise RefusedPickleError("holds a module whose name is none")
        parameters, buffers, modules = members
        kept = {name: buffer for name, buffer in buffers.items() if name not in transient}
        yield from ((prefix + name, _stored(node)) for name, node in (parameters | kept).items() if node is not None)
        waiting += [(f"{prefix}{name}.", depth + 1, child) for name, child in modules.items() if child is not None]


def _transient(node: object) -> set[str]:
    """The names of a module's buffers that no checkpoint holds."""
    names = node.arguments[0] if isinstance(node, Built) and node.arguments else []
    return {name for name in names if type(name) is str}


def _stored(node: object) -> StoredTensor:
    """Where a weight stands, from the calls that would rebuild it. Raises RefusedPickleError for any other call."""
    for _ in range(4):  # a parameter of a tensor, in a call that restores its attributes
        if not isinstance(node, Built) or not isinstance(node.of, Name) or type(node.arguments) is not tuple:
            break
        of, arguments = (node.of.module, node.of.name), node.arguments
        if of in (("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state")):
            node = arguments[0]
        elif of == ("torch._tensor", "_rebuild_from_type_v2"):
            node = Built(arguments[0], arguments[2])
        elif of == ("torch._utils", "_rebuild_tensor_v2"):
            return _checked(*arguments[:4])
        else:
            break
    raise RefusedPickleError(f"holds {_printable(_described(node))} where a weight belongs")


def _checked(storage: object, offset: object, shape: object, stride: object) -> StoredTensor:
    identifier = storage.identifier if isinstance(storage, Persistent) else None
    if type(identifier) is not tuple or len(identifier) != 5 or not isinstance(identifier[1], Name):
        raise RefusedPickleError("holds a weight without a storage")
    kind, storage_type, key, _, elements = identifier
    dtype = STORAGES.get(storage_type.name) if kind == "storage" and storage_type.module == "torch" else None
    sizes = [offset, elements, *shape, *stride] if type(shape) is type(stride) is tuple else [-1]
    fits = all(type(size) is int and 0 <= size < 2**48 for size in sizes) and len(shape) == len(stride) <= 8
    if dtype is None or type(key) is not str or not fits:
        raise RefusedPickleError("holds a weight whose dtype or shape is none")
    stored = StoredTensor(key, dtype, offset, shape, stride)
    # A view that repeats elements can be made as large as one likes; no weight is one.
    if stored.end and (stored.end > elements or torch.Size(shape).numel() > elements):
        raise RefusedPickleError(f"holds a weight that goes beyond its storage {key[:80]}")
    return stored
