"""Computing a grid piece by piece, with the result of the whole.

1. A causal video transformer, frame by frame with a key/value cache: every layer keeps the keys and values of the last
   frames of its window, and a new frame costs its own queries only.
2. Neighborhood attention over an image, tile by tile: each tile brings the keys its windows need.

Both rest on the same three arguments: q_start, kv_start and extent place queries and keys in the global grid.

    python examples/pieces.py
"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natten

TOLERANCE = 2e-6  # ||pieces - whole|| / ||whole||, float32

FRAMES, ROWS, COLUMNS = 12, 16, 16
VIDEO_WINDOW = (4, 7, 7)  # frames, rows, columns
HEADS, HEAD_DIM = 4, 32


class CausalVideoBlock(nn.Module):
    """Transformer block over [B, T, X, Y, C], causal in time. `cache` holds earlier frames' keys and values."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, first_frame: int = 0, cache: list[Tensor] | None = None) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        if cache is not None:
            if cache:
                key = torch.cat([cache[0], key], dim=1)
                value = torch.cat([cache[1], value], dim=1)
            cache[:] = [key[:, 1 - VIDEO_WINDOW[0] :], value[:, 1 - VIDEO_WINDOW[0] :]]  # all that later frames need
        end = first_frame + x.shape[1]
        out = natten.na3d(
            query,
            key,
            value,
            kernel_size=VIDEO_WINDOW,
            is_causal=(True, False, False),
            q_start=(first_frame, 0, 0),
            kv_start=(end - key.shape[1], 0, 0),
            extent=(max(end, VIDEO_WINDOW[0]), ROWS, COLUMNS),
        )
        x = x + self.out(out.flatten(-2))
        return x + self.mlp(x)


@torch.no_grad()
def video_frame_by_frame() -> tuple[Tensor, Tensor]:
    """Three blocks over twelve frames: streamed, and at once."""
    blocks = nn.ModuleList([CausalVideoBlock() for _ in range(3)])
    video = torch.randn(1, FRAMES, ROWS, COLUMNS, HEADS * HEAD_DIM)
    whole = video
    for block in blocks:
        whole = block(whole)

    caches: list[list[Tensor]] = [[] for _ in blocks]
    frames = []
    for index in range(FRAMES):
        frame = video[:, index : index + 1]
        for block, cache in zip(blocks, caches, strict=True):
            frame = block(frame, first_frame=index, cache=cache)
        frames.append(frame)
    return torch.cat(frames, dim=1), whole


def image_tile_by_tile() -> tuple[Tensor, Tensor]:
    """Tiles of 32 x 32 queries of an image of 96 x 128 tokens, each with its halo."""
    grid, tile, window = (96, 128), 32, 13
    query, key, value = torch.randn(3, 1, *grid, HEADS, HEAD_DIM)
    whole = natten.na2d(query, key, value, kernel_size=window)

    def halo(start: int, extent: int) -> slice:
        """Keys that queries [start, start + tile) see. Windows move inward at borders, so up to `window` keys there."""
        first = min(max(start - window // 2, 0), extent - window)
        last = min(max(start + tile - 1 - window // 2, 0), extent - window) + window
        return slice(first, last)

    pieces = torch.empty_like(whole)
    for row in range(0, grid[0], tile):
        for column in range(0, grid[1], tile):
            queries = (slice(None), slice(row, row + tile), slice(column, column + tile))
            keys = (slice(None), halo(row, grid[0]), halo(column, grid[1]))
            pieces[queries] = natten.na2d(
                query[queries],
                key[keys],
                value[keys],
                kernel_size=window,
                q_start=(row, column),
                kv_start=(keys[1].start, keys[2].start),
                extent=grid,
            )
    return pieces, whole


EXAMPLES = {
    "video, frame by frame with a key/value cache": video_frame_by_frame,
    "image, tile by tile": image_tile_by_tile,
}


def main() -> None:
    torch.manual_seed(0)
    table = Table("", "relative error", "", title="pieces against the whole, float32 on the CPU")
    failed = []
    for name, example in EXAMPLES.items():
        pieces, whole = example()
        error = ((pieces - whole).norm() / whole.norm()).item()
        correct = error <= TOLERANCE  # false for NaN
        table.add_row(name, f"{error:.1e}", "ok" if correct else "WRONG")
        if not correct:
            failed.append(name)
    Console().print(table)
    if failed:
        sys.exit(f"pieces differ from the whole by more than {TOLERANCE:.0e}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
