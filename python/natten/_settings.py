"""What a call inherits from its surroundings: autocast, and torch's numerical settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natten import context
from natten._problem import ALLOW_TF32, DETERMINISTIC

__all__ = ["autocast", "autocast_enabled", "current_flags"]


def current_flags(dtype: torch.dtype, device: torch.device) -> int:
    """The operators' `flags` under torch's and natten's current settings."""
    flags = DETERMINISTIC if context.are_deterministic_algorithms_enabled() else 0
    # fp32_precision follows both the older settings (allow_tf32, set_float32_matmul_precision) and the newer ones;
    # reading the older ones raises after the newer were set.
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        flags |= ALLOW_TF32
    return flags


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts as autocast does: floating-point tensors but float64 become the autocast dtype of their device."""
    return tuple(
        tensor
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64
        else tensor.to(torch.get_autocast_dtype(tensor.device.type))
        for tensor in tensors
    )
