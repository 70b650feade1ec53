"""Settings that hold for the whole process."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch

MemoryUsagePreference = Literal["default", "strict", "unrestricted"]

__all__ = [
    "are_deterministic_algorithms_enabled",
    "get_memory_usage_preference",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
]

_deterministic = False
_memory_usage: MemoryUsagePreference = "default"


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Allows only kernels whose results are the same bits on every run.

    `torch.use_deterministic_algorithms(True)` has the same effect; this setting is for natten alone.
    """
    global _deterministic
    _deterministic = bool(mode)


def are_deterministic_algorithms_enabled() -> bool:
    """Whether natten or torch was asked for deterministic algorithms."""
    return _deterministic or torch.are_deterministic_algorithms_enabled()


def set_memory_usage_preference(pref: str = "default") -> None:
    """How much memory beyond inputs and outputs the dispatcher may spend for speed.

    `"default"`: attention weights may be stored (kernel `gemm`) where that is estimated faster and they take at most
    a quarter of the device's memory; `fused_sm80` may accumulate query gradients in float32. `"strict"`: weights are
    never stored, unless the caller forces such a kernel, and gradients never accumulated. `"unrestricted"`: no limit.

    Raises `ValueError` for any other value.
    """
    global _memory_usage
    if pref not in get_args(MemoryUsagePreference):
        raise ValueError(f"pref must be one of {', '.join(get_args(MemoryUsagePreference))}; got {pref!r}")
    _memory_usage = cast(MemoryUsagePreference, pref)


def get_memory_usage_preference() -> MemoryUsagePreference:
    """The preference last set by `set_memory_usage_preference`."""
    return _memory_usage


def is_memory_usage_default() -> bool:
    """Whether the preference is `"default"`."""
    return _memory_usage == "default"


def is_memory_usage_strict() -> bool:
    """Whether the preference is `"strict"`."""
    return _memory_usage == "strict"


def is_memory_usage_unrestricted() -> bool:
    """Whether the preference is `"unrestricted"`."""
    return _memory_usage == "unrestricted"
