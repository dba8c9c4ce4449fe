"""Scores of both towers of a model that sees, against plain autograd over the whole of it."""

import dataclasses

import pytest
import torch
from oracle import oriented
from test_checkpoint import tokenizer
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lib import checkpoint
from lib.errors import UserError
from lib.mlp import LANGUAGE, VISION, find_layers, width_field
from lib.prune import METHODS, abs_sum, blocks_of, remove, score, select, select_neurons, trimmed_mean
from lib.score import saliency_sums
from lib.sums import InMemory
from lib.tape import IGNORE, Batch

IMAGE = 60
PATCHES = 4


def tiny_llava(feature_layer=-2, strategy="default"):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            vision_feature_layer=feature_layer,
            vision_feature_select_strategy=strategy,
            image_seq_length=PATCHES,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batches(n=2, size=1, tokens=PATCHES):
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(n):
        words = torch.randint(3, 50, (size, 9), generator=generator)
        ids = torch.cat([words[:, :2], torch.full((size, tokens), IMAGE), words[:, 2:]], dim=1)
        labels = ids.clone()
        labels[:, : tokens + 4] = IGNORE
        pixels = torch.randn(size, 3, 8, 8, generator=generator)
        made.append(Batch({"input_ids": ids, "pixel_values": pixels}, labels))
    return made


def mlps(model):
    vision = [layer.mlp for layer in model.model.vision_tower.encoder.layers]
    language = [layer.mlp for layer in model.model.language_model.layers]
    return [([m.fc1], m.fc2) for m in vision], [([m.gate_proj, m.up_proj], m.down_proj) for m in language]


