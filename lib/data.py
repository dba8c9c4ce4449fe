"""A data set's name -> calibration samples, and the held-out text that perplexity is measured on."""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from lib import llava_data, locks
from lib.errors import UserError
from lib.tape import IGNORE, Sample

SELF_GENERATED = "self_generated"
FILE_TYPES = (".txt", ".jsonl", ".parquet")
HELD_OUT_SEED = 1_000_003  # added to the seed: no calibration sample is ever measured on
SELF_GENERATED_WINDOWS = 16
GENERATED_AT_ONCE = 16


# --- one row of a set -> the text of a sample -------------------------------------------------------


def mmlu(row: dict) -> str:
    """Question, lettered choices, and the letter of the right one."""
    letters = "ABCDEFGH"
    choices = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"])]
    return "\n".join([row["question"].strip(), *choices, f"Answer: {letters[int(row['answer'])]}"])


def hellaswag(row: dict) -> str:
    """Activity, context and the right ending, without WikiHow's markup."""
    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()} {row['endings'][int(row['label'])]}"
    return re.sub(" +", " ", re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))).strip()


def winogrande(row: dict) -> str:
    """The sentence with the right option in the gap."""
    return row["sentence"].replace("_", row[f"option{row['answer']}"])


def arc(row: dict) -> str:
    """Question and the text of the right answer."""
    choices = dict(zip(row["choices"]["label"], row["choices"]["text"]))
    return f"Question: {row['question']}\nAnswer: {choices[row['answerKey']]}"


@dataclass(frozen=True)
class TextSet:
    """Where a set comes from, the split to calibrate on, and how a row becomes a sample.

    Without `sample`, samples are random windows of the column `text`, joined by blank lines.
    """

    hub: str
    configuration: str
    split: str
    sample: Callable[[dict], str] | None
    summary: str


SETS = {
    "wikitext2": TextSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None, "windows of Wikipedia articles"),
    "mmlu": TextSet("cais/mmlu", "all", "validation", mmlu, "exam questions of 57 subjects"),
    "hellaswag": TextSet("Rowan/hellaswag", None, "train", hellaswag, "everyday scenes and their endings"),
    "winogrande": TextSet("allenai/winogrande", "winogrande_xl", "train", winogrande, "pronoun puzzles, solved"),
    "arc_challenge": TextSet("allenai/ai2_arc", "ARC-Challenge", "train", arc, "hard science questions"),
    "arc_easy": TextSet("allenai/ai2_arc", "ARC-Easy", "train", arc, "easy science questions"),
}


# --- finding a set ----------------------------------------------------------------------------------


def open_split(name: str, split: str, data_dir: str) -> Dataset:
    """One split of a set: from `data_dir/name`, else from the Hub, which is then kept there for the next time.

    Raises UserError that names both places when neither has it, or when the local copy is damaged.
    """
    folder = Path(data_dir) / name
    if not folder.exists():
        _fetch(name, folder)
    with _reading(name, data_dir):
        found = load_from_disk(str(folder))
    if isinstance(found, Dataset):
        found = DatasetDict({str(found.split): found})
    if split not in found:
        raise UserError(f"--dataset {name}: {folder} has the splits {', '.join(found)}, but '{split}' is needed")
    return found[split]


