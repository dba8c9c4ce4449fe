"""lmms-eval's shipped tasks, unmodified and without a network, on LLaVA in every saved form; its command line and
lmms-eval.sh as their users run them."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fresh_environment
from datasets import Dataset
from lmms_eval import evaluator, models
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager
from PIL import Image
from tenacity import Future, RetryError
from test_llava_loading import (  # noqa: F401  fixtures
    IMAGE_ID,
    N_IMAGE,
    SYSTEM,
    TOWER_NAME,
    expanded,
    own_image_tokens,
    picture,
    reference,
    write_checkpoint,
    write_data,
    write_tower,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

import main
from lib import tasks
from lib.errors import UserError
from lib.lmms import __main__ as command_line
from lib.lmms import exits, llava
from lib.lmms.llava import PrunedLlava

TASKS = ["vizwiz_vqa_val", "scienceqa_img"]
ROWS = 5
SHORT = "max_new_tokens=6"


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):  # noqa: F811
    """An original checkpoint whose answers depend on image and question: it attends strongly and says few bytes."""
    folder = tmp_path_factory.mktemp("lively") / "llava-v1.5-7b"
    state = {name: weight * 6 if "_proj." in name else weight for name, weight in reference.original_state().items()}
    state["lm_head.weight"][3:259] *= 0.02
    write_tower(folder / TOWER_NAME, reference)
    return write_checkpoint(folder, state)


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    """Folders with both saved forms: "one width" for each tower, "widths" that differ by layer."""
    folder = tmp_path_factory.mktemp("pruned")
    data = write_data(folder / "data")
    flags = {"one width": [], "widths": ["--global_pruning"]}
    for name, more in flags.items():
        command = ["--model", checkpoint, "--prune_method", "structured_afr_llava", "--pruning_ratio", 0.25, *more]
        command += ["--data_dir", data, "--nsamples", 4, "--dtype", "float32", "--save_format", "both"]
        assert main.main([str(word) for word in [*command, "--save_model", folder / name]]) == 0
    assert not (folder / "one width" / "modeling_pruned.py").exists()
    assert (folder / "widths" / "modeling_pruned.py").exists()
    return {name: folder / name for name in flags}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with data sets under their Hub names: made-up images, one question without any."""
    folder = tmp_path_factory.mktemp("work")
    images = [picture(30 + 7 * number, 40, seed=number) for number in range(ROWS)]
    vizwiz, science = [], []
    for number, image in enumerate(images):
        asked = {"question_id": f"{number}", "question": f"what is number {number}?", "category": "other"}
        vizwiz.append(asked | {"image": image, "answers": ["cat"] * 10})
        asked = {"question": f"is it {number}?", "hint": "", "choices": ["a cat", "a hat"], "answer": number % 2}
        science.append(asked | {"image": image if number != 2 else None})
    write_hub_folder(folder / "lmms-lab-encoder/VizWiz-VQA", "default", "val", vizwiz)
    write_hub_folder(folder / "lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test", science)
    return folder


def write_hub_folder(folder: Path, name: str, split: str, rows: list[dict]) -> None:
    """A data set as the Hub lays it out."""
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    header = ["---", "configs:", f"- config_name: {name}", "  data_files:", f"  - split: {split}"]
    (folder / "README.md").write_text("\n".join([*header, f"    path: {split}.parquet", "---", ""]))


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager("ERROR", model_name="llava")


@pytest.fixture
def evaluate(work, manager, monkeypatch):
    """`evaluate(pretrained=..., batch_size=2, ...)` -> lmms-eval's results in this process."""

    def run(batch_size=1, names=TASKS, **arguments) -> dict:
        monkeypatch.chdir(work)
        arguments = ",".join(f"{name}={value}" for name, value in ({"dtype": "float32"} | arguments).items())
        return evaluator.simple_evaluate(
            model="llava", model_args=arguments, tasks=names, batch_size=f"{batch_size}", gen_kwargs=SHORT,
            task_manager=manager, bootstrap_iters=0, process_docs_parallel=1,
        )  # fmt: skip

    return run


