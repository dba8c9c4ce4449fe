"""What scoring accumulated, kept: in memory, or in a file from which other runs go on.

A score file is an ordinary safetensors file: `LAYER.OBJECTIVE` holds a float32 sum per neuron `[d_ff]` or per weight
`[projections, d_ff, d]`, or the mean and mean square of activations `[2, features]`; the metadata's `key` what they
depend on, its `sha256` proves what it holds. Until it is complete it is called FILE.partial, with FILE.partial.walk
beside it: the cotangents from which the next run goes on.
"""

import errno
import glob
import hashlib
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lib import locks, parallel
from lib.errors import UserError
from lib.score import Walk

# The state of the walk is as large as a layer's hidden states. It is not written more often than so many times the
# time that writing it takes.
WALK_SHARE = 10
ALIGNMENT = 8  # of the header, so that the values can be mapped
UNPROVEN = "0" * 64  # stands for the digest until all is written
SCORES_WORTH_KEEPING = 60.0  # seconds: what took less is scored again sooner than a file is found

Shapes = dict[str, tuple[int, ...]]


def tensor_name(layer: str, objective: str) -> str:
    """What a layer's sum is called in a file."""
    return f"{layer}.{objective}"


def _digest(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def _digest_of_all(digests: dict[str, str]) -> str:
    """What proves a file: SHA-256 of its tensors' names and digests."""
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()


class InMemory:
    """Sums by name, and nothing to go on from."""

    def __init__(self):
        self._held: dict[str, Tensor] = {}
        self.is_complete = False

    def earlier(self, n_batches: int) -> Walk | None:
        """No earlier run left anything."""
        return None

    def put(self, sums: dict[str, Tensor], walk: Walk | None = None) -> None:
        """Keep the sums of one layer."""
        self._held |= sums

    def complete(self) -> None:
        """All layers are there."""
        self.is_complete = True

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name]


