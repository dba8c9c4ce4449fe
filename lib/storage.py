"""Tensors that lie in the same memory: found, and given memory of their own."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def unshare(model: nn.Module) -> nn.Module:
    """Copy parameters and buffers that lie in memory of others, or repeat their own: each can then be written alone.

    A merge of layers, a view of a larger tensor or an expanded one shares memory without saying so. Weights that the
    configuration ties are one parameter under two names, and stay one. Nothing else is copied, so what is mapped from a
    file stays mapped. Returns the model.
    """
    for tensor in overlapping([*model.parameters(), *model.buffers()]):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def overlapping(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that must be copied so that no two overlap, and none overlaps itself; the first of each place may stay."""
    in_memory = [tensor for tensor in tensors if tensor.numel() and not tensor.is_meta]
    ordered = sorted(in_memory, key=lambda tensor: (str(tensor.device), tensor.data_ptr()))
    found, device, end = [], None, 0
    for tensor in ordered:
        start = tensor.data_ptr()
        if repeats_itself(tensor) or (tensor.device == device and start < end):
            found.append(tensor)
        else:
            device, end = tensor.device, start + span(tensor) * tensor.element_size()
    return found


def span(tensor: Tensor) -> int:
    """Elements of memory from a tensor's first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def repeats_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may lie in the same place, as in an expanded one."""
    covered = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step < covered:
            return True
        covered = step * (size - 1) + covered
    return False
