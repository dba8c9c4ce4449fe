"""LLaVA v1.5: both forms on disk, what they compute, the processor, and the calibration samples."""

import json
import os
import re
import struct
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lib import builder, llava, llava_data
from lib.errors import UserError

HIDDEN, SIDE, PATCH, VOCABULARY = 32, 28, 14, 320
N_IMAGE = (SIDE // PATCH) ** 2
IMAGE_ID, PAD_ID, ROWS = VOCABULARY, VOCABULARY + 1, 384  # rows: the next multiple of 64
TOWER_NAME = "openai/clip-vit-large-patch14-336"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

# The fields of the published config.json, at a tiny size.
ORIGINAL_CONFIG = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_length": 4096,
    "max_position_embeddings": 1024,
    "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": TOWER_NAME,
    "model_type": "llava",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": VOCABULARY,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
# As openai/clip-vit-large-patch14-336 has it: sizes are plain numbers there.
PREPROCESSOR = {
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}


def error_of(action) -> str:
    """The line of the UserError that `action` ends in."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a checkpoint in the original form --------------------------------------------------------------


def varint(value: int) -> bytes:
    """A number as protocol buffers write it."""
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def pieces() -> list[tuple[str, float, int]]:
    """A vocabulary laid out as Llama's: unknown, control and byte pieces, then merged pieces, then characters."""
    first = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [
        (f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)
    ]
    merged = ["▁t", "he", "▁the", "▁a", "er", "▁c", "▁ca", "▁cat", "at", "▁▁"]
    letters = list("▁abcdefghijklmnopqrstuvwxyzACEINORSTUP.,:'0123456")
    texts = merged + letters
    texts += [f"zq{number}" for number in range(VOCABULARY - len(first) - len(texts))]
    return first + [(text, -float(rank), 1) for rank, text in enumerate(texts)]


def write_sentencepiece(path: Path, model_type: int = 2) -> None:
    """A `tokenizer.model`: pieces, then the trainer's and the normaliser's settings."""
    message = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + (field(3, kind) if kind != 1 else b""))
        for text, score, kind in pieces()
    )
    message += field(2, field(3, model_type) + field(4, VOCABULARY) + field(10, 0.99995) + field(35, 1))
    path.write_bytes(message + field(3, field(1, b"identity") + field(3, 1) + field(4, 0)))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough to matter, in values that float16 holds."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_((torch.randn_like(weight) * 0.15 + (weight.ndim == 1) * 0.5).half().float())
    return module.eval().requires_grad_(False)


