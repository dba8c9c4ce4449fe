"""Broken streams, signals, memory that runs out, folders of others, impossible numbers, names and configurations."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, files_below, fresh_environment
from safetensors.torch import load_file

from lib import errors, terminal

NOBODY = 65534


@pytest.fixture
def flags(tiny_model, tmp_path) -> list:
    """A command that works; flags given after these count."""
    own = tmp_path / "own.txt"
    own.write_text("seven grey herons wait for fish under the old stone bridge " * 100)
    return ["--model", tiny_model("llama"), "--dataset", own, "--dtype", "float32", "--nsamples", 2, "--seqlen", 16,
            "--pruning_ratio", 0.2]  # fmt: skip


@pytest.fixture
def refused(run_cli, flags, tmp_path):
    """`refused(*more flags, saying=words)`: the command ends in one line with these words, and no file has changed."""

    def check(*more, saying=(), env=None):
        before = files_below(tmp_path)
        done = run_cli(*flags, *more, env=env)
        assert done.code == 2 and done.out == ""
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert len(done.err) < 700
        for words in saying:
            assert words in done.err
        assert files_below(tmp_path) == before
        return done.err

    return check


# --- streams ----------------------------------------------------------------------------------------

BREAK = {
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), {0})",
    "a pipe nobody reads": "r, w = os.pipe(); os.close(r); os.dup2(w, {0})",
    "closed": "os.close({0}); sys.{1} = None",
}
STDOUT = {how: code.format(1, "stdout") for how, code in BREAK.items()}
STDERR = {how: code.format(2, "stderr") for how, code in BREAK.items()}


@pytest.mark.parametrize("how", BREAK)
def test_a_sweep_saves_every_result_when_nobody_takes_what_it_prints(how, run_fresh, run_cli, flags, tmp_path):
    done = run_fresh(*flags, "--pruning_ratio", "0.1,0.2,0.5", "--save_model", tmp_path / "sweep", before=STDOUT[how])
    assert done.code == 0 and "Traceback" not in done.err and "ignored" not in done.err
    assert ("sparsity" in done.err) == (how == "full")  # where it can be seen, nobody having turned away
    assert run_cli(*flags, "--pruning_ratio", 0.5, "--save_model", tmp_path / "single").code == 0
    single = load_file(tmp_path / "single" / "model.safetensors")
    found = load_file(tmp_path / "sweep" / "0.5" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in single.items())
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0.1", "0.2", "0.5"]


@pytest.mark.parametrize("how", BREAK)
def test_a_run_goes_on_without_stderr(how, run_fresh, flags, tmp_path):
    done = run_fresh(*flags, "--save_model", tmp_path / "result", before=STDERR[how])
    assert (done.code, done.err) == (0, "") and "sparsity" in done.out
    assert (tmp_path / "result" / "model.safetensors").exists()


def test_a_progress_bar_that_cannot_be_drawn_stops_nothing(run_fresh, flags):
    # The terminal is there when the bar asks, and gone when it draws.
    drawn = "from lib import terminal; terminal.watched = terminal.Lenient.isatty = lambda *_: True\n"
    done = run_fresh(*flags, before=drawn)
    assert done.code == 0 and "scoring" in done.err
    done = run_fresh(*flags, before=drawn + STDERR["a pipe nobody reads"])
    assert done.code == 0 and "sparsity" in done.out


@pytest.mark.parametrize("how", ["full", "a pipe nobody reads"])
def test_a_result_that_is_not_saved_is_shown_on_stderr_where_stdout_takes_nothing(how, run_fresh, flags):
    done = run_fresh(*flags, before=STDOUT[how])
    assert done.code == 0 and done.err.count("sparsity") == 1 and "Traceback" not in done.err


def test_a_result_that_is_neither_saved_nor_shown_is_a_failure(run_fresh, flags):
    assert run_fresh(*flags, before=f"{STDOUT['full']}\n{STDERR['full']}").code == 1


def test_an_error_is_an_exit_code_where_nothing_can_be_said(run_fresh, flags):
    for how in BREAK:
        done = run_fresh(*flags, "--nsamples", 0, before=f"{STDOUT[how]}\n{STDERR[how]}")
        assert (done.code, done.out, done.err) == (2, "", "")


def test_characters_that_the_terminal_lacks_become_escapes(run_fresh, flags, tmp_path):
    name = tmp_path / "éclair\u202e\x1b[31m"
    ascii_only = "import io; sys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False), encoding='ascii')"
    done = run_fresh(*flags, "--save_model", name, before=ascii_only)
    assert done.code == 0 and r"\xe9clair\u202e\x1b[31m" in done.out and name.exists()


def test_lines_keep_to_themselves_and_long_values_lose_their_middle():
    assert terminal.printable("a\nb\x1b\x85\u2028\udcff ü中") == r"a\nb\x1b\x85\u2028\udcff ü中"
    assert terminal.shortened("short and sweet") == "short and sweet"
    word = terminal.shortened("--seed " + "1" * 150 + "2" * 5000 + "3" * 150 + ": wrong")
    assert word.startswith("--seed 111") and word.endswith("333: wrong") and len(word) < 220
    assert len(terminal.shortened("ab " * 5000)) <= terminal.LONGEST_LINE


# --- signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("where", ["torch.autograd.grad", "transformers.PreTrainedModel.save_pretrained"])
def test_a_signal_ends_a_run_as_ctrl_c_does(where, number, code, run_cli, flags, tmp_path, monkeypatch):
    before = files_below(tmp_path)
    monkeypatch.setattr(where, lambda *_, **__: os.kill(os.getpid(), number))
    done = run_cli(*flags, "--save_model", tmp_path / "result")
    assert (done.code, done.out, done.err) == (code, "", "interrupted: nothing was left half-written\n")
    assert files_below(tmp_path) == before
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored(run_cli, flags, monkeypatch):
    from lib import prune

    select = prune.select
    monkeypatch.setattr(prune, "select", lambda *a, **k: (os.kill(os.getpid(), signal.SIGHUP), select(*a, **k))[1])
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        done = run_cli(*flags)
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert (done.code, done.err) == (0, "") and "sparsity" in done.out


def test_what_a_second_interrupt_left_behind_is_named(run_cli, flags, monkeypatch):
    def interrupted_twice(*args, **kwargs):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("left behind: /some/where") from None

    monkeypatch.setattr(torch.autograd, "grad", interrupted_twice)
    done = run_cli(*flags)
    assert (done.code, done.out, done.err) == (143, "", "interrupted: left behind: /some/where\n")


# --- memory -----------------------------------------------------------------------------------------

TOO_LITTLE = {
    "python": MemoryError(),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                          "you tried to allocate 64 bytes. Error code 12 (Cannot allocate memory)"),
    "c++": RuntimeError("std::bad_alloc"),
    "mapping": OSError(12, "Cannot allocate memory"),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB free."),
}  # fmt: skip
PHASES = {
    "load": ("lib.offload.Resources.place", ["--dtype"]),
    "calibrate": ("lib.data.text_ids", ["--nsamples"]),
    "score": ("torch.autograd.grad", ["--batch_size", "--seqlen", "--offload"]),
    "prune": ("lib.prune.select", ["--offload"]),
    "compensate": ("lib.compensate.compensate", ["--nsamples", "--compensate bias"]),
    "evaluate": ("lib.evaluate.speed", ["--eval_seqlen"]),
    "report": ("lib.report.pictures", ["--report"]),
    "save": ("lib.checkpoint.save", ["--save_format"]),
    "verify": ("lib.checkpoint.load_folder", ["--no_verify"]),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", TOO_LITTLE)
def test_memory_that_runs_out_names_the_phase_and_what_to_lower(kind, phase, run_cli, flags, tmp_path, monkeypatch):
    where, saying = PHASES[phase]
    if kind not in ("python", "gpu") and phase not in ("load", "score", "verify"):
        pytest.skip("the other kinds are told apart in one place")

    def fail(*args, **kwargs):
        raise TOO_LITTLE[kind]

    monkeypatch.setattr(where, fail)
    more = ["--eval_speed"] if phase == "evaluate" else ["--compensate", "ridge", "--report"]
    done = run_cli(*flags, *more, "--save_model", tmp_path / "result", "--scores", tmp_path / "scores")
    assert done.code == 2 and done.err.startswith(f"error: out of memory in the phase '{phase}'"), done.err
    assert done.err.count("\n") == 1 and all(words in done.err for words in saying)
    assert (f"kept in {tmp_path / 'scores'}" in done.err) == (phase not in ("load", "calibrate", "evaluate"))
    assert not (tmp_path / "result").exists()


def test_what_was_scored_before_memory_ran_out_is_gone_on_with(run_cli, flags, tmp_path, monkeypatch):
    flags = [*flags, "--save_model", tmp_path / "result", "--scores", tmp_path / "scores"]
    with monkeypatch.context() as patch:
        patch.setattr("lib.checkpoint.load_folder", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert run_cli(*flags).code == 2
    done = run_cli(*flags)
    assert done.code == 0 and "not computed again" in done.out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_a_real_lack_of_memory_is_one_line(run_fresh, flags, tmp_path):
    limited = """