def answers(found: dict) -> dict[str, list[str]]:
    return {name: [row["filtered_resps"][0] for row in rows] for name, rows in found["samples"].items()}


def written_answers(model, processor, question: str, image) -> str:
    """Greedy decoding by hand, up to six tokens, of a prompt written by hand."""
    mark = "<image>\n" if image else ""
    text = f"{SYSTEM} USER: {mark}{question} ASSISTANT:"
    inputs = processor(text=text, images=image, return_tensors="pt")
    ids, new = inputs.pop("input_ids"), []
    while len(new) < 6 and (not new or new[-1] != processor.tokenizer.eos_token_id):
        with torch.no_grad():
            logits = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1]
        new.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
    return processor.tokenizer.decode(new, skip_special_tokens=True)


# --- answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", ["one width", "widths"])
def test_folder_and_model_bin_answer_alike_and_as_decoding_by_hand(widths, evaluate, pruned):
    folder = pruned[widths]
    as_folder = evaluate(pretrained=folder, device_map="auto")
    as_bin = evaluate(pretrained="some-company/not-here", pruned=f"{folder}/model.bin", device_map="auto")
    assert {name: len(rows) for name, rows in answers(as_folder).items()} == dict.fromkeys(TASKS, ROWS)
    assert answers(as_bin) == answers(as_folder)
    assert all(len(set(rows)) > 2 for rows in answers(as_folder).values())
    for name in TASKS:
        assert as_bin["results"][name]["exact_match,none"] == as_folder["results"][name]["exact_match,none"]

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    for number, answer in enumerate(answers(as_folder)["scienceqa_img"]):
        order = "Answer with the option's letter from the given choices directly."
        question = f"is it {number}?\nA. a cat\nB. a hat\n{order}"
        image = picture(30 + 7 * number, 40, seed=number) if number != 2 else None
        assert written_answers(model, processor, question, image) == answer


def test_a_batch_of_two_answers_as_single_questions_do(evaluate, pruned):
    single, double = (answers(evaluate(size, pruned=pruned["widths"])) for size in (1, 2))
    assert double == single


@pytest.mark.parametrize("form", ["original", "transformers"])
def test_the_dense_model_is_taken_in_both_forms(form, checkpoint, tmp_path):
    model, processor = llava.load(str(checkpoint), dtype=torch.float32)
    if form == "transformers":
        model.save_pretrained(tmp_path / "llava-hf")
        processor.save_pretrained(tmp_path / "llava-hf")
    name = str(checkpoint if form == "original" else tmp_path / "llava-hf")
    found = PrunedLlava(pretrained=name, dtype="float32")._answer(["what is it?"], [[picture()]], {"max_new_tokens": 6})
    assert found == [written_answers(model, processor, "what is it?", picture())]


def test_code_in_a_folder_is_run_only_when_told_to(pruned, tmp_path):
    folder = shutil.copytree(pruned["widths"], tmp_path / "copy")
    own = llava.load(str(folder))[0]
    trusted = llava.load(str(folder), trust_code=True)[0]
    assert type(own).__module__ == "transformers.models.llava.modeling_llava"
    assert type(trusted).__module__.startswith("transformers_modules.")
    with open(folder / "modeling_pruned.py", "a") as file:
        file.write("\nprint('edited')\n")
    with pytest.raises(UserError, match="modeling_pruned.py"):
        llava.load(str(folder))
    states = [model.state_dict() for model in (own, llava.load(str(folder), trust_code=True)[0])]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


@pytest.fixture(scope="module")
def model(pruned):
    return PrunedLlava(pruned=pruned["widths"], dtype="float32")


def requests_of(kind: str, asked: list[tuple], shown: list[list]) -> tuple[dict, list[Instance]]:
    """Requests about the images `shown` with each, and the documents they are about."""
    documents = [{"images": images} for images in shown]
    requests = [
        Instance(kind, (text, more, lambda doc: doc["images"], number, "task", "test"), 0,
                 {"task": "task", "doc_id": number, "repeats": 1})
        for number, (text, more) in enumerate(asked)
    ]  # fmt: skip
    return {"task": {"test": documents}}, requests


