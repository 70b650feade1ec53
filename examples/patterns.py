"""Known attention patterns as parameters of neighborhood attention, each checked against its usual plain-torch form.

python examples/patterns.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import natten

TOLERANCE = 2e-6  # ||natten - plain|| / ||plain||, float32
Result = tuple[Tensor, Tensor]  # natten's output and the usual implementation's, same shape


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dense attention over [B, N, H, D] with an optional boolean mask [N, N]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def random_qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, *shape)
    return query, key, value


def to_blocks(x: Tensor, size: int) -> Tensor:
    """[B, X, Y, H, D] to [B * blocks, size * size, H, D]: the window partition of Swin Transformer."""
    b, rows, columns, h, d = x.shape
    x = x.reshape(b, rows // size, size, columns // size, size, h, d).transpose(2, 3)
    return x.reshape(-1, size * size, h, d)


def from_blocks(blocks: Tensor, size: int, like: Tensor) -> Tensor:
    b, rows, columns, h, d = like.shape
    x = blocks.reshape(b, rows // size, columns // size, size, size, h, d).transpose(2, 3)
    return x.reshape(like.shape)


def swin() -> Result:
    """Window attention of Swin Transformer: disjoint blocks, stride == kernel_size."""
    query, key, value = random_qkv(2, 32, 48, 4, 32)
    ours = natten.na2d(query, key, value, kernel_size=8, stride=8)
    usual = from_blocks(dense(*(to_blocks(x, 8) for x in (query, key, value))), 8, query)
    return ours, usual


def halo() -> Result:
    """HaloNet: a block of queries shares a window of its block and a halo. Away from the border the two agree; there,
    HaloNet pads with zeros and neighborhood attention moves the window inward."""
    block, halo_size = 4, 3
    window = block + 2 * halo_size
    query, key, value = random_qkv(2, 32, 32, 4, 32)
    ours = natten.na2d(query, key, value, kernel_size=window, stride=block)

    def windows_of(x: Tensor) -> Tensor:
        *_, h, d = x.shape
        x = F.pad(x, (0, 0, 0, 0, halo_size, halo_size, halo_size, halo_size))
        x = x.unfold(1, window, block).unfold(2, window, block)  # [B, X / block, Y / block, H, D, window, window]
        return x.permute(0, 1, 2, 5, 6, 3, 4).reshape(-1, window * window, h, d)

    usual = from_blocks(dense(to_blocks(query, block), windows_of(key), windows_of(value)), block, query)
    return ours[:, block:-block, block:-block], usual[:, block:-block, block:-block]


def sliding_tile() -> Result:
    """Sliding tile attention for video: tiles of queries attend the tiles around theirs; the stride is the tile."""
    tile, tiles = (2, 4, 4), (3, 3, 3)  # tokens of a tile, tiles of a window
    grid = (8, 16, 24)
    query, key, value = random_qkv(1, *grid, 2, 32)
    kernel_size = tuple(t * n for t, n in zip(tile, tiles, strict=True))
    ours = natten.na3d(query, key, value, kernel_size=kernel_size, stride=tile)

    mask = torch.ones(1, 1, dtype=torch.bool)
    for extent, t, n in zip(grid, tile, tiles, strict=True):
        position = torch.arange(extent) // t  # the tile of a token; windows that would overhang move inward
        centre = position.clamp(n // 2, extent // t - 1 - n // 2)
        mask = torch.kron(mask, (centre[:, None] - position[None, :]).abs() <= n // 2)
    usual = dense(query.flatten(1, 3), key.flatten(1, 3), value.flatten(1, 3), mask)
    return ours, usual.reshape(ours.shape)


def neighborhood(extent: int, kernel_size: int) -> Tensor:
    """Plain windows of one axis: bool [extent, extent]."""
    position = torch.arange(extent)
    start = (position - kernel_size // 2).clamp(0, extent - kernel_size)
    return (position >= start[:, None]) & (position < start[:, None] + kernel_size)


def strided() -> Result:
    """Generalized neighborhood attention: the queries of a group of s x s share the window of the one in its middle."""
    k, s = 9, 3
    query, key, value = random_qkv(2, 20, 25, 4, 32)  # the last groups are smaller
    ours = natten.na2d(query, key, value, kernel_size=k, stride=s)
    rows, columns = (
        neighborhood(extent, k)[(torch.arange(extent) // s * s + s // 2).clamp(max=extent - 1)] for extent in (20, 25)
    )
    usual = dense(query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2), torch.kron(rows, columns))
    return ours, usual.reshape(ours.shape)


def dilated() -> Result:
    """Dilated neighborhood attention: plain windows on every d-th token, in d x d grids that do not meet."""
    d, k = 3, 5
    query, key, value = random_qkv(2, 20, 25, 4, 32)  # lengths need not be multiples of the dilation
    ours = natten.na2d(query, key, value, kernel_size=k, dilation=d)
    usual = torch.empty_like(ours)
    for i in range(d):
        for j in range(d):
            grid = (slice(None), slice(i, None, d), slice(j, None, d))
            _, rows, columns, _, _ = query[grid].shape
            mask = torch.kron(neighborhood(rows, k), neighborhood(columns, k))
            out = dense(query[grid].flatten(1, 2), key[grid].flatten(1, 2), value[grid].flatten(1, 2), mask)
            usual[grid] = out.unflatten(1, (rows, columns))
    return ours, usual


def grid_attention() -> Result:
    """Grid attention of MaxViT: every d-th token of the whole image, kernel_size == extent / dilation."""
    query, key, value = random_qkv(2, 32, 32, 4, 32)
    ours = natten.na2d(query, key, value, kernel_size=8, dilation=4)

    def to_grids(x: Tensor) -> Tensor:
        return x.reshape(2, 8, 4, 8, 4, 4, 32).permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, 64, 4, 32)

    grids = dense(*(to_grids(x) for x in (query, key, value))).reshape(2, 4, 4, 8, 8, 4, 32)
    return ours, grids.permute(0, 3, 1, 4, 2, 5, 6).reshape(ours.shape)


def causal_sliding_window() -> Result:
    """Sliding window of a language model: a token attends itself and the w - 1 before it; 8 heads share 2 K/V heads."""
    length, w = 512, 128
    query, (key, value) = torch.randn(2, length, 8, 64), torch.randn(2, 2, length, 2, 64)
    ours = natten.na1d(query, key, value, kernel_size=w, is_causal=True)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    mask = (distance >= 0) & (distance < w)
    key, value = key.repeat_interleave(4, dim=2), value.repeat_interleave(4, dim=2)
    return ours, dense(query, key, value, mask)


def video_causal_in_time() -> Result:
    """Video: causal in time, a neighborhood in space."""
    grid, kernel_size = (8, 12, 12), (4, 5, 5)
    query, key, value = random_qkv(1, *grid, 2, 32)
    ours = natten.na3d(query, key, value, kernel_size=kernel_size, is_causal=(True, False, False))
    time = torch.arange(grid[0])
    age = time[:, None] - time[None, :]
    mask = (age >= 0) & (age < kernel_size[0])
    for extent, k in zip(grid[1:], kernel_size[1:], strict=True):
        mask = torch.kron(mask, neighborhood(extent, k))
    usual = dense(query.flatten(1, 3), key.flatten(1, 3), value.flatten(1, 3), mask)
    return ours, usual.reshape(ours.shape)


def registers() -> Result:
    """Blocks that all see the same additional tokens (text, registers), under one softmax."""
    query, key, value = random_qkv(2, 16, 16, 4, 32)
    extra_key, extra_value = torch.randn(2, 2, 7, 4, 32)
    ours = natten.na2d(
        query, key, value, kernel_size=8, stride=8, additional_keys=extra_key, additional_values=extra_value
    )

    def with_extra(x: Tensor, extra: Tensor) -> Tensor:
        return torch.cat([to_blocks(x, 8), extra.repeat_interleave(4, dim=0)], dim=1)  # 4 blocks an image

    usual = dense(to_blocks(query, 8), with_extra(key, extra_key), with_extra(value, extra_value))
    return ours, from_blocks(usual, 8, query)


PATTERNS: dict[str, Callable[[], Result]] = {
    "Swin: na2d, stride == kernel_size": swin,
    "HaloNet: na2d, kernel_size == stride + 2 halo": halo,
    "sliding tile: na3d, stride == tile": sliding_tile,
    "GNA: na2d, 1 < stride < kernel_size": strided,
    "DiNAT: na2d, dilation=3": dilated,
    "MaxViT grid: na2d, kernel_size * dilation == extent": grid_attention,
    "causal sliding window: na1d, 8 heads over 2": causal_sliding_window,
    "video: na3d, is_causal=(True, False, False)": video_causal_in_time,
    "registers: na2d, additional_keys": registers,
}


def main() -> None:
    torch.manual_seed(0)
    table = Table("pattern", "relative error", "", title="natten against plain torch, float32 on the CPU")
    failed = []
    for name, pattern in PATTERNS.items():
        ours, usual = pattern()
        error = ((ours - usual).norm() / usual.norm()).item()
        correct = error <= TOLERANCE  # false for NaN
        table.add_row(name, f"{error:.1e}", "ok" if correct else "WRONG")
        if not correct:
            failed.append(name)
    Console().print(table)
    if failed:
        sys.exit(f"differ from plain torch by more than {TOLERANCE:.0e}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
