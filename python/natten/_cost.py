"""How long a kernel is expected to take.

The estimate follows what the kernels do. Queries come in tiles; a tile computes scores against boxes of keys that cover
the union of its windows, useful or not. The time is about the longer of

    computed scores * (operations per score / (rate * efficiency) + score_ps) + tiles * tile_ns
    bytes that must move / bandwidth

plus the launches. The constants of the CUDA kernels are fitted by `tools/check_costs.py` to the times of 200 random
problems and of the benchmark's list on an H200 (the root mean square of the error and the number of times are stated
with each); docs/performance/h200/costs.json holds them. For other devices the two times are scaled by the ratio of the
float32 rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import SymInt

from natten import context
from natten._kernels import Kernel, Operation
from natten._problem import ALLOW_TF32, DETERMINISTIC, Axis, Problem

__all__ = [
    "accumulating_is_allowed",
    "accumulating_is_faster",
    "attention_weights_bytes",
    "milliseconds",
    "nominal",
    "patches_are_faster",
]


@dataclass(frozen=True)
class Cost:
    """Constants of one form of a kernel's pass."""

    efficiency: float  # share of the device's rate that products reach
    products: tuple[int, int] = (1, 1)  # matrix products over the head dim and over the value head dim, per score
    score_ps: float = 0.0  # picoseconds of the whole device per computed score: exponentials, masks
    tile_ns: float = 0.0  # nanoseconds of the whole device per tile of queries, or per chunk of keys of a tile
    tile: int = 1  # queries per tile; 1: only useful scores are computed
    box: int = 1  # keys per box
    chunk: int = 0  # most keys of one plane that a tile takes at once; 0: tiles cost the same whatever their keys
    bandwidth: float = 0.8  # share of the device's that the tensors move at


_ONE_PASS = (3, 2)  # of backward: the logits again, gradients of query and key; of weights and value
# Key and query gradients by kernels of their own, each of which computes logits and their gradients.
_TWO_PASSES = (4, 3)

# Forms of the kernels. Which of them may run a call, `_forms` says; the fastest one does.
_FORMS: dict[str, Cost] = {
    # Two cores of one CPU, to the nearest tenth; they only order the two families.
    "cpu_naive forward": Cost(0.03),
    "cpu_naive backward": Cost(0.03, _ONE_PASS),
    "cpu_naive unfused": Cost(0.03, (1, 0)),
    "cpu forward": Cost(0.2),
    "cpu backward": Cost(0.2, _ONE_PASS),
    "cpu unfused": Cost(0.2, (1, 0)),
    # Bound by loads, not products; the rate is that of float32 for every smaller type.
    # 21 % of 25
    "naive forward": Cost(0.08, score_ps=2.09, bandwidth=0.186),
    # 22 % of 40
    "naive backward": Cost(0.085, _TWO_PASSES, bandwidth=0.132),
    "naive unfused": Cost(0.32, (1, 0), score_ps=8.0),
    # Fused attention is composed of qk, softmax and av; its backward pass of qk, av and two inverse_av.
    # 28 % of 56
    "gemm forward": Cost(0.372, score_ps=0.249, tile_ns=3.6, tile=64, box=64, bandwidth=0.276),
    "gemm backward": Cost(0.4, (2, 2), score_ps=2.5, tile_ns=8.0, tile=64, box=64),
    "gemm unfused": Cost(0.3, (1, 0), score_ps=0.7, tile_ns=12.0, tile=64, box=64),
    "gemm inverse_av": Cost(0.4, (1, 0), score_ps=2.5, tile_ns=8.0, tile=64, box=64),
    # 22 % of 90
    "fused_sm80 boxes forward": Cost(0.494, score_ps=0.22, tile_ns=15.2, tile=64, box=32, bandwidth=0.477),
    # 25 % of 40
    "fused_sm80 boxes backward": Cost(0.34, _TWO_PASSES, score_ps=0.563, tile_ns=19.7, tile=32, box=64, bandwidth=0.26),
    # 23 % of 50
    "fused_sm80 accumulating backward": Cost(
        0.354, _ONE_PASS, score_ps=0.768, tile_ns=53.3, tile=64, box=64, bandwidth=0.262
    ),
    # Packed keys: every one counts by itself.
    # 25 % of 55
    "fused_sm80 patches forward": Cost(0.293, score_ps=0.682, tile_ns=0.46, tile=16, chunk=96, bandwidth=0.603),
    # 23 % of 52
    "fused_sm80 patches backward": Cost(0.155, _TWO_PASSES, tile_ns=1.19, tile=16, chunk=96, bandwidth=0.301),
    # 26 % of 45
    "fused_sm80 float32 forward": Cost(0.566, tile_ns=13, tile=32, box=64, bandwidth=0.688),
    # 27 % of 45
    "fused_sm80 float32 backward": Cost(0.427, _TWO_PASSES, tile_ns=33.5, tile=32, box=32, bandwidth=0.398),
    # 23 % of 143
    "fused_sm90 forward": Cost(1.18, score_ps=0.218, tile_ns=11, tile=64, box=32, bandwidth=0.608),
    "fused_sm90 deterministic backward": Cost(0.8, _TWO_PASSES, tile_ns=45.0, tile=64, box=64),
    # 21 % of 131
    "fused_sm90 accumulating backward": Cost(0.816, _ONE_PASS, tile_ns=38.6, tile=64, box=64, bandwidth=0.265),
}

