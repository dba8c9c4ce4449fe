"""A score file proves what it holds, has one writer at a time, and outlives a run that fails after scoring."""

import json
import multiprocessing
import os
import struct

import pytest
import torch
from conftest import files_below
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib import locks, sums
from lib.errors import UserError
from lib.score import Walk
from lib.sums import ScoreFile, open_scores

SHAPES = {"a.fo": (6,), "b.fo": (6,)}
KEY = {"seed": 0}


@pytest.fixture
def flags(tiny_model, data_dir, tmp_path) -> list:
    """A command that works; flags given after these count."""
    return ["--model", tiny_model("llama"), "--data_dir", data_dir, "--dtype", "float32", "--nsamples", 4,
            "--seqlen", 32, "--pruning_ratio", 0.2, "--save_model", tmp_path / "result"]  # fmt: skip


def written(path, shapes=SHAPES, values=1.0):
    """A complete score file."""
    file = ScoreFile(path, KEY, shapes)
    for name, shape in shapes.items():
        file.put({name: torch.full(shape, values)})
    file.complete()
    return path


def body(path):
    """Where the values begin."""
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


# --- what it holds ----------------------------------------------------------------------------------


def zeros(path):
    start, size = body(path), path.stat().st_size
    path.write_bytes(path.read_bytes()[:start] + bytes(size - start))


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def not_a_number(path):
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(data)


def swapped(path):
    start, data = body(path), path.read_bytes()
    path.write_bytes(data[:start] + data[start + 24 :] + data[start : start + 24])


def without_checksum(path):
    save_file(load_file(path), path, {"key": json.dumps(KEY)})


@pytest.mark.parametrize("spoil", [zeros, one_bit, not_a_number, swapped, without_checksum])
def test_a_file_that_does_not_hold_what_was_written_is_refused(spoil, tmp_path):
    file = ScoreFile(tmp_path / "s", KEY, SHAPES)
    for i, name in enumerate(SHAPES):
        file.put({name: torch.arange(6.0) + i})
    file.complete()
    assert torch.equal(ScoreFile(tmp_path / "s", KEY, SHAPES)["b.fo"], torch.arange(6.0) + 1)
    spoil(tmp_path / "s")
    with pytest.raises(UserError, match="--scores .*delete"):
        ScoreFile(tmp_path / "s", KEY, SHAPES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_though_they_were_written_so(value, tmp_path):
    written(tmp_path / "s", values=value)
    with pytest.raises(UserError, match="a.fo holds NaN or infinity"):
        ScoreFile(tmp_path / "s", KEY, SHAPES)


def test_the_checksum_stands_in_a_plain_safetensors_file(tmp_path):
    with safe_open(written(tmp_path / "s"), framework="pt") as file:
        assert len(file.metadata()["sha256"]) == 64 and file.metadata()["sha256"] != sums.UNPROVEN


def walk_at(index):
    return Walk(index, {"fo": [torch.arange(4.0)]})


@pytest.mark.parametrize("spoil", [None, "s.partial", "s.partial.walk"])
def test_what_a_killed_run_left_is_gone_on_with_only_if_it_is_what_was_written(spoil, tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "WALK_SHARE", 0)
    file = ScoreFile(tmp_path / "s", KEY, SHAPES)
    file.put({"b.fo": torch.ones(6)}, walk_at(1))
    if spoil:
        data = bytearray((tmp_path / spoil).read_bytes())
        data[-1] ^= 1
        (tmp_path / spoil).write_bytes(data)
    again = ScoreFile(tmp_path / "s", KEY, SHAPES)
    earlier = again.earlier(1)
    assert (earlier is None) == bool(spoil)
    for name in ["a.fo"] if earlier else ["b.fo", "a.fo"]:
        again.put({name: torch.ones(6)})
    again.complete()
    assert torch.equal(ScoreFile(tmp_path / "s", KEY, SHAPES)["b.fo"], torch.ones(6))


def test_it_is_flushed_to_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(sums.os, name, lambda *a, n=name, f=getattr(os, name): (steps.append(n), f(*a))[1])
    written(tmp_path / "s")
    assert steps == ["fsync", "replace"]


def test_a_full_disk_is_found_before_anything_is_scored(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sums.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="--scores .*No space left"), open_scores(str(tmp_path / "s"), KEY, SHAPES):
        pass


# --- one writer -------------------------------------------------------------------------------------


def _hold(path, ready, end):
    with open_scores(str(path), KEY, SHAPES):
        ready.set()
        end.wait(60)


def test_a_second_writer_is_told_who_is_at_work_and_readers_are_not(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(tmp_path / "s", ready, end))
    first.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match=f"process {first.pid} on .*is writing it"):
            with open_scores(str(tmp_path / "s"), KEY, SHAPES):
                pass
        written(tmp_path / "other")
        with open_scores(str(tmp_path / "other"), KEY, SHAPES) as one, open_scores(str(tmp_path / "other"), KEY, SHAPES):
            assert one.is_complete
    finally:
        end.set()
        first.join()


