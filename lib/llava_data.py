"""Images with captions in LLaVA-Pretrain's form -> calibration samples with LLaVA v1.5's prompt."""

import json
import os
import random
import struct
import zlib
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from lib.errors import UserError
from lib.llava import conversation
from lib.rows import SURROGATE
from lib.text_files import read_text

NAME = "llava"
JSON_FILE = "blip_laion_cc_sbu_558k.json"
IMAGE_FOLDER = "images"
IGNORE = -100
ANSWER_FOLLOWS = " ASSISTANT: "
# What Pillow raises for a file that is missing, no image, cut off, or of a size that only an attack has.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
EXPECTED = (
    'a list of {"image": "00453/004539375.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, '
    '{"from": "gpt", "value": "the caption"}]}'
)


def is_captioned(dataset: str) -> bool:
    """Whether a value of `--dataset` means images with captions: `llava`, or a JSON file."""
    return dataset == NAME or dataset.lower().endswith(".json")


def locate(dataset: str, image_dir: str | None, data_dir: str) -> tuple[Path, Path]:
    """The JSON file and the folder of images that `--dataset` means: `llava` in `data_dir`, or a JSON file.

    Without `image_dir` the images are in `images` beside the JSON file. Raises UserError when either is missing.
    """
    own = Path(os.path.expanduser(data_dir)) / NAME / JSON_FILE
    path = own if dataset == NAME else Path(os.path.expanduser(dataset))
    folder = Path(os.path.expanduser(image_dir)) if image_dir else path.parent / IMAGE_FOLDER
    # Unlike those of Path these say no, and raise nothing, for a folder one may not enter and a name too long.
    if not os.path.isfile(path):
        raise UserError(
            f"--dataset {dataset}: {path} is missing; put LLaVA-Pretrain's {JSON_FILE} and its images there "
            "(liuhaotian/LLaVA-Pretrain on the Hub), or give a JSON file of that form and --image_dir"
        )
    if not os.path.isdir(folder):
        flag = f"--image_dir {image_dir}" if image_dir else f"--dataset {dataset}"
        raise UserError(
            f"{flag}: the folder of images {folder} is missing; unpack images.zip there, or give --image_dir"
        )
    return path, folder


def load_samples(
    json_path: str | Path, image_dir: str | Path, processor: LlavaProcessor, n: int, seed: int, seqlen: int,
    rows: list[dict] | None = None,
) -> tuple[list[dict[str, Tensor]], int]:
    """`n` captioned images, and how many rows were skipped: their image is missing or damaged, or nothing is trained.

    A sample holds `input_ids` `[tokens]`, `labels` `[tokens]` (-100 but on the caption and the token that ends it; not
    yet shifted) and `pixel_values` `[3, height, width]`. The end of a caption beyond `seqlen` tokens is cut off. The
    same seed draws the same rows; a row that is skipped is replaced by the next at random.

    Raises UserError for a JSON of another form, too few usable rows, and a `seqlen` that leaves no caption.
    """
    rows = read_rows(json_path) if rows is None else rows
    samples, skipped = [], 0
    for index in random.Random(seed).sample(range(len(rows)), len(rows)):
        if len(samples) == n:
            break
        human, caption = (turn["value"] for turn in rows[index]["conversations"][:2])
        trained = is_trained(processor, human, caption)
        image = open_image(Path(image_dir) / rows[index]["image"]) if trained else None
        if image is None:
            skipped += 1
        else:
            samples.append(make_sample(processor, image, human, caption, seqlen))
    if not samples:
        raise UserError(
            f"--dataset {json_path}: none of its {len(rows)} images can be read in {image_dir}; see --image_dir"
        )
    if len(samples) < n:
        raise UserError(
            f"--nsamples {n}: {json_path} has {len(samples)} rows with a caption and a readable image in {image_dir} "
            f"({skipped} of {len(rows)} are unusable)"
        )
    return samples, skipped


