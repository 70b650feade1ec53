"""Models with neighborhood attention: throughput, memory, and the largest input that fits, by kind of attention.

    python tools/bench_models.py --json docs/performance/h200/models.json
    python tools/bench_models.py --parts limits --limits video --attentions natten,dense

throughput  An image backbone (DiNAT: `dinat-tiny`, `dinat-base`, 224 x 224 pixels) and a diffusion transformer for
            video (`video-dit`: 16 x 32 x 32 tokens), bfloat16, eager: inference, and training steps with AdamW.
limits      Two blocks of a transformer (512 channels, 8 heads) on the longest sequence, the largest feature map and the
            longest video (frames of 32 x 32 tokens) for which a forward and a backward pass fit into the device's
            memory, each within `--step-limit` seconds: found by bisection, from a linear extrapolation of the memory.

Kinds of attention: `natten`, what the dispatcher chooses; `strided`, the same with windows shared by blocks of queries;
`gemm` and `naive`, the composite of qk, softmax and av in these kernels, which stores the attention weights; `dense`,
scaled_dot_product_attention over all tokens. All but the attention is the same, and the weights are random.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import natten
from natten._library import require_library
from natten.bench.problems import DTYPES
from natten.bench.report import Column, RowFile, add_run_arguments, circumstances, number, print_table
from natten.bench.timing import summarize
from natten.functional import neighborhood_attention_generic

ATTENTIONS = ("natten", "strided", "gemm", "naive", "dense")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    kernel_size: Shape
    dilation: Shape
    stride: Shape  # of the contender `strided`

    def call(self, kind: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the given kind; tensors are [B, X.., H, D]."""
        if kind == "dense":
            q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
            return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(query.shape)
        if kind in ("gemm", "naive"):
            window: Any = {"kernel_size": self.kernel_size, "dilation": self.dilation, "kernel": kind}
            return natten.na_av(natten.na_qk(query, key, **window).softmax(-1), value, **window)
        stride = self.stride if kind == "strided" else 1
        out = neighborhood_attention_generic(query, key, value, self.kernel_size, stride, self.dilation)
        assert isinstance(out, Tensor)
        return out


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int, window: Window, kind: str) -> None:
        super().__init__()
        self.heads, self.window, self.kind = heads, window, kind
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out: Tensor = self.proj(self.window.call(self.kind, query, key, value).flatten(-2))
        return out


def mlp(channels: int, ratio: float) -> nn.Sequential:
    hidden = int(channels * ratio)
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))