def oracle(model, groups, batch):
    """`{"fo": Q, "ce": [Q per sample]}` over the MLPs in `groups`, first-order terms of these MLPs alone."""
    modules = [m for inputs, output in groups for m in (*inputs, output)]
    for module in modules:
        module.weight.requires_grad_(True)
    outputs = {}
    hooks = [m.register_forward_hook(lambda m, _, y: outputs.__setitem__(m, y)) for m in modules]
    logits = model(**batch.inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    first_order = sum(torch.linalg.svdvals(outputs[m].flatten(1)).mean() for m in modules)
    entropies = [F.cross_entropy(logits[s, :-1], batch.labels[s, 1:], ignore_index=IGNORE) for s in range(len(logits))]

    def q(loss):
        slopes = torch.autograd.grad(loss, [m.weight for m in modules], retain_graph=True, allow_unused=True)
        slope = {m: torch.zeros_like(m.weight) if g is None else g for m, g in zip(modules, slopes)}
        return [
            [oriented((m.weight * slope[m]).detach(), m, m is output) for m in (*inputs, output)]
            for inputs, output in groups
        ]

    result = {"fo": q(first_order), "ce": [q(entropy) for entropy in entropies]}
    for module in modules:
        module.weight.requires_grad_(False)
    return result


def assert_scores_match(model, made, layers, groups, reduce):
    wanted = [{"fo": 0, "ce": 0} for _ in groups]
    for batch in made:
        found = oracle(model, groups, batch)
        for index, total in enumerate(wanted):
            total["fo"] = total["fo"] + reduce(found["fo"][index])
            for q in found["ce"]:
                total["ce"] = total["ce"] + reduce(q[index])
    sums = dict(saliency_sums(model, layers, made, ("fo", "ce"), reduce))
    indices = sorted(index for index in sums if any(s.any() for s in sums[index].values()))
    assert len(indices) == len(groups)
    for index, want in zip(indices, wanted):
        for objective, value in want.items():
            error = (sums[index][objective] - value).abs().max() / value.abs().max()
            assert error < 3e-5, (index, objective, float(error))
    return sums


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reduce", [trimmed_mean, abs_sum])
@pytest.mark.parametrize("feature_layer, used", [(-2, 3), (-1, 4), (2, 2), ([-3, -2], 3)])
def test_scores_of_both_towers_equal_autograd_over_the_whole_model(feature_layer, used, reduce, size):
    model = tiny_llava(feature_layer)
    vision, language = mlps(model)
    sums = assert_scores_match(model, batches(size=size), find_layers(model), vision[:used] + language, reduce)
    for unused in range(used, 4):  # behind the layer whose features are used
        assert not any(s.any() for s in sums[unused].values())


def test_the_class_token_and_all_patches_can_be_features():
    model = tiny_llava(strategy="full")
    vision, language = mlps(model)
    assert_scores_match(model, batches(tokens=PATCHES + 1), find_layers(model), vision[:3] + language, abs_sum)


@pytest.mark.parametrize("tower", [LANGUAGE, VISION])
def test_one_tower_is_scored_alone(tower):
    model = tiny_llava()
    vision, language = mlps(model)
    layers = [layer if layer.tower == tower else dataclasses.replace(layer, block=None) for layer in find_layers(model)]
    assert_scores_match(model, batches(), layers, language if tower == LANGUAGE else vision[:3], abs_sum)


def test_towers_are_found_in_the_order_of_data_flow():
    layers = find_layers(tiny_llava())
    assert [layer.tower for layer in layers] == [VISION] * 4 + [LANGUAGE] * 3


def choose(model, layers, made, method, ratio, across, neuron_score="trimmed_mean"):
    sums = score(model, layers, made, method, neuron_score, InMemory())
    return select(layers, sums, method, ratio, across, neuron_score)


@pytest.mark.parametrize("across", [False, True])
def test_each_tower_keeps_its_own_share(across):
    model = tiny_llava()
    layers = find_layers(model)
    kept = choose(model, layers, batches(), METHODS["structured_afr_llava"], 0.3, across).kept
    widths = list(map(len, kept))
    if across:
        assert sum(widths[:4]) == round(0.7 * 4 * 28) and sum(widths[4:]) == round(0.7 * 3 * 50)
    else:
        assert widths == [round(0.7 * 28)] * 4 + [round(0.7 * 50)] * 3


def test_towers_are_standardised_apart():
    """Scaling one tower's scores must not move the selection in the other."""
    model = tiny_llava()
    layers = find_layers(model)
    alone = [layer if layer.tower == VISION else dataclasses.replace(layer, block=None) for layer in layers]
    method = METHODS["structured_afr_llava"]
    both = choose(model, layers, batches(), method, 0.3, True, "abs_sum").kept
    assert len(both) == 7 and len(choose(model, alone, batches(), method, 0.3, True, "abs_sum").kept) == 4


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("pruned", ["both", VISION, LANGUAGE])
def test_pruned_towers_are_saved_and_loaded(tmp_path, across, pruned):
    model = tiny_llava()
    layers = find_layers(model)
    if pruned != "both":
        layers = [x if x.tower == pruned else dataclasses.replace(x, block=None) for x in layers]
    assert all(width_field(model, layers, t) == "intermediate_size" for t in {x.tower for x in layers if x.block})
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(b.width, generator=generator) for b in blocks_of(layers)]
    remove(model, layers, select_neurons(scores, 0.3, across))
    (batch,) = batches(1)
    wanted = model(**batch.inputs).logits
    checkpoint.save(tmp_path, model, layers, tokenizer(), ["hf", "bin"])
    for found in (checkpoint.load_folder(tmp_path), checkpoint.load_bin(tmp_path)[0]):
        torch.testing.assert_close(found(**batch.inputs).logits, wanted, rtol=0, atol=0)
    if not across:
        text, vision = model.config.text_config, model.config.vision_config
        assert text.intermediate_size == (50 if pruned == VISION else 35)
        assert vision.intermediate_size == (28 if pruned == LANGUAGE else 20)
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_vision_model_with_other_stacks_is_refused():
    model = tiny_llava()
    model.model.extra = torch.nn.ModuleList([model.model.language_model.layers[0]])
    model.model.extra[0] = type(model.model.language_model.layers[0])(model.config.text_config, 0)
    with pytest.raises(UserError, match="3 stacks"):
        find_layers(model)
