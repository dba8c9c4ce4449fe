"""Kill runs that replace a result, at random moments: a complete result, old or new, has to stand there each time.

    python tests/kill_results.py [MOMENTS]        30 by SIGKILL and 30 by SIGTERM by default; a second or two each

Half of the moments fall anywhere in a run, the others around its save. After each the same command comes again, as far
as its first line. Prints what stood there; exits with 1 when a result was lost.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import GATED, sentences, special_tokens, write_model
from safetensors.torch import load_file
from transformers import LlamaConfig

import main

RATIOS = ("0.25", "0.5")
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def start(*arguments) -> int:
    """Run the command line in a process of its own; return its number."""
    child = os.fork()
    if not child:
        code = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            code = main.main([str(argument) for argument in arguments])
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a process; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ratio_of(folder: Path, weights: dict[str, dict]) -> str | None:
    """Return which of the results stands in `folder`, complete to the last bit; None for anything else."""
    try:
        record = json.loads((folder / "pruning.json").read_text())
        found = load_file(folder / "model.safetensors")
    except OSError:
        return None
    ratio = str(record["arguments"]["pruning_ratio"])
    whole = set(record["files"]) == {path.name for path in folder.iterdir()} and found.keys() == weights[ratio].keys()
    return ratio if whole and all(value.equal(weights[ratio][name]) for name, value in found.items()) else None


def try_moments(count: int, number: int, command: list, weights: dict[str, dict], seconds: float) -> Counter:
    """Kill `count` runs by the signal; count what was there at once, and after the next run's first line."""
    folder, seen = Path(command[-1]), Counter()
    for moment in range(count):
        old = ratio_of(folder, weights)
        new = RATIOS[1 - RATIOS.index(old)]
        child = start(*command, "--overwrite", "--pruning_ratio", new)
        if moment % 2:
            while not list(folder.parent.glob(".*partial/*")) and not os.waitid(os.P_PID, child, ENDED):
                time.sleep(0.001)
        time.sleep(random.uniform(0, seconds / 3 if moment % 2 else seconds))
        os.kill(child, number)
        code = ended(child)
        at_once = ratio_of(folder, weights)
        ended(start("--model", "nowhere", *command[2:], "--overwrite"))  # ends right after it has looked at the target
        later = ratio_of(folder, weights)
        left = [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
        names = {old: "old", new: "new", None: "LOST"}
        ending = "ended before" if code == 0 else "interrupted" if code > 0 else "killed"
        seen[f"{ending}, at once {names[at_once]}, later {names[later]}{', LEFT BEHIND' if left else ''}"] += 1
        if later is None:
            break
    return seen


def run(count: int) -> int:
    """Make a model and its results, then kill runs; return the exit code."""
    work = Path(tempfile.mkdtemp(prefix="kill-results-"))
    try:
        model = write_model(LlamaConfig(**GATED, **special_tokens()), work / "model")
        (work / "own.txt").write_text("\n".join(sentences(400)))
        command = ["--model", model, "--dataset", work / "own.txt", "--seqlen", 32, "--nsamples", 16, "--dtype",
                   "float32", "--save_format", "both", "--save_model", work / "results" / "result"]  # fmt: skip
        weights = {}
        for ratio in RATIOS:
            begun = time.monotonic()
            assert ended(start(*command, "--overwrite", "--pruning_ratio", ratio)) == 0
            seconds = time.monotonic() - begun
            weights[ratio] = load_file(command[-1] / "model.safetensors")
        print(f"a run takes {seconds:.1f} s")
        lost = 0
        for number in (signal.SIGKILL, signal.SIGTERM):
            seen = try_moments(count, number, command, weights, seconds)
            print(f"{number.name}: {sum(seen.values())} moments")
            for what, times in seen.most_common():
                print(f"  {times:4d}  {what}")
            lost += sum(times for what, times in seen.items() if "LOST" in what or "BEHIND" in what)
        return 1 if lost else 0
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]) if sys.argv[1:] else 30))