import resource, torch
size = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
grad = torch.autograd.grad
torch.autograd.grad = lambda *args, **more: (torch.empty(2**36), grad(*args, **more))[1]
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
"""
    done = run_fresh(*flags, "--save_model", tmp_path / "result", before=limited)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert "phase 'score'" in done.err and "can't allocate memory" in done.err


@pytest.mark.parametrize("text", ["the file 'Cannot allocate memory.txt' is damaged", "no memory of it"])
def test_an_error_that_only_speaks_of_memory_is_not_taken_for_the_lack_of_it(text):
    assert not errors.is_out_of_memory(errors.UserError(text))
    assert not errors.is_out_of_memory(RuntimeError("shapes differ"))


# --- the rights of another user ---------------------------------------------------------------------


@pytest.fixture
def as_nobody(run_fresh, tiny_model, flags):
    """`as_nobody(flag, name)`: run as a user who owns nothing, with `flag` naming `name` in a folder of another's."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)
        for file in Path(shutil.copytree(tiny_model("llama"), f"{home}/model")).iterdir():
            file.chmod(0o644)
        shutil.copy(flags[3], f"{home}/own.txt")
        (Path(home) / "locked").mkdir(mode=0o700)
        own = [*flags, "--model", f"{home}/model", "--dataset", f"{home}/own.txt"]

        def run(*more, locking=None):
            if locking:
                (Path(home) / "model" / locking).chmod(0o600)
            become = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
            environment = {"HF_HOME": f"{home}/hf", "TMPDIR": home, "HOME": home}
            return run_fresh(*own, *(str(m).format(home=home) for m in more), cwd=Path(home), before=become,
                             env=environment)  # fmt: skip

        yield run


