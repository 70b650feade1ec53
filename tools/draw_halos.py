"""Draws the documentation's pictures of shards and their halos, in one, two and three dimensions.

What is coloured is what the operator attends, as in `draw_windows.py`: nothing is drawn from a formula, and the number
of halo tokens drawn is checked against `natten.distributed.halo_bytes`.

    python tools/draw_halos.py docs/pictures
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from draw_windows import EMPTY, INK, KEY, attended, bare, cell, draw_all, frame, label, save
from natten.distributed import halo_bytes, shard_bounds

INNER, OUTER, HALO = KEY, "#9cc3f5", "#ffb000"
LEGEND = {
    INNER: "the shard: queries that need no halo",
    OUTER: "the shard: queries that wait for the halo",
    HALO: "the halo: keys and values received",
}


@dataclass(frozen=True)
class Case:
    """A window over a grid in equal shards, and the shard that is looked at."""

    grid: tuple[int, ...]
    shards: tuple[int, ...]
    place: tuple[int, ...]
    window: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> np.ndarray:
        """Whether a token belongs to the shard."""
        result = np.zeros(self.grid, dtype=bool)
        bounds = [shard_bounds(n, count)[at] for n, count, at in zip(self.grid, self.shards, self.place, strict=True)]
        result[tuple(slice(*bound) for bound in bounds)] = True
        return result

    def parts(self) -> dict[str, np.ndarray]:
        """The tokens of each colour."""
        tokens = math.prod(self.grid)
        mask = attended(self.grid, **self.window).reshape(tokens, tokens)
        own = self.own.reshape(-1)
        outer = own & (mask & ~own).any(1)
        halo = mask[own].any(0) & ~own
        rank = int(np.ravel_multi_index(self.place, self.shards))
        if halo.sum() != halo_bytes(self.grid, **self.window, shards=self.shards, bytes_per_token=1)[rank]:
            raise AssertionError("what is received is what is attended")
        parts = {INNER: own & ~outer, OUTER: outer, HALO: halo}
        return {colour: part.reshape(self.grid) for colour, part in parts.items()}


def legend(figure: Any) -> None:
    handles = [Patch(facecolor=colour, label=text) for colour, text in LEGEND.items()]
    figure.legend(handles=handles, loc="lower center", ncol=3, frameon=False, fontsize=10, labelcolor=INK)


def draw_1d(path: Path) -> None:
    """Four shards of a line; the second, and what it receives."""
    windows: list[dict[str, Any]] = [
        {"kernel_size": 7},
        {"kernel_size": 6},
        {"kernel_size": 7, "is_causal": True},
        {"kernel_size": 3, "dilation": 4},
        {"kernel_size": 6, "stride": 3},
        {"kernel_size": 8, "stride": 8},
        {"kernel_size": 21},
    ]
    figure, grid = plt.subplots(len(windows), 1, figsize=(12.4, 6.2))
    for axes, window in zip(grid, windows, strict=True):
        parts = Case((32,), (4,), (1,), window).parts()
        for token in range(32):
            colour = next((colour for colour, part in parts.items() if part[token]), EMPTY)
            cell(axes, 0, token, colour)
        for edge in (8, 16, 24):
            axes.plot((edge, edge), (-0.15, 1.15), color=INK, linewidth=1.2)
        axes.set_xlim(-9.5, 32.1)
        axes.set_ylim(1.2, -0.2)
        axes.text(-0.5, 0.5, label(window), ha="right", va="center", fontsize=10.5, color=INK)
        bare(axes, "")
    figure.subplots_adjust(left=0.0, right=1.0, top=1.0, bottom=0.07, hspace=0.0)
    legend(figure)
    save(figure, path)


def draw_2d(path: Path) -> None:
    """One of 3 x 3 shards of a plane."""
    cases = [
        Case((18, 18), (3, 3), (1, 1), {"kernel_size": 5}),
        Case((18, 18), (3, 3), (1, 1), {"kernel_size": 5, "is_causal": (True, False)}),
        Case((18, 18), (3, 3), (1, 1), {"kernel_size": (3, 5), "dilation": (4, 1)}),
        Case((18, 18), (3, 3), (0, 2), {"kernel_size": 9}),
    ]
    figure, grid = plt.subplots(1, len(cases), figsize=(12.4, 3.75))
    for axes, case in zip(grid, cases, strict=True):
        parts = case.parts()
        for row, column in np.ndindex(18, 18):
            colour = next((colour for colour, part in parts.items() if part[row, column]), EMPTY)
            cell(axes, row, column, colour)
        for i, j in np.ndindex(3, 3):
            axes.add_patch(Rectangle((6 * j, 6 * i), 6, 6, fill=False, edgecolor=INK, linewidth=1.2))
        axes.set_xlim(-0.2, 18.2)
        axes.set_ylim(18.2, -0.2)
        bare(axes, label(case.window))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.09, wspace=0.05)
    legend(figure)
    save(figure, path)


def draw_3d(path: Path) -> None:
    """One shard of a volume that is cut along one, two and three axes; the first axis points to the right."""
    grid = (12, 12, 12)
    cases = [
        Case(grid, (3, 1, 1), (1, 0, 0), {"kernel_size": 5}),
        Case(grid, (3, 3, 1), (1, 1, 0), {"kernel_size": 5}),
        Case(grid, (3, 3, 3), (1, 1, 1), {"kernel_size": 5}),
        Case(grid, (3, 3, 3), (1, 1, 1), {"kernel_size": 5, "is_causal": (True, False, False)}),
    ]
    figure = plt.figure(figsize=(12.4, 3.9))
    for index, case in enumerate(cases):
        axes: Any = figure.add_subplot(1, len(cases), index + 1, projection="3d", computed_zorder=False)
        parts = case.parts()
        axes.voxels(parts[HALO], facecolors=HALO + "38", edgecolors=HALO + "90", linewidth=0.4, shade=False, zorder=2)
        axes.voxels(case.own, facecolors=INNER + "c0", edgecolors=INK + "60", linewidth=0.3, shade=False, zorder=3)
        frame(axes, 12)
        shards = " x ".join(map(str, case.shards))
        causal = f"is_causal={case.window['is_causal']}" if "is_causal" in case.window else ""
        axes.set_title(f"{shards} shards, kernel_size=5\n{causal}", fontsize=10, color=INK, pad=0)
    figure.subplots_adjust(left=0.0, right=1.0, top=0.86, bottom=0.07, wspace=0.0)
    handles = [Patch(facecolor=INNER, label="the shard"), Patch(facecolor=HALO, label=LEGEND[HALO])]
    figure.legend(handles=handles, loc="lower center", ncol=2, frameon=False, fontsize=10, labelcolor=INK)
    save(figure, path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "halos-1d.png": draw_1d,
    "halos-2d.png": draw_2d,
    "halos-3d.png": draw_3d,
}


if __name__ == "__main__":
    draw_all(__doc__, PICTURES)
