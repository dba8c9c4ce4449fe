"""The folder of a result: nothing else is lost, and whatever happens a complete result, old or new, stands there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT, files_below
from transformers import dynamic_module_utils

from lib import filesystem, locks, options, target
from lib.errors import UserError

RECORD = {"arguments": {}, "sparsity": {}, "files": ["model.safetensors", "pruning.json", "sub/part"]}


def fill(folder: Path, text: str, record: dict = RECORD) -> Path:
    """Write what stands for a result, in which every file holds `text`."""
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "sub" / "part").write_text(text)
    (folder / "pruning.json").write_text(json.dumps(record | {"text": text}))
    return folder


def text_of(folder: Path) -> str | None:
    """What all files of a complete result hold; None for no folder, or one that is not complete."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if {name for name in names if "afr-st" not in name and name != ".result.lock"} != set(RECORD["files"]):
        return None
    texts = {(folder / "model.safetensors").read_text(), (folder / "sub" / "part").read_text(),
             json.loads((folder / "pruning.json").read_text())["text"]}  # fmt: skip
    return texts.pop() if len(texts) == 1 else None


def put(folder: Path, text: str, overwrite: bool = True, meanwhile=lambda: None) -> str:
    """Put a result, while `meanwhile` happens."""
    with target.reserve(str(folder), overwrite) as place:
        meanwhile()
        with place.writing() as partial:
            shutil.rmtree(partial)
            fill(partial, text)
            return place.put(partial)


# --- what may be replaced ---------------------------------------------------------------------------


def test_a_result_is_replaced_as_a_whole(tmp_path):
    fill(tmp_path / "result", "old", RECORD | {"files": [*RECORD["files"], "model.bin"]})
    (tmp_path / "result" / "model.bin").write_text("old")
    assert put(tmp_path / "result", "new") == str(tmp_path / "result")
    assert text_of(tmp_path / "result") == "new"
    assert os.listdir(tmp_path) == ["result"]


def refused(folder: Path, saying: str, overwrite: bool = True) -> None:
    before = files_below(folder.parent)
    with pytest.raises(UserError, match=saying) as caught, target.reserve(str(folder), overwrite):
        pass
    assert "\n" not in str(caught.value)
    assert files_below(folder.parent) == before


@pytest.mark.parametrize("files", [
    {"thesis.tex": "years"},
    {"config.json": "{}", "model.safetensors": "weights"},  # a model that somebody else made
    {"pruning.json": '{"rate": 3}'},
    {"pruning.json": "[]"},
    {"0.1/pruning.json": json.dumps(RECORD), "0.5/pruning.json": json.dumps(RECORD)},  # a sweep
])  # fmt: skip
def test_no_other_folder_is_replaced(files, tmp_path):
    for name, text in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(text)
    refused(tmp_path / "folder", "no result of this tool")


@pytest.mark.parametrize("name", ["notes.txt", "lora/adapter.safetensors", "sub/mine", "empty/"])
def test_a_result_that_holds_something_of_the_users_is_not_replaced(name, tmp_path):
    extra = fill(tmp_path / "result", "old") / name
    extra.parent.mkdir(exist_ok=True)
    extra.mkdir() if name.endswith("/") else extra.write_text("mine")
    refused(tmp_path / "result", f"holds '{name.split('/')[0]}")


@pytest.mark.parametrize("name, refuse", [("merges.txt", False), ("notes.txt", True), ("model-notes.txt", True)])
def test_a_result_whose_record_lists_no_files_is_known_by_their_names(name, refuse, tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "pruning.json").write_text(json.dumps({"arguments": {}, "sparsity": {}}))
    (folder / name).write_text("old")
    if refuse:
        refused(folder, f"holds '{name}'")
    else:
        put(folder, "new")
        assert text_of(folder) == "new"


def test_a_result_is_replaced_only_when_told_to(tmp_path):
    fill(tmp_path / "result", "old")
    refused(tmp_path / "result", "not empty.*--overwrite", overwrite=False)


