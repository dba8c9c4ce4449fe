"""The whole command line on tiny models: what is on disk afterwards is the pruned model, and nothing else."""

import json
import math
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import COLUMNS, CONTEXT, N_LAYERS, TINY_MODELS, fresh_environment, special_tokens, write_model
from datasets import load_from_disk
from oracle import oriented, saliencies
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from lib import builder, evaluate, options
from lib.data import Calibration

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
STRUCTURED = ("structured_afr", "structured_snip", "structured_refer_svd")
UNSTRUCTURED = ("afr", "snip", "refer_svd")


@pytest.fixture
def prune(run_cli, tiny_model, data_dir, tmp_path):
    """`prune(model, *flags)` runs the command line and returns the folder of the result.

    `model` is a family's name or a folder. Flags given last count, so that every default here can be overridden.
    """

    def run(model, *flags, to="result", run=run_cli):
        done = run(
            "--model",
            tiny_model(model) if model in TINY_MODELS else model,
            "--data_dir",
            data_dir,
            "--dtype",
            "float32",
            "--nsamples",
            4,
            "--seqlen",
            32,
            "--pruning_ratio",
            0.2,
            "--save_model",
            tmp_path / to,
            *flags,
        )
        assert (done.code, done.err) == (0, "")
        return tmp_path / to

    return run


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


def report_of(folder) -> dict:
    return json.loads((folder / "pruning.json").read_text())


def kept_neurons(folder, family) -> list[torch.Tensor]:
    """The kept indices of every layer, checked for form."""
    kept = load_file(folder / "kept_neurons.safetensors")
    family = TINY_MODELS[family]
    assert set(kept) == set(family.mlps())
    for indices in kept.values():
        assert indices.tolist() == sorted(set(indices.tolist()))
        assert 0 <= indices[0] and indices[-1] < family.width
    return [kept[name] for name in family.mlps()]


def silenced_logits(dense, family, kept):
    """Logits of the dense model when the activations of all neurons but the kept ones are zero."""
    family = TINY_MODELS[family]
    hooks = []
    for name, indices in zip(family.mlps(), kept):
        alive = torch.zeros(family.width)
        alive[indices.long()] = 1
        output = dense.get_submodule(f"{name}.{family.output}")
        hooks.append(output.register_forward_pre_hook(lambda module, args, alive=alive: (args[0] * alive,)))
    silenced = logits_of(dense)
    for hook in hooks:
        hook.remove()
    return silenced


def assert_same_logits(found, wanted):
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


# --- whole neurons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_MODELS)
def test_a_pruned_folder_loads_plainly_and_computes_the_model_with_silenced_neurons(family, prune, tiny_model):
    folder = prune(family)
    kept = kept_neurons(folder, family)
    width = round(0.8 * TINY_MODELS[family].width)
    assert [len(indices) for indices in kept] == [width] * N_LAYERS

    pruned, dense = load(folder), load(tiny_model(family))
    assert getattr(pruned.config, TINY_MODELS[family].width_field) == width
    assert not (folder / "model.bin").exists() and not list(folder.glob("*.py"))
    found = logits_of(pruned)
    assert_same_logits(found, silenced_logits(dense, family, kept))
    assert (found - logits_of(dense)).abs().max() > 1e-3 * found.abs().max()


@pytest.mark.parametrize("family", TINY_MODELS)
def test_global_pruning_keeps_exactly_the_requested_share_in_both_forms(family, prune, tiny_model):
    folder = prune(family, "--global_pruning", "--pruning_ratio", 0.47)
    kept = kept_neurons(folder, family)
    assert sum(map(len, kept)) == round(0.53 * N_LAYERS * TINY_MODELS[family].width)

    wanted = silenced_logits(load(tiny_model(family)), family, kept)
    saved = torch.load(folder / "model.bin", weights_only=False)
    assert set(saved) == {"model", "tokenizer"}
    assert_same_logits(logits_of(saved["model"]), wanted)
    assert_same_logits(logits_of(load(folder, trust_remote_code=True)), wanted)