@pytest.mark.parametrize(
    "more",
    [
        ["--model", "{home}/locked"],
        ["--model", "{home}/locked/model"],
        ["--dataset", "{home}/locked/own.txt"],
        ["--scores", "{home}/locked/scores"],
        ["--save_model", "{home}/locked/result"],
        ["--save_model", "{home}/locked", "--overwrite"],
        ["--data_dir", "{home}/locked", "--dataset", "wikitext2"],
        ["--data_dir", "{home}/locked/data", "--dataset", "wikitext2"],
        ["--cache_dir", "{home}/locked/cache"],
        ["--image_dir", "{home}/locked/images", "--prune_method", "structured_afr_llava", "--dataset", "llava"],
    ],
)
def test_a_folder_one_may_not_enter_is_named_with_its_flag(more, as_nobody):
    done = as_nobody(*more)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert done.err.startswith(f"error: {more[0]} /") and "Permission denied" in done.err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_of_a_model_that_one_may_not_read_is_named(name, as_nobody):
    assert as_nobody().code == 0
    done = as_nobody("--model", "{home}/model", locking=name)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert f"/model/{name} may not be read (Permission denied)" in done.err


# --- any other error of the system ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, line",
    [
        (PermissionError(13, "Permission denied", "/some/file"), "/some/file: Permission denied"),
        (OSError("no more"), "OSError: no more"),
        (ModuleNotFoundError("No module named 'tqdm'", name="tqdm"), "'tqdm' is not installed: pip install"),
    ],
)
def test_an_error_that_nobody_foresaw_but_no_bug_is_one_line(error, line, run_cli, flags, monkeypatch):
    monkeypatch.setattr("lib.prune.sum_shapes", lambda *_: (_ for _ in ()).throw(error))
    done = run_cli(*flags)
    assert done.code == 2 and done.err.startswith("error: ") and line in done.err and done.err.count("\n") == 1


