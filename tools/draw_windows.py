"""Draws the documentation's pictures of windows, in one, two and three dimensions.

Nothing is drawn from a formula: with equal logits and the identity matrix as values, the operator returns its own
attention matrix, and what is coloured is what is not zero there.

    python tools/draw_windows.py docs/pictures
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import natten

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK = "#1c2733"
EMPTY = "#eef1f4"
KEY = "#3b7dd8"
QUERY = "#ffb000"
OUTSIDE = "#9aa7b3"


def attended(grid: tuple[int, ...], **parameters: Any) -> np.ndarray:
    """Which key every query attends: bool [*grid, *grid]."""
    tokens = math.prod(grid)
    attend = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(grid)]
    zeros = torch.zeros(1, *grid, 1, 8)
    identity = torch.eye(tokens).reshape(1, *grid, 1, tokens)
    weights = attend(zeros, zeros, identity, **parameters)
    assert isinstance(weights, torch.Tensor)
    return (weights > 0).reshape(*grid, *grid).numpy()


def label(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, pad=7)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def cell(axes: Axes, row: float, column: float, colour: str, **style: Any) -> None:
    axes.add_patch(Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, facecolor=colour, linewidth=0, **style))


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def frame(axes: Any, side: int) -> None:
    """The edges of a cube, seen from a corner, and nothing else around it."""
    for free in range(3):
        for offset in ((0, 0), (0, side), (side, side), (side, 0)):
            start = np.insert(np.array(offset), free, 0)
            end = np.insert(np.array(offset), free, side)
            axes.plot(*zip(start, end, strict=True), color=OUTSIDE, linewidth=0.7, zorder=1)
    axes.set_box_aspect((1, 1, 1), zoom=1.12)
    axes.view_init(elev=22, azim=-58)
    axes.set_axis_off()


def draw_1d(path: Path) -> None:
    """Attention matrices: one row a query, one column a key."""
    length = 16
    cases: list[dict[str, Any]] = [
        {"kernel_size": 5},
        {"kernel_size": 4},
        {"kernel_size": 5, "dilation": 3},
        {"kernel_size": 6, "stride": 3},
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": 5, "is_causal": True},
        {"kernel_size": 5, "is_causal": True, "dilation": 2},
        {"kernel_size": 6, "is_causal": True, "stride": 3},
    ]
    figure, grid = plt.subplots(2, 4, figsize=(12.4, 7.0))
    for axes, parameters in zip(grid.flat, cases, strict=True):
        mask = attended((length,), **parameters)
        for query in range(length):
            for key in range(length):
                colour = (QUERY if query == key else KEY) if mask[query, key] else EMPTY
                cell(axes, query, key, colour)
        axes.set_xlim(0, length)
        axes.set_ylim(length, 0)
        bare(axes, label(parameters).replace("is_causal=True, ", "is_causal=True,\n"))
    for axes in grid[:, 0]:
        axes.set_ylabel("query", color=INK)
    for axes in grid[1]:
        axes.set_xlabel("key", color=INK)
    figure.subplots_adjust(left=0.03, right=0.99, top=0.94, bottom=0.04, wspace=0.07, hspace=0.19)
    save(figure, path)


def draw_2d(path: Path) -> None:
    """The windows of three queries each: in a corner, at an edge, inside."""
    extent = 14
    queries = ((0, 0), (5, 12), (9, 5))
    cases: list[dict[str, Any]] = [
        {"kernel_size": 5},
        {"kernel_size": 4, "dilation": 3},
        {"kernel_size": 6, "stride": 3},
        {"kernel_size": 5, "is_causal": (True, False)},
    ]
    figure, grid = plt.subplots(len(queries), len(cases), figsize=(12.4, 9.6))
    for column, parameters in enumerate(cases):
        mask = attended((extent, extent), **parameters)
        for axes, query in zip(grid[:, column], queries, strict=True):
            window = mask[query]
            for row in range(extent):
                for other in range(extent):
                    cell(axes, row, other, KEY if window[row, other] else EMPTY)
            if not window[query]:
                raise AssertionError("a query attends itself")
            cell(axes, *query, QUERY)
            axes.set_xlim(0, extent)
            axes.set_ylim(extent, 0)
            bare(axes, label(parameters) if axes is grid[0, column] else "")
    for axes, name in zip(grid[:, 0], ("in the corner", "near an edge", "inside"), strict=True):
        axes.set_ylabel(name, color=INK)
    figure.subplots_adjust(left=0.03, right=0.99, top=0.955, bottom=0.01, wspace=0.05, hspace=0.05)
    save(figure, path)


def draw_3d(path: Path) -> None:
    """The window of one query of a volume: time goes to the right."""
    grid = (8, 8, 8)
    query = (5, 4, 4)
    cases: list[dict[str, Any]] = [
        {"kernel_size": 3},
        {"kernel_size": (5, 3, 3), "is_causal": (True, False, False)},
        {"kernel_size": (4, 2, 2), "stride": (4, 2, 2)},
        {"kernel_size": (4, 3, 3), "dilation": (2, 1, 1)},
    ]
    figure = plt.figure(figsize=(12.4, 3.8))
    for index, parameters in enumerate(cases):
        axes: Any = figure.add_subplot(1, len(cases), index + 1, projection="3d", computed_zorder=False)
        window = attended(grid, **parameters)[query]
        is_query = np.zeros(grid, dtype=bool)
        is_query[query] = True
        axes.voxels(
            window & ~is_query, facecolors=KEY + "50", edgecolors=KEY + "c0", linewidth=0.5, shade=False, zorder=2
        )
        axes.voxels(is_query, facecolors=QUERY, edgecolors=INK, linewidth=0.6, shade=False, zorder=3)
        frame(axes, 8)
        axes.set_title("\n".join(f"{k}={v}" for k, v in parameters.items()), fontsize=10, color=INK, pad=0)
    figure.subplots_adjust(left=0.0, right=1.0, top=0.86, bottom=0.02, wspace=0.0)
    save(figure, path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "windows-1d.png": draw_1d,
    "windows-2d.png": draw_2d,
    "windows-3d.png": draw_3d,
}


def draw_all(description: str | None, pictures: Mapping[str, Callable[[Path], None]]) -> None:
    """The command: draws every picture into the folder that it is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write " + ", ".join(pictures))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        draw(folder / name)


if __name__ == "__main__":
    draw_all(__doc__, PICTURES)
