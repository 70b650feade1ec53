"""A small 3-D model trained on one process, and sharded over several: the same loss curve.

    python examples/sharded_volume.py                 2 processes on the CPU (gloo)
    python examples/sharded_volume.py --processes 4   4 of them; with as many GPUs it uses these (NCCL)

The volume is cut along its first axis. Linear layers and norms act on tokens, so they need nothing from other shards;
attention layers know the mesh and fetch the halo of keys that their windows reach (`natten.distributed`). Gradients of
the parameters are summed over the shards.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import natten
from natten import distributed

EXTENT = (12, 10, 10)
WINDOWS = ((3, 3, 3), (5, 3, 3), (3, 5, 5))
DILATIONS = ((1, 1, 1), (2, 2, 2), (1, 1, 1))


class Block(nn.Module):
    """Attention and an MLP, each with a norm before and a residual around it."""

    def __init__(self, channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(channels), attention
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        result: Tensor = x + self.mlp(x)
        return result


def denoiser(mesh: DeviceMesh | None, channels: int = 16, heads: int = 2) -> nn.Sequential:
    """Predicts a volume from a noisy one; on a mesh, its shard of it."""
    place: dict[str, Any] = {} if mesh is None else {"mesh": mesh, "sharding": (0,), "extent": EXTENT}
    blocks = [
        Block(channels, natten.NeighborhoodAttention3D(channels, heads, window, dilation=dilation, **place))
        for window, dilation in zip(WINDOWS, DILATIONS, strict=True)
    ]
    return nn.Sequential(nn.Linear(1, channels), *blocks, nn.Linear(channels, 1))


def volume(step: int, device: str) -> tuple[Tensor, Tensor]:
    """A smooth random volume `[1, X, Y, Z, 1]`, and the same with noise."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randn(1, 1, 4, 4, 4, generator=generator)
    clean = nn.functional.interpolate(coarse, EXTENT, mode="trilinear").movedim(1, -1)
    return clean.to(device), (clean + 0.5 * torch.randn(clean.shape, generator=generator)).to(device)


def train(steps: int, device: str, mesh: DeviceMesh | None = None) -> list[float]:
    """Losses of each step over the whole volume."""
    torch.manual_seed(0)
    model = denoiser(mesh).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin, end = (0, EXTENT[0])
    if mesh is not None:
        begin, end = distributed.shard_bounds(EXTENT[0], mesh.size())[mesh.get_local_rank()]
    losses = []
    for step in range(steps):
        clean, noisy = (tensor[:, begin:end] for tensor in volume(step, device))
        loss = (model(noisy) - clean).square().sum() / torch.Size(EXTENT).numel()
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if mesh is not None:
            dist.all_reduce(total)
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
        optimizer.step()
        losses.append(float(total))
    return losses


def worker(rank: int, processes: int, store: str, steps: int) -> None:
    """One process: trains its shard; rank 0 also trains the whole, and compares."""
    on_gpu = torch.cuda.device_count() >= processes
    device = f"cuda:{rank}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=processes)
    sharded = train(steps, device, init_device_mesh("cuda" if on_gpu else "cpu", (processes,)))
    if rank == 0:
        alone = train(steps, device)
        print(f"{'step':>4}  {'one process':>12}  {f'{processes} processes':>12}")
        for step in range(0, steps, max(steps // 10, 1)):
            print(f"{step:4}  {alone[step]:12.6f}  {sharded[step]:12.6f}")
        worst = max(abs(a - b) / a for a, b in zip(alone, sharded, strict=True))
        print(f"largest relative difference of the loss: {worst:.1e}")
        assert worst < 1e-3, "sharded training left the single process' curve"
        assert alone[-1] < 0.7 * alone[0], "the model did not learn"
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.processes, f"{folder}/store", options.steps)
        mp.spawn(worker, arguments, nprocs=options.processes)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main()
