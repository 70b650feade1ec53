"""Strong scaling of one volume over GPUs, and the time and bytes of three ways to shard it.

    python tools/bench_distributed.py --gpus 1,2,4 --json docs/performance/h200/distributed.json

`halo` is `natten.distributed`: keys and values of the windows' halos travel. `all-to-all` (Ulysses) turns shards of the
grid into shards of heads and back. `all-gather` collects every key and value on every GPU. All three run the same
kernels on the same volume, cut along its first axis. `exchange_ms` is the communication alone, `compute_ms` the
attention of the shard with its halo already there; what the sum exceeds the whole by is hidden. `difference` is the
relative difference of output and gradients from those of the halo.

What was measured is written even when a way fails or the time limit ends the run. `--device cpu` tries the program out
(gloo, float32; choose a small problem).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import natten
from natten import _pieces, distributed
from natten.bench.report import circumstances, write_json


@dataclass(frozen=True)
class Volume:
    """The problem on some of the GPUs, cut along the first axis."""

    extent: tuple[int, ...]
    window: tuple[int, ...]
    mesh: DeviceMesh

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def gpus(self) -> int:
        return self.mesh.size()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], repeats: int, device: torch.device, group: dist.ProcessGroup) -> float:
    """Median milliseconds of a call that every rank makes, the slowest rank's: from an idle GPU to an idle GPU."""
    call()
    samples = []
    for _ in range(repeats):
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # all ranks are here
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        samples.append(1e3 * (time.perf_counter() - begin))
    slowest = torch.tensor([statistics.median(samples)], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return float(slowest)


class AllToAll(torch.autograd.Function):
    """Shards along dimension `split` become shards along dimension `join`; its derivative is the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = join, split, group
        parts = (group.size(), tensor.shape[join] // group.size())
        outgoing = tensor.reshape(*tensor.shape[:join], *parts, *tensor.shape[join + 1 :]).movedim(join, 0).contiguous()
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        return incoming.movedim(0, split).flatten(split, split + 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return AllToAll.apply(gradient, *ctx.way_back), None, None, None  # type: ignore[no-untyped-call]


class AllGather(torch.autograd.Function):
    """Every rank's shard along the first axis, of a batch of 1; backward sums and scatters."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = tensor.new_empty((group.size() * tensor.shape[1], *tensor.shape[2:]))
        dist.all_gather_into_tensor(whole, tensor[0].contiguous(), group=group)
        return whole.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        mine = gradient.new_empty((gradient.shape[1] // ctx.group.size(), *gradient.shape[2:]))
        dist.reduce_scatter_tensor(mine, gradient[0].contiguous(), group=ctx.group)
        return mine.unsqueeze(0), None


def halo(q: Tensor, k: Tensor, v: Tensor, volume: Volume) -> Tensor:
    out = distributed.neighborhood_attention(
        q, k, v, volume.window, mesh=volume.mesh, sharding=(0,), extent=volume.extent, validate=False
    )
    assert isinstance(out, Tensor)
    return out


def ulysses(q: Tensor, k: Tensor, v: Tensor, volume: Volume) -> Tensor:
    q, k, v = (AllToAll.apply(t, 1, 4, volume.group) for t in (q, k, v))  # type: ignore[no-untyped-call]
    out: Tensor = AllToAll.apply(natten.na3d(q, k, v, volume.window), 4, 1, volume.group)  # type: ignore[no-untyped-call]
    return out


def gathered(q: Tensor, k: Tensor, v: Tensor, volume: Volume) -> Tensor:
    start = q.shape[1] * volume.mesh.get_local_rank()
    k, v = (AllGather.apply(t, volume.group) for t in (k, v))  # type: ignore[no-untyped-call]
    return natten.na3d(q, k, v, volume.window, q_start=(start, 0, 0), kv_start=(0, 0, 0), extent=volume.extent)


WAYS = {"halo": halo, "all-to-all": ulysses, "all-gather": gathered}


def received_bytes(way: str, shard: Tensor, volume: Volume) -> int:
    """Most bytes that a rank receives in the forward pass."""
    gpus, token = volume.gpus, shard.shape[0] * shard.shape[-2] * shard.shape[-1] * shard.element_size()
    if way == "halo":
        shards = (gpus, 1, 1)
        return max(distributed.halo_bytes(volume.extent, volume.window, shards=shards, bytes_per_token=2 * token))
    whole = math.prod(volume.extent) * token
    return (2 * whole * (gpus - 1) // gpus) if way == "all-gather" else (4 * whole * (gpus - 1) // gpus**2)


def difference(results: list[Tensor], expected: list[Tensor], group: dist.ProcessGroup) -> list[float]:
    """Relative differences of whole tensors in the Frobenius norm."""
    squares = torch.stack(
        [
            torch.stack(((a.float() - b.float()).square().sum(), b.float().square().sum()))
            for a, b in zip(results, expected, strict=True)
        ]
    )
    dist.all_reduce(squares, group=group)
    return [float(x) for x in (squares[:, 0] / squares[:, 1]).sqrt()]


def measure(volume: Volume, options: argparse.Namespace, device: torch.device, report: Callable[..., None]) -> None:
    """Rows of every way on the volume's GPUs; every rank of the mesh calls it."""
    shape = (1, volume.extent[0] // volume.gpus, *volume.extent[1:], options.heads, options.head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(dist.get_rank())
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    reference: list[Tensor] = []
    for way, function in WAYS.items():
        if volume.gpus == 1 and way != "halo":
            continue

        def forward(function: Any = function) -> Tensor:
            with torch.no_grad():
                out: Tensor = function(q, k, v, volume)
            return out

        def both(function: Any = function) -> list[Tensor]:
            out = function(*leaves, volume)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        row: dict[str, Any] = {"way": way, "gpus": volume.gpus}
        try:
            if volume.gpus > 1:
                results = both()
                reference = reference or results
                row["difference"] = difference(results, reference, volume.group)
                del results
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row["received_bytes"] = received_bytes(way, q, volume) if volume.gpus > 1 else 0
            row["forward_ms"] = timed(forward, options.repeats, device, volume.group)
            row["forward_backward_ms"] = timed(both, options.repeats, device, volume.group)
            if device.type == "cuda":
                kept = sum(tensor.nbytes for tensor in reference)
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - kept
            if way == "halo" and volume.gpus > 1:
                row |= parts(q, k, v, volume, options.repeats)
        except Exception as error:  # the other ways may work
            row["error"] = f"{type(error).__name__}: {error}"
        report(row)


def parts(q: Tensor, k: Tensor, v: Tensor, volume: Volume, repeats: int) -> dict[str, float]:
    """The halo exchange alone, and the shard's attention alone, its halo already there."""
    call = distributed._Call((0,), (volume.window, 1, 1, False), volume.extent, (None,))
    plan = distributed._plan(volume.mesh, dist.get_rank(), call)
    keys = _pieces.needed_box(plan.axes, plan.own)
    grid = [end - begin for begin, end in keys]
    near_key, near_value = (torch.randn(1, *grid, *k.shape[-2:], device=k.device, dtype=k.dtype) for _ in range(2))

    def exchange() -> None:
        messages = distributed._Exchange(plan, volume.group, k, v)
        messages.start(k, v)
        messages.wait()

    def compute() -> None:
        with torch.no_grad():
            _pieces.attend_piece(plan.axes, q, near_key, near_value, plan.own, keys)

    times = [timed(part, repeats, k.device, volume.group) for part in (exchange, compute)]
    return {"exchange_ms": times[0], "compute_ms": times[1]}


def work(rank: int, options: argparse.Namespace, counts: list[int], folder: str) -> None:
    """One process: measures on the first GPUs, as many as `counts` says in turn, and waits where it has no part."""
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=max(counts))
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        if rank == 0:
            print(row, flush=True)
            partial = Path(folder, "rows.part")
            partial.write_text(json.dumps(rows))
            partial.rename(Path(folder, "rows.json"))

    for count in counts:
        mesh = DeviceMesh(options.device, list(range(count)))
        if rank < count:
            measure(Volume(tuple(options.extent), tuple(options.window), mesh), options, device, report)
        dist.all_reduce(torch.zeros(1, device=device))
        synchronize(device)
    dist.destroy_process_group()


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str | None]:
    """Rows measured until the end, a failure or the time limit, and what went wrong."""
    counts = sorted({int(count) for count in options.gpus.split(",")}, reverse=True)  # what matters most first
    failure = None
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(work, (options, counts, folder), nprocs=max(counts), join=False)  # type: ignore[attr-defined, no-untyped-call]
        end = time.monotonic() + options.limit_s
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    failure = f"stopped after {options.limit_s} s"
                    break
        except Exception as error:
            failure = str(error)
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        written = Path(folder, "rows.json")
        rows = json.loads(written.read_text()) if written.exists() else []
        return sorted(rows, key=lambda row: int(row["gpus"])), failure


def finish(rows: list[dict[str, Any]]) -> None:
    """Adds efficiencies and the hidden share of the exchange."""
    alone = next((row for row in rows if row["gpus"] == 1 and "error" not in row), None)
    for row in rows:
        for key in ("forward", "forward_backward"):
            if alone is not None and f"{key}_ms" in row:
                row[f"{key}_efficiency"] = alone[f"{key}_ms"] / (row["gpus"] * row[f"{key}_ms"])
        if "exchange_ms" in row:
            hidden = row["exchange_ms"] + row["compute_ms"] - row["forward_ms"]
            row["hidden_share"] = max(0.0, min(1.0, hidden / row["exchange_ms"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2,4", help="numbers of GPUs, comma-separated")
    parser.add_argument("--extent", type=int, nargs=3, default=(120, 48, 80))
    parser.add_argument("--window", type=int, nargs=3, default=(18, 24, 24))
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=90)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, failure = run(options)
    finish(rows)
    if options.json:
        problem = {name: getattr(options, name) for name in ("extent", "window", "heads", "head_dim", "repeats")}
        write_json(options.json, circumstances(torch.device(options.device)), rows, problem=problem, failure=failure)
    columns = {
        "forward_ms": "forward ms",
        "forward_backward_ms": "fwd+bwd ms",
        "forward_backward_efficiency": "efficiency",
    }
    print(f"{'way':12} GPUs " + " ".join(f"{title:>12}" for title in (*columns.values(), "received MB", "peak GB")))
    for row in rows:
        numbers = [f"{row.get(key, math.nan):12.3f}" for key in columns]
        numbers += [f"{row.get('received_bytes', 0) / 1e6:12.1f} {row.get('peak_bytes', 0) / 1e9:12.2f}"]
        note = f"exchange {row['exchange_ms']:.2f} ms, {row['hidden_share']:.0%} hidden" if "exchange_ms" in row else ""
        print(f"{row['way']:12} {row['gpus']:4} {' '.join(numbers)}   {row.get('error', note)}")
    if failure is not None:
        raise SystemExit(failure)


if __name__ == "__main__":
    main()