class Block(nn.Module):
    """Pre-norm transformer block on [B, X.., C]."""

    def __init__(self, channels: int, heads: int, ratio: float, window: Window, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.attention = Attention(channels, heads, window, kind)
        self.mlp = mlp(channels, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


class ImageBackbone(nn.Module):
    """DiNAT (Hassani and Shi, 2022): four levels, windows of 7 x 7, every second one dilated as far as it goes."""

    def __init__(self, channels: int, depths: Sequence[int], heads: int, ratio: float, side: int, kind: str) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, channels // 2, 3, 2, 1), nn.Conv2d(channels // 2, channels, 3, 2, 1)]
        self.stem = nn.Sequential(*stages)
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        side //= 4
        for level, depth in enumerate(depths):
            if level > 0:
                self.downs.append(nn.Conv2d(channels, 2 * channels, 3, 2, 1))
                channels, heads, side = 2 * channels, 2 * heads, side // 2
            size = min(7, side)
            windows = [Window((size,) * 2, (d,) * 2, (1, 1)) for d in (1, max(1, side // size))]
            blocks = [Block(channels, heads, ratio, windows[i % 2], kind) for i in range(depth)]
            self.levels.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).movedim(1, -1)
        for i, level in enumerate(self.levels):
            if i > 0:
                x = self.downs[i - 1](x.movedim(-1, 1)).movedim(1, -1)
            x = level(x.contiguous())
        logits: Tensor = self.head(self.norm(x).mean((1, 2)))
        return logits


class VideoBlock(nn.Module):
    """Diffusion transformer block (Peebles and Xie, 2023): norms are shifted and scaled by the condition."""

    def __init__(self, channels: int, heads: int, window: Window, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(channels, heads, window, kind)
        self.mlp = mlp(channels, 4)
        self.modulation = nn.Linear(channels, 6 * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(condition)[:, None, None, None].chunk(6, -1)
        x = x + parts[0] * self.attention(self.norms[0](x) * (1 + parts[1]) + parts[2])
        out: Tensor = x + parts[3] * self.mlp(self.norms[1](x) * (1 + parts[4]) + parts[5])
        return out


class VideoTransformer(nn.Module):
    """Latents [B, 16, T, 2 X, 2 Y] to their noise, in patches of 1 x 2 x 2."""

    def __init__(self, channels: int, depth: int, heads: int, grid: Shape, window: Window, kind: str) -> None:
        super().__init__()
        self.patches = nn.Conv3d(16, channels, (1, 2, 2), (1, 2, 2))
        self.position = nn.Parameter(0.02 * torch.randn(*grid, channels))
        self.blocks = nn.ModuleList(VideoBlock(channels, heads, window, kind) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, 64)

    def forward(self, latents: Tensor, condition: Tensor) -> Tensor:
        x = self.patches(latents).movedim(1, -1) + self.position
        for block in self.blocks:
            x = block(x, condition)
        noise: Tensor = self.out(self.norm(x))
        return noise


@dataclass(frozen=True)
class Model:
    name: str
    batch: int
    make: Callable[[str], nn.Module]
    inputs: Callable[[int], list[Tensor]]
    attentions: tuple[str, ...]


def image_model(name: str, channels: int, heads: int, ratio: float, side: int = 224, batch: int = 128) -> Model:
    return Model(
        name,
        batch,
        partial(ImageBackbone, channels, (3, 4, 18, 5), heads, ratio, side),
        lambda count: [torch.randn(count, 3, side, side)],
        ("natten", "gemm", "naive", "dense"),
    )


def video_model(name: str, channels: int, depth: int, grid: Shape, window: Shape, stride: Shape) -> Model:
    return Model(
        name,
        1,
        partial(VideoTransformer, channels, depth, channels // 64, grid, Window(window, (1, 1, 1), stride)),
        lambda count: [torch.randn(count, 16, grid[0], 2 * grid[1], 2 * grid[2]), torch.randn(count, channels)],
        ATTENTIONS,
    )


MODELS = (
    image_model("dinat-tiny", 64, 2, 3.0),
    image_model("dinat-base", 128, 4, 2.0),
    video_model("video-dit", 768, 12, (16, 32, 32), (8, 16, 16), (4, 8, 8)),
)


@dataclass(frozen=True)
class Limit:
    """A transformer on grids of growing size."""

    name: str
    grid: Callable[[int], Shape]
    window: Window
    start: int  # a size that fits easily

    def tokens(self, size: int) -> int:
        return prod(self.grid(size))


LIMITS = (
    Limit("sequence", lambda n: (128 * n,), Window((1024,), (1,), (128,)), 512),
    Limit("feature map", lambda n: (16 * n, 16 * n), Window((31, 31), (1, 1), (16, 16)), 16),
    Limit("video", lambda n: (n, 32, 32), Window((11, 11, 11), (1, 1, 1), (8, 8, 8)), 64),
)


@dataclass(frozen=True)
class Run:
    device: torch.device
    dtype: torch.dtype
    budget_s: float
    step_limit_s: float
    end: float

    def out_of_time(self) -> bool:
        return time.monotonic() > self.end

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, step: Callable[[], object]) -> float:
        """Of one step, to the end of its last kernel."""
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def failure(error: Exception) -> str:
    """Why a step failed. An error that leaves the device unusable is raised again."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if "CUDA error" in str(error):
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def steps_of(model: Model, kind: str, batch: int, training: bool, run: Run) -> Callable[[], object]:
    torch.manual_seed(0)
    network = model.make(kind).to(run.device, run.dtype)
    inputs = [tensor.to(run.device, run.dtype) for tensor in model.inputs(batch)]
    if not training:
        network.eval()

        def infer() -> None:
            with torch.inference_mode():
                network(*inputs)

        return infer
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=run.device.type == "cuda")

    def train() -> None:
        optimizer.zero_grad()
        network(*inputs).float().square().mean().backward()
        optimizer.step()

    return train


def throughput(model: Model, kind: str, batch: int, training: bool, run: Run) -> dict[str, Any]:
    run.forget()
    step = steps_of(model, kind, batch, training, run)
    for _ in range(2):
        run.seconds(step)
    samples: list[float] = []
    while len(samples) < 3 or (sum(samples) < run.budget_s and len(samples) < 50):
        samples.append(1e3 * run.seconds(step))
    timing = summarize(samples)
    return {
        "ms": round(timing.ms, 3),
        "spread_ms": [round(timing.low_ms, 3), round(timing.high_ms, 3)],
        "repeats": timing.repeats,
        "items_per_s": round(1e3 * batch / timing.ms, 4),
        "peak_bytes": run.peak_bytes(),
    }


def throughput_rows(models: Sequence[Model], kinds: Sequence[str], batch: int | None, run: Run, file: RowFile) -> None:
    for model in models:
        for kind in (kind for kind in model.attentions if kind in kinds):
            for training in (False, True):
                mode = "training" if training else "inference"
                what = {"part": "throughput", "model": model.name, "attention": kind, "mode": mode}
                if run.out_of_time():
                    file.skip(**what, reason="out of time")
                    continue
                count = batch or model.batch
                try:
                    file.add({**what, "batch": count, **throughput(model, kind, count, training, run)})
                except Exception as error:
                    file.skip(**what, reason=failure(error))


@dataclass(frozen=True)
class Trial:
    size: int
    seconds: float
    peak_bytes: int
    refused: str | None  # why it did not run


def attempt_size(limit: Limit, kind: str, size: int, run: Run) -> Trial:
    """A forward and a backward pass on a grid of this size."""
    run.forget()

    def go() -> None:
        channels, heads = 512, 8
        blocks = nn.Sequential(*(Block(channels, heads, 4, limit.window, kind) for _ in range(2)))
        blocks.to(run.device, run.dtype)
        tokens = torch.randn(1, *limit.grid(size), channels, dtype=run.dtype, device=run.device)
        blocks(tokens).sum().backward()

    seconds, refused = math.nan, None
    try:
        seconds = run.seconds(go)
    except Exception as error:
        refused = failure(error)
    return Trial(size, seconds, run.peak_bytes(), refused)


def search(limit: Limit, kind: str, memory_bytes: int, run: Run) -> tuple[Trial | None, str]:
    """The largest size that runs, and what ends it: memory, time (of a step), or the kernel's own refusal."""
    power = 2.0 if kind == "dense" else 1.0  # of the time, in tokens
    attempt_size(limit, kind, limit.start, run)  # loads and chooses everything
    known = [attempt_size(limit, kind, limit.start, run)]
    if known[0].refused is not None:
        return None, known[0].refused
    too_large, ended_by = math.inf, "the search's own time"
    size = 2 * limit.start
    for _ in range(14):
        best = known[-1]
        if run.out_of_time() or size <= best.size:
            break
        growth = limit.tokens(size) / limit.tokens(best.size)
        if best.seconds * growth**power > run.step_limit_s:
            too_large, ended_by = size, f"time: more than {run.step_limit_s:g} s a step"
        else:
            trial = attempt_size(limit, kind, size, run)
            if trial.refused is None:
                known.append(trial)
            else:
                too_large, ended_by = size, trial.refused
        best = known[-1]
        if too_large <= 1.03 * best.size + 1:
            break
        within_time = limit.tokens(best.size) * (0.99 * run.step_limit_s / best.seconds) ** (1 / power)
        size = next_size(limit, known, too_large, memory_bytes, within_time)
    return known[-1], ended_by


def next_size(limit: Limit, known: Sequence[Trial], too_large: float, memory_bytes: int, within_time: float) -> int:
    """Where the memory, linear in the tokens, would end, or the time; else between what runs and what does not."""
    best = known[-1]
    if too_large < math.inf:
        return math.ceil((best.size + too_large) / 2)
    tokens = within_time
    if len(known) > 1 and best.peak_bytes > known[-2].peak_bytes:
        slope = (best.peak_bytes - known[-2].peak_bytes) / (limit.tokens(best.size) - limit.tokens(known[-2].size))
        tokens = min(tokens, limit.tokens(best.size) + 0.98 * (memory_bytes - best.peak_bytes) / slope)
    size = best.size
    while limit.tokens(size + 1) < tokens and size < 8 * best.size:
        size += 1
    return max(size, best.size + max(1, best.size // 32))


def limit_rows(limits: Sequence[Limit], kinds: Sequence[str], run: Run, file: RowFile) -> None:
    memory = torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else 2**30
    for limit in limits:
        for kind in kinds:
            what = {"part": "limits", "limit": limit.name, "attention": kind}
            if run.out_of_time():
                file.skip(**what, reason="out of time")
                continue
            best, ended_by = search(limit, kind, memory, run)
            if best is None:
                file.skip(**what, reason=ended_by)
                continue
            file.add(
                {
                    **what,
                    "shape": list(limit.grid(best.size)),
                    "tokens": limit.tokens(best.size),
                    "window": list(limit.window.kernel_size),
                    "step_s": round(best.seconds, 4),
                    "peak_bytes": best.peak_bytes,
                    "ended_by": ended_by,
                }
            )


def show(rows: Sequence[Any]) -> Iterator[tuple[list[Column], list[list[str]], str]]:
    """Tables of both parts."""

    def columns(*titles: str) -> list[Column]:
        return [Column(title, right=i > 2) for i, title in enumerate(titles)]

    found = [row for row in rows if row["part"] == "throughput"]
    cells = [
        [
            row["model"],
            row["mode"],
            row["attention"],
            str(row["batch"]),
            number(row["ms"]),
            number(row["items_per_s"]),
            number(row["peak_bytes"] / 2**30),
        ]
        for row in found
    ]
    if cells:
        yield columns("model", "mode", "attention", "batch", "ms", "items/s", "peak GiB"), cells, "throughput"
    found = [row for row in rows if row["part"] == "limits"]
    cells = [
        [
            row["limit"],
            row["attention"],
            row["ended_by"],
            "x".join(map(str, row["shape"])),
            f"{row['tokens']:,}",
            number(row["step_s"]),
            number(row["peak_bytes"] / 2**30),
        ]
        for row in found
    ]
    if cells:
        yield columns("limit", "attention", "ended by", "shape", "tokens", "s a step", "peak GiB"), cells, "limits"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default="throughput,limits", help="comma-separated")
    add("--models", default=",".join(model.name for model in MODELS), help="comma-separated")
    add("--limits", default=",".join(limit.name for limit in LIMITS), help="comma-separated")
    add("--attentions", default=",".join(ATTENTIONS), help="comma-separated")
    add("--batch", type=int, help="replaces every model's batch size")
    add("--dtype", default="bfloat16", choices=tuple(DTYPES))
    add("--budget-ms", type=float, default=500.0, help="time to spend on each measurement of throughput")
    add("--step-limit", type=float, default=4.0, help="seconds that a step of a limit may take")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    require_library()
    device = torch.device(arguments.device)
    command = ["python", "tools/bench_models.py", *(sys.argv[1:] if argv is None else argv)]
    file = RowFile(arguments.json, circumstances(device, command, arguments.commit), dtype=arguments.dtype)
    run = Run(device, DTYPES[arguments.dtype], arguments.budget_ms / 1e3, arguments.step_limit, end)
    parts, kinds = arguments.parts.split(","), arguments.attentions.split(",")
    if "throughput" in parts:
        models = [model for model in MODELS if model.name in arguments.models.split(",")]
        throughput_rows(models, kinds, arguments.batch, run, file)
    if "limits" in parts:
        limit_rows([limit for limit in LIMITS if limit.name in arguments.limits.split(",")], kinds, run, file)
    for columns, cells, title in show(file.rows):
        print_table(columns, cells, title=title)
    for skip in file.skipped:
        print("not measured:", *skip.values())
    return 0 if file.rows else 1


if __name__ == "__main__":
    sys.exit(main())
