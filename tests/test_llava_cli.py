"""A tiny LLaVA, in both forms, pruned through the command line; what is saved is loaded back and computes the same."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT, fresh_environment
from safetensors.torch import load_file
from test_llava_loading import (  # noqa: F401  fixtures
    N_IMAGE,
    PATCH,
    SIDE,
    checkpoint,
    loaded,
    picture,
    reference,
    write_data,
)
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from lib.checkpoint import load_bin

LANGUAGE_LAYERS, LANGUAGE_WIDTH, VISION_LAYERS, VISION_WIDTH = 2, 48, 3, 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data directory with a captioned set."""
    return write_data(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def converted(loaded, tmp_path_factory):  # noqa: F811
    """The same model in the form of transformers."""
    folder = tmp_path_factory.mktemp("converted") / "llava-1.5-7b-hf"
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def prune(run_cli, images, tmp_path):
    """`prune(model, *flags)` -> the folder of the result and what was printed."""

    def run(model, *flags, to="result"):
        command = [
            "--model",
            model,
            "--prune_method",
            "structured_afr_llava",
            "--data_dir",
            images,
            "--dtype",
            "float32",
        ]
        command += ["--nsamples", 4, "--pruning_ratio", 0.25, "--save_model", tmp_path / to]
        done = run_cli(*command, *flags)
        assert (done.code, done.err) == (0, "")
        return tmp_path / to, done.out

    return run


def sample(processor) -> dict:
    """What the model takes for a made-up image and a question."""
    return processor(images=picture(50, 30), text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")


def silenced_logits(model, folder, inputs):
    """Logits of the dense model with the activations of removed neurons set to zero."""
    hooks = []
    for name, kept in load_file(folder / "kept_neurons.safetensors").items():
        mlp = model.get_submodule(name)
        output = mlp.down_proj if hasattr(mlp, "down_proj") else mlp.fc2
        mask = torch.zeros(output.in_features)
        mask[kept.long()] = 1
        hooks.append(output.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
    with torch.no_grad():
        found = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return found


def widths_of(folder) -> tuple[list[int], list[int]]:
    report = json.loads((folder / "pruning.json").read_text())
    towers = report["towers"]
    kept = report["widths"]["kept"]
    return tuple([w for w, of in zip(kept, towers, strict=True) if of == tower] for tower in ("vision", "language"))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("form", ["original", "converted"])
def test_both_forms_are_pruned_and_load_everywhere(form, across, prune, checkpoint, converted, loaded):  # noqa: F811
    source = checkpoint if form == "original" else converted
    folder, out = prune(source, "--save_format", "both", *(["--global_pruning"] if across else []))
    vision, language = widths_of(folder)
    assert sum(vision) == round(0.75 * VISION_WIDTH * VISION_LAYERS)
    assert sum(language) == round(0.75 * LANGUAGE_WIDTH * LANGUAGE_LAYERS)
    if not across:
        assert len(set(vision)) == len(set(language)) == 1
    for words in ("vision MLP", "language MLP", "scored 0", "vision_tower", "lmms-eval.sh", "same logits"):
        assert words in out

    inputs = sample(loaded.processor)
    wanted = silenced_logits(loaded.model, folder, inputs)
    found = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=across or None, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    model, with_model = load_bin(folder, torch.float32)
    for pruned, maker in ((found, processor), (model, with_model)):
        again = sample(maker)
        assert all(torch.equal(again[name], value) for name, value in inputs.items())
        with torch.no_grad():
            logits = pruned.eval()(**again).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert pruned.generate(**again, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_checkpoint_as_the_original_code_saves_it_today_is_pruned_alike(prune, checkpoint, tmp_path):  # noqa: F811
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llava_llama"}))
    folders = [prune(source, to=name)[0] for source, name in ((checkpoint, "earlier"), (copy, "today"))]
    for name in ("kept_neurons.safetensors", "model.safetensors", "config.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_one_width_per_tower_is_in_the_configuration(prune, checkpoint):  # noqa: F811
    folder, _ = prune(checkpoint)
    config = LlavaForConditionalGeneration.from_pretrained(folder).config
    assert (config.text_config.intermediate_size, config.vision_config.intermediate_size) == (36, 30)


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_one_tower_is_pruned_and_the_other_left_alone(tower, prune, checkpoint, loaded):  # noqa: F811
    folder, out = prune(checkpoint, "--towers", tower)
    config = LlavaForConditionalGeneration.from_pretrained(folder).config
    wanted = (36, VISION_WIDTH) if tower == "language" else (LANGUAGE_WIDTH, 30)
    assert (config.text_config.intermediate_size, config.vision_config.intermediate_size) == wanted
    assert ("scored 0" in out) == (tower == "vision")
    untouched = "model.vision_tower" if tower == "language" else "model.language_model"
    dense, pruned = loaded.model.state_dict(), LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(pruned[name].float(), dense[name]) for name in dense if name.startswith(untouched))


def test_the_layers_that_the_model_never_uses_are_named(prune, checkpoint):  # noqa: F811
    folder, out = prune(checkpoint)
    # The features are those that leave the last but one layer.
    assert json.loads((folder / "pruning.json").read_text())["unused"] == ["model.vision_tower.encoder.layers.2.mlp"]
    assert "model.vision_tower.encoder.layers.2.mlp" in out


@pytest.mark.parametrize("across", [False, True])
def test_a_pruned_model_can_be_pruned_again(across, prune, checkpoint):  # noqa: F811
    once, _ = prune(checkpoint, *(["--global_pruning"] if across else []), to="once")
    twice, _ = prune(once, to="twice", *(["--global_pruning"] if across else []))
    for before, after in zip(widths_of(once), widths_of(twice), strict=True):
        assert sum(after) == pytest.approx(0.75 * sum(before), abs=len(before))


def test_weights_keep_the_checkpoints_own_values(prune, checkpoint, loaded):  # noqa: F811
    folder, _ = prune(checkpoint, "--dtype", "auto")
    saved, dense = load_file(folder / "model.safetensors"), loaded.model.state_dict()
    assert {weight.dtype for weight in saved.values()} == {torch.float16}
    kept = load_file(folder / "kept_neurons.safetensors")["model.vision_tower.encoder.layers.0.mlp"].long()
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float16
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(name), dense[name][kept].half())


def test_samples_of_different_lengths_are_scored_in_one_batch(prune, checkpoint):  # noqa: F811
    folder, _ = prune(checkpoint, "--batch_size", 3)
    assert json.loads((folder / "pruning.json").read_text())["data"]["samples"] == 4


def test_the_same_command_twice_keeps_the_same(prune, checkpoint):  # noqa: F811
    first, second = (prune(checkpoint, to=name)[0] for name in ("first", "second"))
    assert (first / "kept_neurons.safetensors").read_bytes() == (second / "kept_neurons.safetensors").read_bytes()


def test_damaged_images_are_counted_in_the_summary(prune, checkpoint, images, tmp_path):  # noqa: F811
    copy = shutil.copytree(images, tmp_path / "copy")
    for path in sorted((copy / "llava" / "images").rglob("*.jpg"))[:6]:
        path.write_bytes(b"")
    _, out = prune(checkpoint, "--data_dir", copy, "--nsamples", 6)
    assert "skipped" in out and "missing or damaged" in out


def test_a_json_file_and_its_images_are_a_data_set(prune, checkpoint, images, tmp_path):  # noqa: F811
    where = images / "llava"
    shutil.copy(where / "blip_laion_cc_sbu_558k.json", tmp_path / "own.json")
    by_flag, _ = prune(checkpoint, "--dataset", tmp_path / "own.json", "--image_dir", where / "images", to="own")
    by_name, _ = prune(checkpoint, to="named")
    digests = [json.loads((f / "pruning.json").read_text())["data"]["sha256"] for f in (by_flag, by_name)]
    assert digests[0] == digests[1]


def test_perplexity_and_speed_of_the_language_model_are_measured(prune, checkpoint, images, tmp_path, data_dir):  # noqa: F811
    copy = shutil.copytree(images, tmp_path / "copy")
    shutil.copytree(data_dir / "wikitext2", copy / "wikitext2")
    _, out = prune(
        checkpoint, "--data_dir", copy, "--eval_ppl", "--eval_windows", 2, "--eval_seqlen", 64, "--eval_speed"
    )
    assert "wikitext2 test, 2 windows of 64 tokens" in out and "tokens/s" in out


def test_saved_forms_load_in_a_fresh_process_without_this_repository(prune, checkpoint, loaded, tmp_path):  # noqa: F811
    folder, _ = prune(checkpoint, "--global_pruning")
    inputs = dict(sample(loaded.processor))
    torch.save({"inputs": inputs, "logits": silenced_logits(loaded.model, folder, inputs)}, tmp_path / "wanted.pt")
    program = """
        import sys, torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        folder, wanted = sys.argv[1], torch.load(sys.argv[2])
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        with torch.no_grad():
            logits = model(**wanted["inputs"]).logits
        assert torch.allclose(logits, wanted["logits"], rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
        AutoProcessor.from_pretrained(folder)
        assert "lib" not in sys.modules
        print("same")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), folder, tmp_path / "wanted.pt"],
        cwd=tmp_path,
        env={name: value for name, value in fresh_environment().items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("same\n"), done.stderr


# --- wrong input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, saying", [
    (["--dataset", "wikitext2"], ["--dataset wikitext2", "images with captions"]),
    (["--dataset", "self_generated"], ["--dataset self_generated", "images with captions"]),
    (["--dataset", "nowhere.json"], ["nowhere.json", "missing", "--image_dir"]),
    (["--image_dir", "nowhere"], ["--image_dir nowhere", "missing"]),
    (["--data_dir", "nowhere"], ["--dataset llava", "nowhere/llava", "missing"]),
    (["--towers", "ears"], ["--towers", "ears", "vision"]),
    (["--prune_method", "structured_afr"], ["--model", "structured_afr_llava"]),
    (["--prune_method", "afr"], ["--model", "structured_afr_llava"]),
    (["--prune_method", "snip", "--towers", "vision"], ["--towers vision", "structured_afr_llava"]),
    (["--prune_method", "snip", "--dataset", "llava"], ["--dataset llava", "structured_afr_llava"]),
    (["--prune_method", "snip", "--image_dir", "x"], ["--image_dir x", "structured_afr_llava"]),
    (["--nsamples", "13"], ["--nsamples 13", "12"]),
    (["--seqlen", "20"], ["--seqlen 20", "caption"]),
])  # fmt: skip
def test_wrong_input_is_one_line(flags, saying, run_cli, checkpoint, images, data_dir, tmp_path):  # noqa: F811
    method = [] if "--prune_method" in flags else ["--prune_method", "structured_afr_llava"]
    text = "--prune_method" in flags and "--dataset" not in flags
    command = [
        "--model",
        checkpoint,
        "--data_dir",
        data_dir if text else images,
        "--nsamples",
        4,
        "--pruning_ratio",
        0.2,
    ]
    done = run_cli(*command, *method, *flags, "--save_model", tmp_path / "result")
    assert_one_line(done, saying)
    assert not (tmp_path / "result").exists()


def assert_one_line(done, saying):
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    for words in saying:
        assert words in done.err


def test_a_text_model_is_refused(run_cli, tiny_model, images, tmp_path):
    command = ["--model", tiny_model("llama"), "--prune_method", "structured_afr_llava", "--data_dir", images]
    assert_one_line(run_cli(*command, "--nsamples", 2), ["--model", "vision tower", "structured_afr"])


def test_json_of_another_shape_is_refused(run_cli, checkpoint, images, tmp_path):  # noqa: F811
    (tmp_path / "own.json").write_text('[{"image": "a.jpg", "caption": "a cat"}]')
    command = ["--model", checkpoint, "--prune_method", "structured_afr_llava", "--dataset", tmp_path / "own.json"]
    done = run_cli(*command, "--image_dir", images / "llava" / "images", "--nsamples", 1)
    assert_one_line(done, ["own.json", "row 0", "conversations"])


def test_a_vision_tower_that_cannot_be_had_is_named(run_cli, checkpoint, images, tmp_path):  # noqa: F811
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(copy / "openai")
    command = ["--model", copy, "--prune_method", "structured_afr_llava", "--data_dir", images, "--nsamples", 2]
    assert_one_line(run_cli(*command), ["openai/clip-vit-large-patch14-336", "network"])


def test_numbers_of_the_tiny_model_are_what_these_tests_assume(loaded):  # noqa: F811
    assert (SIDE // PATCH) ** 2 == N_IMAGE
    assert loaded.model.config.text_config.num_hidden_layers == LANGUAGE_LAYERS
    assert loaded.model.config.vision_config.num_hidden_layers == VISION_LAYERS
    assert ROOT.is_dir()


@pytest.mark.parametrize("towers", ["language", "both"])
@pytest.mark.parametrize("across", [False, True])
def test_what_was_removed_is_compensated_and_loads_back(towers, across, prune, converted, loaded):  # noqa: F811
    flags = ["--towers", towers, "--save_format", "both", *(["--global_pruning"] if across else [])]
    folder, out = prune(converted, *flags, "--nsamples", 8, "--compensate", "auto")
    report = json.loads((folder / "pruning.json").read_text())
    found = report["compensation"]
    assert report["verified"] and "held-out samples" in out
    assert len(found["kind"]) == len(report["towers"])
    assert all(a <= b * (1 + 1e-6) for a, b in zip(found["error_after"], found["error_before"]))
    assert any(kind != "none" for kind, of in zip(found["kind"], report["towers"], strict=True) if of == "language")

    inputs = sample(loaded.processor)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=across or None, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        again = load_bin(folder, torch.float32)[0](**inputs).logits
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
