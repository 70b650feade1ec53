"""What reading spatial boxes in place saves: the time of permuting tokens into tiles first, which is another design.

    python tools/bench_permutes.py --json docs/performance/h200/permutes.json

A kernel that reads tiles of consecutive tokens needs its tensors in the order of spatial tiles (and of dilation
groups), padded to whole tiles: query, key and value before the forward pass and its output after it; the output's
gradient before the backward pass and three gradients after it. Here each of these is one copy by torch, eager and
compiled (the better one counts), beside the time of our kernel for the same pass, which copies nothing.
`scores_on_grid` is the share of additional scores if our kernel's key boxes started on a fixed grid, as those of
permuted tokens do, instead of at the first key that a tile of queries needs: counted with the boxes that the kernel
states, forward.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from natten._library import require_library
from natten.bench.floors import CEILINGS, Ceilings, measure_ceilings
from natten.bench.peers import NotSupported
from natten.bench.problems import DTYPES, PASSES, BenchProblem, load_problems
from natten.bench.report import Column, RowFile, add_run_arguments, circumstances, device_name, number, print_table
from natten.bench.run import AUTO, OUT_OF_TIME, attempt, natten_contender, time_contender
from natten.bench.timing import Timing, measure
from natten.bench.windows import checked_problem
from natten.dispatch import Kernel
from natten.profile.analysis import explanation
from natten.profile.tiles import StepPlan, axis_boxes, plan_pass

PROBLEMS = ("hunyuan-na", "flux-na", "wan-na", "ltx-s5", "cosmos-dil", "2d-k13-d64", "hdit-64", "nat-s1", "dinat-s1")
TILES = {1: (128,), 2: (16, 8), 3: (4, 4, 8)}


def to_tiles(x: Tensor, tile: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """[B, X.., H, D] to [B, groups.., tiles.., inside.., H, D], padded with zeros, as one contiguous tensor."""
    rank = len(tile)
    padding = [0, 0, 0, 0]
    sizes = []
    for extent, t, d in reversed(list(zip(x.shape[1 : 1 + rank], tile, dilation, strict=True))):
        padding += [0, -extent % (t * d)]
    for extent, t, d in zip(x.shape[1 : 1 + rank], tile, dilation, strict=True):
        sizes += [-(-extent // (t * d)), t, d]
    split = pad(x, padding).reshape(x.shape[0], *sizes, *x.shape[-2:])
    tiles, inside, groups = (range(first, 3 * rank + 1, 3) for first in (1, 2, 3))
    return split.permute(0, *groups, *tiles, *inside, -2, -1).contiguous()


def from_tiles(x: Tensor, rank: int, shape: Sequence[int]) -> Tensor:
    """Back to [B, X.., H, D], contiguous, without the padding."""
    order = [axis for a in range(rank) for axis in (1 + rank + a, 1 + 2 * rank + a, 1 + a)]
    whole = x.permute(0, *order, -2, -1)
    extents = [prod(whole.shape[1 + 3 * a : 4 + 3 * a]) for a in range(rank)]
    whole = whole.reshape(x.shape[0], *extents, *x.shape[-2:])
    for axis, extent in enumerate(shape):
        whole = whole.narrow(1 + axis, 0, extent)
    return whole.contiguous()


Copies = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def copies_of(problem: BenchProblem, compiled: bool) -> Copies:
    """Into tiles, and back."""

    def into(x: Tensor) -> Tensor:
        return to_tiles(x, TILES[problem.rank], problem.dilation)

    def back(x: Tensor) -> Tensor:
        return from_tiles(x, problem.rank, problem.shape)

    return (torch.compile(into, dynamic=False), torch.compile(back, dynamic=False)) if compiled else (into, back)


def permutes(problem: BenchProblem, pass_: str, device: torch.device, copies: Copies) -> Callable[[], object]:
    """The copies of one pass."""
    dtype = DTYPES[problem.dtype]

    def tensor(heads: int, dim: int) -> Tensor:
        return torch.randn(problem.batch, *problem.shape, heads, dim, dtype=dtype, device=device)

    query, out = tensor(problem.heads, problem.head_dim), tensor(problem.heads, problem.value_dim)
    key, value = tensor(problem.key_heads, problem.head_dim), tensor(problem.key_heads, problem.value_dim)
    before, after = ((query, key, value), (out,)) if pass_ == "forward" else ((out,), (query, key, value))
    tiled = [to_tiles(x, TILES[problem.rank], problem.dilation) for x in after]
    into, back = copies

    def call() -> None:
        for x in before:
            into(x)
        for x in tiled:
            back(x)

    return call


def grid_boxes(axis: Any, rows: int, box: int) -> int:
    """As `tiles.axis_boxes` counts them for queries, but of boxes that start at multiples of their extent."""
    total = 0
    for group in range(axis.dilation):
        length = -(-(axis.extent - group) // axis.dilation)
        for first in range(0, length, rows):
            begin = axis.window(group, first)[0]
            end = axis.window(group, min(first + rows, length) - 1)[1]
            total += (end - 1) // box - begin // box + 1
    return total


def scores_on_grid(problem: BenchProblem, device: torch.device) -> float | None:
    """Scores with boxes on a fixed grid over those with boxes at any origin, minus one."""
    if device.type != "cuda":
        return None
    checked = checked_problem(problem, DTYPES[problem.dtype], device)
    stated = explanation(problem, problem.dtype, device, kernel=Kernel.fused_sm90, requires_grad=False).forward.plan
    plan: StepPlan = plan_pass(Kernel.fused_sm90, checked, "forward", stated)[0]
    along = list(zip(checked.axes, plan.tile, plan.rows, plan.box, strict=True))
    free = prod(axis_boxes(axis, "queries", tile, rows, box) for axis, tile, rows, box in along)
    grid = prod(grid_boxes(axis, rows, box) for axis, _, rows, box in along)
    return grid / free - 1


def time_permutes(problem: BenchProblem, pass_: str, device: torch.device, copies: Copies, budget_ms: float) -> Timing:
    with torch.no_grad():
        return measure(permutes(problem, pass_, device, copies), device, budget_ms)


def measure_problem(
    problem: BenchProblem, device: torch.device, ceilings: Ceilings, budget_ms: float, end: float, file: RowFile
) -> None:
    dtype = DTYPES[problem.dtype]
    bytes_once = dtype.itemsize * problem.batch * problem.tokens
    bytes_once *= problem.heads * (problem.head_dim + problem.value_dim) + problem.key_heads * (
        problem.head_dim + problem.value_dim
    )
    torch._dynamo.reset()  # a new problem is no recompilation
    eagerly, compiled = copies_of(problem, False), copies_of(problem, True)
    for pass_ in PASSES:
        try:
            if time.monotonic() > end:
                raise NotSupported(OUT_OF_TIME)
            ours = attempt(
                time_contender, partial(natten_contender, problem, AUTO, dtype, device), pass_, device, budget_ms
            )
            eager = attempt(time_permutes, problem, pass_, device, eagerly, budget_ms)
            fused = attempt(time_permutes, problem, pass_, device, compiled, budget_ms)
        except NotSupported as reason:
            file.skip(problem=problem.name, **{"pass": pass_}, reason=str(reason))
            continue
        best = min(eager.ms, fused.ms)
        file.add(
            {
                "problem": problem.name,
                "pass": pass_,
                "natten_ms": round(ours.ms, 5),
                "permutes_ms": round(best, 5),
                "permutes_eager_ms": round(eager.ms, 5),
                "permutes_compiled_ms": round(fused.ms, 5),
                "floor_ms": round(2 * bytes_once / ceilings.bandwidth_tbps * 1e-9, 5),
                "scores_on_grid": scores_on_grid(problem, device) if pass_ == "forward" else None,
            }
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="names of the benchmark's list")
    parser.add_argument("--list", default="problems_h200.json", help="problem file: a path, or one shipped")
    parser.add_argument("--budget-ms", type=float, default=40.0, help="time to spend on each measurement")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    require_library()
    device = torch.device(arguments.device)
    ceilings = CEILINGS.get(device_name(device)) or measure_ceilings(device)
    command = ["python", "tools/bench_permutes.py", *(sys.argv[1:] if argv is None else argv)]
    file = RowFile(
        arguments.json,
        circumstances(device, command, arguments.commit),
        ceilings={"bandwidth_tbps": ceilings.bandwidth_tbps},
        tiles={str(rank): tile for rank, tile in TILES.items()},
    )
    for problem in load_problems(arguments.list, arguments.problems.split(",")).problems:
        measure_problem(problem, device, ceilings, arguments.budget_ms, end, file)
    columns = [Column("problem", right=False), Column("pass", right=False), Column("natten ms"), Column("permutes ms")]
    columns += [Column("share"), Column("floor ms"), Column("scores on grid")]
    cells = [
        [
            row["problem"],
            row["pass"],
            number(row["natten_ms"]),
            number(row["permutes_ms"]),
            f"{row['permutes_ms'] / row['natten_ms']:.0%}",
            number(row["floor_ms"]),
            "-" if row["scores_on_grid"] is None else f"{row['scores_on_grid']:+.0%}",
        ]
        for row in file.rows
    ]
    print_table(columns, cells)
    for skip in file.skipped:
        print("not measured:", *skip.values())
    return 0 if file.rows else 1


if __name__ == "__main__":
    sys.exit(main())
