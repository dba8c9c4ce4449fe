"""A data set's name -> calibration samples, and the held-out text that perplexity is measured on."""

import hashlib
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from lib import llava_data, locks
from lib.errors import UserError
from lib.rows import RowError, field, of_row, place_in, place_of, text_column, texts
from lib.tape import IGNORE, Sample
from lib.text_files import FILE_TYPES, is_text_file, read_file

SELF_GENERATED = "self_generated"
HELD_OUT_SEED = 1_000_003  # added to the seed: no calibration sample is ever measured on
SELF_GENERATED_WINDOWS = 16
GENERATED_AT_ONCE = 16


# --- one row of a set -> the text of a sample -------------------------------------------------------


def mmlu(row: dict) -> str:
    """Question, lettered choices, and the letter of the right one."""
    letters, choices = "ABCDEFGH", texts(row["choices"], "'choices'")
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices)]
    right = letters[place_in(row["answer"], len(lines), "'answer'")]
    return "\n".join([field(row, "question").strip(), *lines, f"Answer: {right}"])


def hellaswag(row: dict) -> str:
    """Activity, context and the right ending, without WikiHow's markup."""
    endings = texts(row["endings"], "'endings'")
    ending = endings[place_in(row["label"], len(endings), "'label'")]
    text = f"{field(row, 'activity_label')}: {field(row, 'ctx_a')} {field(row, 'ctx_b').capitalize()} {ending}"
    return re.sub(" +", " ", re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))).strip()


def winogrande(row: dict) -> str:
    """The sentence with the right option in the gap."""
    sentence = field(row, "sentence")
    if "_" not in sentence:
        raise ValueError("'sentence' has no gap '_'")
    right = place_of(row["answer"], "12", "'answer'") + 1
    return sentence.replace("_", field(row, f"option{right}"))


def arc(row: dict) -> str:
    """Question and the text of the right answer."""
    choices, right = arc_choices(row)
    return f"Question: {field(row, 'question')}\nAnswer: {choices[right]}"


def arc_choices(row: dict) -> tuple[list[str], int]:
    """The texts of the answers, and the place of the right one."""
    choices, labels = texts(row["choices"]["text"], "'choices'"), row["choices"]["label"]
    right = place_of(row["answerKey"], labels, "'answerKey'")
    if len(labels) != len(choices):
        raise ValueError(f"'choices' has {len(choices)} texts and {len(labels)} labels")
    return choices, right


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
    folder = Path(os.path.expanduser(data_dir)) / name
    if not _stands(folder):
        _fetch(name, folder)
    with reading(name, data_dir):
        found = load_from_disk(str(folder))
    if isinstance(found, Dataset):
        found = DatasetDict({str(found.split): found})
    if split not in found:
        raise UserError(f"--dataset {name}: {folder} has the splits {', '.join(found)}, but '{split}' is needed")
    return found[split]


def _stands(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError as error:  # a folder that one may not enter, a name too long
        raise UserError(f"--data_dir {folder.parent}: cannot be read ({error.strerror or error})") from error


@contextmanager
def reading(name: str, data_dir: str) -> Iterator[None]:
    """Turn what goes wrong while a local copy is read into a UserError that names its folder."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, RowError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"--dataset {name}: {Path(data_dir) / name} is damaged or not the set of this name "
            f"({' '.join(reason.split())[:150]}); delete it so that it is fetched again"
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


def find_calibration(name: str, data_dir: str, image_dir: str | None) -> "Calibration | CaptionedImages":
    """The data set of a value of `--dataset`. Raises UserError for one that is unknown or cannot be opened."""
    if llava_data.is_captioned(name):
        return CaptionedImages(name, data_dir, image_dir)
    return Calibration(name, data_dir)


class CaptionedImages:
    """Images with captions that have been found; its samples are for vision-language models."""

    def __init__(self, name: str, data_dir: str, image_dir: str | None):
        """Raises UserError for a JSON file or a folder of images that is missing."""
        self.name, self.data_dir, self.skipped, self.rows = name, data_dir, 0, None
        self.json_path, self.images = llava_data.locate(name, image_dir, data_dir)

    def refuse_unusable(self, n: int, seed: int) -> None:
        """Raise UserError for what needs no model: a JSON file of another form, and too few rows with an image."""
        self.rows = llava_data.read_rows(self.json_path)
        if n > len(self.rows):
            raise UserError(f"--nsamples {n}: {self.json_path} has {len(self.rows)} rows with an image")

    def samples(self, model, processor, n: int, seqlen: int, seed: int) -> list[dict[str, Tensor]]:
        """`n` samples as `llava_data.load_samples` makes them; how many rows were passed over is in `skipped`."""
        found, self.skipped = llava_data.load_samples(
            self.json_path, self.images, processor, n, seed, seqlen, self.rows
        )
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
        elif is_text_file(name):
            self.text = read_file(name)
        elif name != SELF_GENERATED:
            raise UserError(
                f"--dataset {name}: unknown; choose {', '.join([*SETS, SELF_GENERATED])}, or a "
                f"{'/'.join(FILE_TYPES)} file"
            )

    def refuse_unusable(self, n: int, seed: int) -> None:
        """Raise UserError for what needs no model: too few samples, and a row that is drawn but makes none."""
        if self.name != SELF_GENERATED:
            self._texts(n, seed)

    def samples(self, model, tokenizer, n: int, seqlen: int, seed: int) -> list[Tensor]:
        """`n` token sequences `[2 to seqlen]`, the same for the same seed, as the tokenizer begins every text.

        Raises UserError when the set has fewer samples or less text, and for a sample in which nothing is predicted.
        """
        if self.name == SELF_GENERATED:
            return list(generate_windows(model, tokenizer, n, seqlen, seed))
        found = self._texts(n, seed)
        if self.rows is None or SETS[self.name].sample is None:
            prefix = prefix_ids(tokenizer)
            return random_windows(text_ids(tokenizer, "\n\n".join(found)), n, seqlen, seed, self.name, prefix)
        samples = [last_tokens(tokenizer, text, seqlen) for text in found]
        for index, sample in zip(self._drawn(n, seed), samples, strict=True):
            if len(sample) < 2:
                raise UserError(f"--dataset {self.name}: row {index} has one token; there is nothing to predict")
        return samples

    def _texts(self, n: int, seed: int) -> list[str]:
        """One text per sample; all texts of a set that is cut into windows."""
        if self.rows is None:
            return [self.text]
        with reading(self.name, self.data_dir):
            if SETS[self.name].sample is None:
                return list(text_column(self.rows["text"]))
            drawn = self._drawn(n, seed)
            return [of_row(SETS[self.name].sample, self.rows[index], f"row {index}") for index in drawn]

    def _drawn(self, n: int, seed: int) -> list[int]:
        """The rows that become samples."""
        if n > len(self.rows):
            raise UserError(f"--nsamples {n}: {self.name} ({SETS[self.name].split}) has {len(self.rows)} samples")
        return random.Random(seed).sample(range(len(self.rows)), n)


# --- text -> tokens ---------------------------------------------------------------------------------


def text_ids(tokenizer, text: str) -> Tensor:
    """Token ids `[tokens]` of a text, without the special tokens that the tokenizer adds by itself."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def prefix_ids(tokenizer) -> Tensor:
    """The special tokens that the tokenizer puts before every text, such as BOS, `[0 or more]`.

    What it puts behind one, such as EOS, says that the text ends, which no window cut out of a text does.
    """
    whole, bare = tokenizer("a")["input_ids"], text_ids(tokenizer, "a").tolist()
    starts = range(len(whole) - len(bare) + 1)
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), 0)
    return torch.tensor(whole[:start], dtype=torch.long)