class ScoreFile:
    """Sums in a file, written layer by layer. With `resumable`, a run that was killed is gone on with."""

    def __init__(self, path: str | Path, key: dict, shapes: Shapes, resumable: bool = True):
        """Open `path`, or what an earlier run left of it, or make it.

        Raises UserError that names the difference when it was made from something else, or lacks a sum that is
        needed, when it is no score file or does not hold what was written, and when it cannot be written.
        """
        self.path, self.key, self.resumable = Path(path), key, resumable
        self.partial = Path(f"{path}.partial")
        self.walk_path = Path(f"{path}.partial.walk{parallel.rank() or ''}")
        self.is_complete = self.path.exists()
        self.bytes = sum(4 * math.prod(shape) for shape in shapes.values())
        self._written, self._took = 0.0, 0.0
        self._places = None
        self._digests: dict[str, str] = {}  # of what was written so far
        found = self.path if self.is_complete else self.partial
        if found.exists() and (self.is_complete or self.walk_path.exists()):
            self._refuse_other(found, shapes)
            if self.is_complete and parallel.is_main():
                self._refuse_unproven()
        elif parallel.is_main():
            self._create(shapes)

    # --- reading ---

    def __contains__(self, name: str) -> bool:
        return name in self._header()

    def __getitem__(self, name: str) -> Tensor:
        entry = self._header()[name]
        start, end = entry["data_offsets"]
        with open(self.path if self.is_complete else self.partial, "rb") as file:
            file.seek(self._data_start + start)
            data = bytearray(file.read(end - start))
        return torch.frombuffer(data, dtype=torch.float32).view(entry["shape"])

    def _header(self) -> dict:
        if self._places is None:
            with open(self.path if self.is_complete else self.partial, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                self._places, self._data_start = json.loads(file.read(size)), 8 + size
        return self._places

    def _refuse_unproven(self) -> None:
        """Read all that stands in the complete file. Raises UserError unless it is what a run wrote, and finite."""
        header, digests = self._header(), {}
        wanted = header["__metadata__"].get("sha256")
        names = [name for name in header if name != "__metadata__"]
        for name in tqdm(names, desc="checking scores", unit="layer", disable=None, leave=False):
            tensor = self[name]
            digests[name] = _digest(tensor)
            if not tensor.isfinite().all():
                raise UserError(f"--scores {self.path}: {name} holds NaN or infinity; delete the file")
        if wanted != _digest_of_all(digests):
            reason = "its values are not those that were written" if wanted else "it holds no checksum of its values"
            raise UserError(f"--scores {self.path}: {reason}; name another file, or delete this one")

    def _refuse_other(self, path: Path, shapes: Shapes) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                key = json.loads(file.metadata()["key"])
                there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--scores {path}: is damaged or no score file ({type(error).__name__}); name another, or delete it"
            ) from error
        for name, wanted in self.key.items():
            if key.get(name) != wanted:
                raise UserError(
                    f"--scores {path}: holds scores for another {name} ({key.get(name)}, now {wanted}); "
                    "name another file, or delete this one"
                )
        missing = [name for name in shapes if there.get(name) != shapes[name]]
        if missing:
            kinds = sorted({name.rpartition(".")[2] for name in there})
            raise UserError(
                f"--scores {path}: holds the sums {', '.join(kinds)}, but '{missing[0]}' is needed; "
                "name another file (structured_afr and afr keep the sums of all methods of their kind)"
            )

    # --- writing ---

    def _create(self, shapes: Shapes) -> None:
        header, offset = {"__metadata__": {"key": json.dumps(self.key), "sha256": UNPROVEN}}, 0
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        data = json.dumps(header).encode()
        data += b" " * (-len(data) % ALIGNMENT)
        with self._writing():
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            with open(self.partial, "wb") as file:
                file.write(struct.pack("<Q", len(data)) + data)
                file.flush()
                _reserve(file.fileno(), 8 + len(data) + offset)
            self._forget_walk()

    def earlier(self, n_batches: int) -> Walk | None:
        """The walk of an earlier run to go on with; None where there is none, or processes are not at one."""
        walk = self._read_walk(n_batches) if self.resumable else None
        index = walk.index if walk else -1
        low, high = parallel.lowest_and_highest(index)
        return walk if low == high else None

    def put(self, sums: dict[str, Tensor], walk: Walk | None = None) -> None:
        """Write the sums of one layer, then how far the walk has come, if it is one to go on with."""
        if parallel.is_main():
            header = self._header()
            with self._writing(), open(self.partial, "r+b") as file:
                for name, value in sums.items():
                    file.seek(self._data_start + header[name]["data_offsets"][0])
                    file.write(value.contiguous().view(torch.uint8).numpy())
                    self._digests[name] = _digest(value)
        now = time.monotonic()
        due = self.resumable and walk is not None and now - self._written >= WALK_SHARE * self._took
        if parallel.lowest_and_highest(int(due))[0]:
            with self._writing():
                self._write_walk(walk)
            self._written = time.monotonic()
            self._took = self._written - now

    def complete(self) -> None:
        """All layers are there: the file takes its name."""
        parallel.wait()
        if parallel.is_main():
            self._header()
            with self._writing():
                with open(self.partial, "r+b") as file:
                    head = file.read(self._data_start)
                    file.seek(head.index(UNPROVEN.encode()))
                    file.write(_digest_of_all(self._digests).encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(self.partial, self.path)
        self._forget_walk()
        self.is_complete, self._places = True, None

    def _write_walk(self, walk: Walk) -> None:
        tensors = {
            f"{where}/{objective}/{number}": tensor.contiguous()
            for where, held in [("pulled", walk.pulled), *((str(i), a) for i, a in walk.arriving.items())]
            for objective, per_batch in held.items()
            for number, tensor in enumerate(per_batch)
            if tensor is not None
        }
        state = {"index": walk.index, "reached": walk.reached, "world": parallel.world(), "sums": self._digests,
                 "tensors": {name: _digest(tensor) for name, tensor in tensors.items()}}  # fmt: skip
        partial = Path(f"{self.walk_path}.new")
        save_file(tensors, partial, {"state": json.dumps(state)})
        parallel.wait()  # so that all are at the same layer, but for the moment of renaming
        os.replace(partial, self.walk_path)

    def _read_walk(self, n_batches: int) -> Walk | None:
        try:
            with safe_open(self.walk_path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                names = list(file.keys())
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None
        if state.get("world") != parallel.world() or not self._proves(state, tensors):
            return None
        self._digests = state["sums"]
        walk = Walk(state["index"], {}, {}, state["reached"])
        for name, tensor in tensors.items():
            where, objective, number = name.split("/")
            held = walk.pulled if where == "pulled" else walk.arriving.setdefault(int(where), {})
            held.setdefault(objective, [None] * n_batches)[int(number)] = tensor
        return walk

    def _proves(self, state: dict, tensors: dict[str, Tensor]) -> bool:
        """Whether the state of a walk, and the sums before it, are what was written."""
        return {name: _digest(tensor) for name, tensor in tensors.items()} == state.get("tensors") and all(
            _digest(self[name]) == digest for name, digest in state.get("sums", {}).items()
        )

    def _forget_walk(self) -> None:
        self.walk_path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(
                f"--scores {self.path}: the scores ({self.bytes / 2**30:.1f} GiB) cannot be written ({reason}); "
                "name a file where there is more room (--scores FILE; without it, the folder TMPDIR)"
            ) from error


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and the room on disk where the file system can promise it. Raises OSError for a full disk.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.truncate(descriptor, size)


def check_path(path: str) -> None:
    """Raise UserError unless `path` can be read, or made, as a score file. Leaves nothing behind."""
    try:
        if Path(path).is_dir():
            raise UserError(f"--scores {path}: is a folder; name a file in it")
        if not Path(path).exists():
            ancestor = next(parent for parent in Path(path).absolute().parents if parent.exists())
            with tempfile.TemporaryFile(dir=ancestor):
                pass
    except OSError as error:
        raise UserError(f"--scores {path}: cannot be written ({error.strerror}); name a file elsewhere") from error


@contextmanager
def open_scores(
    path: str | None, key: dict, shapes: Shapes, beside: str | None = None
) -> Iterator[InMemory | ScoreFile]:
    """Where a run keeps its sums: in the file it names, else in memory where there is none per weight, else in a file
    that goes with the run.

    One run at a time writes a file; complete ones are read by any number. Where the run ends with an error
    after all is scored, and names no file, the sums stay in a file `beside` its result, and the error says in which.
    Raises UserError for a file that another run is writing, and as ScoreFile does.
    """
    start = time.monotonic()
    with ExitStack() as held:
        if path is not None:
            held.enter_context(_writer(Path(path)))
            kept = ScoreFile(path, key, shapes)
        elif all(len(shape) < 3 for shape in shapes.values()):
            kept = InMemory()
        else:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="afr-st-"))
            kept = ScoreFile(Path(folder) / "scores", key, shapes, resumable=False)
        try:
            yield kept
        except UserError as error:
            took = time.monotonic() - start
            if path is None and beside and kept.is_complete and took >= SCORES_WORTH_KEEPING and parallel.is_main():
                raise UserError(f"{error}{_keep(beside, key, shapes, kept)}") from error
            raise