def own_logits(model, prompt: str, images: list) -> tuple[list[int], torch.Tensor]:
    """The original's tokens of a prompt (an image is -200), and the logits that predict the one after each."""
    ids = own_image_tokens(prompt)
    inputs = {"input_ids": torch.tensor([expanded(ids, ids, IMAGE_ID)])}
    if images:
        inputs["pixel_values"] = model.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model.model(**inputs).logits[0]
    last_places = torch.tensor([N_IMAGE if index == -200 else 1 for index in ids]).cumsum(0) - 1
    return ids, logits[last_places]


def own_loss(model, question: str, images: list, continuation: str) -> float:
    """What lmms-eval's own LLaVA returns for a choice: all tokens behind those of the prompt, as many as there are."""
    before = f"{SYSTEM} USER: {question} ASSISTANT:"
    ids, logits = own_logits(model, f"{before} {continuation}</s>", images)
    start = len(own_image_tokens(before))
    parts = [-float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in range(start, len(ids))]
    return sum(parts) / len(parts)


CHOSEN = [
    ("is it a cat?", " yes", "<image>\nis it a cat?"),
    ("is it a cat?", "yes", "<image>\nis it a cat?"),
    ("is it a cat?\n", "  yes\n", "<image>\nis it a cat?\n"),
    (" is it\n<image> this?", " a</s>b", " is it\n<image> this?"),
    ("a</s>cat?", lambda doc: f" no {len(doc['images'])}", "<image>\na</s>cat?"),
]


def test_a_likelihood_is_the_one_of_lmms_evals_own_llava(model):
    asked = [(text, target) for text, target, _ in CHOSEN]
    model.task_dict, requests = requests_of("loglikelihood", asked, [[picture()]] * len(asked))
    for (loss, greedy), (_, target, question) in zip(model.loglikelihood(requests), CHOSEN, strict=True):
        continuation = " no 1" if callable(target) else target
        wanted = own_loss(model, question, [picture()], continuation)
        assert loss == pytest.approx(wanted, rel=1e-4) and greedy is False
    losses = [own_loss(model, CHOSEN[0][2], [picture()], word) for word in (" yes", "yes")]
    assert abs(losses[0] - losses[1]) > 0.01  # the space before a choice tells


def test_a_likelihood_without_an_image_or_with_several_is_the_one_of_lmms_evals_own_llava(model):
    shown = [[], [picture(), picture(seed=2)], [picture(), picture(seed=2)]]
    asked = [("what?", " a cat"), ("which?", " a cat"), ("is <image> it?", " a cat")]
    model.task_dict, requests = requests_of("loglikelihood", asked, shown)
    wanted = [
        own_loss(model, "what?", [], " a cat"),
        own_loss(model, "<image> <image>\nwhich?", shown[1], " a cat"),
        own_loss(model, "is <image> it?", shown[2][:1], " a cat"),  # one mark, so the second image is not looked at
    ]
    assert [loss for loss, _ in model.loglikelihood(requests)] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("question", ["what is it?", "what is it?\n", " what", "a</s>cat <image> sat"])
def test_an_answer_is_the_one_of_lmms_evals_own_llava_whole_and_as_it_is(question, model):
    shown = [picture()]
    marked = question if "<image>" in question else f"<image>\n{question}"
    prompt, new = f"{SYSTEM} USER: {marked} ASSISTANT:", []
    while len(new) < 5 and (not new or new[-1] != 2):
        ids, logits = own_logits(model, prompt, shown) if not new else own_continued(model, prompt, shown, new)
        new.append(int(logits[-1].argmax()))
    wanted = model.tokenizer.decode(new, skip_special_tokens=True)
    asked = [(question, {"max_new_tokens": 5, "until": "\n\n"})]
    model.task_dict, requests = requests_of("generate_until", asked, [shown])
    assert model.generate_until(requests) == [wanted]


def own_continued(model, prompt: str, images: list, new: list[int]) -> tuple[list[int], torch.Tensor]:
    """The logits behind a prompt and the tokens that were generated after it."""
    ids = own_image_tokens(prompt) + new
    inputs = {"input_ids": torch.tensor([expanded(ids, ids, IMAGE_ID)])}
    inputs["pixel_values"] = model.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return ids, model.model(**inputs).logits[0]


