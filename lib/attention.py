"""Causal attention in blocks, for scoring on a CPU.

PyTorch's fused attention for CPUs computes everything again on the way back and multiplies in float32 even where the
CPU has units for bfloat16. Here the probabilities of the past are kept, and blocks are multiplied as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FUSED, NAME = "sdpa", "afr_blockwise"
BLOCK = 128  # queries at once; 64 and 256 are slower
# Tokens of a sample; with more the probabilities leave the caches, and the fused kernel is as fast.
LONGEST = {torch.bfloat16: 4096, torch.float32: 1024}


@contextmanager
def scoring_attention(model: nn.Module) -> Iterator[None]:
    """Within this context attention that is causal and nothing else goes in blocks, where that is faster."""
    with _swapped(model, FUSED, NAME if model.device.type == "cpu" else FUSED):
        yield


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Within this context attention is the model's own again."""
    with _swapped(model, NAME, FUSED):
        yield


@contextmanager
def _swapped(model: nn.Module, old: str, new: str) -> Iterator[None]:
    """Other implementations only for models that choose them by name: others would take the new one for none."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m._supports_attention_backend]
    configs = [c for c in {id(p.config): p.config for p in parts}.values() if c._attn_implementation == old]
    try:
        for config in configs:
            config._attn_implementation = new
        yield
    finally:
        for config in configs:
            config._attn_implementation = old


def blockwise_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Transformers' interface: `[batch, heads, tokens, head size]` -> `([batch, tokens, heads, head size], None)`.

    Anything but plain causal attention of at most LONGEST tokens is left to the fused kernel.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    tokens, plain = query.shape[2], attention_mask is None and not dropout and kwargs.get("position_bias") is None
    short = 1 < tokens == key.shape[2] and tokens <= LONGEST.get(query.dtype, 0)
    if not (plain and causal and short and key.shape[-1] == value.shape[-1]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, blockwise_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`softmax(scaling * Q K^T, causal) V`: query `[batch, heads, tokens, d]`, key and value with as many heads or
    a divisor of them (grouped queries, Ainslie et al. 2023)."""
    batch, heads, tokens, size = query.shape
    groups = heads // key.shape[1]
    found = _Blockwise.apply(
        query.reshape(-1, groups, tokens, size), key.flatten(0, 1), value.flatten(0, 1), scaling
    )  # [batch * key heads, groups, tokens, d]
    return found.reshape(batch, heads, tokens, size)


class _Blockwise(torch.autograd.Function):
    """A block of queries meets only the keys up to its end; its probabilities are kept for the way back."""

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        """Query `[n, groups, tokens, d]`, key and value `[n, tokens, d]` -> `[n, groups, tokens, d]`."""
        n, groups, tokens, size = query.shape
        query = query * scaling
        outputs, kept = [], []
        for start in range(0, tokens, BLOCK):
            end = min(start + BLOCK, tokens)
            rows = query[:, :, start:end].reshape(n, -1, size)
            scores = torch.bmm(rows, key[:, :end].transpose(1, 2)).view(n, groups, end - start, end)
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu_(1)
            scores[..., start:].masked_fill_(future, float("-inf"))
            kept.append(scores.softmax(-1).view(n, -1, end))
            outputs.append(torch.bmm(kept[-1], value[:, :end]).view(n, groups, end - start, size))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scaling = scaling
        return torch.cat(outputs, 2)

    @staticmethod
    def backward(ctx, slope):
        """Slopes by query, key and value, of their shapes, from `slope` of the output's; none by the scaling."""
        query, key, value, *kept = ctx.saved_tensors  # the query is scaled
        n, groups, tokens, size = query.shape
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros(x.shape, device=x.device) for x in (key, value))  # float32 sums over blocks
        for start, probabilities in zip(range(0, tokens, BLOCK), kept):
            end = min(start + BLOCK, tokens)
            rows = query[:, :, start:end].reshape(n, -1, size)
            above = slope[:, :, start:end].reshape(n, -1, size)
            to_value[:, :end] += torch.bmm(probabilities.transpose(1, 2), above)
            to_scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(above, value[:, :end].transpose(1, 2)), probabilities, -1, probabilities.dtype
            )
            to_key[:, :end] += torch.bmm(to_scores.transpose(1, 2), rows)
            to_query[:, :, start:end] = torch.bmm(to_scores, key[:, :end]).view(n, groups, -1, size)
        return to_query.mul_(ctx.scaling), to_key.to(key.dtype), to_value.to(value.dtype), None