def test_a_bug_keeps_its_traceback(run_cli, flags, monkeypatch):
    monkeypatch.setattr("lib.prune.sum_shapes", lambda *_: {}["no such shape"])
    with pytest.raises(KeyError):
        run_cli(*flags)


# --- numbers and names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, value, saying",
    [
        ("--max_memory", "inf", "at most"),
        ("--max_memory", "1e300", "at most"),
        ("--max_memory", "1e309", "at most"),
        ("--max_memory", "nan", "more than 0"),
        ("--max_memory", "-1", "more than 0"),
        ("--seed", 2**63, "at most 4294967295"),
        ("--seed", 2**64, "at most 4294967295"),
        ("--seed", "9" * 5000, "--seed: invalid int value"),
        ("--nsamples", 10**30, "at most"),
        ("--seqlen", 10**12, "at most"),
        ("--batch_size", 10**30, "at most"),
        ("--align", 10**12, "at most"),
        ("--rounds", 10**30, "at most"),
        ("--rounds", 1000, "at most 28"),  # 20% of 144 neurons
        ("--eval_windows", 10**30, "at most"),
        ("--eval_seqlen", 10**12, "at most"),
        ("--pruning_ratio", "0.1,,0.2", "--pruning_ratio 0.1,,0.2"),
        ("--pruning_ratio", "0.1,0.10", "twice"),
        ("--pruning_ratio", "", "expected a number"),
        ("--nsamples", "", "--nsamples"),
    ],
)
def test_a_number_out_of_any_range_is_refused(flag, value, saying, refused):
    assert flag in refused(flag, value, saying=[saying])


def test_the_greatest_seed_works_wherever_seeds_are_derived_from_it(run_cli, flags):
    for more in (["structured_random"], ["structured_afr", "--neuron_score", "token_fisher"],
                 ["structured_snip", "--dataset", "self_generated", "--eval_ppl", "--eval_windows", 1]):  # fmt: skip
        assert run_cli(*flags, "--seed", 2**32 - 1, "--prune_method", *more).code == 0


def test_too_wide_an_align_is_refused_before_scoring(refused, monkeypatch):
    monkeypatch.setattr("lib.prune.score", lambda *_, **__: pytest.fail("was scored"))
    refused("--align", 49, saying=["--align 49", "48"])


PATHS = ["--model", "--dataset", "--data_dir", "--cache_dir", "--image_dir", "--scores", "--save_model"]


@pytest.mark.parametrize("flag", PATHS)
@pytest.mark.parametrize(
    "value, saying",
    [("", "is empty"), (" ", "is empty"), ("n" * 300, "name too long"), ("/".join(["n" * 200] * 30), "name too long"),
     ("a\udcffb", "UTF-8"), ("a\0b", "no name")],
)  # fmt: skip
def test_a_name_that_nothing_can_have_is_refused(flag, value, saying, refused):
    line = refused(flag, value)
    assert line.startswith(f"error: {flag} ") and saying in line.replace("File name", "name")


