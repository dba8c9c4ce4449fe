"""What a model is worth and what it weighs: perplexity, parameters and speed."""

import inspect
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from lib.mlp import Layer


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, desc: str = "perplexity") -> float:
    """`exp` of the mean next-token cross-entropy (nats, float32) over all predicted tokens of `[windows, tokens]`."""
    total = 0.0
    for window in tqdm(windows, desc=desc, unit="window", disable=None):
        ids = window[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        for piece, targets in zip(logits.split(512), ids[0, 1:].split(512)):
            total += F.cross_entropy(piece.float(), targets, reduction="sum").item()
    try:
        return math.exp(total / (windows.numel() - len(windows)))
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Size:
    """Widths per MLP, and the tower of each; elements of the MLP weight matrices and of the model (tied weights
    once); multiply-accumulates per token of text.
    """

    widths: tuple[int, ...]
    towers: tuple[str, ...]
    mlp: int
    total: int
    macs: int


def size(model: nn.Module, layers: Sequence[Layer]) -> Size:
    """Count what the model holds now."""
    blocks = [layer.block for layer in layers if layer.block]
    return Size(
        tuple(b.width for b in blocks),
        tuple(layer.tower for layer in layers if layer.block),
        sum(b.n_weights for b in blocks),
        sum(p.numel() for p in model.parameters()),
        macs_per_token(model),
    )


PREFILL_TOKENS = 512
DECODE_TOKENS = 32


@dataclass(frozen=True)
class Speed:
    """Tokens per second when a prompt is read (prefill) and when text is written (decode), batch 1."""

    prefill: float
    decode: float


@torch.no_grad()
def speed(model: nn.Module, ids: Tensor, context: int, decode_tokens: int = DECODE_TOKENS, repeats: int = 5) -> Speed:
    """Median of `repeats` runs each, on the first tokens of `[tokens]`, after one run to warm up.

    No sequence is longer than `context`: beyond it there may be no positions, and dynamic rotary embeddings are
    computed anew and stay so. A family that keeps no key-value cache reads everything again for every token.
    """
    prompt = ids[None, : min(PREFILL_TOKENS, context)].to(model.device)
    steps = min(decode_tokens, context)
    takes = inspect.signature(model.forward).parameters
    cached = getattr(model(prompt[:, :1], use_cache=True), "past_key_values", None) is not None
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def prefill():
        return model(prompt, use_cache=cached, **last_only)

    def decode():
        written = prompt[:, :1]
        output = model(written, use_cache=cached, **last_only)
        for _ in range(steps - 1):
            token = output.logits[:, -1:].argmax(-1)
            if cached:
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
            else:
                written = torch.cat([written, token], dim=1)
                output = model(written, use_cache=False, **last_only)

    prefill(), decode()
    return Speed(
        prompt.shape[1] / _median_seconds(prefill, model.device, repeats),
        steps / _median_seconds(decode, model.device, repeats),
    )


def _median_seconds(run, device: torch.device, repeats: int) -> float:
    times = []
    for _ in tqdm(range(repeats), desc="speed", leave=False, disable=None):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def macs_per_token(model: nn.Module) -> int:
    """Multiply-accumulates of a token with the weights of the language model and its head, without attention's own."""
    modules = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return sum(m.weight.numel() for m in modules if isinstance(m, (nn.Linear, Conv1D)))