def test_a_second_run_is_refused_before_the_forward_pass(run_cli, flags, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.dry_run.dry_run", lambda *_: None)
    monkeypatch.setattr("lib.prune.saliency_sums", None)
    with locks.exclusive(tmp_path / "s"):
        done = run_cli(*flags, "--scores", tmp_path / "s")
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"--scores {tmp_path / 's'}: process {os.getpid()} on " in done.err


def test_what_a_killed_run_left_beside_a_complete_file_goes(tmp_path):
    path = written(tmp_path / "s")
    for name in ("s.partial.walk", "s.partial.walk1", "s.partial.walk.new"):
        (tmp_path / name).write_bytes(b"left over")
    with open_scores(str(path), KEY, SHAPES):
        assert [p.name for p in tmp_path.iterdir()] == ["s"]


# --- after a failure --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["structured_afr", "afr"])
@pytest.mark.parametrize("failing", ["lib.checkpoint.verify", "lib.steps.prune_at"])
def test_scores_that_took_minutes_outlive_a_run_that_fails_after_them(
    failing, method, run_cli, flags, tmp_path, monkeypatch
):
    flags = [*flags, "--prune_method", method]
    assert run_cli(*flags).code == 0
    wanted = {n: b for n, b in files_below(tmp_path / "result").items() if "kept" in str(n)}
    monkeypatch.setattr(sums, "SCORES_WORTH_KEEPING", 0.0)
    monkeypatch.setattr("lib.dry_run.dry_run", lambda *_: None)  # it would find the failure

    def fail(*_, **__):
        raise UserError("--save_model: is not what it should be")

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        done = run_cli(*flags, "--overwrite")
    place = tmp_path / "result.scores.safetensors"
    assert done.code == 2 and done.err.count("\n") == 1 and f"--scores {place}" in done.err and place.is_file()
    monkeypatch.setattr("lib.dry_run.dry_run", lambda *_: None)
    monkeypatch.setattr("lib.prune.saliency_sums", None)  # nothing may be scored any more
    assert run_cli(*flags, "--overwrite", "--scores", place).code == 0
    assert {n: b for n, b in files_below(tmp_path / "result").items() if "kept" in str(n)} == wanted


def test_scores_that_took_seconds_are_not_worth_a_file(run_cli, flags, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("--save_model: is not what it should be")

    monkeypatch.setattr("lib.checkpoint.verify", fail)
    before = files_below(tmp_path)
    assert run_cli(*flags).code == 2
    assert files_below(tmp_path) == before


def test_kept_scores_never_replace_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "SCORES_WORTH_KEEPING", 0.0)
    for expected in ("r.scores.safetensors", "r.scores1.safetensors"):
        with pytest.raises(UserError, match=expected), open_scores(None, KEY, SHAPES, str(tmp_path / "r")) as kept:
            kept.put({name: torch.ones(6) for name in SHAPES})
            kept.complete()
            raise UserError("no")
