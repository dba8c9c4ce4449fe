"""Calibration samples and held-out text: where they are found, what they say, and what they never contain."""

import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import CALIBRATED, COLUMNS, SPLITS, made_up_row, save_made_up_set, save_set, sentences
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import data
from lib.data import Calibration, fingerprint, generate_windows, held_out_windows
from lib.errors import UserError

LONG = 10_000  # more tokens than any made-up row has


class Bytes:
    """A tokenizer whose tokens are bytes, so that samples can be read and counted."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


def read(sample) -> str:
    """The text of a sample of byte tokens."""
    return bytes(sample.tolist()).decode()


def draw(name, data_dir, n=1, seqlen=LONG, seed=0) -> list[str]:
    """Samples as text."""
    return [read(s) for s in Calibration(str(name), str(data_dir)).samples(None, Bytes(), n, seqlen, seed)]


def error_of(action) -> str:
    """The line of the UserError that `action` ends in."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what a sample says -----------------------------------------------------------------------------

ROWS = {
    "mmlu": (
        {
            "question": " Which gas do plants take in?",
            "subject": "biology",
            "choices": ["Oxygen", "Argon", "Carbon dioxide", "Helium"],
            "answer": 2,
        },
        "Which gas do plants take in?\nA. Oxygen\nB. Argon\nC. Carbon dioxide\nD. Helium\nAnswer: C",
    ),
    "hellaswag": (
        {
            "ind": 1,
            "activity_label": "Removing ice from car",
            "ctx_a": "A man sweeps the windshield.",
            "ctx_b": "he",
            "ctx": "A man sweeps the windshield. he",
            "endings": ["sings.", "flies.", "starts the car.", "sleeps."],
            "source_id": "x",
            "split": "train",
            "split_type": "indomain",
            "label": "2",
        },
        "Removing ice from car: A man sweeps the windshield. He starts the car.",
    ),
    "winogrande": (
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Ann thanked Eve because Eve had helped.",
    ),
    "arc_challenge": (
        {
            "id": "1",
            "question": "What do plants need?",
            "answerKey": "B",
            "choices": {"text": ["sand", "light", "noise", "wind"], "label": ["A", "B", "C", "D"]},
        },
        "Question: What do plants need?\nAnswer: light",
    ),
    "arc_easy": (
        {
            "id": "2",
            "question": "Which one is a metal?",
            "answerKey": "3",
            "choices": {"text": ["wood", "glass", "iron", "wool"], "label": ["1", "2", "3", "4"]},
        },
        "Question: Which one is a metal?\nAnswer: iron",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_sample_is_the_row_with_its_right_answer(name, tmp_path):
    row, text = ROWS[name]
    save_set(tmp_path, name, {split: [row] for split in SPLITS[name]})
    assert draw(name, tmp_path) == [text]


def test_hellaswag_samples_carry_no_wikihow_markup(tmp_path):
    row = ROWS["hellaswag"][0] | {
        "activity_label": "Home",
        "ctx_a": "How to wash a cup [title] Fill it. [step] Wait.",
        "ctx_b": "",
        "endings": ["[substeps] Rinse it.", "No.", "No.", "No."],
        "label": "0",
    }
    save_set(tmp_path, "hellaswag", {"train": [row]})
    assert draw("hellaswag", tmp_path) == ["Home: How to wash a cup. Fill it. Wait. Rinse it."]


@pytest.mark.parametrize("answer, word", [("1", "trophy"), ("2", "case")])
def test_winogrande_fills_the_gap_with_the_right_option(answer, word, tmp_path):
    row = {
        "sentence": "The trophy did not fit in the case as the _ was wrong.",
        "option1": "trophy",
        "option2": "case",
        "answer": answer,
    }
    save_set(tmp_path, "winogrande", {"train": [row]})
    assert draw("winogrande", tmp_path) == [f"The trophy did not fit in the case as the {word} was wrong."]


def test_a_sample_that_is_too_long_keeps_its_end(tmp_path):
    row, text = ROWS["arc_easy"]
    save_set(tmp_path, "arc_easy", {"train": [row]})
    assert draw("arc_easy", tmp_path, seqlen=12) == ["Answer: iron"]
    assert text.endswith("Answer: iron")


def test_wikitext_samples_are_windows_of_the_rows_joined_by_blank_lines(tmp_path):
    save_set(tmp_path, "wikitext2", {"train": [{"text": text} for text in ("ab", "", "cde")]})
    whole = "ab\n\n\n\ncde"
    # As many windows as there are places to start: each comes exactly once.
    assert sorted(draw("wikitext2", tmp_path, n=6, seqlen=4)) == sorted(whole[i : i + 4] for i in range(6))


# --- which samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLUMNS)
def test_the_same_seed_draws_the_same_samples_and_another_seed_others(name, data_dir):
    first, again, other = (draw(name, data_dir, n=10, seqlen=40, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert Counter(first) != Counter(other)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "wikitext2"])
def test_no_row_is_drawn_twice(name, data_dir):
    assert len(set(draw(name, data_dir, n=40))) == 40


@pytest.mark.parametrize("name", COLUMNS)
def test_calibration_never_touches_the_splits_that_are_evaluated(name, tmp_path):
    mark = {split: "ALLOWED " if split == CALIBRATED[name] else "EVALUATED " for split in SPLITS[name]}
    save_made_up_set(tmp_path, name, 8, mark)
    if name == "wikitext2":
        whole = "\n\n".join("ALLOWED " + text for text in sentences(8, seed=SPLITS[name].index("train")))
        assert draw(name, tmp_path, n=1, seqlen=len(whole)) == [whole]
        return
    samples = draw(name, tmp_path, n=8)
    assert all("ALLOWED" in sample and "EVALUATED" not in sample for sample in samples)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "wikitext2"])
