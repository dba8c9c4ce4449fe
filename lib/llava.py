"""LLaVA v1.5 on disk or on the Hub, in its original form or in that of transformers -> model and processor.

The original form (`liuhaotian/llava-v1.5-7b`, `-13b`) is the one of Liu et al. 2023, "Improved Baselines with Visual
Instruction Tuning": a Llama with a projector beside it, and a vision tower that is only named.
"""

import copy
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lib import remote_code
from lib.errors import UserError
from lib.mlp import forget_widths, has_widths
from lib.modeling_pruned import pruned
from lib.tokenizer_files import read_sentencepiece

ARCHITECTURE = "LlavaLlamaForCausalLM"
ORIGINAL_TYPES = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen", "llava_gemma")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
ROWS_MULTIPLE = 64  # 32000 tokens, the image's and padding's become 32064 rows, as in the published conversion
CHAT_TEMPLATE = (
    '{{ "' + SYSTEM + ' " }}{% for message in messages %}{{ message["role"] | upper + ": " }}'
    '{% if message["content"] is string %}{{ message["content"] }}{% else %}'
    '{% for part in message["content"] if part["type"] == "image" %}{{ "<image>\n" }}{% endfor %}'
    '{% for part in message["content"] if part["type"] == "text" %}{{ part["text"] }}{% endfor %}{% endif %}'
    '{{ " " if message["role"] == "user" else eos_token }}{% endfor %}'
    '{% if add_generation_prompt %}{{ "ASSISTANT:" }}{% endif %}'
)


