"""Where a result goes: the folder of `--save_model`, checked before anything is loaded, complete or as it was after.

A result is written to a hidden folder beside the target and takes its place in one step: by renaming, or by exchanging
the names of the old and the new one. Where that cannot be (the target is a mount point, its parent is not writable, the
file system cannot exchange names) the files move one by one, in an order that the next run recognises and finishes.

The hidden names stand beside the target, or in it where it must stay what it is. Only the holder of the target's lock
(`lib.locks`) touches them:

    .NAME.afr-st-partial    a result that is being written, or the one that was just replaced; never needed again
    .NAME.afr-st-complete   a complete result, while the files of the old one move out of the target
    .NAME.afr-st-moving     a complete result, while its files move into the target
    .NAME.afr-st-old        files of the old result
"""

import argparse
import errno
import hashlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from huggingface_hub import constants

from lib import data, filesystem, llava_data, locks, parallel
from lib.errors import UserError
from lib.result_folder import IGNORED, LAST, RECORD, Content, content, record_of, stranger_in

KINDS = ("partial", "complete", "moving", "old")
# The target can be written to, but not be replaced or filled.
NOT_REPLACEABLE = (errno.EBUSY, errno.EPERM, errno.EACCES, errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


# --- reserving --------------------------------------------------------------------------------------


def folders(save_model: str | None, ratios: Sequence[float]) -> dict[float, str | None]:
    """Return the folder for each ratio: `save_model` itself for one, one below it for each of several."""
    if save_model is None or len(ratios) == 1:
        return dict.fromkeys(ratios, save_model)
    return {ratio: str(Path(save_model) / str(ratio)) for ratio in ratios}


@contextmanager
def reserved(args: argparse.Namespace, ratios: Sequence[float]) -> Iterator[dict[float, "Target | None"]]:
    """Reserve the target of each ratio (see `reserve`); None where nothing is saved, and in all but the main process.

    Raises UserError as `reserve` does, also for a target that holds, or is, what the run reads or writes otherwise.
    """
    with ExitStack() as stack:
        found = folders(args.save_model if parallel.is_main() else None, ratios)
        precious = list(_precious(args)) if any(found.values()) else []
        yield {
            ratio: folder and stack.enter_context(reserve(folder, args.overwrite, precious))
            for ratio, folder in found.items()
        }


@contextmanager
def reserve(given: str, overwrite: bool = False, precious: Iterable[tuple[str, Path]] = ()) -> Iterator["Target"]:
    """Hold the target `given` for this process, after finishing or removing what a killed run left there.

    `precious` are things, by name and path, that no result may replace. Parents that are missing are made, and taken
    away again if they stay empty. Raises UserError where no result can be put later on, and where another process
    holds the target.
    """
    target = Target(given)
    target.refuse_to_replace(precious)
    missing = [parent for parent in [target.base, *target.base.parents] if not os.path.lexists(parent)]
    with ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            target.base.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.exclusive(target.base / target.path.name))
        except locks.Busy as busy:
            raise UserError(
                f"{target.label}: another run writes there ({busy}); wait until it has ended, or name another folder"
            ) from busy
        except OSError as error:
                raise UserError(f"{target.label}: cannot write to {_short(target.base)} ({_reason(error)})") from error
        stack.enter_context(target.clearing())
        target.recover()
        target.check(overwrite)
        yield target


def _remove_empty(parents: Sequence[Path]) -> None:
    with suppress(OSError):  # one that is not empty stays
        for parent in parents:
            parent.rmdir()


