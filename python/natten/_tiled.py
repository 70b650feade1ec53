"""Exact inference over grids that do not fit the device: queries in tiles, each with the keys that its windows need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natten._pieces import Box, attend_piece, needed_box, slices, tiles, window_axes
from natten._problem import Axis
from natten.dispatch import Kernel
from natten.types import CausalFlag, Dimension

__all__ = ["tiled", "tiled_memory_bytes"]


def _tile_shape(tile_shape: Dimension, grid: tuple[int, ...]) -> tuple[int, ...]:
    shape = (tile_shape,) * len(grid) if isinstance(tile_shape, int) else tuple(tile_shape)
    if len(shape) != len(grid):
        raise ValueError(f"tile_shape must be an int or {len(grid)} of them (one per axis); got {shape}")
    for axis, size in enumerate(shape):
        if size < 1:
            raise ValueError(f"tile_shape must be at least 1; got {size} along axis {axis}")
    return shape


def _plan(axes: tuple[Axis, ...], grid: tuple[int, ...], tile_shape: Dimension) -> list[tuple[Box, Box]]:
    return [(tile, needed_box(axes, tile)) for tile in tiles(grid, _tile_shape(tile_shape, grid))]


def tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    tile_shape: Dimension,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    kernel: str | Kernel | None = None,
) -> Tensor:
    """Neighborhood attention computed tile by tile: the same rows, with the memory of one tile.

    Each tile of queries is moved to `device` with the keys and values that its windows need, computed there, and its
    output is moved back. Tensors may therefore live where there is room (CPU memory, a memory-mapped file) while
    the device holds one tile at a time: at most `tiled_memory_bytes(...)`. For inference: runs without gradients.

    Args:
        query: `[batch, X, Y, Z, heads, head_dim]` (fewer axes for lower ranks), on any device.
        key, value: as in `natten.na2d`, on the same grid.
        kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, kernel: as in
            `natten.na2d`.
        tile_shape: queries per tile along each axis.
        device: where tiles are computed; query's device by default.
        out: written to when given, `[batch, X, Y, Z, heads, head_dim_v]` with query's dtype.

    Returns:
        Output on query's device, or `out`.

    Raises:
        ValueError, TypeError: as `natten.na2d`, or `tile_shape` or `out` does not fit the grid.
    """
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query must have 4, 5 or 6 dimensions; got shape {tuple(query.shape)}")
    if key.shape[:-2] != query.shape[:-2] or value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            "query, key and value must share batch and grid, key and value the heads; got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    grid = tuple(query.shape[1:-2])
    axes = window_axes(grid, kernel_size, stride, dilation, is_causal)
    shape = (*query.shape[:-1], value.shape[-1])
    if out is None:
        out = query.new_empty(shape)
    elif tuple(out.shape) != tuple(shape) or out.dtype != query.dtype:
        raise ValueError(
            f"out must have shape {tuple(shape)} and dtype {query.dtype}; got {tuple(out.shape)}, {out.dtype}"
        )
    target = query.device if device is None else torch.device(device)

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(target, non_blocking=True)

    extra = {
        "scale": scale,
        "kernel": kernel,
        "additional_keys": None if additional_keys is None else move(additional_keys),
        "additional_values": None if additional_values is None else move(additional_values),
    }
    origin = [0] * rank
    with torch.no_grad():
        for tile, keys in _plan(axes, grid, tile_shape):
            at, needed = slices(tile, origin), slices(keys, origin)
            piece, _ = attend_piece(axes, move(query[at]), move(key[needed]), move(value[needed]), tile, keys, **extra)
            out[at].copy_(piece)
    return out


def tiled_memory_bytes(
    query: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    *,
    tile_shape: Dimension,
) -> int:
    """Largest number of bytes that one tile of `natten.tiled` holds on the device.

    Query, key, value, output and logsumexp of the largest tile; additional keys and values, and what the kernel itself
    needs (nothing for fused kernels), come on top. Takes shapes and dtypes from the tensors, which may be on
    the meta device.
    """
    grid = tuple(query.shape[1:-2])
    axes = window_axes(grid, kernel_size, stride, dilation, is_causal)
    batch, heads, head_dim = query.shape[0], query.shape[-2], query.shape[-1]
    heads_kv, head_dim_v = value.shape[-2:]
    size = query.dtype.itemsize

    def tile_bytes(tile: Box, keys: Box) -> int:
        queries = batch * math.prod(end - begin for begin, end in tile)
        tokens = batch * math.prod(end - begin for begin, end in keys)
        lse = 8 if query.dtype == torch.float64 else 4
        return (
            queries * heads * ((head_dim + head_dim_v) * size + lse)
            + tokens * heads_kv * (head_dim + head_dim_v) * size
        )

    return max(tile_bytes(tile, keys) for tile, keys in _plan(axes, grid, tile_shape))
