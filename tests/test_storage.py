"""Weights that lie in the same memory are given their own after loading; nothing else is copied."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_llava_loading import checkpoint, reference  # noqa: F401  fixtures
from torch import nn
from transformers import AutoModelForCausalLM

from lib import builder, llava
from lib.checkpoint import load_bin
from lib.storage import overlapping, repeats_itself, unshare

LAYERS = [f"model.layers.{index}.mlp." for index in range(3)]


def of_parts(*weights):
    """A module with these weights."""
    return nn.ParameterList([nn.Parameter(weight) for weight in weights])


def test_each_of_overlapping_weights_can_be_written_alone():
    memory = torch.arange(60.0)
    views = [memory[:12].view(3, 4), memory[8:20].view(3, 4), memory[20:32].view(4, 3), memory[20:32].view(4, 3).t(),
             memory[40:44].expand(3, 4), memory[44:45].expand(3, 4), memory[50:52].view(2)]  # fmt: skip
    wanted = [view.clone() for view in views]
    model = unshare(of_parts(*views))
    for index, weight in enumerate(model):
        assert torch.equal(weight, wanted[index])
        weight.data.fill_(-index)
        wanted[index].fill_(-index)
    assert all(torch.equal(weight, value) for weight, value in zip(model, wanted, strict=True))


def test_views_that_do_not_overlap_stay_where_they_are():
    memory = torch.arange(24.0)
    model = of_parts(memory[:12].view(3, 4), memory[12:24].view(4, 3).t(), torch.empty(0), torch.ones(3))
    before = [weight.data_ptr() for weight in model]
    assert [weight.data_ptr() for weight in unshare(model)] == before
    assert before[:2] == [memory.data_ptr(), memory[12:].data_ptr()]
    assert overlapping(model) == []


def test_a_weight_that_two_modules_share_stays_one():
    head, embedding = nn.Linear(3, 4, bias=False), nn.Embedding(4, 3)
    head.weight = embedding.weight
    unshare(nn.ModuleList([head, embedding]))
    assert head.weight is embedding.weight


@pytest.mark.parametrize("shape, stride, repeats", [
    ((2, 3), (3, 1), False), ((3, 2), (1, 3), False), ((2, 3), (0, 1), True), ((2, 3), (2, 1), True),
    ((1, 3), (0, 1), False), ((4,), (2,), False), ((2, 2, 2), (4, 2, 1), False), ((2, 2), (1, 1), True),
])  # fmt: skip
def test_a_tensor_that_repeats_its_memory_is_known(shape, stride, repeats):
    assert repeats_itself(torch.arange(20.0).as_strided(shape, stride)) == repeats


# --- from a checkpoint ------------------------------------------------------------------------------


def repeat_layer(state):
    """A merge that repeats layer 1."""
    return {key: state[key.replace(LAYERS[2], LAYERS[1])] if key.startswith(LAYERS[2]) else state[key] for key in state}


def views_of_one(state):
    """All weights are views of one large tensor, those of layer 2 of the same part as those of layer 1."""
    memory, found, position = torch.cat([weight.flatten() for weight in state.values()]), {}, 0
    for key, weight in state.items():
        found[key] = memory[position : position + weight.numel()].view(weight.shape)
        position += weight.numel()
    return repeat_layer(found)


def expand_rows(state):
    """In layer 2 every neuron of up_proj is the same, written once."""
    key = LAYERS[2] + "up_proj.weight"
    return state | {key: state[key][:1].expand(len(state[key]), -1)}


@pytest.fixture
def shared_checkpoint(tiny_model, tmp_path):
    """`shared_checkpoint(change)` -> folder with a pytorch_model.bin of `change(weights)`."""

    def write(change):
        source, folder = tiny_model("llama"), tmp_path / "source"
        folder.mkdir()
        for file in source.iterdir():
            if file.suffix == ".json":
                (folder / file.name).write_bytes(file.read_bytes())
        torch.save(change(load_file(source / "model.safetensors")), folder / "pytorch_model.bin")
        return folder

    return write


@pytest.mark.parametrize("change", [repeat_layer, views_of_one, expand_rows])
def test_every_layer_loses_its_share_in_every_form(shared_checkpoint, run_cli, data_dir, tmp_path, change):
    command = ["--model", shared_checkpoint(change), "--data_dir", data_dir, "--nsamples", 2, "--seqlen", 32]
    command += ["--pruning_ratio", 0.25, "--prune_method", "afr"]
    done = run_cli(*command, "--save_format", "both", "--save_model", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    for found in (load_bin(tmp_path / "out")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        for layer in found.model.layers:
            zeros = [(p.weight == 0).float().mean().item() for p in layer.mlp.children() if hasattr(p, "weight")]
            assert zeros == pytest.approx([0.25] * 3)


@pytest.mark.parametrize("change", [repeat_layer, views_of_one, expand_rows])
def test_a_loaded_model_has_no_memory_in_common_and_the_same_values(shared_checkpoint, change, tiny_model):
    wanted = change(load_file(tiny_model("llama") / "model.safetensors"))
    model = builder.find_source(str(shared_checkpoint(change)), "unused").model()
    assert overlapping([*model.parameters(), *model.buffers()]) == []
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items() if name in wanted)


def test_tied_weights_stay_tied(tiny_model):
    model = builder.find_source(str(tiny_model("gemma2")), "unused").model()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_llava_in_pytorch_form_is_given_memory_too(checkpoint, tmp_path):  # noqa: F811
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.is_dir():
            (folder / file.name).symlink_to(file)
        elif not file.name.startswith("pytorch_model") and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    place = llava._Place(str(checkpoint), None, "test")
    state = {key: weight.clone() for key, weight in place.weights().items()}
    for key in [key for key in state if key.startswith("model.layers.1.")]:
        state[key] = state[key.replace("layers.1.", "layers.0.")]
    for file in folder.glob("*.index.json"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    model = builder.find_source(str(folder), "unused").model()
    first, second = (layer.mlp.up_proj.weight for layer in model.model.language_model.layers[:2])
    assert torch.equal(first, second) and overlapping(model.parameters()) == []