def test_more_samples_than_the_set_has_says_how_many_there_are(name, tmp_path):
    save_made_up_set(tmp_path, name, 5)
    line = error_of(lambda: draw(name, tmp_path, n=6))
    assert "--nsamples 6" in line and name in line and "5" in line


def test_too_few_tokens_for_the_windows_says_how_many_there_are(tmp_path):
    save_set(tmp_path, "wikitext2", {"train": [{"text": "abcdefghij"}]})
    assert len(draw("wikitext2", tmp_path, n=3, seqlen=8)) == 3
    line = error_of(lambda: draw("wikitext2", tmp_path, n=4, seqlen=8))
    assert "--nsamples 4" in line and "10 tokens" in line and "--seqlen 8" in line


def test_an_empty_text_is_too_few_tokens(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "0 tokens" in error_of(lambda: draw(tmp_path / "empty.txt", tmp_path, seqlen=8))


def test_the_fingerprint_is_equal_exactly_when_the_samples_are():
    def of(*samples):
        return fingerprint([torch.tensor(sample) for sample in samples])

    assert of([1, 2], [3]) == of([1, 2], [3])
    others = {of([1, 2], [3]), of([1], [2, 3]), of([3], [1, 2]), of([1, 2, 3]), of([1, 2], [4])}
    assert len(others) == 5


# --- where a set is found ---------------------------------------------------------------------------

HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "mmlu": ("cais/mmlu", "all"),
    "hellaswag": ("Rowan/hellaswag", "default"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
}


def write_hub_folder(working_dir, source, name, n=8, mark="HUB "):
    """A folder that `datasets` reads in place of a Hub repository: configurations that differ, in parquet files."""
    repository, configuration = HUB[name]
    decoys = {other for other_repository, other in HUB.values() if other_repository == repository} | {configuration}
    lines = ["---", "configs:"]
    for config in sorted(decoys):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in SPLITS[name]:
            rows = [
                made_up_row(name, f"{mark if config == configuration else 'DECOY '}{text}", i)
                for i, text in enumerate(sentences(n))
            ]
            folder = save_set(source, name, {split: rows})
            path = working_dir / repository / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            load_from_disk(str(folder))[split].to_parquet(str(path))
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (working_dir / repository / "README.md").write_text("\n".join([*lines, "---", ""]))
    return working_dir / repository


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Sets of the same name, made up by other tests, are not taken for these."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-cache")