# What the original's configuration may say: the values that its v1.5 models have, and absence where that means one.
SUPPORTED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", "cls_patch", None),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
}
TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "attention_bias", "mlp_bias", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip
VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim",
)  # fmt: skip
IMAGE_FIELDS = (
    "size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "do_resize", "do_center_crop",
    "do_rescale", "do_normalize",
)  # fmt: skip
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")  # buffers that older versions saved
RENAMED = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
TOWER = "model.vision_tower."
TELLING = ("embeddings.patch_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
OPENAI_HEAD_DIM = 64  # in every vision tower that OpenAI published


# --- which form -------------------------------------------------------------------------------------


def is_llava(config) -> bool:
    """Whether a configuration (of AutoConfig, or a raw dict) is LLaVA's, in either form."""
    fields = config if isinstance(config, dict) else config.to_dict()
    return fields.get("model_type") == "llava" or _is_original(fields)


def is_original(config: dict | str | Path) -> bool:
    """Whether the raw configuration, or that of a local folder, is the original LLaVA's.

    AutoConfig cannot tell: it reads the original form as a default LlavaConfig. Raises UserError for a folder
    without a readable config.json.
    """
    return _is_original(config if isinstance(config, dict) else read_config(str(config)))


def _is_original(fields: dict) -> bool:
    """Since v1.2.0 the original code saves a `model_type` that transformers does not know, such as llava_llama."""
    named = ARCHITECTURE in _architectures(fields) or fields.get("model_type") in ORIGINAL_TYPES
    return (named or "mm_vision_tower" in fields) and not fields.keys() & {"text_config", "vision_config"}


def _architectures(fields: dict) -> list:
    named = fields.get("architectures")
    return named if isinstance(named, list) else []


def read_config(name: str, cache_dir: str | None = None) -> dict:
    """The raw config.json of a local folder or a Hub name. Raises UserError when there is none."""
    return _Place(name, cache_dir, f"--model {name}").json("config.json")


def refuse_other_originals(name: str, fields: dict, cache_dir: str | None = None) -> None:
    """Raise UserError for an original form that is not a whole LLaVA v1.5, such as a v1.6, a Mistral or a LoRA.

    Only the raw configuration and the names of the files beside it are looked at.
    """
    folder = Path(name).expanduser()
    place = _Place(str(folder) if folder.is_dir() else name, cache_dir, f"--model {name}")
    _refuse_parts(place)
    _refuse_unsupported(place, fields)


def load(
    name: str, cache_dir: str, dtype: torch.dtype | str = "auto"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA v1.5 of either form on the CPU, for inference, in `dtype` or ("auto") in the checkpoint's own.

    The processor pads images to a square where the original does, and so it does when it is saved and loaded.
    Weights that need no conversion stay mapped from their files. Raises UserError for what is no LLaVA v1.5, cannot
    be found or read, or has weights missing or left over.
    """
    folder = Path(name).expanduser()
    place = _Place(str(folder) if folder.is_dir() else name, cache_dir, f"--model {name}")
    fields = place.json("config.json")
    if not is_llava(fields):
        raise UserError(
            f"--model {name}: is no LLaVA (model_type '{fields.get('model_type')}'); give one like "
            "liuhaotian/llava-v1.5-7b or llava-hf/llava-1.5-7b-hf, or another --prune_method"
        )
    model, processor = (_load_original if is_original(fields) else _load_converted)(place, fields, dtype)
    return model.eval().requires_grad_(False), processor


def _load_original(place: "_Place", fields: dict, dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    _refuse_parts(place)
    _refuse_unsupported(place, fields)
    tokenizer = _tokenizer(place, fields)
    state = {_renamed(key): weight for key, weight in place.weights().items() if not COMPUTED.search(key)}
    tower = _find_tower(place, fields)
    vision, image_settings = _describe_tower(place, tower, state)
    if not any(key.startswith(TOWER) for key in state):
        state |= _tower_weights(tower)
    try:
        config = _config(fields, vision, tokenizer)
    except Exception as error:
        raise UserError(f"{place.what}: config.json does not describe a LLaVA v1.5 ({_reason(error)})") from error
    _refuse_other_layer(place, config, "mm_vision_select_layer")
    for key in (EMBEDDINGS, HEAD):
        if key in state:
            state[key] = _grown(state[key], config.text_config.vocab_size)
    _refuse_differences(place, config, state)
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=state[EMBEDDINGS].dtype if dtype == "auto" else dtype
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    images = _image_processor(image_settings, vision.image_size, fields.get("image_aspect_ratio") == "pad")
    return model, _processor(images, tokenizer, config)


def _load_converted(place: "_Place", fields: dict, dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The form of transformers. Its published processors crop, and transformers 5 drops the space behind an image: both
    are mended.
    """
    # Such a folder names code beside it; the same code stands here, and is the one that is trusted.
    differ = has_widths(fields)
    model_class = pruned(LlavaForConditionalGeneration) if differ else LlavaForConditionalGeneration
    options = {"cache_dir": place.cache_dir, "trust_remote_code": False}
    try:
        config = model_class.config_class.from_pretrained(place.name, **options)
        _refuse_other_layer(place, config, "vision_feature_layer")
        # The attention named in a configuration is its writer's choice, and may be a package or code on the Hub.
        model, report = model_class.from_pretrained(
            place.name, **options, dtype=dtype, output_loading_info=True, attn_implementation="sdpa"
        )
        processor = AutoProcessor.from_pretrained(place.name, **options)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        incomplete = f"cannot be loaded; it may be incomplete ({_reason(error)})"
        problem = remote_code.NOT_RUN if remote_code.is_refusal(error) else incomplete
        raise UserError(f"{place.what}: {problem}") from error
    _refuse(place, missing=report["missing_keys"], unexpected=report["unexpected_keys"])
    model = forget_widths(model) if differ else model
    processor.tokenizer = _spaced_as_original(processor.tokenizer)
    vision = model.config.vision_config
    if vision.model_type == "clip_vision_model":
        settings = processor.image_processor.to_dict()
        pads = settings["image_processor_type"].startswith("CLIP") or settings["do_pad"]
        images = _image_processor(settings, vision.image_size, pads)
        processor = _processor(images, processor.tokenizer, model.config, processor.chat_template)
    return model, processor


# --- files ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A local folder or a Hub name, and how errors call it."""

    name: str
    cache_dir: str | None
    what: str

    @property
    def is_folder(self) -> bool:
        return Path(self.name).is_dir()

    def file(self, filename: str) -> Path | None:
        """The path of a file; None where the place has none, or is a Hub name out of reach."""
        if self.is_folder:
            path = Path(self.name) / filename
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, filename, cache_dir=self.cache_dir))
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise UserError(f"{self.what}: no such folder, and the Hub did not serve it ({_reason(error)})") from error

    def json(self, filename: str) -> dict:
        """A file that holds a JSON object. Raises UserError when it is missing or something else."""
        path = self.file(filename)
        if path is None:
            advice = "give the folder of a saved model" if self.is_folder else "check the name and the network"
            raise UserError(f"{self.what}: has no {filename}, or it could not be fetched; {advice}")
        return _read_json(path, self.what)

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the checkpoint, mapped from their files. Raises UserError for missing or damaged files."""
        path = next((path for name in WEIGHT_FILES if (path := self.file(name))), None)
        if path is None:
            raise UserError(
                f"{self.what}: has no weights, or they could not be fetched (one of {', '.join(WEIGHT_FILES)})"
            )
        if path.suffix != ".json":
            return _read_weights(path, self.what)
        state = {}
        try:
            shards = sorted(set(_read_json(path, self.what)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{self.what}: {path.name} has no weight_map; fetch it again") from error
        for shard in shards:
            found = self.file(shard)
            if found is None:
                raise UserError(f"{self.what}: {shard} is missing; fetch it again")
            state |= _read_weights(found, self.what)
        return state


def _read_json(path: Path, what: str) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path.name} is damaged ({_reason(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{what}: {path.name} is damaged (no JSON object); fetch it again")
    return found


def _read_weights(path: Path, what: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
                return {key: file.get_tensor(key) for key in keys}
        # Files older than torch 1.6 are no archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if all(isinstance(weight, Tensor) for weight in state.values()):
            return state
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {path.name} is damaged or holds more than tensors ({_reason(error)})") from error
    raise UserError(f"{what}: {path.name} holds something else than tensors")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


# --- configuration and weights ----------------------------------------------------------------------


def _refuse_parts(place: _Place) -> None:
    """What the original's training leaves without the language model: LoRA matrices, or a projector."""
    whole = place.is_folder and any(place.file(name) for name in WEIGHT_FILES)
    lora = place.file("adapter_config.json") or (place.is_folder and place.file("non_lora_trainables.bin"))
    if lora and not whole:
        raise UserError(
            f"{place.what}: holds LoRA matrices and no whole model; merge them first into the model that they were "
            "trained on (scripts/merge_lora_weights.py of the original code), and give the merged folder"
        )
    if place.is_folder and place.file("mm_projector.bin") and not whole:
        raise UserError(
            f"{place.what}: holds a projector (mm_projector.bin) and no whole model; give the folder of the LLaVA that "
            "was trained with it"
        )


