"""The model `llava` of lmms-eval: a LLaVA v1.5, dense or pruned, in any form that main.py reads or writes."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from loguru import logger
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, GenerationConfig, ProcessorMixin

from lib import llava
from lib.checkpoint import check_folder, load_bin, load_folder
from lib.devices import checked_dtype, placement, spread_over_gpus
from lib.errors import UserError

# lmms-eval's own for its models of this kind.
DEFAULTS = {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0}
SAMPLING = ("temperature", "top_p", "top_k")
# Read from the checkpoint by LLaVA v1.5, whatever a task asks for: its images are padded to a square.
SETTLED = {"image_aspect_ratio"}


# --- loading ----------------------------------------------------------------------------------------


def load(
    pretrained: str | None,
    pruned: str | None = None,
    dtype: torch.dtype | str = "auto",
    trust_code: bool = False,
    trust_checkpoint: bool = False,
    cache_dir: str | None = None,
) -> tuple[torch.nn.Module, ProcessorMixin]:
    """A LLaVA on the CPU, for inference, and its processor.

    `pruned` is a `model.bin`, or the folder that holds one; then `pretrained` is only a name. Without it, `pretrained`
    is a folder that main.py saved, or a LLaVA v1.5 of either form, in a folder or on the Hub. Code in a folder is run
    with `trust_code` only; without it the same code here takes its place, if it is the same. Raises UserError for what
    cannot be loaded and what is no LLaVA.
    """
    if pruned:
        model, processor = load_bin(pruned, dtype, trust_checkpoint)
        if not (llava.is_llava(model.config) and isinstance(processor, ProcessorMixin)):
            raise _no_llava(f"pruned={pruned}", model.config.model_type)
        return model, processor
    try:
        fields = llava.read_config(pretrained, cache_dir)
        if not llava.is_llava(fields):
            raise _no_llava(f"pretrained={pretrained}", fields.get("model_type"))
        if Path(pretrained).is_dir() and not llava.is_original(fields):
            check_folder(pretrained, trust_code)
            if trust_code and "auto_map" in fields:
                processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
                return load_folder(pretrained, dtype, trust=True), processor
        return llava.load(pretrained, cache_dir, dtype)
    except UserError as error:  # main.py's flag has another name here
        raise UserError(str(error).replace("--model ", "pretrained=", 1)) from error


def _no_llava(what: str, kind: str) -> UserError:
    return UserError(f"{what}: is no LLaVA (model_type '{kind}'); a language model is evaluated with test.sh")


# --- prompts, generation arguments ------------------------------------------------------------------


def prompt(processor: ProcessorMixin, text: str, n_images: int) -> str:
    """The question `text` about `n_images` images in the processor's chat template, up to the answer.

    Images stand before the question, unless it has a mark for each of them where they belong.
    """
    mark = processor.image_token
    parts = [{"type": "text", "text": text}]
    if text.count(mark) != n_images:
        parts = [{"type": "image"}] * n_images + [{"type": "text", "text": text.replace(mark, "").strip()}]
    template = processor.chat_template or llava.CHAT_TEMPLATE
    messages = [{"role": "user", "content": parts}]
    return processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)


def generation_settings(arguments: dict) -> tuple[dict, list[str]]:
    """A task's generation arguments -> those of `generate`, and the strings that end an answer.

    Answers are drawn at random only at a temperature above 0. Arguments that `generate` does not know are left out.
    """
    settings = DEFAULTS | {name: value for name, value in arguments.items() if value is not None}
    until = settings.pop("until", [])
    settings["do_sample"] = bool(settings.get("do_sample", True) and settings["temperature"] > 0)
    for name in list(settings):
        known = hasattr(GenerationConfig(), name)
        if not known and name not in SETTLED:
            _warn_unknown(name)
        if not known or (name in SAMPLING and not settings["do_sample"]):
            del settings[name]
    return settings, [until] if isinstance(until, str) else list(until)


@functools.cache
def _warn_unknown(name: str) -> None:
    logger.warning(f"llava: the generation argument {name} has no effect")


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the strings `until`."""
    for end in filter(None, until):
        text = text.split(end)[0]
    return text.strip()


def images_of(visuals: Sequence | None) -> list[Image.Image]:
    """What a task shows for a question, as RGB images. Raises NotImplementedError for videos and sounds."""
    found = [visual for visual in visuals or () if visual is not None]
    if not all(isinstance(visual, Image.Image) for visual in found):
        raise NotImplementedError("llava: LLaVA v1.5 takes images; choose tasks without videos or sounds")
    return [image.convert("RGB") for image in found]


# --- the model --------------------------------------------------------------------------------------