@contextmanager
def _reading(name: str, data_dir: str) -> Iterator[None]:
    """Turn what goes wrong while a local copy is read into a UserError that names its folder."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"--dataset {name}: {Path(data_dir) / name} is damaged or not the set of this name "
            f"({type(error).__name__}: {' '.join(str(error).split())[:100]}); delete it so that it is fetched again"
        ) from error


def _fetch(name: str, folder: Path) -> None:
    """Load all splits from the Hub and save them to `folder`, which appears only when it is complete.

    One process fetches; others that need the set wait for it.
    """
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locks.exclusive(folder, lambda holder: _note(f"--dataset {name}: {holder}, is fetching it; waiting")):
            if not folder.exists():
                _fetch_alone(name, folder)
    except OSError as error:
        raise UserError(f"--data_dir {folder.parent}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # a folder that is not empty stays
            for parent in made:
                parent.rmdir()


def _fetch_alone(name: str, folder: Path) -> None:
    """As `_fetch`, where no other process does the same. Raises OSError when the disk does not take it."""
    source = SETS[name]
    try:
        loaded = load_dataset(source.hub, source.configuration)
    except Exception as error:
        raise UserError(
            f"--dataset {name}: not in {folder}, and {source.hub} could not be loaded from the Hub "
            f"({type(error).__name__}); connect to the network once, or put a save_to_disk folder there "
            f"(see --data_dir)"
        ) from error
    partial = folder.parent / f".{name}.partial"  # the same for every run: what a killed one left is replaced
    try:
        shutil.rmtree(partial, ignore_errors=True)
        loaded.save_to_disk(partial)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_file(path: str) -> str:
    """The text of a `.txt`, `.jsonl` or `.parquet` file; records (column `text`) are joined by blank lines.

    Raises UserError when the file is missing, damaged or has no such column.
    """
    try:
        if path.endswith(".txt"):
            return Path(path).read_text(encoding="utf-8")
        if path.endswith(".jsonl"):
            rows = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
        else:
            rows = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
        return "\n\n".join(rows)
    except FileNotFoundError as error:
        raise UserError(f"--dataset {path}: no such file") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--dataset {path}: cannot be read ({type(error).__name__}: {reason}); expected "
            f"UTF-8 text, or records with a string column 'text'"
        ) from error


def find_calibration(name: str, data_dir: str, image_dir: str | None) -> "Calibration | CaptionedImages":
    """The data set of a value of `--dataset`. Raises UserError for one that is unknown or cannot be opened."""
    if name == llava_data.NAME or name.endswith(".json"):
        return CaptionedImages(name, data_dir, image_dir)
    return Calibration(name, data_dir)


class CaptionedImages:
    """Images with captions that have been found; its samples are for models that see."""

    def __init__(self, name: str, data_dir: str, image_dir: str | None):
        """Raises UserError for a JSON file or a folder of images that is missing."""
        self.name, self.data_dir, self.skipped = name, data_dir, 0
        self.json_path, self.images = llava_data.locate(name, image_dir, data_dir)

    def samples(self, model, processor, n: int, seqlen: int, seed: int) -> list[dict[str, Tensor]]:
        """`n` samples as `llava_data.load_samples` makes them; how many rows were passed over is in `skipped`."""
        found, self.skipped = llava_data.load_samples(self.json_path, self.images, processor, n, seed, seqlen)
        return found


class Calibration:
    """A data set that has been found, so that a wrong name fails before a model is loaded."""

    skipped = 0  # every row of a text set can be used

    def __init__(self, name: str, data_dir: str):
        """Raises UserError for an unknown name, and for a set or file that cannot be opened."""
        self.name, self.data_dir = name, data_dir
        self.rows = None
        if name in SETS:
            self.rows = open_split(name, SETS[name].split, data_dir)
        elif name.endswith(FILE_TYPES):
            self.text = read_file(name)
        elif name != SELF_GENERATED:
            raise UserError(
                f"--dataset {name}: unknown; choose {', '.join([*SETS, SELF_GENERATED])}, or a "
                f"{'/'.join(FILE_TYPES)} file"
            )

    def samples(self, model, tokenizer, n: int, seqlen: int, seed: int) -> list[Tensor]:
        """`n` token sequences `[at most seqlen]`, the same for the same seed.

        Raises UserError when the set has fewer samples or less text.
        """
        if self.name == SELF_GENERATED:
            return list(generate_windows(model, tokenizer, n, seqlen, seed))
        with _reading(self.name, self.data_dir):
            texts = self._texts(n, seed)
        if self.rows is None or SETS[self.name].sample is None:
            return random_windows(tokenize(tokenizer, "\n\n".join(texts)), n, seqlen, seed, self.name)
        # Too long a sample loses its beginning: the answer stands at the end.
        return [tokenize(tokenizer, text)[-seqlen:] for text in texts]

    def _texts(self, n: int, seed: int) -> list[str]:
        """One text per sample; all texts of a set that is cut into windows."""
        if self.rows is None:
            return [self.text]
        if SETS[self.name].sample is None:
            return list(self.rows["text"])
        if n > len(self.rows):
            raise UserError(f"--nsamples {n}: {self.name} ({SETS[self.name].split}) has {len(self.rows)} samples")
        chosen = random.Random(seed).sample(range(len(self.rows)), n)
        return [SETS[self.name].sample(self.rows[index]) for index in chosen]


def random_windows(ids: Tensor, n: int, seqlen: int, seed: int, name: str) -> list[Tensor]:
    """`n` different windows of `seqlen` tokens. Raises UserError when there are not so many."""
    starts = len(ids) - seqlen + 1
    if n > starts:
        raise UserError(f"--nsamples {n}: {name} has {len(ids)} tokens, too few for {n} windows of --seqlen {seqlen}")
    return [ids[start : start + seqlen] for start in random.Random(seed).sample(range(starts), n)]


def tokenize(tokenizer, text: str) -> Tensor:
    """Token ids `[tokens]`, with the special tokens that the tokenizer adds by itself."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def token_ids(sample: Sample) -> Tensor:
    """The tokens of a sample, `[tokens]`."""
    return sample["input_ids"] if isinstance(sample, dict) else sample