def _refuse_unsupported(place: _Place, fields: dict) -> None:
    architectures = _architectures(fields) or [ARCHITECTURE]
    if ARCHITECTURE not in architectures:
        raise UserError(
            f"{place.what}: is a {architectures[0]}; of the original forms only {ARCHITECTURE} (v1.5) is read"
        )
    for field, values in SUPPORTED.items():
        if fields.get(field) not in values:
            known = " or ".join(str(value) for value in values if value is not None) or "none"
            raise UserError(
                f"{place.what}: {field} '{fields.get(field)}' is not LLaVA v1.5's ({known}); other versions, such as "
                "v1.6, cannot be read"
            )


def _refuse_other_layer(place: _Place, config: LlavaConfig, field: str) -> None:
    """The features may be those that enter the first layer, or leave any."""
    n_layers = config.vision_config.num_hidden_layers
    layers = config.vision_feature_layer
    for layer in layers if isinstance(layers, list | tuple) else [layers]:
        if not isinstance(layer, int) or not -n_layers - 1 <= layer <= n_layers:
            raise UserError(
                f"{place.what}: {field} {layer} is no layer of its vision tower, which has {n_layers}; correct it in "
                "config.json"
            )


def _renamed(key: str) -> str:
    for pattern, replacement in RENAMED:
        key, found = re.subn(pattern, replacement, key)
        if found:
            break
    return key


def _find_tower(place: _Place, fields: dict) -> _Place:
    """Where `mm_vision_tower` is: a folder in the checkpoint or from here, else a Hub name."""
    tower = fields.get("mm_vision_tower")
    if not tower:
        raise UserError(
            f"{place.what}: its config.json names no mm_vision_tower; add the name of the CLIP it was made for"
        )
    if not isinstance(tower, str):
        raise UserError(f"{place.what}: mm_vision_tower {tower} is no name; correct it in config.json")
    what = f"{place.what}: its vision tower {tower}"
    for folder in (Path(place.name) / tower, Path(tower).expanduser()):
        if folder.is_dir():
            return _Place(str(folder), place.cache_dir, what)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", tower):
        raise UserError(f"{what}: no such folder; correct mm_vision_tower in config.json")
    return _Place(tower, place.cache_dir, what)


