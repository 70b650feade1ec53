"""Draws what one query of a photograph attends: its window in four flavours, and the weights inside it.

Nothing here is trained. A token is a patch of 6 x 6 pixels, described by its colour and its edges; queries and keys
are the same descriptors, so a weight says how much a patch resembles the query's patch. The windows themselves are not
drawn from a formula: the values are the identity matrix, so that the operator's output is its own attention matrix.

    python examples/windows.py docs/pictures/windows.png
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from skimage import color, data, feature, filters

import natten

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCH = 6  # pixels along the side of a token
QUERY = (18, 15)  # row and column of the query's token
SHARPNESS = 14.0  # `scale` of the attention: descriptors have unit length, so logits lie in [-14, 14]

INK = "#1c2733"
ACCENT = "#ffb000"


@dataclass(frozen=True)
class Flavour:
    title: str
    caption: str
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool | tuple[bool, bool] = False


FLAVOURS = (
    Flavour("plain", "kernel_size=15\nthe 225 tokens around the query", 15),
    Flavour("dilated", "kernel_size=15, dilation=3\n225 tokens, every third one", 15, dilation=3),
    Flavour("strided", "kernel_size=15, stride=6\n36 queries (dashed) share one window", 15, stride=6),
    Flavour("causal", "kernel_size=15, is_causal=True\nnothing below, nothing to the right", 15, is_causal=True),
)


def photograph() -> np.ndarray:
    """The face of scikit-image's cat, [300, 300, 3] in 0..1; shipped inside that package."""
    return np.asarray(data.chelsea()[:, 90:390], dtype=np.float64) / 255.0


def descriptors(image: np.ndarray) -> torch.Tensor:
    """Colour and edges of every token, unit vectors [1, X, Y, 1, D]."""
    lab = filters.gaussian(color.rgb2lab(image), sigma=PATCH / 3, channel_axis=-1)
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    colours = lab.reshape(rows, PATCH, columns, PATCH, 3).mean(axis=(1, 3))
    edges = feature.hog(
        image,
        orientations=6,
        pixels_per_cell=(PATCH, PATCH),
        cells_per_block=(1, 1),
        channel_axis=-1,
        feature_vector=False,
    ).reshape(rows, columns, 6)

    def standardise(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(axis=(0, 1))) / x.std(axis=(0, 1))

    tokens = torch.from_numpy(np.concatenate([standardise(colours), 0.35 * standardise(edges)], axis=-1)).float()
    return torch.nn.functional.normalize(tokens, dim=-1)[None, :, :, None, :]


def attention_of_query(tokens: torch.Tensor, flavour: Flavour) -> np.ndarray:
    """Weights that the query pays to every token of the image, [X, Y]; exactly 0 outside its window."""
    _, rows, columns, _, _ = tokens.shape
    identity = torch.eye(rows * columns).reshape(1, rows, columns, 1, rows * columns)
    weights = natten.na2d(
        tokens,
        tokens,
        identity,
        kernel_size=flavour.kernel_size,
        stride=flavour.stride,
        dilation=flavour.dilation,
        is_causal=flavour.is_causal,
        scale=SHARPNESS,
    )
    return weights[0, QUERY[0], QUERY[1], 0].reshape(rows, columns).numpy()


def outline(axes: Axes, row: float, column: float, rows: float, columns: float, **style: Any) -> None:
    axes.add_patch(
        Rectangle((column * PATCH - 0.5, row * PATCH - 0.5), columns * PATCH, rows * PATCH, fill=False, **style)
    )


def mark_query(axes: Axes) -> None:
    for style in ({"edgecolor": "black", "linewidth": 3.4}, {"edgecolor": ACCENT, "linewidth": 1.8}):
        outline(axes, QUERY[0] - 0.25, QUERY[1] - 0.25, 1.5, 1.5, **style)


def faded(image: np.ndarray) -> np.ndarray:
    """The photograph as a pale, soft background."""
    return color.gray2rgb(filters.gaussian(0.62 + 0.30 * color.rgb2gray(image), sigma=0.7))


def draw_window(axes: Axes, image: np.ndarray, inside: np.ndarray, flavour: Flavour) -> None:
    mask = np.kron(inside, np.ones((PATCH, PATCH)))[..., None]
    axes.imshow(np.where(mask, image, faded(image)))
    if flavour.stride > 1:
        row, column = (q // flavour.stride * flavour.stride for q in QUERY)
        outline(
            axes, row, column, flavour.stride, flavour.stride, edgecolor="white", linewidth=1.4, linestyle=(0, (2, 1.4))
        )


def draw_attention(axes: Axes, image: np.ndarray, weights: np.ndarray) -> None:
    strength = np.sqrt(weights / weights.max())  # the square root keeps small weights visible
    heat = matplotlib.colormaps["inferno"](strength)[..., :3]
    heat = np.kron(heat, np.ones((PATCH, PATCH, 1)))
    mask = np.kron(weights > 0, np.ones((PATCH, PATCH)))[..., None]
    axes.imshow(np.where(mask, heat, faded(image)))


def draw(path: Path) -> None:
    """Writes the picture to `path`."""
    image = photograph()
    tokens = descriptors(image)
    figure, grid = plt.subplots(2, len(FLAVOURS), figsize=(13.2, 7.25), dpi=130, facecolor="white")
    for column, flavour in enumerate(FLAVOURS):
        weights = attention_of_query(tokens, flavour)
        draw_window(grid[0, column], image, weights > 0, flavour)
        draw_attention(grid[1, column], image, weights)
        grid[0, column].set_title(flavour.title, fontsize=17, fontweight="bold", color=INK, pad=8)
        grid[1, column].set_xlabel(flavour.caption, fontsize=11.5, color=INK, labelpad=8, linespacing=1.5)
    for axes in grid.flat:
        mark_query(axes)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    grid[0, 0].set_ylabel("window of one query", fontsize=13, color=INK, labelpad=10)
    grid[1, 0].set_ylabel("attention it pays", fontsize=13, color=INK, labelpad=10)
    figure.subplots_adjust(left=0.035, right=0.995, top=0.945, bottom=0.095, wspace=0.035, hspace=0.035)
    path.parent.mkdir(parents=True, exist_ok=True)
    rendered = io.BytesIO()
    figure.savefig(rendered, format="png")
    plt.close(figure)
    pixels = Image.open(rendered).convert("RGB")
    # A palette of 256 colours keeps the file small and is not visible here.
    pixels.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", default=Path("build/windows.png"))
    draw(parser.parse_args().picture)


if __name__ == "__main__":
    main()
