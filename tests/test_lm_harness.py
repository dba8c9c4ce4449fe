"""lm-eval's shipped tasks, unmodified and without a network, on every saved form; test.sh as its users run it."""

import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lm_eval
import pytest
import torch
from conftest import ROOT, TINY_MODELS, fresh_environment, save_made_up_set
from lm_eval.api.registry import get_model, model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lib import lm_harness, offline_tasks, tasks
from lib.errors import UserError
from lib.lm_harness import CustomCheckpoint

TASKS = ["arc_easy", "hellaswag", "winogrande"]
LIMIT = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory, data_dir) -> Path:
    """A working directory in which lm-eval finds its sets."""
    folder = tmp_path_factory.mktemp("work")
    offline_tasks.prepare(data_dir, folder)
    return folder


@pytest.fixture
def prune(run_cli, tiny_model, data_dir, tmp_path):
    """`prune(family, *flags)` -> folder of a pruned tiny model, in both forms."""

    def run(family, *flags, to="result") -> Path:
        command = ["--model", tiny_model(family), "--data_dir", data_dir, "--dtype", "float32", "--nsamples", 2]
        command += ["--seqlen", 32, "--pruning_ratio", 0.4, "--save_format", "both", "--save_model", tmp_path / to]
        done = run_cli(*command, *flags)
        assert (done.code, done.err) == (0, "")
        return tmp_path / to

    return run


@pytest.fixture(scope="module")
def task_dict(work) -> dict:
    """The tasks as lm-eval ships them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        return TaskManager().load(TASKS)["tasks"]


def evaluate(model: str, task_dict: dict, **arguments) -> dict:
    """lm-eval's results in this process."""
    model = get_model(model)(batch_size=4, device="cpu", **arguments)
    return lm_eval.evaluate(lm=model, task_dict=task_dict, limit=LIMIT, bootstrap_iters=0)


