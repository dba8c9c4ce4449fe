"""Accuracy on multiple-choice questions, scored as lm-eval scores them: by the log-likelihood of each choice.

Questions, splits and measures are those of lm-eval's tasks of the same names, without examples in the prompt.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib.builder import context_length
from lib.data import arc_choices, open_split, reading
from lib.errors import UserError
from lib.rows import field, of_row, place_in, place_of, texts


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
    choices, answer = arc_choices(row)
    return _of_choices(f"Question: {field(row, 'question')}\nAnswer:", choices, answer)


def hellaswag_question(row: dict) -> Question:
    """Zellers et al. 2019: four endings of a scene, by length, without WikiHow's markup."""
    context = f"{field(row, 'activity_label')}: {field(row, 'ctx_a')} {field(row, 'ctx_b').capitalize()}"
    endings = texts(row["endings"], "'endings'")
    answer = place_in(row["label"], len(endings), "'label'")
    return _of_choices(_plain(context), [_plain(ending) for ending in endings], answer)


def winogrande_question(row: dict) -> Question:
    """Sakaguchi et al. 2020: what follows the gap is scored after each option, so the lengths are equal."""
    before, after = field(row, "sentence").split("_", 1)
    contexts = [before + field(row, "option1"), before + field(row, "option2")]
    return Question(contexts, [f" {after.strip()}"] * 2, [1, 1], place_of(row["answer"], "12", "'answer'"))


def mmlu_question(row: dict) -> Question:
    """Hendrycks et al. 2021: the letters of the choices, after a line that names the subject."""
    letters = "ABCD"
    choices = texts(row["choices"], "'choices'")
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    subject = field(row, "subject").replace("_", " ")
    about = f"The following are multiple choice questions (with answers) about {subject}.\n"
    context = "\n".join([about, field(row, "question").strip(), *lines, "Answer:"])
    return _of_choices(context, list(letters), place_in(row["answer"], len(letters), "'answer'"), normalised=False)


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

BATCH_TOKENS = 4096  # read at once; hidden states of a width of 4096 take 32 MB then, in two bytes


def accuracy(model: nn.Module, tokenizer, name: str, data_dir: str, limit: int | None = None) -> float:
    """Share of the questions of a set whose right choice has the highest log-likelihood per character.

    The set is one of `SETS`, found as `lib.data.open_split` finds it; of more than `limit` rows as many are asked,
    evenly spread (MMLU is sorted by subject). Per character, that is lm-eval's `acc_norm`; for winogrande and mmlu,
    where lengths do not count, its `acc`.

    Raises UserError for a set that is unknown or nowhere to be found, and for a row of another form.
    """
    if name not in SETS:
        raise UserError(f"{name}: no multiple-choice set; choose {', '.join(SETS)}")
    rows = open_split(name, SETS[name].split, data_dir)
    asked = min(limit or len(rows), len(rows))
    if not asked:
        raise UserError(f"{name}: its split '{SETS[name].split}' has no rows")
    places = [place * len(rows) // asked for place in range(asked)]
    with reading(name, data_dir):
        questions = [of_row(SETS[name].question, rows[place], f"row {place}") for place in places]
    likelihoods = log_likelihoods(model, tokenizer, questions, name)
    right = [choose(*pair) == pair[0].answer for pair in zip(questions, likelihoods, strict=True)]
    return sum(right) / len(right)


def choose(question: Question, likelihoods: Tensor) -> int:
    """The choice with the highest log-likelihood (nats) per unit of length; among equal ones the first."""
    return int((likelihoods.double() / torch.tensor(question.lengths)).argmax())


@torch.no_grad()
def log_likelihoods(model: nn.Module, tokenizer, questions: Sequence[Question], desc: str = "") -> list[Tensor]:
    """Sum of the log-probabilities (nats, float32) of each continuation's tokens after its context.

    One tensor `[choices]` per question. Choices of about one length are read together, up to `BATCH_TOKENS`.
    """
    limit = context_length(model.config) + 1
    texts = [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
    pairs = [encode(tokenizer, *pair) for pair in texts]
    # Too long a question loses its beginning.
    whole = [torch.tensor((context + continuation)[-limit:]) for context, continuation in pairs]
    found = torch.zeros(len(whole))
    with tqdm(total=len(whole), desc=desc, unit="choice", disable=None) as bar:
        for places in _batches([len(ids) for ids in whole]):
            alike, counts = [whole[place] for place in places], [len(pairs[place][1]) for place in places]
            found[places] = _summed(model, alike, counts)
            bar.update(len(places))
    return list(found.split([len(q.contexts) for q in questions]))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of sequences of about one length, the longest first, so that what does not fit shows at once."""
    left = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while left:
        size = max(1, BATCH_TOKENS // lengths[left[0]])
        yield left[:size]
        left = left[size:]


def _summed(model: nn.Module, sequences: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The log-probabilities of the last `counts` tokens of each of `sequences`, summed, `[sequences]`."""
    # The last token is only predicted, never read. Padding stands on the right, where causal attention does not
    # look, so that no mask is needed.
    read = nn.utils.rnn.pad_sequence([ids[:-1] for ids in sequences], batch_first=True).to(model.device)
    scored = [range(len(ids) - count - 1, len(ids) - 1) for ids, count in zip(sequences, counts, strict=True)]
    rows = torch.tensor([row for row, places in enumerate(scored) for _ in places])
    places = torch.tensor([place for places in scored for place in places])
    wanted = torch.cat([ids[-count:] for ids, count in zip(sequences, counts, strict=True)])
    # The head is run at the scored places alone: its logits are the largest tensor by far.
    with _before(model.get_output_embeddings(), lambda _, inputs: (inputs[0][rows, places], *inputs[1:])):
        logits = model(input_ids=read, use_cache=False).logits.float()  # [scored tokens, vocabulary]
    each = -F.cross_entropy(logits, wanted.to(logits.device), reduction="none").cpu()
    return torch.stack([piece.sum() for piece in each.split(list(counts))])


@contextmanager
def _before(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def encode(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows, cut where the tokens of the context alone end.

    Spaces at the end of the context go to the continuation, where tokenizers have them (lm-eval does the same).
    """
    stripped = context.rstrip()
    whole = tokenizer(context + continuation)["input_ids"]
    before = len(tokenizer(stripped)["input_ids"])
    return whole[:before], whole[before:]