def test_global_pruning_gives_layers_different_widths(prune):
    folder = prune("llama", "--global_pruning", "--pruning_ratio", 0.5)
    widths = [len(indices) for indices in kept_neurons(folder, "llama")]
    assert len(set(widths)) > 1
    assert report_of(folder)["widths"] == {"dense": [48, 48, 48], "kept": widths}


@pytest.mark.parametrize("flags", [[], ["--global_pruning"]])
def test_every_layer_keeps_a_neuron_at_the_highest_ratio(flags, prune):
    folder = prune("llama", "--pruning_ratio", 0.999, *flags)
    assert [len(indices) for indices in kept_neurons(folder, "llama")] == [1, 1, 1]


@pytest.mark.parametrize("flags", [[], ["--global_pruning"]])
def test_align_makes_every_width_a_multiple(flags, prune):
    # 70% of 48 is 34, nearest to 2 units of 16; 70% of 144 is 101, nearest to 6 units.
    folder = prune("llama", "--pruning_ratio", 0.3, "--align", 16, *flags)
    widths = [len(indices) for indices in kept_neurons(folder, "llama")]
    assert all(width % 16 == 0 for width in widths) and sum(widths) == 6 * 16
    assert flags or widths == [32, 32, 32]


def test_ratio_zero_saves_the_model_as_it_was(prune, tiny_model):
    folder = prune("llama", "--pruning_ratio", 0)
    dense, saved = (load_file(path / "model.safetensors") for path in (tiny_model("llama"), folder))
    assert dense.keys() == saved.keys() and all(torch.equal(dense[name], saved[name]) for name in dense)
    assert [len(indices) for indices in kept_neurons(folder, "llama")] == [48] * N_LAYERS


@pytest.mark.parametrize("flags", [[], ["--global_pruning"]])
def test_a_pruned_model_can_be_pruned_again(flags, prune, tiny_model):
    once = prune("llama", *flags, to="once")
    twice = prune(once, "--pruning_ratio", 0.5, *flags, to="twice")
    first, second = (load_file(folder / "kept_neurons.safetensors") for folder in (once, twice))
    total = sum(map(len, first.values()))
    assert sum(map(len, second.values())) == round(0.5 * total)
    # Indices of the second run count the neurons that the first one left.
    kept = [first[name][second[name].long()] for name in TINY_MODELS["llama"].mlps()]
    found = logits_of(load(twice, trust_remote_code=bool(flags)))
    assert_same_logits(found, silenced_logits(load(tiny_model("llama")), "llama", kept))


def test_a_family_whose_code_fixes_the_width_is_saved_with_code_that_does_not(prune, tmp_path):
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, **special_tokens())
    folder = prune(write_model(config, tmp_path / "bloom"))
    kept = load_file(folder / "kept_neurons.safetensors")
    dense = load(tmp_path / "bloom")
    for index, layer in enumerate(dense.transformer.h):
        alive = torch.zeros(128)
        alive[kept[f"transformer.h.{index}.mlp"].long()] = 1
        assert alive.sum() == round(0.8 * 128)
        layer.mlp.dense_4h_to_h.weight.data *= alive  # what a silenced neuron would have added
    assert_same_logits(logits_of(load(folder, trust_remote_code=True)), logits_of(dense))


# --- single weights ---------------------------------------------------------------------------------


