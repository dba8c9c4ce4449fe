"""Calibration samples and held-out text: where they are found, what they say, and what they never contain."""

import json
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import CALIBRATED, COLUMNS, SPLITS, made_up_row, make_tokenizer, save_made_up_set, save_set, sentences
from datasets import Dataset, DatasetDict, load_from_disk
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import choices, data
from lib.data import Calibration, find_calibration, fingerprint, generate_windows, held_out_windows, prefix_ids
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


# --- what a sample begins and ends with -------------------------------------------------------------

BOS, EOS, PAD = 0, 1, 2
TEMPLATES = {  # what stands before a text -> how the tokenizer is told so
    "none": ((), "$A"),
    "bos": ((BOS,), "<s> $A"),
    "eos": ((), "$A </s>"),
    "bos and eos": ((BOS,), "<s> $A </s>"),
    "two": ((PAD, BOS), "<pad> <s> $A"),
}


def tokenizer_that_adds(kind: str):
    """A tokenizer with the template of this kind, and what it puts before a text."""
    before, template = TEMPLATES[kind]
    tokenizer = make_tokenizer()
    special = [(token, number) for token, number in (("<s>", BOS), ("</s>", EOS), ("<pad>", PAD)) if token in template]
    own = processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = own
    return tokenizer, list(before)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_window_begins_as_the_tokenizer_begins_every_text_and_does_not_end_it(kind, tmp_path):
    tokenizer, before = tokenizer_that_adds(kind)
    text = "\n".join(sentences(60))
    (tmp_path / "own.txt").write_text(text)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert prefix_ids(tokenizer).tolist() == before
    # The draws, by hand: as many different places of the text as samples.
    room = 24 - len(before)
    starts = random.Random(5).sample(range(len(ids) - room + 1), 8)
    wanted = [before + ids[start : start + room] for start in starts]
    samples = Calibration(str(tmp_path / "own.txt"), "nowhere").samples(None, tokenizer, 8, 24, 5)
    assert [sample.tolist() for sample in samples] == wanted


@pytest.mark.parametrize("kind", TEMPLATES)
def test_perplexity_windows_begin_as_every_text_and_hold_each_token_once(kind, tmp_path):
    tokenizer, before = tokenizer_that_adds(kind)
    save_set(tmp_path, "wikitext2", {"train": [{"text": "x"}], "test": [{"text": t} for t in sentences(40)]})
    ids = tokenizer.backend_tokenizer.encode("\n\n".join(sentences(40)), add_special_tokens=False).ids
    windows, _ = held_out_windows(Calibration("wikitext2", str(tmp_path)), None, tokenizer, 16, None, 0)
    assert all(window[: len(before)] == before for window in windows.tolist()) and windows.shape[1] == 16
    found = windows[:, len(before) :].flatten().tolist()
    assert found == ids[: len(found)] and len(ids) - len(found) < 16


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_question_that_is_too_long_keeps_its_end_behind_what_begins_every_text(kind, tmp_path):
    tokenizer, before = tokenizer_that_adds(kind)
    save_set(tmp_path, "arc_easy", {"train": [ROWS["arc_easy"][0]]})
    whole = tokenizer(ROWS["arc_easy"][1])["input_ids"]
    [sample] = Calibration("arc_easy", str(tmp_path)).samples(None, tokenizer, 1, len(whole) - 3, 0)
    assert sample.tolist() == before + whole[len(before) + 3 :]
    [sample] = Calibration("arc_easy", str(tmp_path)).samples(None, tokenizer, 1, len(whole), 0)
    assert sample.tolist() == whole


def test_a_seqlen_with_no_room_for_a_prediction_is_one_line(tmp_path):
    tokenizer, _ = tokenizer_that_adds("two")
    (tmp_path / "own.txt").write_text("\n".join(sentences(9)))
    line = error_of(lambda: Calibration(str(tmp_path / "own.txt"), "nowhere").samples(None, tokenizer, 1, 2, 0))
    assert "--seqlen 2" in line and "at least 3" in line


def test_a_sample_of_one_token_is_named_with_its_row(tmp_path):
    rows = [{"sentence": "_", "option1": "ab", "option2": "a", "answer": answer} for answer in "12"]
    save_set(tmp_path, "winogrande", {"train": rows})
    assert "row 1 has one token" in error_of(lambda: draw("winogrande", tmp_path, n=2))


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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_part_of_the_text(suffix, encoding, tmp_path):
    text = {"txt": "café", "jsonl": json.dumps({"text": "café"}, ensure_ascii=False)}[suffix]
    (tmp_path / f"own.{suffix}").write_bytes(text.encode(encoding))
    assert draw(tmp_path / f"own.{suffix}", tmp_path, seqlen=5) == ["café"]