def _precious(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Yield what the run reads, or writes elsewhere, by name and path."""
    model = _expanded(args.model)
    if os.path.exists(model):
        yield f"the model (--model {args.model})", model
        with suppress(OSError):  # a file, or closed; links: the Hub's cache is made of them
            yield from (("the model's weights", file) for file in model.iterdir() if file.is_symlink())
    if args.dataset.endswith((*data.FILE_TYPES, ".json")):
        yield f"the data (--dataset {args.dataset})", _expanded(args.dataset)
        yield "the images", _expanded(args.image_dir or Path(args.dataset).parent / "images")
    for name in ("", *data.SETS, llava_data.NAME):
        yield f"the data (--data_dir {args.data_dir})", _expanded(args.data_dir) / name
    for ending in ("", ".partial", ".partial.walk") if args.scores else ():
        yield f"the scores (--scores {args.scores})", Path(f"{args.scores}{ending}")
    yield f"the models of the Hub (--cache_dir {args.cache_dir})", Path(args.cache_dir)
    yield "the cache of Hugging Face (HF_HOME)", Path(constants.HF_HOME)
    yield "this program", Path(__file__).parents[1]
    places = {"working directory": Path.cwd, "home directory": Path.home, "folder TMPDIR": tempfile.gettempdir}
    for name, find in places.items():
        with suppress(OSError, RuntimeError):  # there is none
            yield f"the {name}", Path(find())


def _expanded(name: str | Path) -> Path:
    with suppress(RuntimeError):  # no such user
        return Path(name).expanduser()
    return Path(name)


def refuse_full_disks(needed: dict["Target", int]) -> None:
    """Raise UserError when the results, in this order, of so many bytes do not fit on the disks of their targets.

    Each is complete before the one that it replaces is removed.
    """
    held: dict[int, int] = {}
    for target, size in needed.items():
        disk = os.stat(target.base).st_dev
        held[disk] = held.get(disk, 0) + size
        free = filesystem.free_bytes(target.base)
        if free is not None and held[disk] > free:
            raise UserError(
                f"{target.label}: the disk has {free / 2**30:.2f} GiB free, and the result takes about "
                f"{held[disk] / 2**30:.2f} GiB{' with those before it' if held[disk] > size else ''}; name a folder "
                "where there is more room, or save one form only (--save_format hf)"
            )
        held[disk] -= sum(entry[0] for entry in target.seen.values() if entry)


# --- one target -------------------------------------------------------------------------------------


class Target:
    """A folder that a result is put to.

    shown: the folder as the user named it;  path: the same without links and `..`;  base: where the hidden names
    stand;  seen: what stood in the folder when the run began, and may be replaced;  done: where the result is, once it
    is complete.
    """

    def __init__(self, given: str):
        """Raise UserError for a name that no folder can have."""
        self.label = f"--save_model {_short(given)}"
        self.seen: Content = {}
        self.done: str | None = None
        try:
            self.given = Path(given).expanduser()
            self.shown = given if Path(given) == self.given else str(self.given)
            self.path = self.given.resolve()
            str(self.path).encode()
            if os.path.lexists(self.path) and not self.path.is_dir():
                raise UserError(f"{self.label}: is a file; name a folder")
            self.base = self.path if filesystem.must_stay(self.path) else self.path.parent
        except UnicodeEncodeError as error:
            raise UserError(
                f"--save_model {given!a}: is not UTF-8, which the libraries that write models need; name another "
                "folder, or set LC_ALL=C.UTF-8 if the name looks right to you"
            ) from error
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.label}: cannot write to it ({_reason(error)})") from error

    def _hidden(self, kind: str) -> Path:
        name = f".{self.path.name}.afr-st-{kind}"
        if len(os.fsencode(name)) > locks.LONGEST_NAME:
            name = f".{hashlib.sha256(os.fsencode(self.path.name)).hexdigest()}.afr-st-{kind}"
        return self.base / name

    def _own_names(self) -> tuple[str, ...]:
        lock = locks.lock_file(self.base / self.path.name)
        return (*IGNORED, lock.name, *(self._hidden(kind).name for kind in KINDS))

    def _content(self) -> Content:
        return content(self.path, self._own_names()) if self.path.is_dir() else {}

    # --- before the run ---

    def refuse_to_replace(self, precious: Iterable[tuple[str, Path]]) -> None:
        """Raise UserError if the target is, or holds, one of these things, by name and path."""
        for what, path in precious:
            for place in {path.absolute(), Path(os.path.realpath(path))}:
                if any(filesystem.same(self.path, folder) for folder in [place, *place.parents]):
                    verb = "is" if filesystem.same(self.path, place) else "holds"
                    raise UserError(
                        f"{self.label}: {verb} {what}, and a result would take its place; name a folder of its own"
                    )

    def recover(self) -> None:
        """Finish, or remove, what a run that was killed left, and say so."""
        partial, complete, moving, old = map(self._hidden, KINDS)
        try:
            if complete.exists() and self._stranger():
                if old.exists():
                    filesystem.move(old, self.path, LAST)
                place = self._free_place()
                os.rename(complete, place)
                self._say(f"the complete result of a run that was killed is now in {self._name_of(place)}")
            elif complete.exists() or moving.exists():
                with filesystem.uninterrupted():
                    self._finish()
                self._say("finished what a run that was killed had begun; its result is complete")
            elif partial.exists() or old.exists():
                self._say("removed what a run that was killed left half-written")
            self.clear()
        except OSError as error:
            raise UserError(
                f"{self.label}: what a killed run left there cannot be cleared ({_reason(error)})"
            ) from error

    def check(self, overwrite: bool) -> None:
        """Raise UserError unless a result may take the place of what stands there; note what that is."""
        try:
            self._hidden("partial").mkdir()
            self._hidden("partial").rmdir()
            if self.path.exists() and not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self.seen = self._content()
        except OSError as error:
            raise UserError(f"{self.label}: cannot write to it ({_reason(error)})") from error
        if self.seen and not overwrite:
            raise UserError(
                f"{self.label}: the folder is not empty; name another (--overwrite replaces a result of this tool, "
                "and nothing else)"
            )
        if self.seen and (stranger := self._stranger()):
            raise UserError(f"{self.label}: {stranger}, so --overwrite leaves it alone; name another folder")

    def _stranger(self) -> str | None:
        """What in the target is not a result of ours; None where there is nothing else."""
        found = self._content()
        record = record_of(self.path)
        if found and record is None:
            return f"the folder is not empty and is no result of this tool (it has no {RECORD})"
        name = stranger_in(found, record) if found else None
        return name and f"the folder holds '{name}', which this tool did not write"

    # --- at its end ---

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Give a folder to write to, on the target's file system; it is removed afterwards unless `put` takes it.

        Raises UserError when the disk does not take it.
        """
        partial = self._hidden("partial")
        try:
            self.base.mkdir(parents=True, exist_ok=True)  # someone may have tidied up meanwhile
            partial.mkdir()
            yield partial
        except OSError as error:
            waiting = [place for place in map(self._hidden, ("complete", "moving")) if place.exists()]
            advice = f"; the complete result is in {waiting[0]}, and the next run puts it in place" if waiting else ""
            raise UserError(f"{self.label}: cannot be written ({_reason(error)}){advice}") from error
        finally:
            self.clear()

    def put(self, partial: Path, describe: Callable[[str], None] = lambda place: None) -> str:
        """Make the folder `partial` that `writing` gave the result, and return where it is.

        That is the target, unless something appeared there since the run began or it turns out that it cannot be
        replaced: then it is a folder beside it, and a line on stderr says so. Before, `describe` is called with the
        place, to write it down in the result. Raises OSError.
        """
        appeared = sorted(self._content().items() - self.seen.items())
        reason = f"'{appeared[0][0]}' appeared there while this run worked" if appeared else None
        if not reason:
            describe(self.shown)
            self._make_lasting(partial)
            try:
                with filesystem.uninterrupted():
                    self._take_place(partial)
                    self.done = self.shown
                return self.done
            except OSError as error:
                if error.errno not in NOT_REPLACEABLE or not partial.exists():
                    raise
                reason = f"it cannot be replaced ({error.strerror})"
        self._put_beside(partial, describe)
        self._say(f"{reason}; it was left as it is, and the result is in {self.done}")
        return self.done

    def _take_place(self, partial: Path) -> None:
        """Put the complete `partial` where the target is; what it replaces is then called partial, or old."""
        if self.base != self.path:
            if not self.path.exists() or not os.listdir(self.path):
                os.rename(partial, self.path)
                return filesystem.flush(self.base)
            if filesystem.exchange(partial, self.path):
                return filesystem.flush(self.base)
        complete, old = self._hidden("complete"), self._hidden("old")
        os.rename(partial, complete)
        try:
            self._finish()
        except OSError:
            if complete.exists():  # nothing new is in the target yet: everything as it was
                if old.exists():
                    filesystem.move(old, self.path, LAST)
                os.rename(complete, partial)
            raise

    def _finish(self) -> None:
        """Move a complete result into the target file by file, from wherever an earlier attempt ended."""
        _, complete, moving, old = map(self._hidden, KINDS)
        if complete.exists():
            self.path.mkdir(exist_ok=True)
            filesystem.move(self.path, old, LAST, self._own_names())
            os.rename(complete, moving)
        filesystem.move(moving, self.path, LAST)
        moving.rmdir()
        filesystem.flush(self.path)
        filesystem.flush(self.base)

    def _put_beside(self, partial: Path, describe: Callable[[str], None]) -> None:
        place = self._free_place()
        try:
            describe(self._name_of(place))
            self._make_lasting(partial)
            with filesystem.uninterrupted():
                os.rename(partial, place)
                self.done = self._name_of(place)
        except BaseException:
            with suppress(OSError):
                place.rmdir()
            raise

    def _free_place(self) -> Path:
        """Make the first folder NAME-1, NAME-2, ... that is not there yet."""
        for number in itertools.count(1):
            place = self.base / f"{self.path.name}-{number}"
            if len(os.fsencode(place.name)) > locks.LONGEST_NAME:
                place = self.base / f"{hashlib.sha256(os.fsencode(self.path.name)).hexdigest()}-{number}"
            with suppress(FileExistsError):
                place.mkdir()
                return place

    def _name_of(self, place: Path) -> str:
        """A place in the target's base, in the user's words where they lead there."""
        return str(self.given.parent / place.name if filesystem.same(self.given.parent, self.base) else place)

    def _make_lasting(self, folder: Path) -> None:
        """Give the files the permissions that the user's umask asks for, and get them onto the disk.

        safetensors makes its files private. A folder that is replaced hands its permissions on.
        """
        mask = os.umask(0)
        os.umask(mask)
        for parent, _, names in os.walk(folder, topdown=False):
            for name in names:
                os.chmod(os.path.join(parent, name), 0o666 & ~mask)
                filesystem.flush(os.path.join(parent, name))
            filesystem.flush(parent)
        if self.path.exists():
            with suppress(OSError):
                os.chown(folder, -1, self.path.stat().st_gid)
                shutil.copymode(self.path, folder)

    @contextmanager
    def clearing(self) -> Iterator[None]:
        """Remove at the end what is not needed; a KeyboardInterrupt says what is complete, and what is left behind."""
        try:
            try:
                yield
            finally:
                for folder in self.clear():
                    self._say(f"{folder} could not be removed; it is not needed any more")
        except KeyboardInterrupt as interrupt:
            said = [str(interrupt)] if interrupt.args else []
            if self.done:
                said.append(f"the result is complete in {self.done}")
            if left := [str(folder) for folder in map(self._hidden, KINDS) if folder.exists()]:
                said.append(f"left behind: {', '.join(left)}; the next run with {self.label} removes it")
            raise KeyboardInterrupt("; ".join(said)) from None

    def clear(self) -> list[Path]:
        """Remove what is not needed any more, and return what withstood; parts of a complete result stay."""
        partial, complete, moving, old = map(self._hidden, KINDS)
        unneeded = [partial] if complete.exists() or moving.exists() else [partial, old]
        for folder in unneeded:
            shutil.rmtree(folder, ignore_errors=True)
        return [folder for folder in unneeded if folder.exists()]

    def _say(self, text: str) -> None:
        print(f"note: {self.label}: {text}", file=sys.stderr)


def _short(text) -> str:
    return str(text) if len(str(text)) < 300 else f"{str(text)[:100]}... ({len(str(text))} characters)"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