def masks_of(folder, family) -> dict[str, list[torch.Tensor]]:
    """Per MLP the kept weights of each matrix, bool `[d_ff, d]`, from the packed bits."""
    masks = {}
    with safe_open(folder / "kept_weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(TINY_MODELS[family].mlps())
        for name in file.keys():
            shapes = json.loads(file.metadata()["projections"])[name]
            bits = np.unpackbits(file.get_tensor(name).numpy())
            sizes = [math.prod(shape) for shape in shapes.values()]
            assert 0 <= len(bits) - sum(sizes) < 8 and not bits[sum(sizes) :].any()
            pieces = np.split(bits[: sum(sizes)].astype(bool), np.cumsum(sizes)[:-1])
            masks[name] = [torch.from_numpy(p).view(*shape) for p, shape in zip(pieces, shapes.values())]
    return masks


def matrices_of(model, family) -> dict[str, list[torch.Tensor]]:
    """Per MLP each weight matrix with neurons as rows, `[d_ff, d]`; a fused one in two parts."""
    family = TINY_MODELS[family]
    found = {}
    for name in family.mlps():
        mlp = model.get_submodule(name)
        inputs = [oriented(getattr(mlp, child).weight, getattr(mlp, child), False) for child in family.inputs]
        parts = [part for matrix in inputs for part in matrix.split(family.width)]
        output = getattr(mlp, family.output)
        found[name] = [part.detach() for part in (*parts, oriented(output.weight, output, True))]
    return found


def assert_zero_exactly_where_the_masks_say(folder, family, dense_folder):
    masks = masks_of(folder, family)
    dense, pruned = load(dense_folder), load(folder)
    before, after = matrices_of(dense, family), matrices_of(pruned, family)
    for name, kept in masks.items():
        assert len(kept) == len(before[name])
        for mask, old, new in zip(kept, before[name], after[name]):
            assert torch.equal(new, old * mask) and torch.equal(new != 0, mask)
    mlp_weights = {
        f"{name}.{child}.weight"
        for name in masks
        for child in (*TINY_MODELS[family].inputs, TINY_MODELS[family].output)
    }
    others = {name: p for name, p in dense.named_parameters() if name not in mlp_weights}
    assert others and all(torch.equal(pruned.get_parameter(name), p) for name, p in others.items())


@pytest.mark.parametrize(
    "family, method",
    [
        *(("llama", method) for method in UNSTRUCTURED),
        *((family, "afr") for family in ("gemma2", "phi3", "opt", "gpt2")),
    ],
)
def test_every_matrix_loses_exactly_its_share_of_weights(family, method, prune, tiny_model):
    folder = prune(family, "--prune_method", method, "--pruning_ratio", 0.3)
    assert_zero_exactly_where_the_masks_say(folder, family, tiny_model(family))
    for masks in masks_of(folder, family).values():
        assert all(mask.sum() == round(0.7 * mask.numel()) for mask in masks)


@pytest.mark.parametrize("family, method", [*(("llama", method) for method in UNSTRUCTURED), ("phi3", "afr")])
def test_one_threshold_removes_exactly_the_share_of_all_weights(family, method, prune, tiny_model):
    folder = prune(family, "--prune_method", method, "--pruning_ratio", 0.3, "--global_pruning")
    assert_zero_exactly_where_the_masks_say(folder, family, tiny_model(family))
    masks = [mask for masks in masks_of(folder, family).values() for mask in masks]
    assert sum(int(mask.sum()) for mask in masks) == round(0.7 * sum(mask.numel() for mask in masks))
    assert len({int(mask.sum()) for mask in masks}) > 1


def test_masked_weights_leave_the_shape_of_the_model_alone(prune, tiny_model):
    folder = prune("llama", "--prune_method", "snip", "--pruning_ratio", 0.5)
    assert load(folder).config.intermediate_size == 48
    report = report_of(folder)
    assert report["widths"]["kept"] == report["widths"]["dense"] == [48] * N_LAYERS
    assert report["sparsity"]["mlp"] == pytest.approx(0.5, abs=1e-3)


def test_ratio_zero_masks_nothing(prune, tiny_model):
    folder = prune("llama", "--prune_method", "snip", "--pruning_ratio", 0)
    assert all(mask.all() for masks in masks_of(folder, "llama").values() for mask in masks)
    assert_zero_exactly_where_the_masks_say(folder, "llama", tiny_model("llama"))


# --- which neurons and weights: plain autograd, the definitions, a sort -----------------------------


def standardised(pieces):
    whole = torch.cat([p.flatten() for p in pieces])
    return [(p - whole.mean()) / whole.std() for p in pieces]


def scores_by_definition(method, neuron_score, folder, data_dir):
    """Scores of every neuron `[d_ff]` or weight `[matrices, d_ff, d]` per layer, from gradients of the whole model."""
    model = load(folder).double()
    layers = [model.get_submodule(name) for name in TINY_MODELS["llama"].mlps()]
    mlps = [([mlp.gate_proj, mlp.up_proj], mlp.down_proj, 1) for mlp in layers]
    samples = Calibration("winogrande", str(data_dir)).samples(model, AutoTokenizer.from_pretrained(folder), 4, 32, 0)

    def reduce(qs):  # 2% of 32 values is less than one, so nothing is trimmed here
        if method in UNSTRUCTURED:
            return torch.stack(qs).abs()
        column = torch.stack(qs).sum(0)
        return {
            "trimmed_mean": column.mean(1).abs(),
            "snr": column.mean(1).abs() / (column.std(1) + 1e-8),
            "abs_sum": torch.stack(qs).abs().sum((0, 2)),
        }[neuron_score]

    fo, ce = [0] * N_LAYERS, [0] * N_LAYERS
    for sample in samples:
        q = saliencies(model, mlps, sample[None])
        fo = [total + reduce(qs) for total, qs in zip(fo, q["fo"])]
        ce = [total + reduce(qs) for total, qs in zip(ce, q["ce"][0])]
    if "snip" in method:
        return ce
    if "refer_svd" in method:
        return fo
    power = 2 if method == "structured_afr" and neuron_score == "trimmed_mean" else 1
    return [a + b for a, b in zip(standardised(fo), standardised([x**power for x in ce]))]


@pytest.mark.parametrize("flags", [[], ["--global_pruning"]])
@pytest.mark.parametrize(
    "method, neuron_score",
    [*((m, "trimmed_mean") for m in STRUCTURED), ("structured_afr", "snr"), ("structured_afr", "abs_sum")],
)
def test_the_neurons_that_stay_are_those_with_the_highest_scores(
    method, neuron_score, flags, prune, tiny_model, data_dir
):
    folder = prune(
        "llama",
        "--dataset",
        "winogrande",
        "--prune_method",
        method,
        "--neuron_score",
        neuron_score,
        "--pruning_ratio",
        0.5,
        *flags,
    )
    scores = scores_by_definition(method, neuron_score, tiny_model("llama"), data_dir)
    if flags:
        lowest_kept = torch.cat(scores).topk(72).values[-1]
        wanted = [(score >= lowest_kept).nonzero().flatten().tolist() for score in scores]
    else:
        wanted = [sorted(score.topk(24).indices.tolist()) for score in scores]
    assert [indices.tolist() for indices in kept_neurons(folder, "llama")] == wanted


@pytest.mark.parametrize("flags", [[], ["--global_pruning"]])
@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_the_weights_that_stay_are_those_with_the_highest_scores(method, flags, prune, tiny_model, data_dir):
    folder = prune("llama", "--dataset", "winogrande", "--prune_method", method, "--pruning_ratio", 0.5, *flags)
    scores = torch.stack(scores_by_definition(method, None, tiny_model("llama"), data_dir))  # [layers, matrices, ...]
    masks = masks_of(folder, "llama")
    kept = torch.stack([torch.stack(masks[name]) for name in TINY_MODELS["llama"].mlps()])
    groups = scores.flatten()[None] if flags else scores.flatten(2).flatten(0, 1)
    lowest_kept = groups.topk(groups.shape[1] // 2, dim=1).values[:, -1:]
    wanted = (groups >= lowest_kept).view_as(kept)
    # Scores of single weights lie so close together that rounding may swap two of them at the threshold.
    assert (wanted != kept).sum() <= 1e-3 * kept.numel()


# --- calibration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*COLUMNS, "self_generated"])
def test_every_set_calibrates_a_run(name, prune):
    report = report_of(prune("llama", "--dataset", name, "--nsamples", 5))
    assert report["data"]["set"] == name and report["data"]["samples"] == 5
    assert 5 * 2 <= report["data"]["tokens"] <= 5 * 32
    assert report["widths"]["kept"] == [38] * N_LAYERS


def test_an_own_file_calibrates_a_run(prune, tmp_path):
    (tmp_path / "own.txt").write_text("herons wait for fish under the old bridge " * 20)
    report = report_of(prune("llama", "--dataset", "own.txt"))
    assert report["data"]["tokens"] == 4 * 32


def test_samples_are_as_long_as_the_model_allows_by_default(prune, tiny_model, data_dir, run_cli, tmp_path):
    assert report_of(prune("llama", "--seqlen", 100_000))["data"]["seqlen"] == CONTEXT
    done = run_cli(
        "--model",
        tiny_model("opt"),
        "--data_dir",
        data_dir,
        "--nsamples",
        2,
        "--dtype",
        "float32",
        "--pruning_ratio",
        0.2,
        "--save_model",
        tmp_path / "default",
    )
    assert done.code == 0
    assert report_of(tmp_path / "default")["data"] | {"sha256": ""} == {
        "seqlen": CONTEXT,
        "set": "wikitext2",
        "samples": 2,
        "tokens": 2 * CONTEXT,
        "sha256": "",
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_samples_of_different_lengths_share_a_batch(family, prune):
    flags = ["--dataset", "mmlu", "--nsamples", 5, "--seqlen", 64, "--prune_method", "structured_snip"]
    one, three = (prune(family, *flags, "--batch_size", size, to=f"by-{size}") for size in (1, 3))
    # The cross-entropy counts every sample by itself, so padding and batches change nothing.
    assert [k.tolist() for k in kept_neurons(one, family)] == [k.tolist() for k in kept_neurons(three, family)]


# --- the same again ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [[], ["--global_pruning"], ["--prune_method", "afr"], ["--dataset", "self_generated"]]
)
def test_the_same_command_twice_keeps_the_same(flags, prune, run_fresh):
    first, second = prune("llama", *flags, to="first"), prune("llama", *flags, to="second", run=run_fresh)
    kept = next(path.name for path in first.glob("kept_*"))
    assert (first / kept).read_bytes() == (second / kept).read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert report_of(first)["data"] == report_of(second)["data"]


def test_another_seed_draws_other_samples(prune):
    first, second = (prune("llama", "--seed", seed, to=f"seed-{seed}") for seed in (0, 1))
    assert report_of(first)["data"]["sha256"] != report_of(second)["data"]["sha256"]


# --- what is saved ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, scoring",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--global_pruning"], ["--prune_method", "snip"]])
def test_saved_weights_are_the_checkpoints_own_whatever_scores_are_computed_in(
    own, scoring, flags, prune, tiny_model, monkeypatch
):
    monkeypatch.setattr(builder, "scoring_dtype", lambda device: scoring)
    source = tiny_model("llama", own)
    dense = load_file(source / "model.safetensors")
    assert any(not torch.equal(weight, weight.to(scoring).to(own)) for weight in dense.values()) == (
        own == torch.float32
    )

    folder = prune(source, "--dtype", "auto", *flags)
    names = {"checkpoint": own, "scoring": scoring}
    assert report_of(folder)["dtypes"] == {key: str(dtype).removeprefix("torch.") for key, dtype in names.items()}
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == dense.keys()
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(own).removeprefix("torch.")
    wanted = dict(dense)
    if "snip" in flags:
        for mlp, masks in masks_of(folder, "llama").items():
            for child, mask in zip(("gate_proj", "up_proj"), masks):
                wanted[f"{mlp}.{child}.weight"] = dense[f"{mlp}.{child}.weight"] * mask
            wanted[f"{mlp}.down_proj.weight"] = dense[f"{mlp}.down_proj.weight"] * masks[2].t()
    else:
        for mlp, kept in load_file(folder / "kept_neurons.safetensors").items():
            for child in ("gate_proj", "up_proj"):
                wanted[f"{mlp}.{child}.weight"] = dense[f"{mlp}.{child}.weight"][kept.long()]
            wanted[f"{mlp}.down_proj.weight"] = dense[f"{mlp}.down_proj.weight"][:, kept.long()]
    for tensor, weight in wanted.items():
        assert saved[tensor].dtype == own
        assert torch.equal(saved[tensor], weight), tensor


def test_a_dtype_that_is_named_is_also_saved_in(prune, tiny_model):
    folder = prune("llama", "--dtype", "bfloat16", "--pruning_ratio", 0)
    dense, saved = (load_file(path / "model.safetensors") for path in (tiny_model("llama"), folder))
    assert all(torch.equal(saved[name], weight.bfloat16()) for name, weight in dense.items())


LOADING = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
for folder in folders:
    if folder.endswith("-bin"):
        saved = torch.load(f"{folder}/model.bin", weights_only=False)
        model = saved["model"]
        assert saved["tokenizer"]("herons").input_ids[0] == 0
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.eval()(torch.load(ids)).logits.detach(), f"{folder}/logits")
"""


def test_results_load_in_another_process_without_this_project(prune, tiny_model, tmp_path):
    torch.save(IDS, tmp_path / "ids")
    folders = {}
    for family in ("llama", "opt", "gpt2"):
        folders[family, "bin"] = prune(family, "--global_pruning", "--save_format", "bin", to=f"{family}-bin")
        folders[family, "hf"] = prune(family, to=f"{family}-hf")
    environment = {name: value for name, value in fresh_environment().items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", LOADING, tmp_path / "ids", *folders.values()], env=environment, cwd=tmp_path, check=True
    )
    for (family, _), folder in folders.items():
        wanted = silenced_logits(load(tiny_model(family)), family, kept_neurons(folder, family))
        assert_same_logits(torch.load(folder / "logits"), wanted)


@pytest.mark.parametrize(
    "flags, files",
    [
        ([], {"hf"}),
        (["--global_pruning"], {"hf", "bin"}),
        (["--save_format", "bin"], {"bin"}),
        (["--save_format", "both"], {"hf", "bin"}),
        (["--global_pruning", "--save_format", "hf"], {"hf"}),
    ],
)
def test_save_format_says_which_forms_are_written(flags, files, prune):
    folder = prune("llama", *flags)
    found = {form for form, name in (("hf", "model.safetensors"), ("bin", "model.bin")) if (folder / name).exists()}
    assert found == files
    assert (folder / "config.json").exists() == ("hf" in files)
    assert (folder / "pruning.json").exists() and (folder / "kept_neurons.safetensors").exists()


def test_the_tokenizer_is_saved_with_the_model(prune, tiny_model):
    folder = prune("llama", "--save_format", "both")
    text = "seven grey herons — and a bridge"
    wanted = AutoTokenizer.from_pretrained(tiny_model("llama"))(text).input_ids
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == wanted
    assert torch.load(folder / "model.bin", weights_only=False)["tokenizer"](text).input_ids == wanted


def test_overwrite_replaces_the_whole_folder(prune, tmp_path):
    prune("llama", "--pruning_ratio", 0.5, "--save_format", "both")
    (tmp_path / "result" / "old.txt").write_text("old")
    folder = prune("llama", "--overwrite")
    assert load(folder).config.intermediate_size == 38
    assert not (folder / "old.txt").exists() and not (folder / "model.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_an_empty_folder_is_as_good_as_none(prune, tmp_path):
    (tmp_path / "result").mkdir()
    assert load(prune("llama")).config.intermediate_size == 38


def test_missing_parents_of_the_target_are_made(prune, tmp_path):
    assert load(prune("llama", to="new/deep/result")).config.intermediate_size == 38
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["result"]


def test_nothing_is_written_without_save_model(run_cli, tiny_model, data_dir, tmp_path):
    done = run_cli(
        "--model",
        tiny_model("llama"),
        "--data_dir",
        data_dir,
        "--nsamples",
        2,
        "--seqlen",
        32,
        "--dtype",
        "float32",
        "--pruning_ratio",
        0.2,
    )
    assert done.code == 0 and "--save_model" in done.out
    assert not list(tmp_path.iterdir())


# --- what is reported -------------------------------------------------------------------------------


def test_the_report_says_what_was_run_and_what_came_out(prune, run_fresh, tiny_model, data_dir, tmp_path):
    source, folder = tiny_model("llama"), tmp_path / "my results" / "llama"
    flags = [
        "--model",
        source,
        "--data_dir",
        data_dir,
        "--dtype",
        "float32",
        "--nsamples",
        4,
        "--seqlen",
        32,
        "--pruning_ratio",
        0.5,
        "--global_pruning",
        "--dataset",
        "mmlu",
        "--seed",
        7,
        "--save_model",
        folder,
    ]
    assert run_fresh(*flags).code == 0
    report = report_of(folder)
    assert shlex.split(report["command"]) == ["python", "main.py", *map(str, flags)]
    given = {
        "model": str(source),
        "prune_method": "structured_afr",
        "pruning_ratio": 0.5,
        "nsamples": 4,
        "seed": 7,
        "dataset": "mmlu",
        "cuda": False,
        "global_pruning": True,
        "neuron_score": "trimmed_mean",
        "align": 1,
        "save_model": str(folder),
        "save_format": "auto",
        "dtype": "float32",
        "batch_size": 1,
    }
    assert given.items() <= report["arguments"].items()
    assert report["versions"]["torch"] == torch.__version__ and "transformers" in report["versions"]
    assert re.fullmatch("[0-9a-f]{64}", report["data"]["sha256"])
    assert {"load", "calibrate", "score", "prune"} <= report["seconds"].keys()
    assert all(value >= 0 for value in report["seconds"].values())
    assert report["peak_memory_bytes"]["scoring"] > 2**20
    assert report["perplexity"] is None


@pytest.mark.parametrize(
    "family, per_neuron", [("llama", 3 * 32), ("gemma2", 3 * 32), ("opt", 2 * 32 + 1), ("gpt2", 2 * 24 + 1)]
)
def test_both_sparsities_are_reported(family, per_neuron, prune, tiny_model, run_cli):
    folder = prune(family, "--pruning_ratio", 0.25)
    removed = N_LAYERS * TINY_MODELS[family].width // 4
    dense = sum(p.numel() for p in load(tiny_model(family)).parameters())
    report = report_of(folder)
    assert report["parameters"] == {"dense": dense, "kept": dense - removed * per_neuron}
    assert report["sparsity"] == pytest.approx({"mlp": 0.25, "model": removed * per_neuron / dense})


def test_the_summary_names_widths_sparsities_and_the_result(run_cli, tiny_model, data_dir, tmp_path):
    done = run_cli(
        "--model",
        tiny_model("llama"),
        "--data_dir",
        data_dir,
        "--nsamples",
        2,
        "--seqlen",
        32,
        "--dtype",
        "float32",
        "--pruning_ratio",
        0.25,
        "--save_model",
        tmp_path / "result",
    )
    assert done.code == 0
    # 3 layers lose 12 neurons of 96 weights each: 3,456 of 43,744 parameters.
    for expected in (
        "48 -> 36",
        "3 layers",
        "43744 -> 40288",
        "25.00% of the MLP weights",
        "7.90% of the whole model",
        str(tmp_path / "result"),
        "evaluate",
        "structured_afr",
    ):
        assert expected in done.out
    assert len(done.out.strip().splitlines()) <= 15


def test_the_summary_gives_a_range_where_widths_differ(run_cli, prune, tiny_model, data_dir, tmp_path):
    flags = [
        "--model",
        tiny_model("llama"),
        "--data_dir",
        data_dir,
        "--nsamples",
        4,
        "--seqlen",
        32,
        "--dtype",
        "float32",
        "--pruning_ratio",
        0.5,
        "--global_pruning",
        "--save_model",
        tmp_path / "result",
    ]
    done = run_cli(*flags)
    widths = [len(indices) for indices in kept_neurons(tmp_path / "result", "llama")]
    assert f"48 -> {min(widths)} to {max(widths)}" in done.out


def plain_perplexity(model, ids, seqlen, n_windows):
    """exp of the mean negative log-likelihood of the text's tokens, behind a bos token in each window."""
    (bos, *text), nll = ids.tolist(), []
    for start in range(0, n_windows * (seqlen - 1), seqlen - 1):
        window = torch.tensor([bos, *text[start : start + seqlen - 1]])
        with torch.no_grad():
            log_p = F.log_softmax(model(window[None]).logits[0].double(), -1)
        nll += [-log_p[t, window[t + 1]] for t in range(seqlen - 1)]
    return float(torch.stack(nll).mean().exp())


@pytest.mark.parametrize(
    "flags, seqlen, bound",
    [([], 32, None), (["--eval_windows", 3], 32, 3), (["--eval_seqlen", 20, "--eval_windows", 4], 20, 4)],
)
def test_perplexity_before_and_after_is_that_of_wikitext_test(flags, seqlen, bound, prune, tiny_model, data_dir):
    folder = prune("llama", "--pruning_ratio", 0.5, "--eval_ppl", "--dataset", "winogrande", *flags)
    rows = load_from_disk(str(data_dir / "wikitext2"))["test"]["text"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny_model("llama"))("\n\n".join(rows)).input_ids)
    assert ids[0] == 0
    n_windows = bound or (len(ids) - 1) // (seqlen - 1)
    assert n_windows > 2
    found = report_of(folder)["perplexity"]
    for name, source in (("dense", tiny_model("llama")), ("pruned", folder)):
        assert found[name] == pytest.approx(plain_perplexity(load(source), ids, seqlen, n_windows), rel=1e-4)
    assert found["dense"] != pytest.approx(found["pruned"], rel=1e-3)
    for words in ("wikitext2 test", f"{n_windows} windows of {seqlen} tokens"):
        assert words in found["measured_on"]