@pytest.mark.parametrize("name", COLUMNS)
def test_a_set_comes_from_the_hub_once_and_then_from_data_dir(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = write_hub_folder(tmp_path, tmp_path / "source", name)
    seqlen = 300 if name == "wikitext2" else LONG
    first = draw(name, "kept", n=4, seqlen=seqlen)
    assert any("HUB" in sample for sample in first) and not any("DECOY" in sample for sample in first)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [name]
    assert set(load_from_disk(f"kept/{name}")) == set(SPLITS[name])

    shutil.rmtree(hub.parent)
    assert draw(name, "kept", n=4, seqlen=seqlen) == first


def test_a_local_set_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub_folder(tmp_path, tmp_path / "source", "arc_easy")
    save_made_up_set(tmp_path / "local", "arc_easy", 8, {"train": "LOCAL "})
    assert all("LOCAL" in sample for sample in draw("arc_easy", "local", n=8))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_set_that_is_nowhere_names_both_places(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_of(lambda: Calibration(name, "my_data"))
    assert f"--dataset {name}" in line and f"my_data/{name}" in line and HUB[name][0] in line and "--data_dir" in line
    assert not list(tmp_path.iterdir())


def test_a_download_that_is_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub_folder(tmp_path, tmp_path / "source", "winogrande")

    def interrupt(self, folder, *args, **kwargs):
        folder = Path(folder)
        folder.mkdir(exist_ok=True)
        (folder / "half").write_text("half a set")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetDict, "save_to_disk", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Calibration("winogrande", "kept")
    assert not (tmp_path / "kept").exists() or not list((tmp_path / "kept").iterdir())
    assert len(draw("winogrande", "kept", n=8)) == 8


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub_folder(tmp_path, tmp_path / "source", "winogrande")
    (tmp_path / "file").write_text("")
    assert "file" in error_of(lambda: Calibration("winogrande", "file/data"))


def cut_in_half(folder):
    """An arrow file that lost its second half."""
    path = next((folder / "train").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble_the_text(folder):
    """Texts that are no UTF-8."""
    path = next((folder / "train").glob("*.arrow"))
    path.write_bytes(path.read_bytes().replace(b"Which is", b"\xff" * len("Which is")))


def lose_the_index(folder):
    """A folder without the file that says what it is."""
    (folder / "dataset_dict.json").unlink()


def lose_a_split(folder):
    """A folder whose calibrated split is gone."""
    shutil.rmtree(folder / "train")


def garble_the_state(folder):
    """A description that is no JSON."""
    (folder / "train" / "state.json").write_text("{ not json")


def rename_a_column(folder):
    """A set of another form."""
    shutil.rmtree(folder)
    DatasetDict({"train": Dataset.from_list([{"question": "Why?", "key": "A"}] * 8)}).save_to_disk(str(folder))


DAMAGES = (cut_in_half, garble_the_text, lose_the_index, lose_a_split, garble_the_state, rename_a_column)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_set_is_one_line_that_names_its_folder(damage, tmp_path):
    folder = save_made_up_set(tmp_path, "arc_easy", 8)
    assert len(draw("arc_easy", tmp_path, n=8)) == 8
    damage(folder)
    line = error_of(lambda: draw("arc_easy", tmp_path, n=8))
    assert "--dataset arc_easy" in line and str(folder) in line


def test_a_set_without_the_split_that_is_needed_says_which(tmp_path):
    save_set(tmp_path, "arc_easy", {"test": [ROWS["arc_easy"][0]]})
    line = error_of(lambda: Calibration("arc_easy", str(tmp_path)))
    assert "'train'" in line and "test" in line


def test_an_unknown_set_lists_the_known_ones(tmp_path):
    line = error_of(lambda: Calibration("wikitext3", str(tmp_path)))
    assert "wikitext3" in line and "self_generated" in line and ".jsonl" in line
    assert all(name in line for name in COLUMNS)


# --- own files --------------------------------------------------------------------------------------


def test_a_text_file_is_read_as_it_is(tmp_path):
    text = "one line\n\nanother — with a dash\n"
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    assert draw(tmp_path / "own.txt", tmp_path, seqlen=len(text.encode())) == [text]


def test_records_of_a_jsonl_file_are_joined_by_blank_lines(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "one"}\n\n{"id": 7, "text": "two"}\n')
    assert draw(tmp_path / "own.jsonl", tmp_path, seqlen=8) == ["one\n\ntwo"]


def test_a_line_separator_inside_a_record_does_not_end_it(tmp_path):
    text = "one\u2028two\x85three"  # line breaks to Python's splitlines, plain characters in JSON
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert draw(tmp_path / "own.jsonl", tmp_path, seqlen=len(text.encode())) == [text]


def test_rows_of_a_parquet_file_are_joined_by_blank_lines(tmp_path):
    table = pyarrow.table({"id": [1, 2], "text": ["one", "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "own.parquet")
    assert draw(tmp_path / "own.parquet", tmp_path, seqlen=8) == ["one\n\ntwo"]


BROKEN = {
    "not_utf8.txt": b"caf\xe9",
    "no_json.jsonl": b'{"text": "one"}\n{"text": ',
    "no_text.jsonl": b'{"body": "one"}\n',
    "no_record.jsonl": b"[1, 2]\n",
    "number.jsonl": b'{"text": 7}\n',
    "null.jsonl": b'{"text": null}\n',
    "no_parquet.parquet": b"PAR1 but nothing more",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_says_what_was_expected(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    line = error_of(lambda: Calibration(str(tmp_path / name), str(tmp_path)))
    assert f"--dataset {tmp_path / name}" in line and "UTF-8" in line and "'text'" in line


def test_a_parquet_file_without_text_says_what_was_expected(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "own.parquet")
    assert "'text'" in error_of(lambda: Calibration(str(tmp_path / "own.parquet"), str(tmp_path)))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_file_that_is_not_there_is_said_to_be_missing(suffix, tmp_path):
    assert "no such file" in error_of(lambda: Calibration(str(tmp_path / f"x.{suffix}"), str(tmp_path)))


# --- text that the model makes itself ---------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tiny_model):
    folder = tiny_model("llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_self_generated_samples_are_seeded(llama):
    first, again, other = (generate_windows(*llama, 5, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n", [1, 16, 17, 33])
def test_self_generated_samples_have_the_asked_number_and_length(n, llama):
    samples = Calibration("self_generated", "nowhere").samples(*llama, n, 20, 0)
    assert [tuple(sample.shape) for sample in samples] == [(20,)] * n
    assert len({tuple(sample.tolist()) for sample in samples}) == n


def test_generation_goes_on_after_an_end_of_text(llama):
    model, tokenizer = llama
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    try:
        assert generate_windows(model, tokenizer, 3, 20, 0).shape == (3, 20)
        assert model.generation_config.eos_token_id == list(range(model.config.vocab_size))
    finally:
        model.generation_config.eos_token_id = model.config.eos_token_id


def test_self_generated_tokens_follow_the_models_distribution(llama):
    model, tokenizer = llama
    windows = generate_windows(model, tokenizer, 2000, 2, 0)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    with torch.no_grad():
        expected = model(windows[:1, :1]).logits[0, -1].softmax(-1)
    found = torch.bincount(windows[:, 1], minlength=len(expected)) / len(windows)
    # Half the total variation: 0.5 * sum|p - q| is about sqrt(tokens / (2 pi n)) = 0.16 for a sample of p itself.
    assert 0.5 * (found - expected).abs().sum() < 0.2


def test_generating_leaves_the_global_random_state_alone(llama):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate_windows(*llama, 2, 8, 0)
    assert torch.equal(torch.rand(3), expected)


# --- held-out text ----------------------------------------------------------------------------------


def test_perplexity_is_measured_on_wikitext_test_in_order_without_overlap(tmp_path):
    save_set(tmp_path, "wikitext2", {"train": [{"text": "x" * 50}], "test": [{"text": "abcdef"}, {"text": "ghijk"}]})
    calibration = Calibration("wikitext2", str(tmp_path))
    windows, source = held_out_windows(calibration, None, Bytes(), 4, None, 0)
    assert [read(window) for window in windows] == ["abcd", "ef\n\n", "ghij"]
    assert "wikitext2 test" in source
    first, _ = held_out_windows(calibration, None, Bytes(), 4, 2, 0)
    assert [read(window) for window in first] == ["abcd", "ef\n\n"]


def test_other_sets_are_measured_on_wikitext_test_too(tmp_path):
    save_made_up_set(tmp_path, "winogrande", 4)
    save_set(tmp_path, "wikitext2", {"test": [{"text": "abcdefgh"}]})
    windows, _ = held_out_windows(Calibration("winogrande", str(tmp_path)), None, Bytes(), 4, None, 0)
    assert [read(window) for window in windows] == ["abcd", "efgh"]


def test_a_test_split_shorter_than_a_window_is_one_line(tmp_path):
    save_set(tmp_path, "wikitext2", {"train": [{"text": "x" * 50}], "test": [{"text": "abc"}]})
    line = error_of(lambda: held_out_windows(Calibration("wikitext2", str(tmp_path)), None, Bytes(), 4, None, 0))
    assert "--eval_ppl" in line and "3 tokens" in line


def test_self_generated_text_is_measured_on_other_text_than_it_calibrates_on(llama):
    calibration = Calibration("self_generated", "nowhere")
    samples = {tuple(sample.tolist()) for sample in calibration.samples(*llama, 16, 20, 0)}
    windows, source = held_out_windows(calibration, *llama, 20, 16, 0)
    assert windows.shape == (16, 20)
    assert not samples & {tuple(window.tolist()) for window in windows}
    assert "wikitext2" not in source


# --- several runs that need one set -----------------------------------------------------------------


def _fetching(data_dir, started, ended):
    """As a run of its own: fetch wikitext2 from a Hub that answers slowly."""

    def slow(*_):
        started.put(os.getpid())
        time.sleep(0.5)
        return DatasetDict({"train": Dataset.from_dict({"text": ["a b"]})})

    data.load_dataset = slow
    ended.put(len(data.open_split("wikitext2", "train", str(data_dir))))


def test_two_runs_that_need_one_set_fetch_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    started, ended = context.Queue(), context.Queue()
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / ".wikitext2.partial").mkdir()  # a killed run's
    runs = [context.Process(target=_fetching, args=(tmp_path / "sets", started, ended)) for _ in range(3)]
    for run in runs:
        run.start()
    assert [ended.get(timeout=60) for _ in runs] == [1, 1, 1]
    for run in runs:
        run.join()
    assert started.get() and started.empty()
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["wikitext2"]
