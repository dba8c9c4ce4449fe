"""Where a model that was built on the CPU goes: the arguments `dtype`, `device` and `device_map` of an evaluation."""

import os

import accelerate
import torch
from accelerate.utils import get_balanced_memory, get_max_memory

from lib.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """A dtype, or "auto", from its name. Raises UserError for another name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"--model_args dtype={name}: expected {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, name)


def placement(device_map: str | None, device: str) -> tuple[str | None, str]:
    """How to spread the model over GPUs (None: not at all), and the device of its inputs.

    Raises UserError for a `device_map` that is neither one of DEVICE_MAPS nor a device.
    """
    if device_map in DEVICE_MAPS:
        one_process = int(os.environ.get("WORLD_SIZE", 1)) == 1
        spread = device.startswith("cuda") and torch.cuda.is_available() and one_process
        return (device_map if spread else None), device
    try:
        return None, str(torch.device(device_map or device))
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"--model_args device_map={device_map}: expected {', '.join(DEVICE_MAPS)} or a device"
        ) from error


def spread_over_gpus(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """`model` with each part on a GPU, or on the CPU where they are full; `kind` is one of DEVICE_MAPS."""
    whole = list(model._no_split_modules or [])
    if kind == "sequential":
        memory = get_max_memory()
    else:
        memory = get_balanced_memory(model, no_split_module_classes=whole, low_zero=kind == "balanced_low_0")
    return accelerate.dispatch_model(
        model, accelerate.infer_auto_device_map(model, memory, no_split_module_classes=whole)
    )
