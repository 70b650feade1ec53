"""Neighborhood attention for PyTorch: `na1d`, `na2d`, `na3d`, and layers built on them.

`python -m natten info` shows what is installed; `natten.explain` which kernel a call takes, and why.
"""

from natten import _composites as _composites
from natten._explain import Explanation, explain
from natten._library import HAS_LIBNATTEN
from natten._tiled import tiled, tiled_memory_bytes
from natten._tune import Tuning, tune
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
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

if HAS_LIBNATTEN:
    from natten import _flops as _flops

__all__ = [
    "HAS_LIBNATTEN",
    "Explanation",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Tuning",
    "__version__",
    "are_deterministic_algorithms_enabled",
    "attention",
    "explain",
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
    "tiled",
    "tiled_memory_bytes",
    "tune",
    "use_deterministic_algorithms",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("natten")
        except PackageNotFoundError:  # a checkout on the path
            return "0+unknown"
    raise AttributeError(f"module 'natten' has no attribute {name!r}")