def test_a_byte_order_mark_of_the_other_byte_order_is_understood(tmp_path):
    (tmp_path / "own.txt").write_bytes(b"\xfe\xff" + "café".encode("utf-16-be"))
    assert draw(tmp_path / "own.txt", tmp_path, seqlen=5) == ["café"]


def test_line_ends_of_windows_and_lines_of_spaces_make_no_difference(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b'{"text": "one"}\r\n  \r\n\t\r\n{"text": "two"}\r\n')
    assert draw(tmp_path / "own.jsonl", tmp_path, seqlen=8) == ["one\n\ntwo"]
    (tmp_path / "own.txt").write_bytes(b"one\r\ntwo\r")
    assert draw(tmp_path / "own.txt", tmp_path, seqlen=8) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["OWN.TXT", "Own.Jsonl", "own.PARQUET"])
def test_suffixes_are_read_in_any_case(name, tmp_path):
    if name.endswith("PARQUET"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / name)
    else:
        (tmp_path / name).write_text("one" if name.endswith("TXT") else '{"text": "one"}')
    assert draw(tmp_path / name, tmp_path, seqlen=3) == ["one"]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_every_kind_of_string_column_of_a_parquet_file_is_read(kind, tmp_path):
    column = pyarrow.array(["one", "two", "one"]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "own.parquet")
    assert draw(tmp_path / "own.parquet", tmp_path, seqlen=13) == ["one\n\ntwo\n\none"]


def test_a_tilde_is_the_home_folder_wherever_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.txt").write_text("abcd")
    save_made_up_set(tmp_path / "sets", "arc_easy", 3)
    assert draw("~/own.txt", "nowhere", seqlen=4) == ["abcd"]
    assert len(draw("arc_easy", "~/sets", n=3)) == 3
    assert "no such file" in error_of(lambda: draw("~nobody-of-this-name/own.txt", "nowhere"))


@pytest.mark.parametrize("name", ["txt", "jsonl", "parquet"])
def test_a_name_that_no_file_system_takes_is_one_line(name, tmp_path):
    line = error_of(lambda: Calibration(str(tmp_path / f"{'x' * 300}.{name}"), str(tmp_path)))
    assert "cannot be read" in line
    assert "--data_dir" in error_of(lambda: Calibration("arc_easy", str(tmp_path / ("x" * 300))))


HALF = "cut off \ud83d"
BAD_ROWS = {"null": (None, "is null"), "number": (7, "no text but int"), "half": (HALF, "surrogate pair (\\ud83d)")}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_record_that_holds_no_text_is_named_with_its_row_and_line(kind, tmp_path):
    value, said = BAD_ROWS[kind]
    lines = [json.dumps({"text": text}) for text in (*sentences(17), value, "more")]
    (tmp_path / "own.jsonl").write_text("\n".join(["", *lines]))
    line = error_of(lambda: Calibration(str(tmp_path / "own.jsonl"), str(tmp_path)))
    assert "row 17 (line 19)" in line and said in line


