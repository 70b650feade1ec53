"""Trains small models from the same seeds: in bfloat16 with the Hopper kernels, and in float32 with naive kernels.

    python tools/train_compare.py --output docs/performance/h200/training.json
    python tools/train_compare.py --output docs/performance/h200/training.json --picture docs/pictures/training.svg

The second form draws the losses of a file that exists. A model is three blocks of neighborhood attention, on images or
on videos; it removes noise from waves with a box of them inverted, made here. Weights, data and their order are the
same in every run of a model; a third run, bfloat16 with naive kernels, tells what the type does from what the kernel
does. bfloat16 is autocast: weights and their updates are float32.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import natten
from natten.bench.problems import read_data
from natten.bench.report import circumstances, write_json

CHANNELS, HEADS = 256, 4
NOISE = 1.0
LAST = 20  # steps over which final losses are averaged


@dataclass(frozen=True)
class Task:
    """A model and its data."""

    name: str
    grid: tuple[int, ...]
    batch: int
    windows: tuple[dict[str, Any], ...]  # of each block


TASKS = (
    Task(
        "2-D",
        (40, 48),
        8,
        (
            {"kernel_size": 9},
            {"kernel_size": (9, 7), "dilation": (2, 3)},
            {"kernel_size": 12, "stride": (4, 2)},
        ),
    ),
    Task(
        "3-D",
        (8, 20, 24),
        4,
        (
            {"kernel_size": (5, 5, 7), "is_causal": (True, False, False)},
            {"kernel_size": (3, 5, 5), "dilation": (2, 2, 3)},
            {"kernel_size": (8, 7, 9), "stride": (4, 1, 3)},
        ),
    ),
)
# Name of a run: type of its products, kernel.
RUNS = {
    "float32, naive": (torch.float32, "naive"),
    "bfloat16, naive": (torch.bfloat16, "naive"),
    "bfloat16, fused_sm90": (torch.bfloat16, "fused_sm90"),
}


class Block(nn.Module):
    """Pre-norm transformer block with neighborhood attention, [B, ..., C] in and out."""

    def __init__(self, window: dict[str, Any], kernel: str) -> None:
        super().__init__()
        self.window, self.kernel = window, kernel
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.mlp = nn.Sequential(
            nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        attend = natten.na2d if x.dim() == 4 else natten.na3d
        packed = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, CHANNELS // HEADS))
        attended = attend(*packed.unbind(-3), **self.window, kernel=self.kernel)
        assert isinstance(attended, Tensor)
        x = x + self.out(attended.flatten(-2))
        result: Tensor = x + self.mlp(x)
        return result


class Denoiser(nn.Module):
    """Noisy grids [B, ...] to clean ones."""

    def __init__(self, task: Task, kernel: str) -> None:
        super().__init__()
        self.embed = nn.Linear(1, CHANNELS)
        self.position = nn.Parameter(0.1 * torch.randn(*task.grid, CHANNELS))
        self.blocks = nn.Sequential(*(Block(window, kernel) for window in task.windows))
        self.head = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.embed(x[..., None]) + self.position))[..., 0]
        return result


def clean_grids(task: Task, generator: torch.Generator) -> Tensor:
    """Four waves of random direction, length and phase; inside a random box, their negative."""
    device = generator.device

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator, device=device)

    per_item = (..., *[None] * len(task.grid))
    coordinates = torch.meshgrid(*(torch.arange(n, device=device) / n for n in task.grid), indexing="ij")
    waves = uniform(0, 2 * math.pi, task.batch, 4)[per_item].expand(-1, -1, *task.grid)
    inside = torch.ones(task.batch, *task.grid, device=device)
    for coordinate in coordinates:
        waves = waves + 2 * math.pi * uniform(-3, 3, task.batch, 4)[per_item] * coordinate
        begin = uniform(0, 0.5, task.batch)[per_item]
        inside = inside * ((coordinate >= begin) & (coordinate < begin + 0.4))
    return waves.sin().sum(1) / 2 * (1 - 2 * inside)


def train(task: Task, dtype: torch.dtype, kernel: str, steps: int, device: torch.device) -> list[float]:
    """Loss of every step."""
    torch.manual_seed(0)
    model = Denoiser(task, kernel).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator(device).manual_seed(1)
    losses = []
    for _ in range(steps):
        target = clean_grids(task, generator)
        noisy = target + NOISE * torch.randn(target.shape, generator=generator, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = model(noisy)
        loss = nn.functional.mse_loss(predicted.float(), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def measure(steps: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each model and run; prints them."""
    rows = []
    for task in TASKS:
        for name, (dtype, kernel) in RUNS.items():
            begin = time.perf_counter()
            losses = train(task, dtype, kernel, steps, device)
            final = fmean(losses[-LAST:])
            rows.append(
                {
                    "model": task.name,
                    "run": name,
                    "parameters": sum(p.numel() for p in Denoiser(task, kernel).parameters()),
                    "final_loss": round(final, 5),
                    "losses": [round(loss, 5) for loss in losses],
                }
            )
            seconds = time.perf_counter() - begin
            print(f"{task.name}  {name:22} first {losses[0]:.4f}  final {final:.5f}  {seconds:.1f} s", flush=True)
    return rows


def draw(source: Path, picture: Path) -> None:
    """Losses over steps, one panel a model; below, their distance from the float32 run."""
    import matplotlib.pyplot as plt

    from draw_windows import INK, KEY, OUTSIDE, QUERY

    rows = read_data(str(source))["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    colours = dict(zip(RUNS, (OUTSIDE, QUERY, KEY), strict=True))
    figure, panels = plt.subplots(
        2, len(models), figsize=(10, 5), height_ratios=(2, 1), sharex=True, squeeze=False, layout="constrained"
    )
    for column, model in enumerate(models):
        losses = {row["run"]: row["losses"] for row in rows if row["model"] == model}
        above, below = panels[0][column], panels[1][column]
        reference = losses[next(iter(RUNS))]
        for run, values in losses.items():
            thick = values is reference
            above.plot(values, color=colours[run], linewidth=3 if thick else 1, label=run)
            if not thick:
                relative = [100 * (value / other - 1) for value, other in zip(values, reference, strict=True)]
                below.plot(relative, color=colours[run], linewidth=1)
        above.set_yscale("log")
        above.set_title(f"{model} model", color=INK)
        above.set_ylabel("loss", color=INK)
        below.set_ylabel("distance from float32, %", color=INK)
        below.set_xlabel("step", color=INK)
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    figure.savefig(picture, facecolor="white", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of losses")
    parser.add_argument("--picture", type=Path, help="draw the losses in --output here, instead of training")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--commit", help="revision, where the code runs outside of its repository")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        draw(arguments.output, arguments.picture)
        return
    if not torch.cuda.is_available():
        sys.exit("needs a GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    rows = measure(arguments.steps, device)
    write_json(arguments.output, circumstances(device, commit=arguments.commit), rows)


if __name__ == "__main__":
    main()