_PATCH_HEAD_DIM = 64  # fused_sm80 works by patches up to this head dim
# It takes them in the backward pass up to so many keys in a window times channels of the head dim class;
# patch_backward.cu has the same rule.
_MOST_PATCH_CHANNELS = 200 * 64

# Fused kernels are compiled for these head dims; others are padded to the next.
_HEAD_DIM_CLASSES = (32, 64, 96, 128, 192, 256)
_FLOAT32_HEAD_DIM_CLASSES = (32, 64, 128)


class Hardware(NamedTuple):
    """Rates of a device: floating-point operations and bytes per second, microseconds per launch."""

    half: float
    tf32: float
    float32: float
    float64: float
    bandwidth: float
    launch_us: float


# The H200's rates are measured (matrix products and copies of torch); the others are data-sheet figures.
_H200 = Hardware(half=750e12, tf32=354e12, float32=51e12, float64=34e12, bandwidth=4.2e12, launch_us=4.0)
_HARDWARE: Mapping[tuple[int, int], Hardware] = {
    (9, 0): _H200,
    (8, 9): Hardware(half=165e12, tf32=82e12, float32=82e12, float64=1.3e12, bandwidth=1.0e12, launch_us=4.0),
    (8, 6): Hardware(half=71e12, tf32=35e12, float32=35e12, float64=0.5e12, bandwidth=0.9e12, launch_us=4.0),
    (8, 0): Hardware(half=312e12, tf32=156e12, float32=19e12, float64=9.7e12, bandwidth=1.9e12, launch_us=4.0),
}


def _cpu() -> Hardware:
    cores = torch.get_num_threads()
    return Hardware(50e9 * cores, 50e9 * cores, 50e9 * cores, 25e9 * cores, bandwidth=20e9, launch_us=2.0)


def nominal(problem: Problem) -> Problem:
    """The problem with symbols replaced by typical numbers, so that estimates put no guard on them."""
    if not problem.is_symbolic:
        return problem

    def number(value: int, typical: int) -> int:
        return typical if isinstance(value, SymInt) else value

    axes, q_grid = [], []
    for axis, queries in zip(problem.axes, problem.q_grid, strict=True):
        stride, dilation = number(axis.stride, 1), number(axis.dilation, 1)
        kernel_size = number(axis.kernel_size, 7)
        length = max(round(4096 ** (1 / problem.rank)), kernel_size * dilation, stride * dilation)
        axes.append(Axis(kernel_size, stride, dilation, axis.causal, 0, 0, length))
        q_grid.append(min(number(queries, length), length))
    return replace(
        problem,
        batch=number(problem.batch, 8),
        q_grid=tuple(q_grid),
        kv_grid=tuple(axis.extent for axis in axes),
        additional=number(problem.additional, 128),
        axes=tuple(axes),
    )