def _describe_tower(place: _Place, tower: _Place, state: dict[str, Tensor]) -> tuple[CLIPVisionConfig, dict]:
    """The tower's configuration and how it wants its images. Only the names in `state`, and shapes, are used."""
    contained = f"{TOWER}embeddings.class_embedding" in state
    path = _reachable(tower, "config.json", needed=not contained)
    if path is None and contained and tower.name.startswith("openai/clip-vit-"):
        return _openai_tower(place, state), {}
    if path is None:
        raise _unreachable(place, tower)
    fields = _read_json(path, tower.what)
    if fields.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserError(f"{tower.what}: is a '{fields.get('model_type')}'; only CLIP towers can be read")
    fields = fields.get("vision_config") or fields
    images = _reachable(tower, "preprocessor_config.json", needed=False)
    vision = CLIPVisionConfig(**{field: fields[field] for field in VISION_FIELDS if field in fields})
    return vision, _read_json(images, tower.what) if images else {}


def _reachable(tower: _Place, filename: str, needed: bool) -> Path | None:
    try:
        return tower.file(filename)
    except UserError:
        if needed:
            raise
        return None


def _unreachable(place: _Place, tower: _Place) -> UserError:
    folder = (
        f"{place.name}/{tower.name}" if place.is_folder else "a folder and name it as mm_vision_tower in config.json"
    )
    return UserError(
        f"{tower.what} is neither in the checkpoint nor in the Hub cache, and the Hub did not serve it; "
        f"connect to the network once, or put it into {folder}"
    )


def _openai_tower(place: _Place, state: dict[str, Tensor]) -> CLIPVisionConfig:
    """The configuration of one of OpenAI's towers, from the shapes of its weights."""
    patches, positions, fc1 = (f"{TOWER}{key}.weight" for key in TELLING)
    _refuse(place, missing=[key for key in (patches, positions, fc1) if key not in state])
    hidden, channels, patch, _ = state[patches].shape
    side = round((len(state[positions]) - 1) ** 0.5)  # in patches; one position is the class token's
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=len(state[fc1]),
        num_hidden_layers=len({key.split(".")[4] for key in state if key.startswith(f"{TOWER}encoder.layers.")}),
        num_attention_heads=hidden // OPENAI_HEAD_DIM,
        num_channels=channels,
        image_size=side * patch,
        patch_size=patch,
    )


def _tower_weights(tower: _Place) -> dict[str, Tensor]:
    """The weights of a CLIP's vision part under the names they have in LLaVA."""
    state = {}
    for key, weight in tower.weights().items():
        if not re.match(r"text_model\.|(text|visual)_projection\.|logit_scale$", key) and not COMPUTED.search(key):
            state[TOWER + key.removeprefix("vision_model.")] = weight
    return state


def _config(fields: dict, vision: CLIPVisionConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    rows = max(fields.get("vocab_size", 32000), len(tokenizer))
    text = LlamaConfig(
        vocab_size=-(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE,
        pad_token_id=tokenizer.pad_token_id,
        **{field: fields[field] for field in TEXT_FIELDS if fields.get(field) is not None},
    )
    keeps_class = fields.get("mm_vision_select_feature") == "cls_patch"
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + keeps_class,
        projector_hidden_act="gelu",
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if keeps_class else "default",
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )


def _grown(weight: Tensor, rows: int) -> Tensor:
    """`weight` `[tokens, d]` with rows added up to `rows`, each the mean of those before.

    In the head they take part in the softmax: losses lie about 1e-4 above those of the original without them.
    """
    grown = torch.empty(rows, weight.shape[1], dtype=weight.dtype)  # [rows, d]
    grown[: len(weight)] = weight
    grown[len(weight) :] = weight.mean(0, dtype=torch.float32)
    return grown


def _refuse_differences(place: _Place, config: LlavaConfig, state: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        wanted = LlavaForConditionalGeneration(copy.deepcopy(config)).state_dict()
    if config.tie_word_embeddings and HEAD not in state:
        del wanted[HEAD]
    _refuse(
        place,
        missing=[key for key in wanted if key not in state],
        unexpected=[key for key in state if key not in wanted],
        misshapen=[key for key in wanted if key in state and wanted[key].shape != state[key].shape],
    )


def _refuse(place: _Place, **differences: Sequence[str]) -> None:
    found = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in differences.items()
        if keys
    ]
    if found:
        raise UserError(f"{place.what}: its weights are not those of a LLaVA v1.5: {'; '.join(found)}; fetch it again")


# --- processor --------------------------------------------------------------------------------------


def conversation(question: str, answer: str = "", end: str = "") -> str:
    """Return a question, with its images' marks, in v1.5's conversation; with an answer and what ends one, or up to it.

    Source: the conversation `vicuna_v1` of the original, in which an empty turn has no space either.
    """
    asked = f"USER: {question} " if question else "USER:"
    return f"{SYSTEM} {asked}" + (f"ASSISTANT: {answer}{end}" if answer else "ASSISTANT:")


def _image_processor(settings: dict, image_size: int, pads: bool) -> LlavaImageProcessorPil:
    """CLIP's preprocessing, after padding to a square with the mean colour where `pads`. Source: Liu et al. 2023."""
    default = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    given = {field: settings[field] for field in IMAGE_FIELDS if settings.get(field) is not None}
    return LlavaImageProcessorPil(**(default | given), do_convert_rgb=True, do_pad=pads)


def _processor(images, tokenizer, config: LlavaConfig, chat_template: str = CHAT_TEMPLATE) -> LlavaProcessor:
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=chat_template,
    )