def test_perplexity_of_self_generated_text_needs_no_set(run_cli, tiny_model, tmp_path):
    done = run_cli(
        "--model",
        tiny_model("llama"),
        "--dataset",
        "self_generated",
        "--nsamples",
        2,
        "--seqlen",
        32,
        "--dtype",
        "float32",
        "--pruning_ratio",
        0.5,
        "--eval_ppl",
        "--eval_windows",
        3,
        "--save_model",
        tmp_path / "result",
    )
    assert (done.code, done.err) == (0, "")
    found = report_of(tmp_path / "result")["perplexity"]
    # Its own text surprises the dense model least.
    assert 1 < found["dense"] < found["pruned"]
    assert f"{found['dense']:.2f} -> {found['pruned']:.2f}" in done.out


def test_the_report_stays_valid_json_when_perplexity_overflows(prune, monkeypatch):
    monkeypatch.setattr(evaluate, "perplexity", lambda *_, **__: math.inf)
    text = (prune("llama", "--eval_ppl") / "pruning.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse)["perplexity"]


def test_a_terminal_without_progress_bars_gets_no_noise(run_fresh, tiny_model, data_dir, tmp_path):
    for flags in (["--global_pruning"], ["--prune_method", "afr"], ["--dataset", "self_generated", "--eval_ppl"]):
        done = run_fresh(
            "--model",
            tiny_model("llama"),
            "--data_dir",
            data_dir,
            "--nsamples",
            2,
            "--seqlen",
            32,
            "--dtype",
            "float32",
            "--pruning_ratio",
            0.5,
            "--save_model",
            tmp_path / "result",
            "--overwrite",
            *flags,
        )
        assert (done.code, done.err) == (0, "")


# --- flags ------------------------------------------------------------------------------------------


def test_the_fixed_flags_have_their_fixed_defaults():
    args = vars(options.parse(["--model", "x"]))
    fixed = {
        "model": "x",
        "prune_method": "structured_afr",
        "pruning_ratio": 0.0,
        "nsamples": 128,
        "seed": 0,
        "dataset": "wikitext2",
        "cuda": False,
        "global_pruning": False,
        "save_model": None,
        "cache_dir": "llm_weights",
        "seqlen": None,
        "batch_size": 1,
        "dtype": "auto",
        "neuron_score": "trimmed_mean",
        "align": 1,
        "save_format": "auto",
        "data_dir": "data_local",
        "eval_ppl": False,
        "overwrite": False,
    }
    assert fixed.items() <= args.items()


def test_help_groups_and_explains_every_flag(run_fresh):
    done = run_fresh("--help")
    assert (done.code, done.err) == (0, "")
    groups = ("model:", "method:", "calibration:", "saving:", "evaluation:")
    assert [line for line in done.out.splitlines() if line in groups] == list(groups)
    parser = options.build_parser()
    for action in parser._actions:
        assert action.option_strings[-1] in done.out
        assert action.help and len(action.help.split()) >= 3
    assert all(method in done.out for method in (*STRUCTURED, *UNSTRUCTURED))
    for default in ("structured_afr", "128", "wikitext2", "llm_weights", "data_local", "trimmed_mean", "0.0", "1024"):
        assert re.search(rf"\[default:\s+{re.escape(default)}", done.out), default