class Reference:
    """LLaVA v1.5 put together by hand from its parts."""

    def __init__(self):
        torch.manual_seed(0)
        names = ("hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
                 "max_position_embeddings rms_norm_eps").split(" ")  # fmt: skip
        text = {name: ORIGINAL_CONFIG[name] for name in names}
        self.llama = randomised(LlamaForCausalLM(LlamaConfig(**text, bos_token_id=1, eos_token_id=2)))
        tiny = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
                "vocab_size": 50, "max_position_embeddings": 8}  # fmt: skip
        self.clip = randomised(CLIPModel(CLIPConfig(text_config=tiny, vision_config=VISION, projection_dim=8)))
        self.first = randomised(torch.nn.Linear(24, HIDDEN))
        self.second = randomised(torch.nn.Linear(HIDDEN, HIDDEN))

    def logits(self, before: list[int], pixels: torch.Tensor, after: list[int], layer=-2, first=1) -> torch.Tensor:
        """Logits `[tokens, vocabulary]` of text, the image's features in its place, and text."""
        states = self.clip.vision_model(pixels[None], output_hidden_states=True).hidden_states
        image = self.second(torch.nn.functional.gelu(self.first(states[layer][:, first:])))  # [1, patches, hidden]
        embed = self.llama.model.embed_tokens
        whole = torch.cat([embed(torch.tensor([before])), image, embed(torch.tensor([after]))], dim=1)
        return self.llama(inputs_embeds=whole).logits[0]

    def original_state(self) -> dict[str, torch.Tensor]:
        """The tensors of an original checkpoint under its names, in float16, without the vision tower."""
        state = dict(self.llama.state_dict())
        for index in range(ORIGINAL_CONFIG["num_hidden_layers"]):
            state[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
        for place, linear in ((0, self.first), (2, self.second)):
            state[f"model.mm_projector.{place}.weight"] = linear.weight
            state[f"model.mm_projector.{place}.bias"] = linear.bias
        return {key: weight.detach().half().clone() for key, weight in state.items()}

    def contained_tower(self) -> dict[str, torch.Tensor]:
        """The vision tower under the names it has in an original checkpoint that contains it."""
        state = self.clip.vision_model.state_dict()
        return {f"model.vision_tower.vision_tower.vision_model.{key}": w.half() for key, w in state.items()}


def write_weights(folder: Path, state: dict[str, torch.Tensor], form: str) -> None:
    """The tensors as one file or two shards with an index; `form` is like 'sharded bin' or 'single safetensors'."""
    count, kind = (2 if form.startswith("sharded") else 1), form.split()[-1]
    stem = "model" if kind == "safetensors" else "pytorch_model"
    keys, where = list(state), {}
    for shard in range(count):
        name = f"{stem}-{shard + 1:05d}-of-{count:05d}.{kind}" if count > 1 else f"{stem}.{kind}"
        part = {key: state[key] for key in keys[shard::count]}
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    if count > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def write_tower(folder: Path, reference: Reference, kind: str = "published") -> Path:
    """A vision tower's folder: 'published' is a whole CLIP as openai's, 'vision' its part as transformers saves it."""
    folder.mkdir(parents=True)
    if kind == "vision":
        tower = CLIPVisionModel(reference.clip.config.vision_config)
        tower.load_state_dict(reference.clip.vision_model.state_dict())
        tower.save_pretrained(folder)
    else:
        reference.clip.config.save_pretrained(folder)
        state = dict(reference.clip.state_dict())
        state["vision_model.embeddings.position_ids"] = torch.arange(N_IMAGE + 1)[None]
        state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def write_checkpoint(folder: Path, state: dict[str, torch.Tensor], form: str = "sharded bin", **fields) -> Path:
    """An original checkpoint; `fields` change its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | fields))
    write_weights(folder, state, form)
    write_sentencepiece(folder / "tokenizer.model")
    settings = {"add_bos_token": True, "legacy": False, "model_max_length": 2048, "padding_side": "right",
                "tokenizer_class": "LlamaTokenizer", "pad_token": None}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    """An original checkpoint with its tower in a folder inside it. Never change it."""
    folder = tmp_path_factory.mktemp("llava") / "llava-v1.5-7b"
    write_tower(folder / TOWER_NAME, reference)
    return write_checkpoint(folder, reference.original_state())


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model, processor = llava.load(str(checkpoint), "unused", torch.float32)
    return SimpleNamespace(model=model, processor=processor)


def picture(width=40, height=20, seed=0) -> Image.Image:
    """A made-up image of coloured noise."""
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def compare(model, reference, **how) -> None:
    """Logits of the model equal the reference's on a text with an image in it."""
    before, after = [1, 270, 265, 280], [300, 261, 2, 290, 275]
    pixels = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    n_image = N_IMAGE + (1 - how.get("first", 1))
    ids = torch.tensor([before + [IMAGE_ID] * n_image + after])
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels[None]).logits[0]
    wanted = reference.logits(before, pixels, after, **how)
    assert found.shape == (len(before) + n_image + len(after), ROWS)
    torch.testing.assert_close(found[:, :VOCABULARY], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


# --- weights and configuration ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sharded bin", "single bin", "sharded safetensors", "single safetensors"])
@pytest.mark.parametrize("tower", ["published", "vision"])
def test_the_original_form_computes_what_its_parts_put_together_by_hand_do(form, tower, reference, tmp_path):
    # Relative to the checkpoint or absolute, a folder may be named as the tower.
    name = "clip" if form.startswith("sharded") else str(tmp_path / "checkpoint" / "clip")
    write_tower(tmp_path / "checkpoint" / "clip", reference, tower)
    folder = write_checkpoint(tmp_path / "checkpoint", reference.original_state(), form, mm_vision_tower=name)
    model, _ = llava.load(str(folder), "unused", torch.float32)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    compare(model, reference)


def test_the_layer_and_the_tokens_of_the_vision_tower_follow_the_configuration(checkpoint, reference, tmp_path):
    fields = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
    fields["mm_vision_tower"] = str(checkpoint / TOWER_NAME)
    folder = write_checkpoint(tmp_path / "other", reference.original_state(), **fields)
    model, processor = llava.load(str(folder), "unused", torch.float32)
    compare(model, reference, layer=-1, first=0)
    ids = processor(images=picture(), text="<image>", return_tensors="pt")["input_ids"]
    assert int((ids == IMAGE_ID).sum()) == N_IMAGE + 1 == model.config.image_seq_length


def test_a_tower_within_the_file_needs_neither_folder_nor_network(reference, tmp_path):
    """The tower's shape then comes from its weights; a head of OpenAI's towers is 64 wide."""
    torch.manual_seed(3)
    wide = VISION | {"hidden_size": 128, "num_attention_heads": 2}
    tiny = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = Reference()
    own.clip = randomised(CLIPModel(CLIPConfig(text_config=tiny, vision_config=wide, projection_dim=8)))
    own.first = randomised(torch.nn.Linear(128, HIDDEN))
    folder = write_checkpoint(tmp_path / "whole", own.original_state() | own.contained_tower(), mm_hidden_size=128)
    model, processor = llava.load(str(folder), str(tmp_path / "cache"), torch.float32)
    compare(model, own)
    assert processor.image_processor.crop_size.height == SIDE


def test_a_tower_within_the_file_is_preferred_to_the_one_that_is_named(checkpoint, reference, tmp_path):
    other = Reference()
    other.clip = randomised(CLIPModel(reference.clip.config))
    state = reference.original_state() | other.contained_tower()
    folder = write_checkpoint(tmp_path / "whole", state, mm_vision_tower=str(checkpoint / TOWER_NAME))
    compare(llava.load(str(folder), "unused", torch.float32)[0], other)


def test_image_and_padding_tokens_are_added_behind_the_vocabulary_as_mean_rows(loaded, reference):
    config, tokenizer = loaded.model.config, loaded.processor.tokenizer
    assert (config.image_token_index, config.text_config.pad_token_id) == (IMAGE_ID, PAD_ID)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [IMAGE_ID, PAD_ID]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD_ID, 1, 2)
    assert config.text_config.vocab_size == ROWS and loaded.model.generation_config.pad_token_id == PAD_ID
    for grown, before in (
        (loaded.model.get_input_embeddings().weight, reference.llama.model.embed_tokens.weight),
        (loaded.model.lm_head.weight, reference.llama.lm_head.weight),
    ):
        assert grown.shape[0] == ROWS and torch.equal(grown[:VOCABULARY], before)
        # The rows of a float16 checkpoint are float16 numbers.
        torch.testing.assert_close(grown[VOCABULARY:], before.mean(0).expand(64, -1), rtol=1e-3, atol=1e-4)


def test_the_configuration_says_what_the_original_one_says(loaded):
    config = loaded.model.config
    text, vision = config.text_config, config.vision_config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
                 "max_position_embeddings", "num_key_value_heads", "tie_word_embeddings"):  # fmt: skip
        assert getattr(text, name) == ORIGINAL_CONFIG[name]
    assert {name: getattr(vision, name) for name in VISION} == VISION
    assert vision.hidden_act == "quick_gelu" and config.projector_hidden_act == "gelu"
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.image_seq_length == N_IMAGE