def test_a_score_file_whose_temporary_names_would_be_too_long_is_refused(refused):
    refused("--scores", "n" * 250, saying=["--scores nnn", "too long"])


@pytest.mark.parametrize("flag", ["--model", "--dataset", "--pruning_ratio", "--prune_method", "--seed"])
def test_control_characters_stay_out_of_messages(flag, refused):
    assert r"a\nb\x1b[31m" in refused(flag, "a\nb\x1b[31m").replace("\\\\", "\\")


def test_a_tilde_that_the_shell_left_is_the_home_folder(run_cli, flags, tiny_model, data_dir, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "model").symlink_to(tiny_model("llama"))
    (home / "data").symlink_to(data_dir)
    done = run_cli(*flags, "--model", "~/model", "--data_dir", "~/data", "--dataset", "wikitext2", "--scores", "~/s",
                   "--save_model", "~/result", env={"HOME": str(home)})  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert sorted(p.name for p in home.iterdir()) == ["data", "model", "result", "s"]
    assert not (tmp_path / "~").exists()


# --- configurations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", -32),
        ("intermediate_size", -1),
        ("intermediate_size", 0),
        ("head_dim", -8),
        ("head_dim", 0),
        ("num_key_value_heads", 0),
        ("hidden_act", "nope"),
        ("rope_parameters", {"rope_type": "nope"}),
        ("pad_token_id", 10**6),
        ("architectures", 5),
        ("architectures", [5]),
        ("pruned_mlp", 5),
        ("pruned_mlp", {"field": "x"}),
        ("per_layer_config", {"0": {"intermediate_size": 7}}),
        ("per_layer_config", {"0": 5}),
        ("per_layer_config", 5),
        ("max_position_embeddings", -5),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 1),
        ("max_position_embeddings", "x"),
        ("max_position_embeddings", 1e9),
        ("max_position_embeddings", float("nan")),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("text_config", {"num_hidden_layers": 10**9}),
        ("vocab_size", 10**12),
        ("vocab_size", 10**30),
        ("num_labels", 10**9),
        ("sub_configs", 5),
    ],
)
def test_a_configuration_of_no_model_is_refused(field, value, refused, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    special = {("vocab_size", 10**12): "in the phase 'load'", ("num_hidden_layers", 0): "no MLP was recognised"}
    known = isinstance(value, int) and special.get((field, value))
    refused("--model", folder, saying=[known or f"--model {folder}"])


def test_a_configuration_that_asks_for_tuples_changes_nothing(run_cli, flags, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "tuples")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    assert run_cli(*flags, "--model", folder, "--save_model", tmp_path / "result").code == 0


# --- processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, saying",
    [
        ({"RANK": "first"}, "RANK first: must be a number"),
        ({"RANK": "1"}, "RANK 1: must be less than WORLD_SIZE, 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2: must be less than"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cannot meet"),
    ],
)
def test_an_environment_of_processes_that_are_none_is_one_line(env, saying, refused, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    refused(saying=[saying, "torchrun"], env=env)


FAILING = """
import os, sys
import main
from lib import score
from lib.errors import UserError
walk = score._walk_layer
def fail(*args, **more):
    if os.environ["RANK"] == "1":
        raise UserError("seven herons")
    return walk(*args, **more)
score._walk_layer = fail
sys.exit(main.main())
"""


def test_a_process_that_fails_says_so_and_ends_the_others(flags, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "failing.py"]
    done = subprocess.run([*launch, *map(str, flags), "--save_model", "two"], cwd=tmp_path, env=fresh_environment(),
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "interrupted"))]
    assert lines == ["error: process 1: seven herons"], done.stderr
    assert str(ROOT / "main.py") not in done.stderr  # no traceback of ours; torchrun prints one of its own
    assert done.returncode != 0 and done.stdout == "" and not (tmp_path / "two").exists()