def test_what_file_systems_put_into_a_folder_does_not_count(tmp_path):
    (tmp_path / "result" / "lost+found").mkdir(parents=True)
    put(tmp_path / "result", "new", overwrite=False)
    assert (tmp_path / "result" / "model.safetensors").read_text() == "new"


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A working directory with a model, data, scores and results; home and caches are in it too."""
    for name in ("work", "home", "hub", "model", "data/wikitext2", "temporary", "blobs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "blobs" / "weights").write_text("")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blobs" / "weights")
    for name in ("model.gguf", "own.txt", "own.json", "scores"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


MODEL = ["--model", "../model"]
PRECIOUS = {
    "the model": ("model", MODEL),
    "the model's folder": (".", ["--model", "../model"]),
    "a gguf file's folder": (".", ["--model", "../model.gguf"]),
    "linked weights": ("blobs", MODEL),
    "a file of data": (".", [*MODEL, "--dataset", "../own.txt"]),
    "images": ("images", [*MODEL, "--dataset", "../own.json", "--prune_method", "structured_afr_llava"]),
    "other images": ("pictures", [*MODEL, "--dataset", "../own.json", "--prune_method", "structured_afr_llava",
                                  "--image_dir", "../pictures"]),
    "data": ("data", [*MODEL, "--data_dir", "../data"]),
    "a data set": ("data/wikitext2", [*MODEL, "--data_dir", "../data"]),
    "data that are yet to come": ("new", [*MODEL, "--data_dir", "../new/data"]),
    "scores": (".", [*MODEL, "--scores", "../scores"]),
    "scores that are yet to come": ("new", [*MODEL, "--scores", "../new/scores"]),
    "the Hub's models": ("hub", [*MODEL, "--cache_dir", "../hub"]),
    "the working directory": ("work", MODEL),
    "home": ("home", MODEL),
    "temporary files": ("temporary", MODEL),
    "the program": (ROOT, MODEL),
    "everything": ("/", MODEL),
}  # fmt: skip


@pytest.mark.parametrize("ways", ["plain", "dots", "link", "sweep", "overwrite"])
@pytest.mark.parametrize("what", PRECIOUS)
def test_no_result_takes_the_place_of_what_a_run_needs(what, ways, workplace):
    place, flags = PRECIOUS[what]
    folder = workplace / place
    if ways == "dots":
        folder = workplace / "hub" / ".." / "work" / ".." / place
    elif ways == "link":
        (workplace / "work" / "link").symlink_to(folder)
        folder = workplace / "work" / "link"
    elif ways == "sweep":
        if folder.name in ("", ROOT.name) or not folder.is_dir():
            pytest.skip("its name is no ratio")
        # The folder is found under the name of a ratio.
        (workplace / "results").mkdir()
        (workplace / "results" / "0.25").symlink_to(folder)
        folder = workplace / "results"
    elif ways == "overwrite" and what == "the model":
        (folder / "pruning.json").write_text(json.dumps(RECORD | {"files": os.listdir(folder) + ["pruning.json"]}))
    args = options.parse([*flags, "--save_model", str(folder), *(["--overwrite"] if ways != "plain" else [])])
    before = sorted(workplace.rglob("*"))
    ratios = [0.25, 0.5] if ways == "sweep" else [0.25]
    with pytest.raises(UserError, match="(is|holds) .*a result would take its place"):
        with target.reserved(args, ratios):
            pass
    assert sorted(workplace.rglob("*")) == before


def test_a_result_may_stand_inside_all_of_these(workplace):
    for place in ("model/pruned", "data/mine", "work/result", "home/result", "hub/result", "temporary/result"):
        args = options.parse([*MODEL, "--data_dir", "../data", "--cache_dir", "../hub", "--save_model",
                              str(workplace / place)])  # fmt: skip
        with target.reserved(args, [0.5]):
            pass


def test_the_model_survives_overwrite(run_cli, tiny_model, tmp_path):
    """The folder above a model, and a sweep one of whose folders is the model."""
    shutil.copytree(tiny_model("llama"), tmp_path / "models" / "0.1")
    before = files_below(tmp_path)
    model = ["--model", tmp_path / "models" / "0.1", "--save_model", tmp_path / "models", "--overwrite"]
    for ratios in ("0.5", "0.1,0.5"):
        done = run_cli(*model, "--pruning_ratio", ratios)
        assert done.code == 2 and done.err.count("\n") == 1 and "the model (--model" in done.err
        assert files_below(tmp_path) == before


# --- what appears while a run works -----------------------------------------------------------------


def test_what_appears_in_the_target_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "result"

    def appear():
        folder.mkdir()
        (folder / "precious.txt").write_text("mine")

    assert put(folder, "new", overwrite=False, meanwhile=appear) == str(tmp_path / "result-1")
    assert text_of(tmp_path / "result-1") == "new"
    assert (folder / "precious.txt").read_text() == "mine" and len(os.listdir(folder)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "'precious.txt' appeared" in err and str(tmp_path / "result-1") in err


def test_not_even_overwrite_deletes_what_appears(tmp_path):
    folder = fill(tmp_path / "result", "old")
    (tmp_path / "result-1").mkdir()
    assert put(folder, "new", meanwhile=lambda: (folder / "notes.txt").write_text("mine")) == f"{folder}-2"
    assert put(tmp_path / "other", "new", meanwhile=lambda: fill(tmp_path / "other", "theirs")).endswith("other-1")
    assert (folder / "notes.txt").exists() and text_of(tmp_path / "other") == "theirs"
    assert text_of(tmp_path / "result-2") == text_of(tmp_path / "other-1") == "new"


def test_a_changed_file_of_an_old_result_is_one_that_appeared(tmp_path):
    folder = fill(tmp_path / "result", "old")
    put(folder, "new", meanwhile=lambda: (folder / "model.safetensors").write_text("fine-tuned"))
    assert (folder / "model.safetensors").read_text() == "fine-tuned"
    assert text_of(tmp_path / "result-1") == "new"


def test_parents_that_are_deleted_meanwhile_are_made_again(tmp_path):
    folder = tmp_path / "new" / "result"
    assert put(folder, "new", meanwhile=lambda: shutil.rmtree(tmp_path / "new")) == str(folder)
    assert text_of(folder) == "new"


@pytest.fixture
def command(tiny_model, data_dir) -> list:
    """The flags of a short run."""
    return ["--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 2, "--seqlen", 32, "--dtype",
            "float32", "--pruning_ratio", 0.25]  # fmt: skip


def test_a_run_says_where_its_result_is(run_cli, command, tmp_path, monkeypatch):
    from lib import prune

    score = prune.score

    def appear(*args, **more):
        (tmp_path / "result").mkdir(exist_ok=True)
        (tmp_path / "result" / "precious.txt").write_text("mine")
        return score(*args, **more)

    monkeypatch.setattr(prune, "score", appear)
    done = run_cli(*command, "--save_model", "result")
    assert done.code == 0, done.err
    assert "saved        result-1  (" in done.out and "PRUNED=result-1 " in done.out
    assert done.err.count("\n") == 1 and done.err.startswith("note: ") and "precious.txt" in done.err
    report = json.loads((tmp_path / "result-1" / "pruning.json").read_text())
    assert report["arguments"]["save_model"] == "result-1"
    assert set(report["files"]) == set(os.listdir(tmp_path / "result-1"))
    assert os.listdir(tmp_path / "result") == ["precious.txt"]


# --- one run at a time ------------------------------------------------------------------------------


def test_the_second_run_with_a_target_is_told_who_is_at_work(run_cli, command, tmp_path):
    with target.reserve(str(tmp_path / "result")):
        before = files_below(tmp_path)
        done = run_cli("--model", "nowhere", "--save_model", "../" + tmp_path.name + "/result")
        assert done.code == 2 and done.err.count("\n") == 1
        assert f"process {os.getpid()} on " in done.err and "another run" in done.err
        assert files_below(tmp_path) == before
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_neither_lock_nor_parents(tmp_path):
    with pytest.raises(ZeroDivisionError), target.reserve(str(tmp_path / "new" / "deep" / "result")) as place:
        assert locks.lock_file(place.path).exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


# --- where it can be --------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_link_leads_to_the_folder_behind_it(there, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big" / "result")
    if there:
        (tmp_path / "big" / "result").mkdir()
    put(tmp_path / "link", "old")
    put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert text_of(tmp_path / "big" / "result") == "new"
    assert os.listdir(tmp_path / "big") == ["result"]


def test_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(UserError, match="--save_model"), target.reserve(str(tmp_path / "link")):
        pass
    assert os.listdir(tmp_path) == ["link"]


@contextmanager
def mounted(folder: Path, *arguments: str):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, folder], capture_output=True)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="nothing can be mounted here")
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_filled(kind, tmp_path):
    (tmp_path / "behind").mkdir()
    arguments = ["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(tmp_path / "behind")]
    folder = tmp_path / "mount point"
    with mounted(folder, *arguments):
        put(folder, "old")
        assert put(folder, "new") == str(folder)
        assert text_of(folder) == "new" and filesystem.is_mount(folder)
        assert put(folder, "newer", meanwhile=lambda: (folder / "notes").touch()) == str(folder / "mount point-1")
        assert text_of(folder / "mount point-1") == "newer"
    assert sorted(os.listdir(tmp_path)) == ["behind", "mount point"]


def as_nobody(act) -> bool:
    """Whether `act` succeeds for a user without rights."""
    child = os.fork()
    if not child:
        with suppress(BaseException):
            os.setgroups([])
            os.setuid(65534)
            act()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_folder_of_ones_own_in_a_folder_of_others_is_filled(tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        parent.chmod(0o755)
        (parent / "mine").mkdir()
        os.chown(parent / "mine", 65534, 65534)
        assert as_nobody(lambda: put(parent / "mine", "old"))
        assert as_nobody(lambda: put(parent / "mine", "new"))
        assert text_of(parent / "mine") == "new" and os.listdir(parent) == ["mine"]
        parent.chmod(0o1777)  # as /tmp: only the owner of a folder may rename it
        (parent / "theirs").mkdir()
        (parent / "theirs").chmod(0o777)
        assert as_nobody(lambda: put(parent / "theirs", "new"))
        assert text_of(parent / "theirs") == "new"
        fill(parent / "closed", "old")
        assert as_nobody(lambda: pytest.raises(UserError, target.reserve(str(parent / "closed"), True).__enter__))


def test_a_target_that_cannot_be_replaced_after_all_loses_nothing(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "result", "old")

    def busy(one, other):
        raise OSError(16, os.strerror(16))

    monkeypatch.setattr(filesystem, "exchange", busy)
    assert put(tmp_path / "result", "new") == str(tmp_path / "result-1")
    assert text_of(tmp_path / "result") == "old" and text_of(tmp_path / "result-1") == "new"
    assert "cannot be replaced" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["result", "result-1"]


def test_an_old_result_that_cannot_be_removed_is_named_once(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "result", "old")
    monkeypatch.setattr("lib.target.shutil.rmtree", lambda folder, **more: None)
    with target.reserve(str(tmp_path / "result"), True) as place, place.writing() as partial:
        place.put(fill(partial / "new", "new"))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / ".result.afr-st-partial") in err


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127])
def test_a_name_may_be_as_long_as_the_file_system_takes(name, tmp_path):
    put(tmp_path / name, "old")
    put(tmp_path / name, "new")
    assert text_of(tmp_path / name) == "new" and os.listdir(tmp_path) == [name]
    place = Path(put(tmp_path / name, "newer", meanwhile=lambda: (tmp_path / name / "x").touch()))
    assert text_of(place) == "newer"


@pytest.mark.parametrize("name", ["n" * 256, "new/" + "n" * 256, "n" * 5000, "n/" * 3000])
def test_a_name_that_is_too_long_is_refused(name, tmp_path):
    refused(tmp_path / "x" / name, "--save_model .*too long") if "/" not in name else None
    with pytest.raises(UserError, match="too long") as caught, target.reserve(str(tmp_path / name)):
        pass
    assert len(str(caught.value)) < 900 and not list(tmp_path.iterdir())


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    refused(tmp_path / os.fsdecode(b"r\xe9sult"), "UTF-8")


def test_a_folder_that_is_replaced_hands_its_permissions_on(tmp_path):
    (tmp_path / "result").mkdir(mode=0o700)
    put(tmp_path / "result", "old")
    put(tmp_path / "result", "new")
    assert (tmp_path / "result").stat().st_mode & 0o777 == 0o700


def test_an_unwritable_cache_of_modules_does_not_matter(run_cli, command, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", "/proc/nowhere/modules")
    path = list(sys.path)
    done = run_cli(*command, "--save_model", "result", "--global_pruning")
    assert done.code == 0 and done.out.count("loaded back, same logits") == 1, done.err
    assert (tmp_path / "result" / "modeling_pruned.py").exists()
    assert sys.path == path and dynamic_module_utils.HF_MODULES_CACHE == "/proc/nowhere/modules"


# --- disks that are too full ------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--save_format", "hf"], ["--save_format", "both"], ["--prune_method", "afr"],
                                  ["--pruning_ratio", "0.5,0.25"], ["--dtype", "bfloat16"]])  # fmt: skip
def test_a_result_that_is_sure_not_to_fit_is_refused_before_scoring(more, run_cli, command, tmp_path, monkeypatch):
    done = run_cli(*command, *more, "--save_model", "result")
    size = sum(path.stat().st_size for path in tmp_path.rglob("model.*"))
    shutil.rmtree(tmp_path / "result")
    estimates = []
    monkeypatch.setattr(target, "refuse_full_disks", lambda needed: estimates.append(sum(needed.values())))
    assert run_cli(*command, *more, "--save_model", "result").code == 0
    assert 0.75 * size < estimates[0] <= size  # files have headers too, which are large beside a tiny model
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "result")
    monkeypatch.setattr(filesystem, "free_bytes", lambda folder: estimates[0] - 1)
    monkeypatch.setattr("lib.prune.score", None)
    done = run_cli(*command, *more, "--save_model", "result")
    assert done.code == 2 and done.err.count("\n") == 1 and "GiB free" in done.err
    assert not list(tmp_path.iterdir())


def test_what_is_replaced_makes_room_for_the_next(tmp_path, monkeypatch):
    def needs(*sizes):
        with target.reserve(str(tmp_path / "a"), True) as one, target.reserve(str(tmp_path / "b"), True) as two:
            target.refuse_full_disks(dict(zip((one, two), sizes)))

    for name in "ab":
        fill(tmp_path / name, "o" * 1000)
    monkeypatch.setattr(filesystem, "free_bytes", lambda folder: 2500)
    needs(2400, 2400)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match="with those before it"):
        needs(2400, 101)
    with pytest.raises(UserError, match="GiB free"):
        needs(2501, 1)


# --- kills and interrupts ---------------------------------------------------------------------------

STEPS = ("rename", "replace", "mkdir", "rmdir", "unlink")
HOW = ["exchange", "moves", "inside", "absent", "empty"]


def prepare(folder: Path, how: str, monkeypatch) -> None:
    """A folder whose old result is replaced in one of the ways there are, or that is not there yet."""
    if how == "empty":
        folder.mkdir(parents=True)
    elif how != "absent":
        fill(folder, "old")
    monkeypatch.setattr(filesystem, "exchange", exchange if how == "exchange" else lambda one, other: False)
    monkeypatch.setattr(filesystem, "is_mount", lambda path: how == "inside" and path == folder)


exchange = filesystem.exchange


@contextmanager
def acting_at(steps: set[int], act, monkeypatch):
    """Call `act` before those of the changes of the disk, counted from 1; gives the list of all that were made."""
    made = []

    def counted(function):
        def call(*args, **more):
            made.append(function.__name__)
            if len(made) in steps:
                act()
            return function(*args, **more)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(filesystem, "exchange", counted(filesystem.exchange))
        yield made


def killed_at(step: int, folder: Path, monkeypatch) -> bool:
    """Put a new result in a process that is killed before that change of the disk; False where it makes fewer."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    with suppress(BaseException), acting_at({step}, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch):
        put(folder, "new")
        os._exit(0)
    os._exit(1)