def test_a_whole_surrogate_pair_is_the_character_it_stands_for(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert draw(tmp_path / "own.jsonl", tmp_path, seqlen=4) == ["\U0001f600"]


@pytest.mark.parametrize("column, said", [
    (pyarrow.array([*sentences(17), None, "more"]), "row 17: 'text' is null"),
    (pyarrow.nulls(3), "row 0: 'text' is null"),
    (pyarrow.array([b"one"]), "row 0: 'text' is no text but bytes"),
    (pyarrow.array([1.5]), "row 0: 'text' is no text but float"),
    (pyarrow.array([], pyarrow.string()), "holds no text"),
])  # fmt: skip
def test_a_row_of_a_parquet_file_that_holds_no_text_is_named(column, said, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "own.parquet")
    assert said in error_of(lambda: Calibration(str(tmp_path / "own.parquet"), str(tmp_path)))


def test_a_null_row_of_a_set_is_named_before_any_model_is_asked_for(tmp_path):
    texts = [*sentences(17), None]
    DatasetDict({split: Dataset.from_dict({"text": texts}) for split in ("train", "test")}).save_to_disk(
        tmp_path / "wikitext2"
    )
    calibration = Calibration("wikitext2", str(tmp_path))
    for action in (
        lambda: calibration.refuse_unusable(1, 0),
        lambda: calibration.samples(None, Bytes(), 1, 8, 0),
        lambda: held_out_windows(calibration, None, Bytes(), 8, None, 0),
    ):
        line = error_of(action)
        assert "--dataset wikitext2" in line and "row 17: 'text' is null" in line


def test_too_few_rows_are_found_before_any_model_is_asked_for(tmp_path):
    save_made_up_set(tmp_path, "arc_easy", 5)
    calibration = find_calibration("arc_easy", str(tmp_path), None)
    calibration.refuse_unusable(5, 0)
    assert "--nsamples 6" in error_of(lambda: calibration.refuse_unusable(6, 0))
    Calibration("self_generated", "nowhere").refuse_unusable(10, 0)


BAD_QUESTIONS = [
    ("hellaswag", {"label": ""}, "'label' is ''"),
    ("hellaswag", {"label": "-1"}, "'label' is '-1'"),
    ("hellaswag", {"label": "4"}, "from 0 to 3"),
    ("hellaswag", {"label": None}, "'label' is None"),
    ("hellaswag", {"endings": None}, "'endings' is no list"),
    ("hellaswag", {"ctx_a": None}, "'ctx_a' is null"),
    ("hellaswag", {"endings": ["a.", None, "c.", "d."]}, "'endings'[1] is null"),
    ("mmlu", {"answer": 4}, "from 0 to 3"),
    ("mmlu", {"answer": -1}, "'answer' is -1"),
    ("mmlu", {"choices": []}, "'choices' is no list"),
    ("mmlu", {"question": None}, "'question' is null"),
    ("winogrande", {"answer": ""}, "none of the labels 1, 2"),
    ("winogrande", {"answer": "3"}, "none of the labels 1, 2"),
    ("winogrande", {"option1": None, "answer": "1"}, "'option1' is null"),
    ("arc_easy", {"answerKey": "E"}, "'answerKey' is 'E', which is none of the labels 1, 2, 3, 4"),
    ("arc_easy", {"question": HALF}, "surrogate pair"),
    ("arc_easy", {"choices": {"text": None, "label": list("1234")}}, "'choices' is no list"),
    ("arc_easy", {"choices": {"text": ["a"], "label": None}}, "there are none"),
    ("arc_easy", {"choices": {"text": ["a"], "label": list("1234")}, "answerKey": "4"}, "1 texts and 4 labels"),
    ("arc_easy", {"choices": None}, "TypeError"),
]


@pytest.mark.parametrize("name, change, said", BAD_QUESTIONS)
def test_a_row_that_makes_no_question_is_named_and_nothing_is_made_up(name, change, said, tmp_path, monkeypatch):
    good = ROWS[name][0]
    rows = [good, good, good | change]
    monkeypatch.setattr("lib.data.open_split", lambda *where: rows)
    monkeypatch.setattr("lib.choices.open_split", lambda *where: rows)
    calibration = Calibration(name, str(tmp_path))
    for action in (
        lambda: calibration.refuse_unusable(3, 0),
        lambda: calibration.samples(None, Bytes(), 3, LONG, 0),
        lambda: choices.accuracy(None, Bytes(), name, str(tmp_path)),
    ):
        line = error_of(action)
        assert f"--dataset {name}" in line and "row 2: " in line and said in line


@pytest.mark.parametrize("name, change, word", [
    ("winogrande", {"answer": 1}, "Ann had"),
    ("arc_easy", {"answerKey": 3}, "Answer: iron"),
    ("arc_easy", {"choices": {"text": ["wood", "iron"], "label": [1, 2]}, "answerKey": "2"}, "Answer: iron"),
    ("mmlu", {"answer": "2"}, "Answer: C"),
    ("hellaswag", {"label": 2}, "He starts the car."),
])  # fmt: skip
def test_labels_may_be_numbers_or_their_digits(name, change, word, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.data.open_split", lambda *where: [ROWS[name][0] | change])
    assert word in draw(name, tmp_path)[0]


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


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_folder_with_the_name_of_a_file_is_one_line(suffix, tmp_path):
    (tmp_path / f"own.{suffix}").mkdir()
    assert "IsADirectory" in error_of(lambda: Calibration(str(tmp_path / f"own.{suffix}"), str(tmp_path)))


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


def test_self_generated_samples_begin_as_the_tokenizer_begins_every_text(llama):
    tokenizer, before = tokenizer_that_adds("two")
    assert (generate_windows(llama[0], tokenizer, 3, 12, 0)[:, :2] == torch.tensor(before)).all()
    tokenizer, _ = tokenizer_that_adds("none")
    windows = generate_windows(llama[0], tokenizer, 3, 12, 0)
    assert windows.shape == (3, 12) and (windows[:, 0] == BOS).all()


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