def last_tokens(tokenizer, text: str, seqlen: int) -> Tensor:
    """Token ids `[at most seqlen]` of a whole text, with the special tokens that the tokenizer adds by itself.

    Too long a text loses its beginning, since the answer stands at the end, and still starts as every text does.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) <= seqlen:
        return ids
    prefix = prefix_ids(tokenizer)
    return torch.cat([prefix, ids[-_room(seqlen, prefix) :]])


def random_windows(ids: Tensor, n: int, seqlen: int, seed: int, name: str, prefix: Tensor) -> list[Tensor]:
    """`n` different windows of `seqlen` tokens: `prefix`, and what follows a random place of `ids`.

    Raises UserError when there are not so many.
    """
    length = _room(seqlen, prefix)
    starts = len(ids) - length + 1
    if n > starts:
        raise UserError(f"--nsamples {n}: {name} has {len(ids)} tokens, too few for {n} windows of --seqlen {seqlen}")
    chosen = random.Random(seed).sample(range(starts), n)
    return [torch.cat([prefix, ids[start : start + length]]) for start in chosen]


def windows_in_order(tokenizer, text: str, seqlen: int, n: int | None, what: str) -> Tensor:
    """The first `n` (or all) windows of a text, in order and without overlap, `[windows, seqlen]`.

    Each begins with the special tokens that the tokenizer puts before a text. Raises UserError, with `what` it is,
    for a text shorter than a window.
    """
    ids, prefix = text_ids(tokenizer, text), prefix_ids(tokenizer)
    length = _room(seqlen, prefix)
    parts = ids[: len(ids) // length * length].view(-1, length)[:n]
    if not len(parts):
        raise UserError(f"{what} has {len(ids)} tokens, fewer than one window of {seqlen}")
    return torch.cat([prefix.expand(len(parts), -1), parts], dim=1)


def _room(seqlen: int, prefix: Tensor) -> int:
    """How many tokens of text a window of `seqlen` holds. Raises UserError when there are none to predict."""
    if seqlen < max(len(prefix) + 1, 2):
        raise UserError(
            f"--seqlen {seqlen}: leaves nothing to predict; the tokenizer begins every text with {len(prefix)} special "
            f"tokens, so give at least {max(len(prefix) + 1, 2)}"
        )
    return seqlen - len(prefix)


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

    Source: Williams et al. 2024, Ji et al. 2025. They start as the tokenizer begins every text, else at the model's
    first token; an end of text is a token like any other.
    """
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    prefix = prefix_ids(tokenizer)
    first = prefix if len(prefix) else torch.tensor([start])
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=_room(seqlen, first),
        pad_token_id=start,
        eos_token_id=None,
    )
    own_config, model.generation_config = model.generation_config, config  # else its end-of-text token is used
    windows = []
    try:
        with torch.random.fork_rng(), tqdm(total=n, desc="generating", unit="sample", disable=None) as bar:
            torch.manual_seed(seed)
            while len(windows) < n:
                begun = first.to(model.device).repeat(min(GENERATED_AT_ONCE, n - len(windows)), 1)
                windows.extend(model.generate(begun, attention_mask=torch.ones_like(begun)).cpu())
                bar.update(len(begun))
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
    with reading("wikitext2", calibration.data_dir):
        text = "\n\n".join(text_column(rows["text"]))
    return windows_in_order(tokenizer, text, seqlen, n, "--eval_ppl: wikitext2 test"), "wikitext2 test"


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 of what the samples hold and its lengths: equal exactly when the samples are."""
    digest = hashlib.sha256()
    for sample in samples:
        for value in sample.values() if isinstance(sample, dict) else [sample]:
            digest.update(len(value).to_bytes(8, "little") + value.numpy().tobytes())
    return digest.hexdigest()