def test_grouped_heads_and_the_rotary_base_are_taken_over(checkpoint, reference, tmp_path):
    state = reference.original_state()
    for key in list(state):
        if re.search(r"[kv]_proj", key):
            state[key] = state[key][: HIDDEN // 2].clone()
    folder = write_checkpoint(tmp_path / "gqa", state, num_key_value_heads=2, rope_theta=5000.0,
                              rope_scaling={"type": "linear", "factor": 2.0},
                              mm_vision_tower=str(checkpoint / TOWER_NAME))  # fmt: skip
    rotary = llava.load(str(folder), "unused")[0].config.text_config.rope_parameters
    assert (rotary["rope_theta"], rotary["rope_type"], rotary["factor"]) == (5000.0, "linear", 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_weights_keep_their_own_dtype_unless_another_is_asked_for(dtype, checkpoint):
    # The tower's file is float32; the checkpoint's dtype counts for the whole model.
    model, _ = llava.load(str(checkpoint), "unused") if dtype is None else llava.load(str(checkpoint), "unused", dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype or torch.float16}


def test_what_is_loaded_can_be_saved_and_loaded_in_the_form_of_transformers(loaded, reference, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    assert not llava.is_original(tmp_path)
    model, processor = llava.load(str(tmp_path), "unused")
    compare(model, reference)
    compare(LlavaForConditionalGeneration.from_pretrained(tmp_path), reference)
    text = "USER: <image>\nthe cat ASSISTANT:"
    for own in (processor, AutoProcessor.from_pretrained(tmp_path)):
        found, wanted = (p(images=picture(), text=text, return_tensors="pt") for p in (own, loaded.processor))
        assert torch.equal(found["input_ids"], wanted["input_ids"])
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])


def test_a_published_conversion_loads_and_pads_to_a_square_too(loaded, reference, tmp_path):
    """As llava-hf/llava-1.5-7b-hf: older names of the weights, and CLIP's processor, which crops."""
    loaded.model.save_pretrained(tmp_path)
    renamed = {}
    for key, weight in load_file(tmp_path / "model.safetensors").items():
        key = re.sub(r"^(model\.language_model|language_model\.model|model\.language_model\.model)\.",
                     "language_model.model.", key)  # fmt: skip
        key = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", key)
        key = re.sub(r"^model\.multi", "multi", key)
        renamed[re.sub(r"^lm_head", "language_model.lm_head", key)] = weight
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(images, loaded.processor.tokenizer).save_pretrained(tmp_path)
    model, processor = llava.load(str(tmp_path), "unused", torch.float32)
    compare(model, reference)
    found, wanted = (p(images=picture(), text="<image>", return_tensors="pt") for p in (processor, loaded.processor))
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert int((found["input_ids"] == IMAGE_ID).sum()) == N_IMAGE


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("form", ["sharded bin", "sharded safetensors"])
def test_weights_stay_mapped_from_their_files(form, checkpoint, reference, tmp_path):
    tower = str(checkpoint / TOWER_NAME)
    folder = write_checkpoint(tmp_path / "mapped", reference.original_state(), form, mm_vision_tower=tower)
    model, _ = llava.load(str(folder), "unused")
    address = model.model.language_model.layers[1].mlp.down_proj.weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith(form.split()[-1])
            return
    pytest.fail("not mapped")


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "1 missing (model.language_model.layers.1.mlp.up_proj"),
        (lambda s: s.pop("model.mm_projector.2.bias"), "1 missing (model.multi_modal_projector.linear_2.bias)"),
        (lambda s: s.pop("model.embed_tokens.weight"), "1 missing (model.language_model.embed_tokens.weight)"),
        (lambda s: s.pop("lm_head.weight"), "1 missing (lm_head.weight)"),
        (lambda s: s.update({"model.image_newline": torch.ones(4)}), "1 unexpected (model.image_newline)"),
        (lambda s: s.update({"model.norm.weight": torch.ones(4)}), "1 misshapen (model.language_model.norm.weight)"),
        (lambda s: [s.pop(key) for key in list(s) if ".layers.1." in key], "9 missing"),
    ],
)
def test_weights_that_are_missing_or_left_over_are_refused_by_name(change, said, checkpoint, reference, tmp_path):
    state = reference.original_state()
    change(state)
    folder = write_checkpoint(tmp_path / "bad", state, mm_vision_tower=str(checkpoint / TOWER_NAME))
    assert said in error_of(lambda: llava.load(str(folder), "unused"))


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_tower_with_weights_missing_or_left_over_is_refused(kind, reference, tmp_path):
    folder = write_checkpoint(tmp_path / "bad", reference.original_state(), mm_vision_tower="clip")
    tower = write_tower(folder / "clip", reference)
    state = torch.load(tower / "pytorch_model.bin")
    if kind == "missing":
        del state["vision_model.encoder.layers.2.mlp.fc1.weight"]
    else:
        state["vision_model.head.weight"] = torch.ones(3)
    torch.save(state, tower / "pytorch_model.bin")
    said = error_of(lambda: llava.load(str(folder), "unused"))
    assert f"1 {kind} (model.vision_tower." in said


