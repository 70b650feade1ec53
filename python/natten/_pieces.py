"""Pieces of a grid: which keys a range of queries needs, and which queries need only some keys.

Sharding over devices, tiled inference and the key/value cache compute pieces of a larger problem exactly. All three ask
the same two questions, answered here per axis, in global coordinates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from natten._problem import Axis, check_window_arguments
from natten.types import CausalFlag, Dimension

__all__ = [
    "Box",
    "Range",
    "attend_piece",
    "intersection",
    "needed_box",
    "needed_keys",
    "slices",
    "split_queries",
    "starts",
    "tiles",
    "window_axes",
]

#: Half-open range of global coordinates along one axis.
Range = tuple[int, int]
#: One range for each axis.
Box = tuple[Range, ...]


def window_axes(
    extent: Sequence[int],
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag | None,
) -> tuple[Axis, ...]:
    """The checked window over a whole grid of that extent.

    Raises:
        ValueError, TypeError: as `natten.na2d` does for the window's arguments.
    """
    window = check_window_arguments(len(extent), kernel_size, stride, dilation, is_causal)
    axes = []
    for axis, (length, k, s, d, causal) in enumerate(zip(extent, *window, strict=True)):
        if length < 1:
            raise ValueError(f"extent must be at least 1; got {length} along axis {axis}")
        if d > length or (k != -1 and k * d > length):
            raise ValueError(
                f"kernel_size * dilation must not exceed the extent {length} along axis {axis}; got {k} * {d}"
            )
        result = Axis(k, s, d, int(causal), 0, 0, length)
        if s > result.slots:
            raise ValueError(f"stride must not exceed the window of {result.slots}; got {s} along axis {axis}")
        axes.append(result)
    return tuple(axes)


@functools.lru_cache(maxsize=4096)
def needed_keys(axis: Axis, queries: Range) -> Range:
    """Smallest range of keys that holds the windows of all the queries.

    Both ends of the windows are non-decreasing inside a dilation group, so each group's first and last query decide.
    """
    first, end = queries
    count = min(axis.dilation, end - first)
    begins = [axis.key_range(first + i)[0] for i in range(count)]
    ends = [axis.key_range(end - 1 - i)[1] for i in range(count)]
    return min(begins), max(ends)


def needed_box(axes: Sequence[Axis], queries: Box) -> Box:
    """`needed_keys` along every axis."""
    return tuple(needed_keys(axis, part) for axis, part in zip(axes, queries, strict=True))


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None when that is nothing."""
    result = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return None if any(begin >= end for begin, end in result) else result


@functools.lru_cache(maxsize=4096)
def _inner_queries(axis: Axis, queries: Range, keys: Range) -> Range:
    """A range of the queries whose windows lie in `keys`, maximal from its first query on; empty ranges are (b, b)."""
    begin, end = queries
    spans = [axis.key_range(i) for i in range(begin, end)]
    inner = begin + max((i + 1 for i, span in enumerate(spans) if span[0] < keys[0]), default=0)
    outer = next((i for i in range(inner, end) if spans[i - begin][1] > keys[1]), end)
    return inner, outer


def split_queries(axes: Sequence[Axis], queries: Box, keys: Box) -> tuple[Box | None, list[Box]]:
    """The queries that need only `keys`, as one box (None: there are none), and the others, as disjoint boxes."""
    inner = tuple(_inner_queries(axis, q, k) for axis, q, k in zip(axes, queries, keys, strict=True))
    if any(begin >= end for begin, end in inner):
        return None, [queries]
    outer: list[Box] = []
    for axis, ((begin, end), (inner_begin, inner_end)) in enumerate(zip(queries, inner, strict=True)):
        # Before and behind the inner box along this axis; inside it along earlier axes, anywhere along later ones.
        for part in ((begin, inner_begin), (inner_end, end)):
            if part[0] < part[1]:
                outer.append((*inner[:axis], part, *queries[axis + 1 :]))
    return inner, outer


def slices(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """Index of a box in a tensor `[batch, axes..., ...]` whose first token stands at `origin`."""
    return (slice(None), *(slice(b - o, e - o) for (b, e), o in zip(box, origin, strict=True)))


def starts(box: Box) -> list[int]:
    """The box's first coordinates."""
    return [begin for begin, _ in box]


def tiles(extent: Sequence[int], tile: Sequence[int]) -> list[Box]:
    """The grid cut into tiles of that shape, those at the ends smaller."""
    parts = [
        [(begin, min(begin + size, length)) for begin in range(0, length, size)]
        for length, size in zip(extent, tile, strict=True)
    ]
    return list(itertools.product(*parts))


def attend_piece(
    axes: Sequence[Axis], query: Tensor, key: Tensor, value: Tensor, queries: Box, keys: Box, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of a box of queries from a box of keys that holds their windows.

    The tensors are the pieces themselves; the result equals those rows of the whole problem.
    """
    from natten.functional import neighborhood_attention_generic

    result = neighborhood_attention_generic(
        query,
        key,
        value,
        kernel_size=[axis.kernel_size for axis in axes],
        stride=[axis.stride for axis in axes],
        dilation=[axis.dilation for axis in axes],
        is_causal=[bool(axis.causal) for axis in axes],
        q_start=starts(queries),
        kv_start=starts(keys),
        extent=[axis.extent for axis in axes],
        return_lse=True,
        **arguments,
    )
    assert isinstance(result, tuple)
    return result