@contextmanager
def _writer(path: Path) -> Iterator[None]:
    """Be the only one who writes the score file, where it has to be written."""
    if not parallel.is_main():
        yield
        return
    if path.exists():
        with suppress(OSError, locks.Busy), locks.exclusive(path):
            for left in path.parent.glob(f"{glob.escape(path.name)}.partial*"):
                left.unlink()  # by a run that was killed between its last two steps
        yield
        return
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locks.exclusive(path))
        except locks.Busy as busy:
            raise UserError(
                f"--scores {path}: {busy}, is writing it; wait until that run has ended, or name another file"
            ) from busy
        except OSError as error:
            raise UserError(f"--scores {path}: cannot be written ({error.strerror}); name a file elsewhere") from error
        yield


def _keep(beside: str, key: dict, shapes: Shapes, kept: InMemory | ScoreFile) -> str:
    """Write the sums to a new file beside the result; what an error says of it."""
    place = Path(beside).absolute()
    names = (place.with_name(f"{place.name}.scores{number or ''}.safetensors") for number in range(1000))
    path = next(name for name in names if not name.exists())
    with suppress(UserError, OSError):
        file = ScoreFile(path, key, shapes, resumable=False)
        for name in shapes:
            file.put({name: kept[name]})
        file.complete()
        return f". The scores are kept: with --scores {path} the same command goes on from them"
    Path(f"{path}.partial").unlink(missing_ok=True)
    return ""