def test_a_conversion_with_a_weight_missing_is_refused(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(key for key in state if "linear_2.weight" in key)
    save_file({k: w for k, w in state.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "1 missing (model.multi_modal_projector.linear_2.weight)" in error_of(
        lambda: llava.load(str(tmp_path), "unused")
    )


def test_a_tower_that_cannot_be_had_offline_is_named_with_what_to_do(reference, tmp_path):
    folder = write_checkpoint(tmp_path / "alone", reference.original_state())
    said = error_of(lambda: llava.load(str(folder), str(tmp_path / "cache")))
    assert TOWER_NAME in said and "network" in said and f"{folder}/{TOWER_NAME}" in said


@pytest.mark.parametrize("tower", ["/no/such/folder", "../clip here", None])
def test_a_tower_that_is_neither_a_folder_nor_a_hub_name_is_refused(tower, reference, tmp_path):
    folder = write_checkpoint(tmp_path / "alone", reference.original_state(), mm_vision_tower=tower)
    assert "mm_vision_tower" in error_of(lambda: llava.load(str(folder), "unused"))


def test_a_tower_that_is_no_clip_is_refused(reference, tmp_path):
    folder = write_checkpoint(tmp_path / "siglip", reference.original_state(), mm_vision_tower="tower")
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    assert "'siglip'" in error_of(lambda: llava.load(str(folder), "unused"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_projector_type", None),
        ("mm_vision_select_feature", "cls"),
        ("mm_use_im_start_end", True),
        ("image_aspect_ratio", "anyres"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("architectures", ["LlavaMistralForCausalLM"]),
    ],
)
@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_other_llavas_are_refused_by_what_is_different(kind, name, value, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | {"model_type": kind, name: value}))
    for action in (lambda: llava.load(str(tmp_path), "unused"), builder.find_source(str(tmp_path), "unused").config):
        said = error_of(action)
        assert str(value[0] if isinstance(value, list) else value) in said and "v1.5" in said


@pytest.mark.parametrize("kind, more", [
    ("llava", {}), ("llava_llama", {}), ("llava_llama", {"architectures": None, "mm_vision_tower": TOWER_NAME}),
])  # fmt: skip
def test_the_raw_configuration_says_what_a_folder_is_before_transformers_does(kind, more, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | {"model_type": kind} | more))
    config = builder.find_source(str(tmp_path), "unused").config()
    assert llava.is_llava(config)
    builder.refuse_unsupported("it", config, sees=True)
    assert "structured_afr_llava" in error_of(lambda: builder.refuse_unsupported("it", config, sees=False))


@pytest.mark.parametrize("model_type, architecture", [
    ("llava_mistral", "LlavaMistralForCausalLM"), ("llava_mpt", "LlavaMptForCausalLM"),
    ("llava_qwen", "LlavaQwenForCausalLM"),
])  # fmt: skip
@pytest.mark.parametrize("named", [{}, {"mm_vision_tower": None}])
def test_llavas_on_other_language_models_are_refused_by_their_class(model_type, architecture, named, tmp_path):
    fields = ORIGINAL_CONFIG | {"model_type": model_type, "architectures": [architecture]} | named
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert f"is a {architecture}" in error_of(builder.find_source(str(tmp_path), "unused").config)


@pytest.mark.parametrize("files, said", [
    (["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"], "merge"),
    (["adapter_config.json", "adapter_model.safetensors"], "merge"),
    (["non_lora_trainables.bin"], "merge"),
    (["mm_projector.bin"], "holds a projector"),
])  # fmt: skip
def test_parts_of_a_llava_are_named_as_such(files, said, tmp_path):
    # As the original's training saves them: the class is still the language model's.
    fields = ORIGINAL_CONFIG | {"model_type": "llava_llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for name in files:
        (tmp_path / name).write_text("{}")
    for action in (lambda: llava.load(str(tmp_path), "unused"), builder.find_source(str(tmp_path), "unused").config):
        assert said in error_of(action) and "no whole model" in error_of(action)


def test_a_whole_checkpoint_with_a_part_beside_it_loads(checkpoint, reference, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    for name in ("mm_projector.bin", "non_lora_trainables.bin"):
        (folder / name).write_text("left over from training")
    compare(llava.load(str(folder), "unused", torch.float32)[0], reference)


@pytest.mark.parametrize("name, value", [
    ("mm_vision_tower", 5), ("mm_vision_tower", ["clip"]), ("mm_vision_select_layer", 99),
    ("mm_vision_select_layer", -5), ("mm_vision_select_layer", "last"), ("mm_vision_select_layer", None),
    ("mm_projector_type", ["mlp2x_gelu"]), ("bos_token_id", "a"), ("eos_token_id", 10**6), ("vocab_size", "many"),
    ("rope_scaling", 7), ("num_attention_heads", 0), ("hidden_size", -3), ("max_position_embeddings", "x"),
])  # fmt: skip
def test_a_value_of_a_wrong_kind_is_one_line(name, value, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    assert name in error_of(lambda: llava.load(str(folder), "unused")) or "config.json" in error_of(
        lambda: llava.load(str(folder), "unused")
    )


def test_a_layer_that_a_conversions_tower_has_not_is_one_line(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layer in (99, -5, [-2, 99]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": layer}))
        assert "vision_feature_layer" in error_of(lambda: llava.load(str(tmp_path), "unused"))


def test_text_models_and_folders_without_a_model_are_refused(reference, tmp_path):
    assert "config.json" in error_of(lambda: llava.load(str(tmp_path), "unused"))
    reference.llama.config.save_pretrained(tmp_path)
    said = error_of(lambda: llava.load(str(tmp_path), "unused"))
    assert "is no LLaVA" in said and "'llama'" in said
    assert "network" in error_of(lambda: llava.load("liuhaotian/llava-v1.5-7b", str(tmp_path / "cache")))


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint whose own files can be changed."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(checkpoint / TOWER_NAME)}))
    return folder


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("damage", ["missing", "cut off", "hostile", "not tensors", "no index", "nothing"])
def test_damaged_files_are_refused_by_name_and_nothing_in_them_runs(damage, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy_of(checkpoint, tmp_path / "copy")
    shard = folder / "pytorch_model-00002-of-00002.bin"
    said = shard.name
    if damage == "missing":
        shard.unlink()
    elif damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:3000])
    elif damage == "no index":
        (folder / "pytorch_model.bin.index.json").write_text("{}")
        said = "weight_map"
    elif damage == "nothing":
        (folder / "pytorch_model.bin.index.json").unlink()
        said = "no weights"
    else:
        torch.save(Hostile() if damage == "hostile" else {"a": 1}, shard)
    assert said in error_of(lambda: llava.load(str(folder), "unused"))
    assert not (tmp_path / "hostile-was-here").exists()


def test_a_file_from_before_torch_archives_is_read(checkpoint, reference, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    for shard in folder.glob("*.bin"):
        torch.save(torch.load(shard), shard, _use_new_zipfile_serialization=False)
    compare(llava.load(str(folder), "unused", torch.float32)[0], reference)


def test_a_configuration_with_values_of_a_wrong_kind_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    assert "config.json" in error_of(lambda: llava.load(str(folder), "unused"))
    (folder / "config.json").write_text("{")
    assert "config.json" in error_of(lambda: llava.load(str(folder), "unused"))


# --- which form -------------------------------------------------------------------------------------


def test_the_two_forms_are_told_apart_and_from_other_models(checkpoint, loaded, reference):
    assert llava.is_original(checkpoint) and llava.is_original(ORIGINAL_CONFIG)
    assert llava.is_original({k: v for k, v in ORIGINAL_CONFIG.items() if k != "architectures"})
    converted = loaded.model.config
    assert llava.is_llava(converted) and llava.is_llava(converted.to_dict())
    assert not llava.is_original(converted.to_dict())
    assert llava.is_llava(ORIGINAL_CONFIG) and llava.is_llava(ORIGINAL_CONFIG | {"model_type": "llava_llama"})
    assert llava.is_llava(AutoConfig.from_pretrained(checkpoint))
    for other in (reference.llama.config, reference.clip.config, {"model_type": "llava_next", "text_config": {}}):
        assert not llava.is_llava(other)


# --- tokenizer --------------------------------------------------------------------------------------

ORDER = [text for text, _, _ in pieces()]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("the cat", ["▁the", "▁cat"]),
        ("at the", ["▁a", "t", "▁the"]),
        # A dummy space starts every piece of text, also behind an image.
        ("the<image>\ncat", ["▁the", "<image>", "▁", "<0x0A>", "c", "at"]),
        ("USER: <image>", ["▁", "U", "S", "E", "R", ":", "▁", "<image>"]),
        (" the", ["▁", "▁the"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("<image>", ["<image>"]),
        ("<image><image> the", ["<image>", "<image>", "▁", "▁the"]),
        ("<image> <image>\ncat", ["<image>", "▁▁", "<image>", "▁", "<0x0A>", "c", "at"]),
        # No other special token adds a space, and none of them is followed by one.
        ("at</s>the", ["▁a", "t", "</s>", "t", "he"]),
        ("at</s> the", ["▁a", "t", "</s>", "▁the"]),
        ("</s>the", ["</s>", "t", "he"]),
        ("<image></s>the", ["<image>", "</s>", "t", "he"]),
        ("<image>the</s>cat", ["<image>", "▁the", "</s>", "c", "at"]),
    ],
)
def test_a_sentencepiece_model_is_read_without_its_package(text, wanted, loaded, reloaded):
    for tokenizer in (loaded.processor.tokenizer, reloaded.tokenizer):
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *(IMAGE_ID if piece == "<image>" else ORDER.index(piece) for piece in wanted)]
        assert tokenizer.decode(ids[1:]).replace("<image> ", "<image>") == text


@pytest.fixture(scope="module")
def reloaded(loaded, tmp_path_factory):
    """The processor as others load it, after it was saved."""
    folder = tmp_path_factory.mktemp("processor")
    loaded.model.config.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("legacy", [True, None])
def test_a_tokenizer_made_the_older_way_puts_a_space_behind_every_special_token(legacy, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    tokenizer = llava.load(str(folder), "unused")[1].tokenizer
    found = tokenizer("at</s>the<image>\ncat")["input_ids"]
    wanted = ["▁a", "t", "</s>", "▁the", "<image>", "▁", "<0x0A>", "c", "at"]
    assert found == [1, *(IMAGE_ID if piece == "<image>" else ORDER.index(piece) for piece in wanted)]


def test_a_tokenizer_json_is_read_as_it_stands(checkpoint, loaded, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    (folder / "tokenizer.model").unlink()
    core = loaded.processor.tokenizer.backend_tokenizer.to_str()
    bare = json.loads(core)
    bare["added_tokens"] = [token for token in bare["added_tokens"] if token["id"] < VOCABULARY]
    bare["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    tokenizer = llava.load(str(folder), "unused")[1].tokenizer
    text = "USER: <image>\nthe cat sat ASSISTANT:"
    assert tokenizer(text)["input_ids"] == loaded.processor.tokenizer(text)["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (PAD_ID, 2048)


@pytest.mark.parametrize("damage", ["other kind", "cut off", "missing"])
def test_a_tokenizer_that_cannot_be_read_is_refused(damage, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    path = folder / "tokenizer.model"
    if damage == "other kind":
        write_sentencepiece(path, model_type=1)
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    assert "tokenizer.model" in error_of(lambda: llava.load(str(folder), "unused"))


def test_the_chat_template_is_the_prompt_of_v1_5(loaded):
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    text = loaded.processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"


# --- images -----------------------------------------------------------------------------------------


def by_hand(image: Image.Image, pad: bool) -> torch.Tensor:
    """CLIP's preprocessing of an image `[3, SIDE, SIDE]`, after centring it on a square of the mean colour."""
    mean, std = (torch.tensor(PREPROCESSOR[name])[:, None, None] for name in ("image_mean", "image_std"))
    if pad:
        side = max(image.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    scale = SIDE / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    pixels = torch.tensor(list(image.crop((left, top, left + SIDE, top + SIDE)).tobytes()))
    return (pixels.view(SIDE, SIDE, 3).permute(2, 0, 1) / 255 - mean) / std


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (33, 33), (3, 56)])
def test_images_are_padded_to_a_square_with_the_mean_colour(size, loaded):
    image = picture(*size)
    found = loaded.processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, by_hand(image, pad=True), rtol=0, atol=1e-5)


def test_the_border_of_a_wide_image_is_grey_and_its_middle_is_whole(loaded):
    image = Image.new("RGB", (2 * SIDE, SIDE), (255, 0, 0))
    found = loaded.processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    assert (found[:, : SIDE // 4 - 2].abs() < 0.02).all()  # the mean colour is zero after normalisation
    red = torch.tensor([(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711])
    middle = found[:, SIDE // 4 + 2 : SIDE * 3 // 4 - 2]
    torch.testing.assert_close(middle, red[:, None, None].expand_as(middle), rtol=0, atol=1e-4)


def test_a_checkpoint_made_without_padding_crops(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["image_aspect_ratio"]
    (folder / "config.json").write_text(json.dumps(config))
    processor = llava.load(str(folder), "unused")[1]
    found = processor(images=picture(56, 28), text="<image>", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, by_hand(picture(56, 28), pad=False), rtol=0, atol=1e-5)


# --- beside the original's own tokens and labels ----------------------------------------------------

BYTES = {bytes([byte]): f"<0x{byte:02X}>" for byte in range(256)}
SCORES = {text: score for text, score, _ in pieces()}
SPECIAL = re.compile("(<s>|</s>|<unk>)")


def sentencepieces(text: str) -> list[str]:
    """SentencePiece's BPE by hand: of all neighbours the best piece is merged, the first one among equals."""
    parts = list(text.replace(" ", "▁"))
    while pairs := [(-SCORES[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in SCORES]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = ([part] if part in SCORES else [BYTES[bytes([byte])] for byte in part.encode()] for part in parts)
    return [unit for units in spelled for unit in units]


def own_tokens(chunk: str) -> list[int]:
    """Llama's slow tokenizer with `legacy: false`: one space before a text that begins with no special token."""
    found = []
    for place, part in enumerate(SPECIAL.split(chunk)):
        found += [part] if place % 2 else sentencepieces(f"▁{part}" if part and place == 0 else part)
    return [1, *map(ORDER.index, found)]


def own_image_tokens(prompt: str) -> list[int]:
    """The original's tokens of a prompt: each piece between images is tokenised as a text; an image is -200."""
    chunks = [own_tokens(chunk) for chunk in prompt.split("<image>")]
    return chunks[0] + [index for chunk in chunks[1:] for index in (-200, *chunk[1:])]


def own_labels(prompt: str) -> list[int]:
    """The original's labels of a conversation of one exchange, -100 where nothing is trained."""
    ids, labels = own_image_tokens(prompt), own_image_tokens(prompt)
    at, total = 1, sum(index != 0 for index in ids)  # it pads with <unk>, 0
    labels[0] = -100
    for exchange in prompt.split("</s>"):
        parts = exchange.split(" ASSISTANT: ")
        if exchange == "" or len(parts) != 2:
            break
        asked = len(own_image_tokens(f"{parts[0]} ASSISTANT: ")) - 2
        labels[at : at + asked] = [-100] * asked
        at += len(own_image_tokens(exchange))
    labels[at:] = [-100] * (len(labels) - at)
    return labels if at == total else [-100] * len(labels)


def expanded(values: list[int], ids: list[int], image: int) -> list[int]:
    """Values of tokens, with one of an image's mark as many times as it has patches."""
    return [v for value, i in zip(values, ids) for v in ([image] * N_IMAGE if i == -200 else [value])]


ASKED = ["<image>", "<image>\nwhat is this?", "what is this?\n<image>", "  <image> what is it?  "]
ANSWERED = [
    "the cat", " the cat", "  the cat ", "the cat\n", "\nthe cat", "the cat sat.  ", "été à la mer", "a ASSISTANT: b",
    "the</s>cat", "</s>", "the cat</s>", "<s>the cat", "the <unk> cat", "ASSISTANT: the cat", "the cat ASSISTANT:",
]  # fmt: skip


@pytest.mark.parametrize("human", [*ASKED, "<image>\nwhat</s> is it?", "<image> ASSISTANT: what?"])
@pytest.mark.parametrize("answered", ANSWERED)
def test_a_row_has_the_originals_tokens_and_labels_or_is_passed_over(human, answered, loaded, reloaded):
    turn = human.replace("<image>", "").strip()
    prompt = f"{SYSTEM} USER: " + f"<image>\n{turn}".strip() + f" ASSISTANT: {answered}</s>"
    ids, labels = own_image_tokens(prompt), own_labels(prompt)
    for processor in (loaded.processor, reloaded):
        assert llava_data.is_trained(processor, human, answered) == any(label != -100 for label in labels)
        sample = llava_data.make_sample(processor, picture(), human, answered, 4096)
        assert sample["input_ids"].tolist() == expanded(ids, ids, IMAGE_ID)
        if any(label != -100 for label in labels):
            assert sample["labels"].tolist() == expanded(labels, ids, -100)


@pytest.fixture(scope="module")
def published(loaded, tmp_path_factory) -> Path:
    """A conversion whose tokenizer is named as in the published ones, so that transformers makes it anew."""
    folder = tmp_path_factory.mktemp("published")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_published_conversion_has_the_originals_tokens_too(published, tmp_path):
    processor = llava.load(str(published), "unused")[1]
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    for maker in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert (maker.tokenizer.pad_token_id, maker.tokenizer.padding_side) == (PAD_ID, "left")
        for question in ("<image>\nthe cat", "<image> <image>\nthe cat", " the</s>cat", "a\n"):
            prompt = f"{SYSTEM} USER: {question} ASSISTANT:  the cat</s>"
            ids = own_image_tokens(prompt)
            shown = [picture()] * question.count("<image>") or None
            found = maker(images=shown, text=prompt, return_tensors="pt")["input_ids"][0]
            assert found.tolist() == expanded(ids, ids, IMAGE_ID)


def test_rows_that_the_original_masks_and_half_surrogate_pairs_are_counted_as_skipped(loaded, tmp_path):
    write_data(tmp_path, 8)
    rows = read_rows(tmp_path)
    for row, words_ in zip(rows, ["a</s>b", "an ASSISTANT: b", "cut off \ud83d", "<unk>"], strict=False):
        row["conversations"][1]["value"] = words_
    rows[4]["conversations"][0]["value"] = "<image>\n\udc00"
    rows[5]["image"] = "\ud83d.jpg"
    write_rows(tmp_path, rows)
    assert {caption(s, loaded.processor)[-5] for s in draw(tmp_path, loaded.processor, 2)[0]} == {"6", "7"}
    assert "6 of 8 are unusable" in error_of(lambda: draw(tmp_path, loaded.processor, 3))


def test_a_json_with_a_byte_order_mark_or_an_upper_case_suffix_is_read(tmp_path, monkeypatch):
    write_data(tmp_path, 2)
    path = tmp_path / "llava" / "OWN.JSON"
    path.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "llava" / "blip_laion_cc_sbu_558k.json").read_bytes())
    assert len(llava_data.read_rows(path)) == 2 and llava_data.is_captioned(str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert llava_data.locate("~/llava/OWN.JSON", "~/llava/images", "x") == (path, tmp_path / "llava" / "images")
    assert llava_data.locate("llava", None, "~")[1] == tmp_path / "llava" / "images"
    assert "missing" in error_of(lambda: llava_data.locate("x" * 300 + ".json", None, "x"))


# --- calibration samples ----------------------------------------------------------------------------

QUESTIONS = ["Provide a brief description of the given image.\n<image>", "<image>\nWhat is this?", "<image>"]


def write_data(folder: Path, n: int = 12) -> Path:
    """LLaVA-Pretrain's layout in `folder/llava`: `n` rows, each with its own image in a numbered subfolder."""
    rows = []
    for index in range(n):
        path = folder / "llava" / "images" / f"{index % 3:05d}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(30 + index, 40, seed=index).save(path)
        turns = [("human", QUESTIONS[index % 3]), ("gpt", f"the cat number {index}")]
        turns = [{"from": speaker, "value": words} for speaker, words in turns]
        rows.append({"id": str(index), "image": f"{index % 3:05d}/{index}.jpg", "conversations": turns})
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows) -> None:
    (folder / "llava" / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))


def read_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "llava" / "blip_laion_cc_sbu_558k.json").read_text())


def draw(folder: Path, processor, n: int, seed: int = 0, seqlen: int = 1024):
    """Samples and the count of skipped rows of the set in `folder`."""
    path, images = llava_data.locate("llava", None, str(folder))
    return llava_data.load_samples(path, images, processor, n, seed, seqlen)


def words(sample, processor) -> str:
    """The text of a sample, its image as one mark."""
    text = processor.tokenizer.decode(sample["input_ids"])
    return re.sub(r"(<image> ?)+", "<image>", text)


def caption(sample, processor) -> str:
    """The text that a sample is trained on."""
    return processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])


def test_a_sample_is_image_prompt_and_caption_and_only_the_caption_is_trained_on(loaded, tmp_path):
    samples, skipped = draw(write_data(tmp_path), loaded.processor, 12)
    assert skipped == 0 and len(samples) == 12
    asked = ["\nProvide a brief description of the given image.", "\nWhat is this?", ""]
    seen = set()
    for sample in samples:
        assert set(sample) == {"input_ids", "labels", "pixel_values"}
        trained = caption(sample, loaded.processor)
        number = int(trained.removesuffix("</s>").split()[-1])
        seen.add(number)
        assert trained == f"the cat number {number}</s>"
        wanted = f"<s> {SYSTEM} USER: <image>{asked[number % 3]} ASSISTANT: {trained}"
        assert words(sample, loaded.processor).replace("<s>A", "<s> A") == wanted
        kept = sample["labels"] != -100
        assert torch.equal(sample["labels"][kept], sample["input_ids"][kept])
        assert not kept[: int(kept.long().argmax())].any() and kept[int(kept.long().argmax()) :].all()
        assert int((sample["input_ids"] == IMAGE_ID).sum()) == N_IMAGE
        image = by_hand(Image.open(tmp_path / "llava" / "images" / f"{number % 3:05d}" / f"{number}.jpg"), pad=True)
        torch.testing.assert_close(sample["pixel_values"], image, rtol=0, atol=1e-5)
    assert seen == set(range(12))


def test_the_model_takes_a_sample_and_its_loss_is_that_of_the_caption(loaded, tmp_path):
    sample = draw(write_data(tmp_path, 3), loaded.processor, 1)[0][0]
    with torch.no_grad():
        out = loaded.model(**{name: value[None] for name, value in sample.items()})
    chosen = [index for index, label in enumerate(sample["labels"].tolist()) if label != -100]
    logs = out.logits[0].log_softmax(-1)
    wanted = -sum(logs[index - 1, sample["labels"][index]] for index in chosen) / len(chosen)
    torch.testing.assert_close(out.loss, wanted)


def test_the_same_seed_draws_the_same_samples_and_another_seed_others(loaded, tmp_path):
    write_data(tmp_path)
    first, again, other = (
        [caption(s, loaded.processor) for s in draw(tmp_path, loaded.processor, 6, seed)[0]] for seed in (1, 1, 2)
    )
    assert first == again and sorted(first) != sorted(other)


def test_missing_and_damaged_images_are_counted_and_replaced_by_other_rows(loaded, tmp_path):
    write_data(tmp_path)
    before = [caption(s, loaded.processor) for s in draw(tmp_path, loaded.processor, 12)[0]]
    images = sorted((tmp_path / "llava" / "images").rglob("*.jpg"), key=lambda path: int(path.stem))
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:300])
    images[2].write_text("<html>404</html>")
    images[3].write_bytes(b"")
    samples, skipped = draw(tmp_path, loaded.processor, 8)
    assert 3 <= skipped <= 4  # one that comes last in the draw is never looked at
    good = [text for text in before if int(text.removesuffix("</s>").split()[-1]) > 3]
    assert [caption(s, loaded.processor) for s in samples] == good
    said = error_of(lambda: draw(tmp_path, loaded.processor, 9))
    assert "--nsamples 9" in said and "8 rows" in said and "4 of 12" in said


def test_only_the_rows_that_were_passed_over_are_counted(loaded, tmp_path):
    write_data(tmp_path)
    for path in (tmp_path / "llava" / "images").rglob("*.jpg"):
        if int(path.stem) > 5:
            path.unlink()
    counts = [draw(tmp_path, loaded.processor, n)[1] for n in (1, 3, 6)]
    assert counts == sorted(counts) and counts[-1] <= 6


def test_no_readable_image_at_all_is_an_error_that_names_the_folder(loaded, tmp_path):
    write_data(tmp_path, 3)
    for path in (tmp_path / "llava" / "images").rglob("*.jpg"):
        path.unlink()
    said = error_of(lambda: draw(tmp_path, loaded.processor, 2))
    assert "none of its 3 images" in said and str(tmp_path / "llava" / "images") in said


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_every_colour_mode_become_rgb(mode, loaded, tmp_path):
    write_data(tmp_path, 1)
    rows = read_rows(tmp_path)
    picture().convert(mode).save(tmp_path / "llava" / "images" / "odd.tiff")
    write_rows(tmp_path, [rows[0] | {"image": "odd.tiff"}])
    assert draw(tmp_path, loaded.processor, 1)[0][0]["pixel_values"].shape == (3, SIDE, SIDE)


def test_a_long_caption_loses_its_end_and_too_short_a_seqlen_is_refused(loaded, tmp_path):
    write_data(tmp_path, 1)
    whole = draw(tmp_path, loaded.processor, 1)[0][0]
    start = int((whole["labels"] != -100).long().argmax())
    cut = draw(tmp_path, loaded.processor, 1, seqlen=start + 2)[0][0]
    assert torch.equal(cut["input_ids"], whole["input_ids"][: start + 2])
    assert int((cut["labels"] != -100).sum()) == 2
    said = error_of(lambda: draw(tmp_path, loaded.processor, 1, seqlen=start))
    assert f"--seqlen {start}" in said


def test_a_caption_that_mentions_the_image_token_holds_no_second_image(loaded, tmp_path):
    write_data(tmp_path, 1)
    rows = read_rows(tmp_path)
    rows[0]["conversations"][1]["value"] = "the <image> cat"
    write_rows(tmp_path, rows)
    assert int((draw(tmp_path, loaded.processor, 1)[0][0]["input_ids"] == IMAGE_ID).sum()) == N_IMAGE


def test_rows_of_text_alone_and_empty_captions_are_passed_over(loaded, tmp_path):
    write_data(tmp_path, 4)
    rows = read_rows(tmp_path)
    del rows[0]["image"]
    rows[1]["conversations"][1]["value"] = " "
    write_rows(tmp_path, rows)
    samples, skipped = draw(tmp_path, loaded.processor, 2)
    assert {caption(s, loaded.processor)[-5] for s in samples} == {"2", "3"}
    assert skipped <= 1
    assert "--nsamples 3" in error_of(lambda: draw(tmp_path, loaded.processor, 3))


TURNS = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]


@pytest.mark.parametrize(
    "rows",
    [
        {"rows": []},
        [],
        ["text"],
        [{"text": "no image"}],
        [{"image": 7, "conversations": TURNS}],
        [{"image": "a.jpg", "caption": "a cat"}],
        [{"image": "a.jpg", "conversations": TURNS[:1]}],
        [{"image": "a.jpg", "conversations": TURNS[::-1]}],
        [{"image": "a.jpg", "conversations": [{"role": "human"}, {"role": "gpt"}]}],
        [{"image": "a.jpg", "conversations": [TURNS[0], {"from": "gpt", "value": None}]}],
    ],
)
def test_a_json_of_another_form_is_refused_with_the_form_expected(rows, loaded, tmp_path):
    write_data(tmp_path, 1)
    write_rows(tmp_path, rows)
    said = error_of(lambda: draw(tmp_path, loaded.processor, 1))
    assert "conversations" in said and "blip_laion_cc_sbu_558k.json" in said


def test_a_broken_json_and_the_number_of_an_odd_row_are_named(loaded, tmp_path):
    write_data(tmp_path, 3)
    rows = read_rows(tmp_path)
    write_rows(tmp_path, [*rows, {"image": "x.jpg"}])
    assert "row 3" in error_of(lambda: draw(tmp_path, loaded.processor, 1))
    (tmp_path / "llava" / "blip_laion_cc_sbu_558k.json").write_text('[{"image": ')
    assert "JSON" in error_of(lambda: draw(tmp_path, loaded.processor, 1))


def test_the_set_is_looked_for_in_the_data_folder_or_where_the_flags_say(tmp_path):
    said = error_of(lambda: llava_data.locate("llava", None, str(tmp_path)))
    assert str(tmp_path / "llava" / "blip_laion_cc_sbu_558k.json") in said
    write_data(tmp_path, 1)
    path, images = llava_data.locate("llava", None, str(tmp_path))
    assert images == tmp_path / "llava" / "images"
    assert llava_data.locate(str(path), None, "unused") == (path, images)
    (tmp_path / "elsewhere").mkdir()
    assert llava_data.locate(str(path), str(tmp_path / "elsewhere"), "unused")[1] == tmp_path / "elsewhere"
    said = error_of(lambda: llava_data.locate("llava", str(tmp_path / "nowhere"), str(tmp_path)))
    assert "--image_dir" in said and "nowhere" in said
    images.rename(tmp_path / "gone")
    assert "images.zip" in error_of(lambda: llava_data.locate("llava", None, str(tmp_path)))
