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
from transformers import AutoProcessor, ProcessorMixin

from lib import llava
from lib.checkpoint import check_folder, load_bin, load_folder
from lib.devices import checked_dtype, placement, spread_over_gpus
from lib.errors import UserError

# What lmms-eval's own LLaVA takes of a task's generation arguments, and what it takes where a task says nothing.
DEFAULTS = {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0, "top_p": None}
# Without effect there too, as every task has one or many do: an answer ends with its closing token, it is drawn at
# random exactly at a temperature above 0, and images are padded to a square as the checkpoint says.
SETTLED = {"until", "do_sample", "image_aspect_ratio"}
# An empty question, and how a template of v1.5's, such as the published conversion's, writes it.
PROBE, AS_V1_5 = "what?", "USER: what? ASSISTANT:"


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


def prompt(processor: ProcessorMixin, text: str, n_images: int, answer: str = "") -> str:
    """The question `text` about `n_images` images, up to the answer, or with it and the token that closes it.

    As lmms-eval's own LLaVA writes it: images stand before a question without a mark, one line for all. What stands at
    the edges of question and answer stays. A processor with another model's chat template writes in that one.
    """
    mark = processor.image_token
    if text.count(mark) > n_images:  # more marks than there are images to put there: its own fails
        text = text.replace(mark, "").strip()
    if n_images and mark not in text:
        text = " ".join([mark] * n_images) + f"\n{text}"
    if _as_v1_5(processor):
        return llava.conversation(text, answer, processor.tokenizer.eos_token)
    asked = _templated(processor, text)
    return f"{asked}{answer}{processor.tokenizer.eos_token}" if answer else asked


def _as_v1_5(processor: ProcessorMixin) -> bool:
    """Whether questions are put as to v1.5, whose system prompt the published conversion's template leaves out."""
    return not processor.chat_template or _templated(processor, PROBE).strip().endswith(AS_V1_5)


def _templated(processor: ProcessorMixin, text: str) -> str:
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def used_images(text: str, mark: str, images: list[Image.Image]) -> list[Image.Image]:
    """The images that a question's marks take, the first ones; all where it has no marks or more than images."""
    return images[: text.count(mark)] if 0 < text.count(mark) <= len(images) else images


def generation_settings(arguments: dict) -> dict:
    """A task's generation arguments -> those of `generate`: the four that lmms-eval's own LLaVA takes."""
    for name in arguments.keys() - DEFAULTS.keys() - SETTLED:
        _warn_unknown(name)
    given = {name: arguments[name] for name in DEFAULTS if arguments.get(name) is not None}
    settings = DEFAULTS | given
    settings["do_sample"] = settings["temperature"] > 0
    sampling = () if settings["do_sample"] else ("temperature", "top_p")
    return {name: value for name, value in settings.items() if value is not None and name not in sampling}


@functools.cache
def _warn_unknown(name: str) -> None:
    logger.warning(f"llava: the generation argument {name} has no effect, nor has it on lmms-eval's own LLaVA")


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
        """The answers to `requests`, whole, greedy unless a task asks for a temperature."""
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
        nats: lmms-eval takes the answer with the lowest, as its own LLaVA returns it. The answer stands as it is given,
        mostly with a space of its own behind the prompt's. The rows that were added to the vocabulary make the number
        about 1e-4 larger than the original's, for all answers alike.
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
        settings, mark = generation_settings(arguments), self.processor.image_token
        images = [used_images(text, mark, its) for text, its in zip(texts, images, strict=True)]
        prompts = [prompt(self.processor, text, len(its)) for text, its in zip(texts, images, strict=True)]
        inputs = self._inputs(prompts, [image for its in images for image in its])
        ids = self.model.generate(**inputs, **settings, pad_token_id=self.tokenizer.pad_token_id)
        new = ids[:, inputs["input_ids"].shape[1] :]  # [batch, new tokens]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    @torch.inference_mode()
    def _score(self, text: str, images: list[Image.Image], answer: str) -> tuple[float, bool]:
        """See `loglikelihood`."""
        images = used_images(text, self.processor.image_token, images)
        inputs = self._inputs([prompt(self.processor, text, len(images), answer)], images)
        start = self._inputs([prompt(self.processor, text, len(images))], images)["input_ids"].shape[1]
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
