"""A lock is held by one process at a time, says by which, and goes with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib import locks

HOLD = """
import sys
from lib import locks
with locks.exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path/result` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "result"],
        cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_is_told_who_is_at_work(tmp_path, holder):
    with pytest.raises(locks.Busy, match=f"process {holder.pid} on "), locks.exclusive(tmp_path / "result"):
        pass


def test_the_second_process_waits_where_it_is_told_to(tmp_path, holder):
    told = []

    def waiting(text):
        told.append(text)
        holder.communicate("\n")  # ends it

    with locks.exclusive(tmp_path / "result", waiting):
        assert holder.returncode == 0
    assert len(told) == 1 and str(holder.pid) in told[0]
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.exclusive(tmp_path / "result"):
        assert locks.lock_file(tmp_path / "result").read_text().startswith(f"process {os.getpid()} ")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_fills_the_file_system_can_be_locked(tmp_path):
    with locks.exclusive(tmp_path / ("ü" * 127)):
        assert len(list(tmp_path.iterdir())) == 1