@pytest.mark.parametrize("how", HOW)
def test_a_run_killed_at_any_step_leaves_a_complete_result(how, tmp_path, monkeypatch, capsys):
    ways = set()
    for step in range(1, 200):
        folder = tmp_path / str(step) / "result"
        folder.parent.mkdir()
        prepare(folder, how, monkeypatch)
        if not killed_at(step, folder, monkeypatch):
            break
        at_once = text_of(folder)
        capsys.readouterr()
        with suppress(UserError), target.reserve(str(folder)):
            pass
        said = capsys.readouterr().err
        found = text_of(folder)
        assert found in ("old", "new") or (how in ("absent", "empty") and found is None), step
        assert at_once != "new" or found == "new"
        assert said.count("\n") <= 1
        if how == "exchange":
            assert at_once == found  # there never is a moment without one
        assert not hidden(folder)
        ways.add((found, said.split(": ")[-1][:8]))
    assert 10 < step < 199
    assert {found for found, _ in ways} == ({"old", "new"} if how not in ("absent", "empty") else {None, "new"})
    assert any(words for _, words in ways)


def hidden(folder: Path) -> list[str]:
    """The names that a run left beside a target, or in it."""
    places = [folder.parent, *([folder] if folder.exists() else [])]
    return [name for place in places for name in os.listdir(place) if name.startswith(".")]