def read_rows(path: str | Path) -> list[dict]:
    """The rows that have an image. Raises UserError that names the first row of another form than LLaVA-Pretrain's."""
    try:
        rows = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--dataset {path}: cannot be read as JSON ({type(error).__name__}); expected {EXPECTED}"
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"--dataset {path}: holds no list; expected {EXPECTED}")
    # Mixtures for instruction tuning have rows of text alone among those with images.
    with_image = [row for row in rows if not isinstance(row, dict) or "image" in row]
    if not with_image:
        raise UserError(f"--dataset {path}: has no row with an image; expected {EXPECTED}")
    for row in with_image:
        if not _well_formed(row):
            raise UserError(f"--dataset {path}: row {rows.index(row)} has another form; expected {EXPECTED}")
    return with_image


def _well_formed(row) -> bool:
    if not (isinstance(row, dict) and isinstance(row["image"], str)):
        return False
    turns = row.get("conversations")
    if not (isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, dict) for turn in turns[:2])):
        return False
    speakers = [turn.get("from") for turn in turns[:2]]
    return speakers == ["human", "gpt"] and all(isinstance(turn.get("value"), str) for turn in turns[:2])


def open_image(path: Path) -> Image.Image | None:
    """The image, decoded, as RGB; None when it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except DAMAGED:
        return None


def make_sample(
    processor: LlavaProcessor, image: Image.Image, human: str, caption: str, seqlen: int
) -> dict[str, Tensor]:
    """One sample (see `load_samples`): the first exchange of a conversation about `image`.

    The image stands before the question, wherever the data has it, and the closing token is trained on, both as
    the original does. Raises UserError when `seqlen` leaves no token of the caption.
    """
    mark = processor.image_token
    prompt, text = _texts(processor, human, caption)
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0]  # [tokens]
    n_image = int((ids == processor.image_token_id).sum())
    before = processor.tokenizer(prompt.replace(mark, mark * n_image), return_tensors="pt")["input_ids"][0]
    start = _common_prefix(before, ids)
    if seqlen <= start:
        raise UserError(
            f"--seqlen {seqlen}: the prompt with its image takes {start} tokens already; "
            f"give more than that (1024 leaves room for the caption)"
        )
    labels = ids.clone()
    labels[:start] = IGNORE
    return {"input_ids": ids[:seqlen], "labels": labels[:seqlen], "pixel_values": inputs["pixel_values"][0]}


def _texts(processor: LlavaProcessor, human: str, caption: str) -> tuple[str, str]:
    """The prompt, and the prompt with the caption. What stands around a caption belongs to it, as in the original."""
    mark = processor.image_token
    turn = f"{mark}\n{human.replace(mark, '').strip()}".strip()
    # The original would give a caption with a mark a second image, which no row has.
    answer = caption.replace(mark, "").strip() if mark in caption else caption
    return conversation(turn), conversation(turn, answer, processor.tokenizer.eos_token)


def is_trained(processor: LlavaProcessor, human: str, caption: str) -> bool:
    """Whether a row has a caption that the original trains on.

    The original splits what it has put together at the closing token and at " ASSISTANT: "; a row with another number
    of parts, or with its padding token among the words, is masked as a whole. Half of a surrogate pair is no text.
    """
    if not caption.strip() or SURROGATE.search(human + caption):
        return False
    tokenizer, (_, text) = processor.tokenizer, _texts(processor, human, caption)
    once = text.count(tokenizer.eos_token) == text.count(ANSWER_FOLLOWS) == 1
    return once and not (tokenizer.unk_token and tokenizer.unk_token in text)


def _common_prefix(a: Tensor, b: Tensor) -> int:
    """How many first tokens are equal: the last token of a prompt may differ when text follows."""
    length = min(len(a), len(b))
    return int((a[:length] == b[:length]).long().cumprod(0).sum())
