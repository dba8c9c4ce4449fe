"""Tokenizers of checkpoints that bring no `tokenizer.json`: Llama's `tokenizer.model` is read, others are named."""

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lib.errors import UserError
from lib.source_checks import Files

CORE, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# Any of these, and transformers knows what to do without a tokenizer.json.
OTHERS = re.compile(r"vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece\..*model|.*\.spm|bpe\.codes|.*vocab.*")
ADVICE = "take the checkpoint's form for transformers, or add the tokenizer.json of the model it was made from"


def read(files: Files) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint whose only one is a `tokenizer.model` as Llama has it, from that file alone.

    None where there is a `tokenizer.json`, or files of other families, or where nothing can be known of the files.
    Raises UserError for a `tokenizer.model` of another kind, for other forms that are not read, and for none at all.
    """
    what, names = f"--model {files.name}", files.names
    if CORE in names or not names:
        return None
    if SENTENCEPIECE not in names:
        if any(OTHERS.fullmatch(name) for name in names):
            return None
        other = [n for n in names if re.search(r"tekken|tiktoken|tokenizer\.model\.", n)]
        found = f"its tokenizer is {min(other)}, which is not read" if other else "holds no tokenizer (tokenizer.json)"
        raise UserError(f"{what}: {found}; {ADVICE}")
    try:
        data = files.path(SENTENCEPIECE).read_bytes()
        return _assemble(files, read_sentencepiece(data), special_tokens(data))
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(
            f"{what}: its tokenizer.model is not one like Llama's, and there is no tokenizer.json; {ADVICE} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:80]})"
        ) from error


def _assemble(files: Files, core: Tokenizer, special: dict[str, str]) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of `core` and the settings beside the `tokenizer.model`."""
    settings = files.json("tokenizer_config.json")
    given = {role: token for role, token in settings.items() if token}
    # What LlamaTokenizer of transformers 4 does where nothing is said, and Llama was trained with.
    settings = {"add_bos_token": True, "add_eos_token": False} | settings | special | given
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    for field in ("auto_map", "legacy", "use_fast", "sp_model_kwargs"):
        settings.pop(field, None)
    bos, eos = (
        [_text(settings[f"{role}_token"])] if settings[f"add_{role}_token"] and settings.get(f"{role}_token") else []
        for role in ("bos", "eos")
    )
    core.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)],
        special_tokens=[(token, core.token_to_id(token)) for token in {*bos, *eos}],
    )
    with tempfile.TemporaryDirectory(prefix="afr-st-") as folder:
        core.save(str(Path(folder) / CORE))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        for name in BESIDE:
            if name in files.names:
                shutil.copy(files.path(name), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.name_or_path = files.name
    return tokenizer


def _text(token: str | dict) -> str:
    """A token as it stands in `tokenizer_config.json`: its text, or fields that hold it."""
    return token["content"] if isinstance(token, dict) else token


def special_tokens(data: bytes) -> dict[str, str]:
    """The unknown, first and last token of a sentencepiece model, by transformers' names of their roles."""
    pieces = [dict(_fields(value))[1].decode() for number, value in _fields(data) if number == 1]
    trainer = dict(_fields(next((value for number, value in _fields(data) if number == 2), b"")))
    roles = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2)}
    ids = {role: trainer.get(field, default) for role, (field, default) in roles.items()}
    return {role: pieces[index] for role, index in ids.items() if index < len(pieces)}  # -1 is a huge number


def read_sentencepiece(data: bytes) -> Tokenizer:
    """Llama's `tokenizer.model` as a fast tokenizer, without the packages `sentencepiece` and `protobuf`.

    Source: the message `ModelProto` of sentencepiece. Raises ValueError for a model of another kind than Llama's.
    """
    normal, unknown, user_defined, byte, bpe = 1, 2, 4, 6, 2
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            kind = piece.get(3, normal)
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], kind))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    kinds = {kind for *_, kind in pieces}
    # Of the normalizer: characters to replace, a space before the text (on unless it says no), fewer spaces.
    plain = not normalizer.get(2) and normalizer.get(3, 1) and not normalizer.get(4, 1) and not trainer.get(24)
    if trainer.get(3) != bpe or not plain or byte not in kinds or user_defined in kinds:
        raise ValueError("is not a byte-fallback BPE like Llama's")
    vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
    merges = []
    for text, score, kind in pieces:
        for cut in range(1, len(text)) if kind == normal else ():
            left, right = vocabulary.get(text[:cut]), vocabulary.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-score, left, right, (text[:cut], text[cut:])))
    core = Tokenizer(
        models.BPE(
            vocabulary,
            [pair for *_, pair in sorted(merges)],
            unk_token=next(text for text, _, kind in pieces if kind == unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer message: number and value (an int, or bytes)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError("the file ends too early")
        yield number, data[at : at + size]
        at += size