def attention_weights_bytes(problem: Problem) -> int:
    """Size of the attention weights that the unfused operators store."""
    return problem.batch * problem.queries * problem.heads * problem.slots * problem.dtype.itemsize


def _sides(lengths: Sequence[float], tokens: int) -> list[int]:
    """Powers of two whose product is `tokens`, as long along each axis as fits its length best."""
    sides = [1] * len(lengths)
    while math.prod(sides) < tokens:
        longest = max(range(len(sides)), key=lambda axis: (lengths[axis] / sides[axis], axis))
        sides[longest] *= 2
    return sides


def _computed(cost: Cost, problem: Problem) -> tuple[float, float]:
    """Tiles (or their chunks), and scores computed, of one batch item and head."""
    if cost.tile == 1:
        return problem.queries, problem.attention_pairs()
    lengths = [-(-queries // axis.dilation) for axis, queries in zip(problem.axes, problem.q_grid, strict=True)]
    tile = _sides(lengths, cost.tile)
    tiles, unions = 1, []
    for axis, queries, length, side in zip(problem.axes, problem.q_grid, lengths, tile, strict=True):
        tiles *= min(axis.dilation, queries) * -(-length // side)
        window = axis.pairs(queries) / queries
        # Queries of a stride group share their window; further ones move the union on.
        unions.append(min(window + max(side - axis.stride, 0), -(-axis.extent // axis.dilation)))
    box = _sides(unions, cost.box)
    keys = math.prod(math.ceil(union / side - 1e-9) * side for union, side in zip(unions, box, strict=True))
    keys += -(-problem.additional // cost.box) * cost.box
    scores = tiles * cost.tile * keys
    if cost.chunk:
        planes = unions[0] if problem.rank == 3 else 1.0
        tiles *= math.ceil(planes - 1e-9) * max(math.ceil(math.prod(unions) / planes / cost.chunk - 1e-9), 1)
    return tiles, scores


def _forms(kernel: Kernel, problem: Problem, operation: Operation) -> list[str]:
    """The forms that the kernel may take: names in `_FORMS`."""
    if operation not in (Operation.forward, Operation.backward):
        name = f"{kernel.name} {operation.value}"
        return [name if name in _FORMS else f"{kernel.name} unfused"]
    name = operation.value
    if kernel is Kernel.fused_sm80:
        if problem.dtype == torch.float32:
            return [f"fused_sm80 float32 {name}"]
        if operation is Operation.forward:
            patches = ["fused_sm80 patches forward"] if _patches_fit(problem) else []
            return ["fused_sm80 boxes forward", *patches]
        if patches_are_faster(problem):
            return ["fused_sm80 patches backward"]
        return [f"fused_sm80 {'accumulating' if accumulating_is_faster(problem) else 'boxes'} backward"]
    if kernel is Kernel.fused_sm90 and operation is Operation.backward:
        return [f"fused_sm90 {'accumulating' if accumulating_is_allowed(problem) else 'deterministic'} backward"]
    return [f"{kernel.name} {name}"]


def milliseconds(
    kernel: Kernel, problem: Problem, operation: Operation, capability: tuple[int, int] | None, composite: bool
) -> float:
    """Estimated time; `composite` kernels run a pass of fused attention as several unfused operators."""
    forms = _forms(kernel, problem, operation)
    return min(_milliseconds(_FORMS[name], kernel, problem, operation, capability, composite) for name in forms)


def _milliseconds(
    cost: Cost,
    kernel: Kernel,
    problem: Problem,
    operation: Operation,
    capability: tuple[int, int] | None,
    composite: bool,
) -> float:
    hardware = _cpu() if capability is None else _HARDWARE.get(capability, _HARDWARE[(8, 0)])
    d, dv = problem.head_dim, problem.head_dim_v
    if kernel in (Kernel.fused_sm80, Kernel.fused_sm90):
        d, dv = _padded(problem)
        if kernel is Kernel.fused_sm90 and operation is Operation.backward:
            d = dv = 64 if d <= 64 else 128
    size = problem.dtype.itemsize
    queries = problem.batch * problem.queries * problem.heads
    keys = problem.batch * (problem.keys + problem.additional) * problem.heads_kv
    tensors = (queries + keys) * (problem.head_dim + problem.head_dim_v) * size
    weights = attention_weights_bytes(problem)
    moved, launches, steps = tensors, 1, 1
    if operation is Operation.forward:
        if composite:  # weights written by qk, read and written by softmax, read by av
            moved, launches, steps = tensors + 4 * weights, 3, 2
    elif operation is Operation.backward:
        moved, launches = 2 * tensors, 2
        if composite:  # gradient of the weights written; softmax reads two, writes one; three products read one each
            moved, launches, steps = moved + 7 * weights, 7, 4
    else:
        moved = tensors // 2 + weights
    products = cost.products[0] * d + cost.products[1] * dv
    tiles, scores = _computed(cost, problem)
    heads = problem.batch * problem.heads
    slower = 1.0 if capability is None else _H200.float32 / hardware.float32
    compute = heads * scores * 2 * products / (_rate(kernel, problem, hardware) * cost.efficiency)
    compute += heads * steps * slower * (scores * cost.score_ps * 1e-12 + tiles * cost.tile_ns * 1e-9)
    memory = moved / (cost.bandwidth * hardware.bandwidth)
    # Partly at the same time: a little more than the longer one where both are long.
    return 1e3 * float((compute**3 + memory**3) ** (1 / 3)) + 1e-3 * launches * hardware.launch_us


def _rate(kernel: Kernel, problem: Problem, hardware: Hardware) -> float:
    if problem.dtype == torch.float64:
        return hardware.float64
    if kernel is Kernel.naive:
        return hardware.float32
    if problem.dtype != torch.float32:
        return hardware.half
    if kernel in (Kernel.gemm, Kernel.fused_sm80):  # three TF32 products make one of float32
        return hardware.tf32 if problem.flags & ALLOW_TF32 else hardware.tf32 / 3
    return hardware.float32


def accumulating_is_allowed(problem: Problem) -> bool:
    """Whether a backward pass may sum query gradients in a float32 workspace, in any order."""
    return not (problem.flags & DETERMINISTIC or context.is_memory_usage_strict())


def _patches_fit(problem: Problem) -> bool:
    """Whether fused_sm80 has patches for the problem at all."""
    largest = max(problem.head_dim, problem.head_dim_v)
    return problem.dtype != torch.float32 and problem.additional == 0 and largest <= _PATCH_HEAD_DIM


def patches_are_faster(problem: Problem) -> bool:
    """Whether fused_sm80 works by patches in its backward pass, which is deterministic then: small windows."""
    problem = nominal(problem)
    return _patches_fit(problem) and problem.slots * _padded(problem)[0] <= _MOST_PATCH_CHANNELS


def accumulating_is_faster(problem: Problem) -> bool:
    """Whether fused_sm80 should accumulate query gradients: estimated to save a twentieth at least, and allowed."""
    if problem.dtype == torch.float32 or patches_are_faster(problem) or not accumulating_is_allowed(problem):
        return False
    problem = nominal(problem)
    dims = _padded(problem)

    def seconds(cost: Cost) -> float:
        tiles, scores = _computed(cost, problem)
        products = cost.products[0] * dims[0] + cost.products[1] * dims[1]
        per_score = 2 * products / (_H200.half * cost.efficiency) + cost.score_ps * 1e-12
        return scores * per_score + tiles * cost.tile_ns * 1e-9

    return seconds(_FORMS["fused_sm80 accumulating backward"]) < 0.95 * seconds(_FORMS["fused_sm80 boxes backward"])


def _padded(problem: Problem) -> tuple[int, int]:
    largest = max(problem.head_dim, problem.head_dim_v)
    classes = _FLOAT32_HEAD_DIM_CLASSES if problem.dtype == torch.float32 else _HEAD_DIM_CLASSES
    padded = next(size for size in classes if largest <= size)
    return padded, padded
