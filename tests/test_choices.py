"""Questions as lm-eval asks them, and its scores: by hand on a tiny model, by lm-eval itself where it is installed."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import choices, offline_tasks
from lib.choices import Question
from lib.errors import UserError

ARC = {
    "question": "Why?",
    "choices": {"label": ["A", "B", "C"], "text": ["So.", "Thus it is.", "No"]},
    "answerKey": "B",
}
HELLASWAG = {
    "activity_label": "Tea",
    "ctx_a": "[header] How to pour [title] Lift the  pot.",
    "ctx_b": "then",
    "endings": ["it  pours.", "[substeps] all sleep."],
    "label": "1",
}
WINOGRANDE = {"sentence": "Ann thanked Sue because _ had helped.", "option1": "Ann", "option2": "Sue", "answer": "2"}
MMLU = {"subject": "high_school_physics", "question": " What falls? ", "choices": ["a", "b", "c", "d"], "answer": 3}


# --- questions --------------------------------------------------------------------------------------


def test_arc_asks_for_the_text_of_the_answer():
    found = choices.arc_question(ARC)
    assert found.contexts == ["Question: Why?\nAnswer:"] * 3
    assert found.continuations == [" So.", " Thus it is.", " No"]
    assert (found.lengths, found.answer) == ([3, 11, 2], 1)


def test_hellaswag_loses_the_markup():
    found = choices.hellaswag_question(HELLASWAG)
    assert found.contexts[0] == "Tea: How to pour. Lift the pot. Then"
    assert found.continuations == [" it pours.", "  all sleep."]
    assert (found.lengths, found.answer) == ([9, 11], 1)


def test_winogrande_scores_what_follows_the_gap():
    found = choices.winogrande_question(WINOGRANDE)
    assert found.contexts == ["Ann thanked Sue because Ann", "Ann thanked Sue because Sue"]
    assert (found.continuations, found.lengths, found.answer) == ([" had helped."] * 2, [1, 1], 1)


def test_mmlu_asks_for_a_letter():
    found = choices.mmlu_question(MMLU)
    head = "The following are multiple choice questions (with answers) about high school physics.\n\nWhat falls?\n"
    assert found.contexts[2] == head + "A. a\nB. b\nC. c\nD. d\nAnswer:"
    assert (found.continuations, found.answer) == ([" A", " B", " C", " D"], 3)


# --- scoring ----------------------------------------------------------------------------------------


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_choice_is_the_likeliest_per_character():
    question = Question(["?"] * 3, [" a", " bb", " cccc"], [1, 2, 4], 0)
    assert choices.choose(question, torch.tensor([-3.0, -5.0, -9.0])) == 2
    assert choices.choose(question, torch.tensor([-3.0, -6.0, -12.0])) == 0  # equal: the first


def by_hand(model, tokenizer, before: str, after: str) -> float:
    ids = tokenizer(before + after)["input_ids"]
    start = len(ids) - len(choices.encode(tokenizer, before, after)[1])
    ids, cut = ids[-(model.config.max_position_embeddings + 1) :], len(ids) - model.config.max_position_embeddings - 1
    with torch.no_grad():
        probabilities = model(torch.tensor([ids[:-1]])).logits[0].softmax(-1)
    return sum(math.log(probabilities[place - 1, ids[place]]) for place in range(start - max(0, cut), len(ids)))


@pytest.mark.parametrize("batch_tokens", [4096, 20, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_likelihood_adds_the_log_probabilities_of_the_continuation(tiny_model, monkeypatch, family, batch_tokens):
    monkeypatch.setattr(choices, "BATCH_TOKENS", batch_tokens)
    model, tokenizer = loaded(tiny_model(family))
    questions = [
        Question(["the quick river", "a miller"], [" bends", " counts sacks of rye"], [1, 1], 0),
        Question(["the heron"] * 3, [" stands", " flies over the mill and the pond", " eats"], [1, 1, 1], 2),
    ]
    found = choices.log_likelihoods(model, tokenizer, questions)
    assert [len(each) for each in found] == [2, 3]
    for question, likelihoods in zip(questions, found):
        wanted = [by_hand(model, tokenizer, *pair) for pair in zip(question.contexts, question.continuations)]
        assert likelihoods.tolist() == pytest.approx(wanted, rel=1e-4)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_question_that_is_too_long_loses_its_beginning(tiny_model):
    model, tokenizer = loaded(tiny_model("llama"))
    context = " ".join(["river"] * 400)
    assert len(tokenizer(context)["input_ids"]) > model.config.max_position_embeddings
    (found,) = choices.log_likelihoods(model, tokenizer, [Question([context], [" bends"], [1], 0)])
    assert found.item() == pytest.approx(by_hand(model, tokenizer, context, " bends"), rel=1e-4)


def test_spaces_at_the_end_of_a_context_go_to_the_continuation(tiny_model):
    _, tokenizer = loaded(tiny_model("llama"))
    context, continuation = choices.encode(tokenizer, "the river ", "bends")
    assert tokenizer.decode(context, skip_special_tokens=True) == "the river"
    assert tokenizer.decode(continuation) == " bends"


def test_a_limit_is_spread_over_the_whole_set(tiny_model, data_dir, monkeypatch):
    model, tokenizer = loaded(tiny_model("llama"))
    asked = []
    def likelihoods(model, tokenizer, questions, desc):
        asked.extend(questions)
        return [torch.zeros(4)] * len(questions)

    monkeypatch.setattr(choices, "log_likelihoods", likelihoods)
    rate = choices.accuracy(model, tokenizer, "mmlu", str(data_dir), 4)
    assert len(asked) == 4
    everything = [choices.mmlu_question(row) for row in choices.open_split("mmlu", "test", str(data_dir))]
    assert asked == everything[::10]
    assert rate == sum(question.answer == 0 for question in asked) / 4


def test_an_unknown_set_is_an_error(tiny_model, data_dir):
    with pytest.raises(UserError, match="wikitext2: .*arc_easy"):
        choices.accuracy(*loaded(tiny_model("llama")), "wikitext2", str(data_dir))


def mmlu_of_herons(lm_eval) -> dict:
    """lm-eval's task for the one subject of the made-up set, from the template that all subjects share."""
    template = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / "_default_template_yaml"
    about = "The following are multiple choice questions (with answers) about herons.\n\n"
    return yaml.safe_load(template.read_text()) | {"task": "herons", "dataset_name": "herons", "description": about}


@pytest.mark.parametrize(
    "name, measure", [("arc_easy", "acc_norm"), ("hellaswag", "acc_norm"), ("winogrande", "acc"), ("mmlu", "acc")]
)
def test_lm_eval_comes_to_the_same(tiny_model, data_dir, tmp_path, monkeypatch, name, measure):
    lm_eval = pytest.importorskip("lm_eval")
    offline_tasks.prepare(data_dir, tmp_path)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded(tiny_model("llama"))
    lm = importlib.import_module("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    task = name if name != "mmlu" else mmlu_of_herons(lm_eval)
    done = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    (samples,) = done["samples"].values()
    rows = choices.open_split(name, choices.SETS[name].split, str(data_dir))
    questions = [choices.SETS[name].question(rows[sample["doc_id"]]) for sample in samples]
    for sample, found in zip(samples, choices.log_likelihoods(model, tokenizer, questions), strict=True):
        assert found.tolist() == pytest.approx([pair[0] for pair in sample["filtered_resps"]], rel=1e-4)
    (results,) = done["results"].values()
    assert choices.accuracy(model, tokenizer, name, str(data_dir)) == pytest.approx(results[f"{measure},none"])
