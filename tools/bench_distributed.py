"""Strong scaling of one volume over GPUs, and the time and bytes of three ways to shard it.

    python tools/bench_distributed.py --gpus 1,2,4 --json docs/performance/h200/distributed.json

`halo` is `natten.distributed`: keys and values of the windows' halos travel. `all-to-all` (Ulysses) turns shards of the
grid into shards of heads and back. `all-gather` collects every key and value on every GPU. All three run the same
kernels on the same volume, cut along its first axis, in one run. `exchange_ms` is the communication alone, `compute_ms`
the attention of the shard with its halo already there; what the sum exceeds the whole by is hidden.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import natten
from natten import _pieces, distributed
from natten.bench.report import circumstances

WINDOW = (18, 24, 24)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call that every rank makes; the slowest rank's."""
    call()
    samples = []
    for _ in range(repeats):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = _event(), _event()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end))
    slowest = torch.tensor([statistics.median(samples)], device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


class AllToAll(torch.autograd.Function):
    """Shards along dimension `split` become shards along dimension `join`; its derivative is the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, split: int, join: int) -> Tensor:
        ctx.dimensions = split, join
        return _all_to_all(tensor, split, join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        split, join = ctx.dimensions
        return _all_to_all(gradient, join, split), None, None


def _all_to_all(tensor: Tensor, split: int, join: int) -> Tensor:
    outgoing = [part.contiguous() for part in tensor.chunk(dist.get_world_size(), join)]
    incoming = [torch.empty_like(outgoing[0]) for _ in outgoing]
    dist.all_to_all(incoming, outgoing)
    return torch.cat(incoming, split)


class AllGather(torch.autograd.Function):
    """Every rank's shard along the first axis; backward sums and scatters."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = [part.contiguous() for part in gradient.chunk(dist.get_world_size(), 1)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts)
        return mine


def halo(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, extent: tuple[int, ...]) -> Tensor:
    out = distributed.neighborhood_attention(q, k, v, WINDOW, mesh=mesh, sharding=(0,), extent=extent, validate=False)
    assert isinstance(out, Tensor)
    return out


def ulysses(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, extent: tuple[int, ...]) -> Tensor:
    q, k, v = (AllToAll.apply(t, 1, 4) for t in (q, k, v))  # type: ignore[no-untyped-call]
    out: Tensor = AllToAll.apply(natten.na3d(q, k, v, WINDOW), 4, 1)  # type: ignore[no-untyped-call]
    return out


def gathered(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, extent: tuple[int, ...]) -> Tensor:
    start = q.shape[1] * dist.get_rank()
    k, v = AllGather.apply(k), AllGather.apply(v)  # type: ignore[no-untyped-call]
    out = natten.na3d(q, k, v, WINDOW, q_start=(start, 0, 0), kv_start=(0, 0, 0), extent=extent)
    assert isinstance(out, Tensor)
    return out


WAYS = {"halo": halo, "all-to-all": ulysses, "all-gather": gathered}


def received_bytes(way: str, shard: Tensor, extent: tuple[int, ...]) -> int:
    """Most bytes that a rank receives in the forward pass."""
    world, token = dist.get_world_size(), shard.shape[0] * shard.shape[-2] * shard.shape[-1] * shard.element_size()
    if way == "halo":
        return max(distributed.halo_bytes(extent, WINDOW, shards=(world, 1, 1), bytes_per_token=2 * token))
    whole = math.prod(extent) * token
    if way == "all-gather":
        return 2 * whole * (world - 1) // world
    return 4 * whole * (world - 1) // world**2


def measure(rank: int, world: int, store: str, options: argparse.Namespace, output: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cuda", (world,))
    extent = tuple(options.extent)
    shape = (1, extent[0] // world, *extent[1:], options.heads, options.head_dim)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    rows: list[dict[str, Any]] = []
    for way, function in WAYS.items():
        if world == 1 and way != "halo":
            continue

        def forward(function: Any = function) -> Tensor:
            with torch.no_grad():
                result: Tensor = function(q, k, v, mesh, extent)
            return result

        def both(function: Any = function) -> None:
            torch.autograd.grad(function(*leaves, mesh, extent), leaves, grad)

        row: dict[str, Any] = {"way": way, "gpus": world}
        row["forward_ms"] = timed(forward, options.repeats)
        row["forward_backward_ms"] = timed(both, options.repeats)
        row["received_bytes"] = received_bytes(way, q, extent) if world > 1 else 0
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if way == "halo" and world > 1:
            row |= parts(q, k, v, mesh, extent, options.repeats)
        rows.append(row)
    if rank == 0:
        Path(output).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def parts(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, extent: tuple[int, ...], repeats: int) -> dict[str, float]:
    """The halo exchange alone, and the shard's attention alone, its halo already there."""
    axes = _pieces.window_axes(extent, WINDOW, 1, 1, False)
    layout = distributed._layout(mesh, (0,), axes, (None,))
    keys = _pieces.needed_box(axes, layout.own)
    grid = [end - begin for begin, end in keys]
    near_key, near_value = (torch.randn(1, *grid, *k.shape[-2:], device="cuda", dtype=k.dtype) for _ in range(2))

    def exchange() -> None:
        messages = distributed._Exchange(layout, k.detach(), v.detach())
        messages.start()
        messages.wait()

    def compute() -> None:
        with torch.no_grad():
            _pieces.attend_piece(axes, q, near_key, near_value, layout.own, keys)

    return {"exchange_ms": timed(exchange, repeats), "compute_ms": timed(compute, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2,4", help="numbers of GPUs, comma-separated")
    parser.add_argument("--extent", type=int, nargs=3, default=(120, 48, 80))
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for world in map(int, options.gpus.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            result = f"{folder}/rows.json"
            mp.spawn(measure, (world, f"{folder}/store", options, result), nprocs=world)  # type: ignore[attr-defined, no-untyped-call]
            rows += json.loads(Path(result).read_text())
    alone = next((row for row in rows if row["gpus"] == 1), None)
    columns = ("forward ms", "fwd+bwd ms", "efficiency", "received MB", "peak GB")
    print(f"{'way':12} GPUs " + " ".join(f"{name:>12}" for name in columns))
    for row in rows:
        if alone is not None:
            for key in ("forward_ms", "forward_backward_ms"):
                row[key.replace("_ms", "_efficiency")] = alone[key] / (row["gpus"] * row[key])
        if "exchange_ms" in row:
            hidden = row["exchange_ms"] + row["compute_ms"] - row["forward_ms"]
            row["hidden_share"] = max(0.0, min(1.0, hidden / row["exchange_ms"]))
        efficiency = row.get("forward_backward_efficiency", float("nan"))
        print(
            f"{row['way']:12} {row['gpus']:4} {row['forward_ms']:12.2f} {row['forward_backward_ms']:12.2f} "
            f"{efficiency:12.3f} {row['received_bytes'] / 1e6:12.1f} {row['peak_bytes'] / 1e9:12.2f}"
            + (
                f"   exchange {row['exchange_ms']:.2f} ms, {row['hidden_share']:.0%} hidden"
                if "exchange_ms" in row
                else ""
            )
        )
    if options.json:
        problem = {"extent": options.extent, "window": WINDOW, "heads": options.heads, "head_dim": options.head_dim}
        head = circumstances(torch.device("cuda"))
        options.json.write_text(json.dumps({**head, "problem": problem, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