def _tokenizer(place: _Place, fields: dict) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer, starting every text with its bos token, with the image and padding tokens added."""
    path = place.file("tokenizer.json") or place.file("tokenizer.model")
    if path is None:
        raise UserError(f"{place.what}: has no tokenizer.model or tokenizer.json, or it could not be fetched")
    try:
        core = Tokenizer.from_file(str(path)) if path.suffix == ".json" else read_sentencepiece(path.read_bytes())
    except Exception as error:
        raise UserError(f"{place.what}: {path.name} cannot be read ({_reason(error)}); fetch it again") from error
    special = {"bos_token": fields.get("bos_token_id", 1), "eos_token": fields.get("eos_token_id", 2)}
    if not all(isinstance(index, int) and 0 <= index < core.get_vocab_size() for index in special.values()):
        raise UserError(f"{place.what}: bos_token_id or eos_token_id in its config.json is no token; correct it there")
    path_of_settings = place.file("tokenizer_config.json")
    settings = _read_json(path_of_settings, place.what) if path_of_settings else {}
    longest = settings.get("model_max_length")
    prefixed_once = settings.get("legacy") is False and _is_llamas(core)
    if prefixed_once:
        _prefix_once(core)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{role: core.id_to_token(index) for role, index in special.items()},
        unk_token=getattr(core.model, "unk_token", None),
        add_bos_token=True,
        add_eos_token=False,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=longest or fields.get("max_position_embeddings", 4096),
    )
    # In this order: the published conversion has the image at 32000 and padding at 32001.
    image = AddedToken(IMAGE_TOKEN, special=True, normalized=prefixed_once)
    tokenizer.add_tokens([image], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    return tokenizer


def _spaced_as_original(tokenizer):
    """Llama's tokenizer of a published conversion with spaces where the original has them; any other as it is."""
    if not isinstance(tokenizer, LlamaTokenizer) or tokenizer.legacy or not _is_llamas(tokenizer.backend_tokenizer):
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["normalized"] |= token["content"] == IMAGE_TOKEN
    core = Tokenizer.from_str(json.dumps(state))
    _prefix_once(core)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{role: getattr(tokenizer, role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")},
        add_bos_token=tokenizer.add_bos_token,
        add_eos_token=tokenizer.add_eos_token,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
    )


def _is_llamas(core: Tokenizer) -> bool:
    return isinstance(core.model, models.BPE) and core.model.byte_fallback


def _prefix_once(core: Tokenizer) -> None:
    """Put the space that begins a text nowhere else but behind images, as `legacy: false` of Llama's tokenizer means.

    The original tokenises what stands between images one by one; behind other special tokens it adds no space. The
    image's token has to be added as normalised, so that it is seen here.
    """
    core.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(rf"(?<={IMAGE_TOKEN})(?!{IMAGE_TOKEN})(?=[\s\S])"), "▁"),
         normalizers.Replace(" ", "▁")]
    )  # fmt: skip
    # The first puts a space before the text, even before one that begins with a space; the second spells it.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(" ", "first", split=False), pre_tokenizers.Metaspace("▁", "never", split=False)]
    )