@pytest.mark.parametrize("how, again", [(how, False) for how in HOW] + [("exchange", True), ("inside", True)])
def test_ctrl_c_at_any_step_leaves_a_complete_result_or_says_what_it_left(how, again, tmp_path, monkeypatch):
    seen = set()
    for step in range(1, 200):
        folder = tmp_path / str(step) / "result"
        folder.parent.mkdir()
        prepare(folder, how, monkeypatch)
        steps = {step, step + 1} if again else {step}
        with acting_at(steps, lambda: signal.raise_signal(signal.SIGINT), monkeypatch) as made:
            try:
                put(folder, "new")
                said = None
            except KeyboardInterrupt as interrupt:
                said = str(interrupt)
        if len(made) < step:
            break
        found = text_of(folder)
        complete = f"the result is complete in {folder}" in said
        assert found in ("old", "new") or (how in ("absent", "empty") and found is None), step
        assert found == "new" or not complete, (step, said)
        left = [name for name in hidden(folder) if "afr-st" in name]
        assert all(name in said for name in left), (step, said, left)
        seen.add((found, complete, bool(left)))
    assert 10 < step < 199 and ("new", True, again) in seen
    assert any(left for *_, left in seen) == again


def test_a_result_that_somebody_changed_after_a_kill_is_not_touched(tmp_path, capsys):
    """Killed while the old files move out: somebody puts a file there, then the next run comes."""
    folder = fill(tmp_path / "result", "old")
    (tmp_path / ".result.afr-st-old").mkdir()
    (folder / "sub").rename(tmp_path / ".result.afr-st-old" / "sub")
    fill(tmp_path / ".result.afr-st-complete", "new")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"), target.reserve(str(folder)):
        pass
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert text_of(folder) == "old" and text_of(tmp_path / "result-1") == "new"
    assert "result-1" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["result", "result-1"]


def test_signals_wait_until_names_are_exchanged():
    came = []
    own = signal.signal(signal.SIGTERM, lambda *_: came.append("handled"))
    try:
        with filesystem.uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)
            assert not came
        assert came == ["handled"]
    finally:
        signal.signal(signal.SIGTERM, own)
