"""Neighborhood attention for PyTorch."""

from natten import _composites
from natten._library import HAS_LIBNATTEN
from natten.context import (
    are_deterministic_algorithms_enabled,
    get_memory_usage_preference,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_deterministic_algorithms,
)
from natten.functional import (
    attention,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    na_av,
    na_qk,
    neighborhood_attention_generic,
)

__all__ = [
    "HAS_LIBNATTEN",
    "are_deterministic_algorithms_enabled",
    "attention",
    "get_memory_usage_preference",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "na_av",
    "na_qk",
    "neighborhood_attention_generic",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
]
