"""Accuracy on multiple-choice questions, scored as lm-eval scores them: by the log-likelihood of each choice.

Questions, splits and measures are those of lm-eval's tasks of the same names, without examples in the prompt.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib.builder import context_length
from lib.data import open_split
from lib.errors import UserError


@dataclass(frozen=True)
class Question:
    """What stands before each choice, what is scored after it, the choices' lengths, the place of the right one."""

    contexts: list[str]
    continuations: list[str]
    lengths: list[int]
    answer: int


# --- one row of a set -> a question -----------------------------------------------------------------


def _of_choices(context: str, choices: list[str], answer: int, normalised: bool = True) -> Question:
    """Every choice follows the same context; a length is one of characters, or 1 where it does not count."""
    lengths = [len(choice) if normalised else 1 for choice in choices]
    return Question([context] * len(choices), [f" {choice}" for choice in choices], lengths, answer)


def arc_question(row: dict) -> Question:
    """Clark et al. 2018: the texts of the answers, by length."""
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return _of_choices(f"Question: {row['question']}\nAnswer:", texts, labels.index(row["answerKey"]))


def hellaswag_question(row: dict) -> Question:
    """Zellers et al. 2019: four endings of a scene, by length, without WikiHow's markup."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _of_choices(_plain(context), [_plain(ending) for ending in row["endings"]], int(row["label"]))


def winogrande_question(row: dict) -> Question:
    """Sakaguchi et al. 2020: what follows the gap is scored after each option, so the lengths are equal."""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Question(contexts, [f" {after.strip()}"] * 2, [1, 1], int(row["answer"]) - 1)


def mmlu_question(row: dict) -> Question:
    """Hendrycks et al. 2021: the letters of the choices, after a line that names the subject."""
    letters = "ABCD"
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
    about = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}.\n"
    context = "\n".join([about, row["question"].strip(), *lines, "Answer:"])
    return _of_choices(context, list(letters), int(row["answer"]), normalised=False)


@dataclass(frozen=True)
class ChoiceSet:
    """The split that is scored, and how a row becomes a question."""

    split: str
    question: Callable[[dict], Question]


SETS = {
    "arc_easy": ChoiceSet("test", arc_question),
    "arc_challenge": ChoiceSet("test", arc_question),
    "hellaswag": ChoiceSet("validation", hellaswag_question),
    "winogrande": ChoiceSet("validation", winogrande_question),
    "mmlu": ChoiceSet("test", mmlu_question),
}


def _plain(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# --- scoring ----------------------------------------------------------------------------------------


def accuracy(model: nn.Module, tokenizer, name: str, data_dir: str, limit: int | None = None) -> float:
    """Share of the questions of a set whose right choice has the highest log-likelihood per character.

    The set is one of `SETS`, found as `lib.data.open_split` finds it; of more than `limit` rows as many are asked,
    evenly spread (MMLU is sorted by subject). Per character, that is lm-eval's `acc_norm`; for winogrande and mmlu,
    where lengths do not count, its `acc`.

    Raises UserError for a set that is unknown or nowhere to be found.
    """
    if name not in SETS:
        raise UserError(f"{name}: no multiple-choice set; choose {', '.join(SETS)}")
    rows = open_split(name, SETS[name].split, data_dir)
    asked = min(limit or len(rows), len(rows))
    rows = rows.select([place * len(rows) // asked for place in range(asked)])
    questions = (SETS[name].question(row) for row in rows)
    right = [
        choose(question, log_likelihoods(model, tokenizer, question)) == question.answer
        for question in tqdm(questions, total=len(rows), desc=name, unit="question", disable=None)
    ]
    return sum(right) / len(right)


def choose(question: Question, likelihoods: Tensor) -> int:
    """The choice with the highest log-likelihood (nats) per unit of length; among equal ones the first."""
    return int((likelihoods.double() / torch.tensor(question.lengths)).argmax())


@torch.no_grad()
def log_likelihoods(model: nn.Module, tokenizer, question: Question) -> Tensor:
    """Sum of the log-probabilities (nats, float32) of each continuation's tokens after its context, `[choices]`."""
    limit = context_length(model.config) + 1
    pairs = [encode(tokenizer, *texts) for texts in zip(question.contexts, question.continuations, strict=True)]
    # Too long a question loses its beginning. The last token is only predicted, never read.
    whole = [torch.tensor((context + continuation)[-limit:]) for context, continuation in pairs]
    counts = [len(continuation) for _, continuation in pairs]
    # Padded on the right, where causal attention does not look, so that no mask is needed.
    read = nn.utils.rnn.pad_sequence([ids[:-1] for ids in whole], batch_first=True)
    first = min(len(ids) - count for ids, count in zip(whole, counts)) - 1  # the first position whose logits count
    logits = _logits(model, read.to(model.device), first)  # [choices, tokens - first, vocabulary]
    found = []
    for row, ids, count in zip(logits, whole, counts):
        predicted = row[len(ids) - count - 1 - first : len(ids) - 1 - first].float()
        found.append(-F.cross_entropy(predicted, ids[-count:].to(predicted.device), reduction="sum"))
    return torch.stack(found).cpu()


def _logits(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    """Logits from position `first` on; the head is not run on the others where the model can leave them out."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    return model(input_ids=ids, use_cache=False).logits[:, first:]


def encode(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows, cut where the tokens of the context alone end.

    Spaces at the end of the context go to the continuation, where tokenizers have them (lm-eval does the same).
    """
    stripped = context.rstrip()
    whole = tokenizer(context + continuation)["input_ids"]
    before = len(tokenizer(stripped)["input_ids"])
    return whole[:before], whole[before:]