def test_several_rounds_are_refused(model):
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(NotImplementedError, match="videos"):
        llava.images_of(["film.mp4"])


# --- prompts, generation arguments ------------------------------------------------------------------


@pytest.mark.parametrize("text, n_images, wanted", [
    ("what?", 1, "<image>\nwhat?"),
    ("what?", 0, "what?"),
    (" what?\n", 1, "<image>\n what?\n"),
    ("which?", 2, "<image> <image>\nwhich?"),
    ("is <image> like <image> ?", 2, "is <image> like <image> ?"),
    # More marks than images, where lmms-eval's own fails.
    ("say <image>", 0, "say"),
    ("is <image> like <image> ?", 1, "<image>\nis  like  ?"),
])  # fmt: skip
def test_prompts_are_those_of_lmms_evals_own_llava(text, n_images, wanted, model):
    assert llava.prompt(model.processor, text, n_images) == f"{SYSTEM} USER: {wanted} ASSISTANT:"
    asked = f"{SYSTEM} USER: {wanted} ASSISTANT:  yes</s>"
    assert llava.prompt(model.processor, text, n_images, " yes") == asked


def test_an_empty_question_and_an_empty_choice_have_no_spaces(model):
    assert llava.prompt(model.processor, "", 0) == llava.prompt(model.processor, "", 0, "") == (
        f"{SYSTEM} USER:ASSISTANT:"
    )


# As published: llava-hf/llava-1.5-7b-hf leaves the system prompt out, other models write other words.
PUBLISHED = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
OTHER = "{% for message in messages %}[{{ message['content'][0]['text'] }}]{% endfor %}"


@pytest.mark.parametrize("template, wanted", [
    (None, f"{SYSTEM} USER: <image>\nwhat? ASSISTANT:  yes</s>"),
    (PUBLISHED, f"{SYSTEM} USER: <image>\nwhat? ASSISTANT:  yes</s>"),
    (OTHER, "[<image>\nwhat?] yes</s>"),
])  # fmt: skip
def test_a_conversion_is_asked_as_the_original_unless_it_is_another_model(template, wanted, model, monkeypatch):
    monkeypatch.setattr(model.processor, "chat_template", template)
    assert llava.prompt(model.processor, "what?", 1, " yes") == wanted


GREEDY = {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False}