class PrunedLlava(lmms):
    """A LLaVA v1.5, as `load` reads it, for lmms-eval's tasks."""

    def __init__(self, pretrained=None, pruned=None, device=None, device_map=None, dtype="auto", batch_size=1,
                 trust_remote_code=False, trust_checkpoint=False, cache_dir=None, **unknown):  # fmt: skip
        """Load and place a model.

        `pretrained`, `pruned`, `trust_remote_code` (of a folder), `trust_checkpoint` (of a model.bin) and `cache_dir`
        are as in `load`; `dtype` "auto" is the one that was saved. `device_map` "auto" spreads the model over the
        GPUs, if there are any. Raises UserError for other arguments and for what cannot be loaded.
        """
        super().__init__()
        if unknown:
            name, value = next(iter(unknown.items()))
            raise UserError(f"--model_args {name}={value}: llava takes no such argument")
        if not (pretrained or pruned):
            raise UserError("--model_args: name a model, pretrained=FOLDER_OR_NAME or pruned=FOLDER/model.bin")
        self.batch_size = _whole_number(batch_size)
        spread, device = placement(device_map, _default_device(device))
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--model_args device={device}: there is no CUDA GPU here; leave it out for the CPU")
        self.device = torch.device(device)
        model, self.processor = load(
            *(str(name) if name else None for name in (pretrained, pruned)),
            checked_dtype(dtype), trust_remote_code is True, trust_checkpoint is True, cache_dir,
        )  # fmt: skip
        self.model = spread_over_gpus(model, spread) if spread else model.to(self.device)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # every answer begins where its prompt ends
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        """How lmms-eval's command line makes its model; ends the process with 2 where the user is to mend something.

        Raised on, an error would end in a traceback and the exit code 0.
        """
        try:
            return super().create_from_arg_string(arg_string, additional_config)
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    def generate_until(self, requests) -> list[str]:
        """The answers to `requests`, greedy unless a task asks for a temperature."""
        # Longest first, so that memory runs out at once or not at all; one batch has the same generation arguments.
        order = Collator([request.args for request in requests], lambda args: (-len(args[0]), args[0]), grouping=True)
        answers = []
        with tqdm(total=len(requests), disable=self._quiet(), desc="Model Responding") as bar:
            for batch in order.get_batched(n=self.batch_size):
                texts = [args[0] for args in batch]
                found = self._answer(texts, [self._images(*args[2:6]) for args in batch], batch[0][1])
                for args, answer in zip(batch, found, strict=True):
                    self.cache_hook.add_partial("generate_until", args[:2], answer)
                answers += found
                bar.update(len(batch))
        return order.get_original(answers)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """For each request: how unlikely the answer is, and whether greedy decoding gives it.

        The number is the mean over the answer's tokens, its closing one included, of the negative log-likelihood in
        nats: lmms-eval takes the answer with the lowest, as its own LLaVA returns it.
        """
        found = []
        for text, target, *where in tqdm([request.args for request in requests], disable=self._quiet()):
            answer = target if isinstance(target, str) else target(self.task_dict[where[2]][where[3]][where[1]])
            found.append(self._score(text, self._images(*where), f"{answer}"))
        return found

    def generate_until_multi_round(self, requests) -> list[str]:
        """Raises NotImplementedError."""
        raise NotImplementedError("llava: conversations of several rounds are not supported; choose other tasks")

    def _quiet(self) -> bool | None:
        """Whether to show no progress: None, where it is not a terminal that would show it."""
        return True if self.rank else None

    def _images(self, to_visual, doc_id, task, split) -> list[Image.Image]:
        return images_of(to_visual(self.task_dict[task][split][doc_id]))

    def _inputs(self, prompts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model takes, padded on the left: `input_ids` `[batch, tokens]`, and all their images."""
        found = self.processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        return found.to(self.device, self.model.dtype)

    @torch.inference_mode()
    def _answer(self, texts: list[str], images: list[list[Image.Image]], arguments: dict) -> list[str]:
        """The answers to a batch of questions, each with its images."""
        settings, until = generation_settings(arguments)
        prompts = [prompt(self.processor, text, len(its)) for text, its in zip(texts, images, strict=True)]
        inputs = self._inputs(prompts, [image for its in images for image in its])
        ids = self.model.generate(**inputs, **settings, pad_token_id=self.tokenizer.pad_token_id)
        new = ids[:, inputs["input_ids"].shape[1] :]  # [batch, new tokens]
        return [cut(text, until) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def _score(self, text: str, images: list[Image.Image], answer: str) -> tuple[float, bool]:
        """See `loglikelihood`."""
        question = prompt(self.processor, text, len(images))
        inputs = self._inputs([f"{question.rstrip()} {answer.strip()}{self.tokenizer.eos_token}"], images)
        start = self._inputs([question.rstrip()], images)["input_ids"].shape[1]
        targets = inputs["input_ids"][0, start:]  # [answer]
        logits = self.model(**inputs).logits[0, start - 1 : -1].float()  # [answer, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device))
        return loss.item(), bool((logits.argmax(-1) == targets.to(logits.device)).all())


def _default_device(device: str | None) -> str:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return str(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))


def _whole_number(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"--batch_size {batch_size}: expected a whole number from 1 on")
    return int(batch_size)