def likelihoods(found: dict) -> dict[str, list[list[float]]]:
    """Per task and question, the log-likelihood of each choice."""
    return {
        name: [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
        for name, samples in found["samples"].items()
    }


FORMS = [
    *((family, ["--global_pruning"]) for family in TINY_MODELS),
    ("llama", []),
    ("llama", ["--prune_method", "afr"]),
]


@pytest.mark.parametrize("family, flags", FORMS, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_folder_and_model_bin_answer_alike(family, flags, prune, task_dict):
    folder = prune(family, *flags)
    remote = "--global_pruning" in flags
    as_folder = evaluate("hf", task_dict, pretrained=str(folder), trust_remote_code=remote)
    as_bin = evaluate("custom_checkpoint", task_dict, checkpoint=f"{folder}/model.bin")
    assert {name: len(samples) for name, samples in as_folder["samples"].items()} == dict.fromkeys(TASKS, LIMIT)
    assert likelihoods(as_bin) == likelihoods(as_folder)
    assert as_bin["results"].keys() == as_folder["results"].keys() == set(TASKS)
    for name in TASKS:
        assert as_bin["results"][name]["acc,none"] == as_folder["results"][name]["acc,none"]


# --- the model --------------------------------------------------------------------------------------


def test_the_base_model_gives_its_name_and_never_its_weights(prune):
    folder = prune("llama")
    model = CustomCheckpoint(pretrained="some-company/not-here", checkpoint=str(folder / "model.bin"), device="cpu")
    assert model.model.config.intermediate_size == 29
    assert model.tokenizer("herons").input_ids == AutoTokenizer.from_pretrained(folder)("herons").input_ids


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", torch.float16])
def test_dtype_is_that_of_every_weight(name, prune):
    model = CustomCheckpoint(checkpoint=str(prune("llama")), dtype=name, device_map="auto", device="cpu")
    wanted = getattr(torch, name) if isinstance(name, str) else name
    assert {weight.dtype for weight in model.model.parameters()} == {wanted}


@pytest.mark.parametrize("wanted", [True, False])
def test_add_bos_token_decides_how_a_text_begins(wanted, prune):
    model = CustomCheckpoint(checkpoint=str(prune("opt")), device="cpu", add_bos_token=wanted)
    ids = model.tok_encode("herons wait")
    assert (ids[0] == model.tokenizer.bos_token_id) == wanted


def test_an_automatic_batch_without_a_gpu_is_small(prune):
    model = CustomCheckpoint(checkpoint=str(prune("llama")), device="cpu", batch_size="auto")
    assert model._detect_batch_size() == lm_harness.CPU_BATCH


@pytest.mark.parametrize("arguments, saying", [
    ({}, "checkpoint="),
    ({"checkpoint": "nowhere/model.bin"}, "no such file"),
    ({"checkpoint": "{}", "peft": "adapter"}, "peft"),
    ({"checkpoint": "{}", "dtype": "int3"}, "dtype=int3"),
    ({"checkpoint": "{}", "device_map": "everywhere"}, "device_map=everywhere"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(arguments, saying, prune):
    folder = prune("llama") if "{}" in arguments.values() else ""
    with pytest.raises(UserError, match=saying) as caught:
        CustomCheckpoint(**{name: value.format(folder) for name, value in arguments.items()})
    assert "\n" not in str(caught.value)


def test_the_built_in_models_stay():
    assert {"hf", "vllm", "local-completions", "dummy"} <= set(model_registry.keys())
    assert get_model("hf") is HFLM
    assert get_model("custom_checkpoint") is CustomCheckpoint


# --- command lines ----------------------------------------------------------------------------------


@pytest.fixture
def harness(work):
    """`harness(*arguments)` runs lm-eval's command line with our model in a fresh process."""

    def run(*arguments, before=(), **more):
        command = [sys.executable, *before, "-m", "lib.lm_harness", *map(str, arguments)]
        environment = fresh_environment() | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(work / ".cache")}
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, **more)

    return run


def accuracy(folder: Path, task: str) -> float:
    return tasks.results(folder)["results"][task]["acc,none"]


def test_the_readmes_command_runs_and_under_accelerate_too(harness, prune, task_dict, tmp_path):
    folder = prune("llama", "--global_pruning")
    common = ["--model", "custom_checkpoint", "--model_args"]
    common += [f"pretrained=some-company/not-here,checkpoint={folder}/model.bin,device_map=auto,dtype=float32"]
    common += ["--tasks", "winogrande", "--batch_size", "auto", "--limit", LIMIT]
    done = harness(*common, "--output_path", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done = harness(*common, "--output_path", tmp_path / "two", before=["-m", "accelerate.commands.launch", "--cpu"])
    assert done.returncode == 0, done.stderr
    wanted = evaluate("hf", task_dict, pretrained=str(folder), trust_remote_code=True)
    assert accuracy(tmp_path / "one", "winogrande") == wanted["results"]["winogrande"]["acc,none"]
    assert accuracy(tmp_path / "two", "winogrande") == accuracy(tmp_path / "one", "winogrande")


class Hostile:
    """Unpickles to a program that leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_hostile_checkpoint_is_refused_in_one_line_and_trusted_on_demand(harness, tmp_path):
    torch.save({"model": Hostile(tmp_path / "ran"), "tokenizer": None}, tmp_path / "model.bin")
    command = ["--model", "custom_checkpoint", "--model_args", f"checkpoint={tmp_path}/model.bin"]
    command += ["--tasks", "winogrande", "--limit", 1]
    done = harness(*command)
    assert done.returncode == 2 and "system" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()
    harness(*command, "--trust_checkpoint")
    assert (tmp_path / "ran").exists()


def test_a_task_that_is_not_there_is_one_line(harness, prune):
    folder = prune("llama")
    done = harness("--model", "custom_checkpoint", "--model_args", f"checkpoint={folder}", "--tasks", "no_such_task")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no_such_task" in done.stderr.splitlines()[-1]


@pytest.fixture
def test_sh(data_dir, tmp_path):
    """`test_sh(NAME=value, ...)` runs the script with the environment of these tests."""

    def run(*arguments, **values):
        settings = {"VENV": sys.prefix, "OFFLINE": 1, "DATA_DIR": data_dir, "WORK_DIR": tmp_path / "work", "LIMIT": 8}
        settings |= {"TASKS": "winogrande,arc_easy", "OUT": tmp_path / "logs" / "pruned"} | values
        environment = fresh_environment() | {name: str(value) for name, value in settings.items()}
        return subprocess.run(["bash", ROOT / "test.sh", *arguments], env=environment, capture_output=True, text=True)

    return run


def test_test_sh_prints_dense_beside_pruned(test_sh, prune, tiny_model, tmp_path):
    folder, base = prune("llama", "--global_pruning", to="my result"), tiny_model("llama")
    done = test_sh(PRUNED=folder, BASE=base)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    found = {row[1].strip(): [float(cell) for cell in row[4:6]] for row in rows if row[3].strip() == "8"}
    dense = next((tmp_path / "logs").glob("dense-*"))
    for name, measure in (("winogrande", "acc"), ("arc_easy", "acc_norm")):
        values = [
            tasks.results(place)["results"][name][f"{measure},none"] for place in (dense, tmp_path / "logs/pruned")
        ]
        assert found[name] == pytest.approx(values, abs=1e-4)

    again = test_sh(PRUNED=folder, BASE=base, FORM="bin")
    assert again.returncode == 0, again.stderr
    assert "figures of" in again.stdout and "custom_checkpoint" in again.stdout
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]


def test_test_sh_asks_for_a_model(test_sh):
    done = test_sh()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "PRUNED=" in done.stderr


# --- what is wrong with a result shows before it is loaded --------------------------------------------


def edit(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def take_away(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("damage, saying", [
    (take_away("config.json"), "config.json"),
    (edit("config.json", lambda data: data[:50]), "damaged"),
    (take_away("model.safetensors"), "model.safetensors"),
    (edit("model.safetensors", lambda data: data[: len(data) // 2]), "cut short"),
    (edit("modeling_pruned.py", lambda data: data + b"\nprint('edited')\n"), "modeling_pruned.py"),
    (lambda folder: (folder / "more.py").write_text("print('more')"), "more.py"),
], ids=["no config", "half a config", "no weights", "half the weights", "edited code", "more code"])  # fmt: skip
def test_a_damaged_folder_is_one_line(damage, saying, prune, capfd):
    folder = prune("llama", "--global_pruning", "--save_format", "hf")
    assert tasks.main(["arguments", str(folder)]) == 0
    capfd.readouterr()
    damage(folder)
    assert tasks.main(["arguments", str(folder)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert str(folder) in err and saying in err


def test_a_folder_is_loaded_by_what_it_holds(prune, tmp_path):
    def kind(path, **more):
        found = tasks.arguments(str(path), **more)
        return found[1], found[3].split("=")[0], "trust_remote_code=True" in found[3]

    both = prune("llama", "--global_pruning")
    assert kind(both) == ("pruned_folder", "pretrained", False)
    assert kind(both, trust=True) == ("hf", "pretrained", True)
    assert kind(both, form="bin") == kind(both / "model.bin") == ("custom_checkpoint", "checkpoint", False)
    (both / "config.json").unlink()
    assert kind(both) == ("custom_checkpoint", "checkpoint", False)
    assert kind(prune("llama", to="plain")) == ("hf", "pretrained", False)
    assert kind("some-company/some-model") == ("hf", "pretrained", False)
    for missing in ("./nowhere", str(tmp_path / "nowhere"), "nowhere/model.bin", "nowhere.gguf"):
        with pytest.raises(UserError, match="no such"):
            tasks.arguments(missing)


def test_weights_that_were_changed_are_not_noticed_as_damage_but_code_is(prune):
    folder = prune("llama", "--global_pruning", "--save_format", "hf")
    weights = {name: weight + 1 for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert tasks.arguments(str(folder))
    (folder / "modeling_pruned.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UserError, match="TRUST=1"):
        tasks.arguments(str(folder))
    assert tasks.arguments(str(folder), trust=True)


def test_the_table_shows_groups_once_and_their_questions(tmp_path):
    def results(shift):
        return {
            "results": {
                "mmlu": {"acc,none": 0.5 - shift, "acc_stderr,none": 0.01},
                "mmlu_law": {"acc,none": 0.1, "acc_stderr,none": 0.1},
                "wikitext": {"word_perplexity,none": 10.0 + shift, "word_perplexity_stderr,none": "N/A"},
                "arc_easy": {"acc,none": 0.2, "acc_norm,none": 0.75 - shift, "acc_norm_stderr,none": 0.02},
            },
            "group_subtasks": {"mmlu": ["mmlu_law", "mmlu_art"], "arc_easy": []},
            "n-samples": {"mmlu_law": {"effective": 7}, "mmlu_art": {"effective": 5}, "arc_easy": {"effective": 9},
                          "wikitext": {"effective": 3}},
        }  # fmt: skip

    assert tasks.table(results(0), results(0.25)).splitlines()[2:] == [
        "| mmlu | acc | 12 | 0.5000 | 0.2500 | -0.2500 | 0.0100 |",
        "| wikitext | word_perplexity | 3 | 10.0000 | 10.2500 | +0.2500 |  |",
        "| arc_easy | acc_norm | 9 | 0.7500 | 0.5000 | -0.2500 | 0.0200 |",
        "| mean |  |  | 0.6250 | 0.3750 | -0.2500 |  |",
    ]


# --- questions without a network --------------------------------------------------------------------


def test_only_sets_that_are_there_are_prepared(tmp_path, capfd):
    save_made_up_set(tmp_path / "data", "arc_easy", 4)
    assert offline_tasks.main(["--data_dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    assert "skipped: arc_challenge, hellaswag" in capfd.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["allenai"]


def test_prepared_again_only_when_the_rows_changed(tmp_path):
    prepare = functools.partial(offline_tasks.prepare, tmp_path / "data", tmp_path / "out")
    save_made_up_set(tmp_path / "data", "winogrande", 4)
    prepare()
    written = tmp_path / "out/allenai/winogrande/winogrande_xl/train.parquet"
    before = written.stat().st_mtime_ns
    prepare()
    assert written.stat().st_mtime_ns == before
    save_made_up_set(tmp_path / "data", "winogrande", 5)
    prepare()
    assert written.stat().st_mtime_ns > before


@pytest.mark.parametrize("content", [None, "no set"])
def test_a_data_dir_without_sets_is_one_line(content, tmp_path, capfd):
    if content:
        (tmp_path / "data" / "mmlu").mkdir(parents=True)
        (tmp_path / "data" / "mmlu" / "file").write_text(content)
    assert offline_tasks.main(["--data_dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and str(tmp_path / "data") in err


def test_an_article_begins_at_a_heading_of_the_first_level():
    lines = ["", " = One = \n", " a b \n", " = = Part = = \n", " c \n", " = Two = \n", " d \n"]
    pages = list(offline_tasks.articles(lines))
    assert [page.split("\n")[-1].strip() for page in pages] == ["c", "d"]
    assert "= = Part = =" in pages[0]


def test_results_are_the_newest(tmp_path):
    for number, name in enumerate(["results_b.json", "results_a.json"]):
        (tmp_path / name).write_text(json.dumps({"number": number}))
        os.utime(tmp_path / name, (number, number))
    assert tasks.results(tmp_path) == {"number": 1}
    with pytest.raises(UserError, match="no results"):
        tasks.results(tmp_path / "nowhere")


def test_lm_harness_says_how_to_get_lm_eval(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')")
    environment = fresh_environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-m", "lib.lm_harness"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "requirements-eval.txt" in done.stderr
    assert textwrap.dedent(done.stderr).count("\n") == 1