def refuse_unknown_tokens(model, samples: Sequence[Sample]) -> None:
    """Raise UserError when the tokenizer made ids that the model's embedding has no row for."""
    highest = max(int(token_ids(sample).max()) for sample in samples)
    rows = len(model.get_input_embeddings().weight)
    if highest >= rows:
        raise UserError(
            f"--model: its tokenizer makes token {highest}, but its embedding has only {rows} rows; they do not "
            "belong together"
        )


def text_of(samples: Sequence[Sample]) -> Tensor:
    """The tokens of all samples one after another, without prompts and images, `[tokens]`."""
    return torch.cat([s["input_ids"][s["labels"] != IGNORE] if isinstance(s, dict) else s for s in samples])


@torch.no_grad()
def generate_windows(model, tokenizer, n: int, seqlen: int, seed: int) -> Tensor:
    """`n` sequences of `seqlen` tokens sampled from the model itself at temperature 1, `[n, seqlen]`.

    Source: Williams et al. 2024, Ji et al. 2025. They start at the model's first token; an end of text is
    a token like any other.
    """
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=seqlen - 1,
        pad_token_id=start,
        eos_token_id=None,
    )
    own_config, model.generation_config = model.generation_config, config  # else its end-of-text token is used
    windows = []
    try:
        with torch.random.fork_rng(), tqdm(total=n, desc="generating", unit="sample", disable=None) as bar:
            torch.manual_seed(seed)
            while len(windows) < n:
                first = torch.full((min(GENERATED_AT_ONCE, n - len(windows)), 1), start, device=model.device)
                windows.extend(model.generate(first, attention_mask=torch.ones_like(first)).cpu())
                bar.update(len(first))
    finally:
        model.generation_config = own_config
    return torch.stack(windows)


def held_out_windows(
    calibration: Calibration, model, tokenizer, seqlen: int, n: int | None, seed: int
) -> tuple[Tensor, str]:
    """What perplexity is measured on, `[windows, seqlen]`, and its name: wikitext2 test in order, without overlap.

    Where the model calibrates itself, no data set may be at hand: then its own text from another seed.
    `n` bounds the number of windows.
    """
    if calibration.name == SELF_GENERATED:
        windows = generate_windows(model, tokenizer, n or SELF_GENERATED_WINDOWS, seqlen, seed + HELD_OUT_SEED)
        return windows, "the dense model's own text, another seed"
    rows = open_split("wikitext2", "test", calibration.data_dir)
    with _reading("wikitext2", calibration.data_dir):
        ids = tokenize(tokenizer, "\n\n".join(rows["text"]))
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:n]
    if not len(windows):
        raise UserError(f"--eval_ppl: wikitext2 test has {len(ids)} tokens, fewer than one window of {seqlen}")
    return windows, "wikitext2 test"


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 of what the samples hold and its lengths: equal exactly when the samples are."""
    digest = hashlib.sha256()
    for sample in samples:
        for value in sample.values() if isinstance(sample, dict) else [sample]:
            digest.update(len(value).to_bytes(8, "little") + value.numpy().tobytes())
    return digest.hexdigest()
