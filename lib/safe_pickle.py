"""Read a pickled model without executing the pickle: weights and configuration come out, code does not run.

A pickle is a program that may call anything it can name. Here a name resolves to one of three things: a
real class that only holds data (configurations, tokenizers, containers), a stand-in that records what it is
given (every module and function of torch and transformers), or a refusal.
"""

import collections
import importlib
import io
import pickle
import pickletools
import re
import zipfile
from enum import Enum
from pathlib import Path

import torch
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

from lib.errors import UserError

REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
REBUILDERS = ("torch._utils", "torch._tensor")  # a weight must not become a stand-in by mistake
RECORDED = ("torch", "transformers")  # packages whose names may occur
PIECE = 2**22  # elements that are read at once
DATA_CLASSES = (
    PreTrainedConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ImageProcessingMixin,
    SizeDict,
    Enum,
    torch.dtype,
)
BUILTINS = {
    kind.__name__: kind
    for kind in (
        set,
        frozenset,
        list,
        dict,
        tuple,
        int,
        float,
        str,
        bytes,
        bytearray,
        bool,
        complex,
        slice,
        range,
        object,
    )
}
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


class Record:
    """Stands where the pickle has an object of torch or transformers; keeps its attributes, does nothing."""

    path = ("", "")  # module and name of what it stands for

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key, value):
        pass

    def model_class(self) -> type:
        """The model class this stands for. Raises TypeError when it stands for anything else."""
        found = getattr(importlib.import_module(self.path[0]), self.path[1])
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            raise TypeError(f"{found} is not a model")
        return found

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The weights and persistent buffers below this module, by name, as `nn.Module.state_dict` has them."""
        held = vars(self)
        transient = held.get("_non_persistent_buffers_set", ())
        state = {prefix + n: t for n, t in held.get("_parameters", {}).items() if t is not None}
        state |= {prefix + n: t for n, t in held.get("_buffers", {}).items() if t is not None and n not in transient}
        for name, module in held.get("_modules", {}).items():
            if module is not None:
                state |= module.state_dict(f"{prefix}{name}.")
        return state


def read(path: Path, dtype: torch.dtype | str = "auto") -> object:
    """The object that `torch.save` wrote, with Records for its modules and floating weights in `dtype`.

    No weight is ever in memory twice. Raises UserError that lists what is not allowed;
    other exceptions mean a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        program = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        data = archive.read(program)
        unknown = (name for name in named_globals(data) - {REBUILD_TENSOR} if _resolve(*name) is None)
        refused = sorted(map(".".join, unknown))
        if refused:
            raise UserError(
                f"{path}: names {', '.join(refused[:5])}, which a saved model does not need and which may "
                "run code; use the Hugging Face folder, or trust the checkpoint explicitly if you made it"
            )
        return _Reader(data, archive, program.removesuffix("data.pkl"), dtype).load()


def named_globals(data: bytes) -> set[tuple[str, str]]:
    """Every `(module, name)` that a pickle refers to, found without running it."""
    found, strings = set(), []
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("GLOBAL", "INST"):
            found.add(tuple(argument.split(" ", 1)))
        elif code.name == "STACK_GLOBAL":
            found.add(tuple(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return found


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, archive: zipfile.ZipFile, folder: str, dtype):
        super().__init__(io.BytesIO(data))
        self.archive, self.folder, self.dtype = archive, folder, dtype
        self.read: dict[str, Tensor] = {}  # tied weights share one storage

    def find_class(self, module, name):
        """What the pickle names, if it is one of the few things a checkpoint needs. Raises UserError for all else."""
        if (module, name) == REBUILD_TENSOR:
            return self.rebuild_tensor
        found = _resolve(module, name)
        if found is None:
            raise UserError(f"the checkpoint names {module}.{name}, which is not allowed")
        return found

    def persistent_load(self, identifier):
        """The dtype, name and number of elements of a storage: nothing is read before a tensor asks for it."""
        kind, storage_type, key, _, length = identifier
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return storage_type, key, length

    def rebuild_tensor(self, storage, offset, size, stride, *_):
        """A tensor on its storage, in the dtype that was asked for."""
        saved_dtype, key, length = storage
        if length == 0:
            return torch.empty(size, dtype=saved_dtype)
        if key not in self.read:
            self.read[key] = self.read_storage(key, saved_dtype)
        return self.read[key].as_strided(size, stride, offset)

    def read_storage(self, key: str, saved_dtype: torch.dtype) -> Tensor:
        """All elements of a storage; it is read and converted in pieces, so that it never exists twice."""
        record = self.archive.getinfo(f"{self.folder}data/{key}")
        dtype = self.dtype if saved_dtype.is_floating_point and self.dtype != "auto" else saved_dtype
        held = torch.empty(record.file_size // saved_dtype.itemsize, dtype=dtype)
        with self.archive.open(record) as file:
            for piece in held.split(PIECE):
                data = bytearray(file.read(len(piece) * saved_dtype.itemsize))
                piece.copy_(torch.frombuffer(data, dtype=saved_dtype))
        return held


def _resolve(module: str, name: str) -> object | None:
    """What a name in the pickle becomes; None where it is refused."""
    if (module, name) in _STAND_INS:
        return _STAND_INS[module, name]
    if module in ("builtins", "__builtin__"):
        return BUILTINS.get(name)
    if module == "torch" and name in STORAGES:
        return STORAGES[name]
    if module.split(".")[0] == "tokenizers":
        found = getattr(importlib.import_module(module), name, None)
        return found if isinstance(found, type) else None
    if module.split(".")[0] not in RECORDED or module in REBUILDERS or "." in name:
        return None
    found = getattr(importlib.import_module(module), name, None) if module == "torch" or _holds_data(name) else None
    if isinstance(found, torch.dtype) or (isinstance(found, type) and issubclass(found, DATA_CLASSES)):
        return found
    return type(name, (Record,), {"path": (module, name)})


def _holds_data(name: str) -> bool:
    """Only modules that may hold a data class are imported at all."""
    return name.endswith(
        (
            "Config",
            "Tokenizer",
            "TokenizerFast",
            "Backend",
            "Pil",
            "Resampling",
            "Strategy",
            "Type",
            "Mode",
            "Processor",
            "SizeDict",
        )
    )


def _encode_latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


_STAND_INS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("functools", "partial"): type("partial", (Record,), {"path": ("functools", "partial")}),
    ("re", "_compile"): re.compile,  # tokenizers keep patterns
    ("_codecs", "encode"): _encode_latin1,  # how protocol 2 writes bytes
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, arguments, state: function(*arguments),
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch", "Tensor"): type("Tensor", (Record,), {"path": ("torch", "Tensor")}),
}