@pytest.mark.parametrize("given, wanted", [
    ({}, GREEDY),
    ({"temperature": 0, "image_aspect_ratio": "original", "until": "\n\n"}, GREEDY),
    ({"temperature": 0.0, "top_p": None, "top_k": 5, "do_sample": True, "until": ["a", "b"]}, GREEDY),
    # Its own draws at random exactly where the temperature is above 0, whatever the task says beside it.
    ({"do_sample": False, "temperature": 0.7}, GREEDY | {"do_sample": True, "temperature": 0.7}),
    ({"temperature": 0.7, "top_p": 0.9}, GREEDY | {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
    ({"num_beams": 3, "visual_cot": True, "repetition_penalty": 1.2}, GREEDY | {"num_beams": 3}),
])  # fmt: skip
def test_generation_arguments_are_those_that_lmms_evals_own_llava_takes(given, wanted, model):
    assert llava.generation_settings(given) == wanted
    assert len(model._answer(["is it?"], [[picture()]], given | {"max_new_tokens": 2})) == 1


def test_images_are_taken_in_any_mode():
    images = llava.images_of([Image.new("L", (4, 4)), None, Image.new("RGBA", (4, 4))])
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert llava.images_of(None) == llava.images_of([]) == []


# --- what it is told --------------------------------------------------------------------------------


def test_dtype_is_that_of_every_weight_and_images_follow(pruned):
    model = PrunedLlava(pruned=pruned["one width"], dtype="bfloat16", device="cpu")
    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}
    assert len(model._answer(["is it?"], [[picture()]], {"max_new_tokens": 2})) == 1
    assert model.tokenizer.padding_side == "left" and model.tokenizer.pad_token == "<pad>"


class Hostile:
    """Unpickles to a program that leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("arguments, saying", [
    ({}, "pretrained="),
    ({"pruned": "nowhere/model.bin"}, "no such file"),
    ({"pretrained": "./nowhere"}, "pretrained=./nowhere"),
    ({"pruned": "{}/model.bin", "conv_template": "vicuna_v1"}, "conv_template=vicuna_v1"),
    ({"pruned": "{}/model.bin", "dtype": "int3"}, "dtype=int3"),
    ({"pruned": "{}/model.bin", "device_map": "everywhere"}, "device_map=everywhere"),
    ({"pruned": "{}/model.bin", "batch_size": "auto"}, "--batch_size auto"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(arguments, saying, pruned):
    with pytest.raises(UserError, match=saying) as caught:
        PrunedLlava(**{name: value.format(pruned["widths"]) for name, value in arguments.items()})
    assert "\n" not in str(caught.value)


def test_a_language_model_is_no_llava(tiny_model, run_cli, data_dir, tmp_path):
    command = ["--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 2, "--seqlen", 32]
    assert run_cli(*command, "--save_format", "both", "--save_model", tmp_path / "text").code == 0
    for arguments in ({"pretrained": tmp_path / "text"}, {"pruned": tmp_path / "text" / "model.bin"}):
        with pytest.raises(UserError, match="is no LLaVA"):
            PrunedLlava(**arguments)


def test_a_hostile_checkpoint_ends_the_command_line_in_one_line(tmp_path, capfd):
    torch.save({"model": Hostile(tmp_path / "ran"), "tokenizer": None}, tmp_path / "model.bin")
    with pytest.raises(SystemExit) as leaving:
        PrunedLlava.create_from_arg_string(f"pruned={tmp_path}/model.bin", {"batch_size": "1", "device": None})
    err = capfd.readouterr().err
    assert leaving.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "system" in err
    assert not (tmp_path / "ran").exists()


def test_the_built_in_models_stay():
    listed = models.list_available_models()
    assert {"llava", "llava_hf", "llava_onevision", "qwen2_5_vl", "vllm", "dummy"} <= set(listed) and len(listed) > 90
    assert models.get_model("llava") is PrunedLlava
    assert inspect.getmodule(models.get_model("dummy")).__name__.startswith("lmms_eval.")


def test_arguments_load_a_result_by_what_it_holds(pruned):
    def found(path, **more):
        kind, values = tasks.arguments(str(path), harness="lib.lmms", **more)[1::2]
        return kind, values.split(",")

    folder = pruned["widths"]
    assert found(folder) == ("llava", [f"pretrained={folder}", "dtype=auto"])
    assert found(folder, trust=True)[1] == [f"pretrained={folder}", "trust_remote_code=True", "dtype=auto"]
    as_bin = ("llava", [f"pruned={folder}/model.bin", "dtype=auto"])
    assert found(folder, form="bin") == found(folder / "model.bin") == as_bin
    assert found("liuhaotian/llava-v1.5-13b")[1][0] == "pretrained=liuhaotian/llava-v1.5-13b"


def test_the_table_shows_a_measure_that_it_does_not_know():
    def results(shift):
        mme = {"alias": "mme", "submission,none": [], "mme_score,none": 1500 + shift, "mme_score_stderr,none": "N/A"}
        return {"results": {"mme": mme, "gqa": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.25}},
                "n-samples": {"gqa": {"effective": 4}, "mme": {"effective": 9}}}  # fmt: skip

    assert tasks.table(results(0), results(-100)).splitlines()[2:] == [
        "| mme | mme_score | 9 | 1500.0000 | 1400.0000 | -100.0000 |  |",
        "| gqa | exact_match | 4 | 0.5000 | 0.5000 | +0.0000 | 0.2500 |",
    ]


# --- command lines ----------------------------------------------------------------------------------


def test_the_readmes_command_runs(pruned, work, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "-m", "lmms_eval"]
    command += ["--model", "llava", "--model_args"]
    command += [f"pretrained=liuhaotian/llava-v1.5-13b,pruned={pruned['widths']}/model.bin,device_map=auto"]
    command += ["--tasks", ",".join(TASKS), "--batch_size", "1", "--output_path", tmp_path / "logs"]
    done = subprocess.run(
        [*command, "--gen_kwargs", SHORT], cwd=work, env=fresh_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = tasks.results(tmp_path / "logs")
    assert found["results"].keys() == set(TASKS) and found["model_name"] == "liuhaotian/llava-v1.5-13b"
    assert {name: count["effective"] for name, count in found["n-samples"].items()} == dict.fromkeys(TASKS, ROWS)


def test_the_readmes_command_exits_with_an_error_when_it_fails(work, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "-m", "lmms_eval"]
    command += ["--model", "llava", "--model_args", f"pretrained={tmp_path}", "--tasks", "no_such_task"]
    done = subprocess.run(command, cwd=work, env=fresh_environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "\nerror: Tasks not found: no_such_task" in f"\n{done.stderr}"


def test_lmms_evals_own_command_line_exits_as_ours_does(capfd):
    own = sys.modules["lmms_eval.__main__"]
    exits.exit_on_errors()  # as when it asks for its plugins while it is imported
    assert own.cli_evaluate and own.cli_evaluate_single.exits
    with pytest.raises(SystemExit) as leaving:
        own.cli_evaluate_single(SimpleNamespace(tasks=None))
    assert leaving.value.code == 2 and capfd.readouterr().err.startswith("error: --tasks")


@pytest.fixture
def lmms_eval_sh(work, tmp_path):
    """`lmms_eval_sh(NAME=value, ...)` runs the script with the environment of these tests."""

    def run(*arguments, **values):
        settings = {"VENV": sys.prefix, "OFFLINE": 1, "DATA_DIR": work, "WORK_DIR": tmp_path / "work", "LIMIT": 4}
        settings |= {"TASKS": "scienceqa_img", "OUT": tmp_path / "logs" / "pruned"} | values
        environment = fresh_environment() | {name: str(value) for name, value in settings.items()}
        command = ["bash", ROOT / "lmms-eval.sh", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_lmms_eval_sh_prints_dense_beside_pruned(lmms_eval_sh, pruned, checkpoint, tmp_path):
    done = lmms_eval_sh("--gen_kwargs", SHORT, PRUNED=pruned["widths"], BASE=checkpoint)
    assert done.returncode == 0, done.stderr
    places = next((tmp_path / "logs").glob("dense-*")), tmp_path / "logs" / "pruned"
    values = [tasks.results(place)["results"]["scienceqa_img"]["exact_match,none"] for place in places]
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].split("|")]
    assert cells[1:4] == ["scienceqa_img", "exact_match", "4"]
    assert [float(cell) for cell in cells[4:6]] == pytest.approx(values, abs=1e-4)


def test_lmms_eval_sh_asks_for_a_model(lmms_eval_sh):
    done = lmms_eval_sh()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "PRUNED=" in done.stderr


def failed(error: Exception) -> RetryError:
    """How lmms-eval reports data that it could not get."""
    attempt = Future(5)
    attempt.set_exception(error)
    return RetryError(attempt)


@pytest.mark.parametrize("error, code, saying", [
    (ValueError("Tasks not found: gqq.\nTry another"), 2, "error: Tasks not found: gqq. Try another"),
    (failed(ConnectionError("Couldn't reach 'a/b' (OfflineModeIsEnabled)")), 2, "DATA_DIR"),
    (NotImplementedError("llava: no videos"), 2, "error: llava: no videos"),
    (KeyError("image"), 1, "Traceback"),
], ids=["task", "data", "video", "defect"])  # fmt: skip
def test_the_command_line_ends_with_an_exit_code(error, code, saying, capfd):
    def evaluate(_):
        raise error

    with pytest.raises(SystemExit) as leaving:
        command_line.exiting(evaluate)(None)
    err = capfd.readouterr().err
    assert leaving.value.code == code and saying in err
    assert code == 1 or err.count("\n") == 1
