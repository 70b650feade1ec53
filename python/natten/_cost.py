"""How long a kernel is expected to take.

The estimate follows what the kernels do. Queries come in tiles; a tile computes scores against boxes of keys that cover
the union of its windows, useful or not. The time is the longer of

    computed scores * (operations per score / (rate * efficiency) + score_ps) + tiles * tile_ns
    bytes that must move / bandwidth

plus the launches. The constants of the CUDA kernels are fitted to measurements on an H200; the root mean square of the
error is stated beside each: over 19 problems in bfloat16, from 7x7 windows to 30x48x80 volumes, for the fused kernels,
and over 5 to 9 problems in float16, float32 and TF32 for the others. For other devices the two times are scaled by the
ratio of the float32 rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    """Constants of one kernel and pass."""

    efficiency: float  # share of the device's rate that products reach
    products: tuple[int, int] = (1, 1)  # matrix products over the head dim and over the value head dim, per score
    score_ps: float = 0.0  # picoseconds of the whole device per computed score: exponentials, masks
    tile_ns: float = 0.0  # nanoseconds of the whole device per tile of queries
    tile: int = 1  # queries per tile; 1: only useful scores are computed
    box: int = 1  # keys per box


_UNFUSED = (Operation.qk, Operation.av, Operation.inverse_av, Operation.rpb_backward)
_ONE_PASS = (3, 2)  # of backward: the logits again, gradients of query and key; of weights and value
_TWO_PASSES = (
    4,
    3,
)  # key and query gradients by kernels of their own, each of which computes logits and their gradients


def _costs(forward: Cost, backward: Cost, unfused: Cost | None = None) -> dict[Operation, Cost]:
    costs = {Operation.forward: forward, Operation.backward: backward}
    if unfused is not None:
        costs.update(dict.fromkeys(_UNFUSED, unfused))
    return costs


_GEMM = Cost(0.3, (1, 0), score_ps=0.7, tile_ns=12.0, tile=64, box=64)  # 26 %
_GEMM_INVERSE = Cost(0.4, (1, 0), score_ps=2.5, tile_ns=8.0, tile=64, box=64)  # 13 %
_COSTS: Mapping[Kernel, Mapping[Operation, Cost]] = {
    # Two cores of one CPU, to the nearest tenth; they only order the two families.
    Kernel.cpu_naive: _costs(Cost(0.03), Cost(0.03, _ONE_PASS), Cost(0.03, (1, 0))),
    Kernel.cpu: _costs(Cost(0.2), Cost(0.2, _ONE_PASS), Cost(0.2, (1, 0))),
    # Bound by loads, not products; the rate is that of float32 for every smaller type. 33 %, 29 %, 25 %
    Kernel.naive: _costs(
        Cost(0.18, score_ps=8.0), Cost(0.18, _TWO_PASSES, score_ps=8.0), Cost(0.32, (1, 0), score_ps=8.0)
    ),
    # Fused attention is composed of qk, softmax and av; its backward pass of qk, av and two inverse_av.
    Kernel.gemm: {
        **_costs(replace(_GEMM, products=(1, 1)), replace(_GEMM_INVERSE, products=(2, 2)), _GEMM),
        Operation.inverse_av: _GEMM_INVERSE,
    },
    Kernel.fused_sm80: _costs(
        Cost(0.55, score_ps=0.2, tile_ns=12.0, tile=64, box=32),  # 9 %
        Cost(0.5, _TWO_PASSES, score_ps=1.0, tile_ns=12.0, tile=32, box=64),  # 9 %
    ),
    Kernel.fused_sm90: _costs(
        Cost(0.95, score_ps=0.05, tile_ns=12.0, tile=64, box=32),  # 11 %
        # Deterministic. Over six problems of head dims 64 and 128, windows from 13x13: 9 % with (0.9, 40 ns). A little
        # dearer here, so that it is not preferred on a narrow margin where it was not measured.
        Cost(0.8, _TWO_PASSES, tile_ns=45.0, tile=64, box=64),
    ),
}

# The backward pass of fused_sm80 that accumulates query gradients. 13 %
_ACCUMULATING = Cost(0.45, _ONE_PASS, score_ps=1.0, tile_ns=32.0, tile=64, box=64)

# The forward pass of fused_sm80 by patches of 16 queries, as far as it is sure to be taken: the windows of a patch span
# one plane of at most so many keys. 9 % over four problems.
_FORWARD_PATCHES = Cost(0.31, score_ps=0.33, tile_ns=1.1, tile=16, box=1)
_MOST_PATCH_KEYS, _MOST_PATCH_HEAD_DIM = 112, 64

# The backward pass of fused_sm80 by patches: walked columns are packed, so every one counts by itself. 13 %, over eight
# problems with windows of 49 to 343 keys
_PATCHES = Cost(0.2, _TWO_PASSES, tile_ns=4.0, tile=16, box=1)
# Taken up to so many keys in a window times channels of the head dim class; patch_backward.cu has the same rule.
_MOST_PATCH_CHANNELS = 200 * 64

# The backward pass of fused_sm90 that accumulates query gradients. 13 %, over seventeen problems
_SM90_ACCUMULATING = Cost(0.8, _ONE_PASS, tile_ns=48.0, tile=64, box=64)

# float32 in fused_sm80: TF32, and three TF32 products for one. 11 %, 11 %, over seven problems of each
_FLOAT32_FUSED: Mapping[Operation, Cost] = _costs(
    Cost(0.49, score_ps=0.18, tile_ns=5.0, tile=32, box=64),
    Cost(0.41, _TWO_PASSES, score_ps=0.25, tile_ns=14.0, tile=32, box=32),
)

# Fused kernels are compiled for these head dims; others are padded to the next.
_HEAD_DIM_CLASSES = (32, 64, 96, 128, 192, 256)
_FLOAT32_HEAD_DIM_CLASSES = (32, 64, 128)


@dataclass(frozen=True)
class Hardware:
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
    """Tiles, and scores computed, of one batch item and head."""
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
    return tiles, tiles * cost.tile * keys


def _forward_is_in_patches(problem: Problem) -> bool:
    if max(problem.head_dim, problem.head_dim_v) > _MOST_PATCH_HEAD_DIM or problem.additional or problem.rank > 2:
        return False
    tiles, scores = _computed(_FORWARD_PATCHES, problem)
    return scores <= tiles * _FORWARD_PATCHES.tile * _MOST_PATCH_KEYS


def milliseconds(
    kernel: Kernel, problem: Problem, operation: Operation, capability: tuple[int, int] | None, composite: bool
) -> float:
    """Estimated time; `composite` kernels run a pass of fused attention as several unfused operators."""
    hardware = _cpu() if capability is None else _HARDWARE.get(capability, _HARDWARE[(8, 0)])
    cost = _COSTS[kernel][operation]
    if kernel is Kernel.fused_sm80 and problem.dtype == torch.float32:
        cost = _FLOAT32_FUSED[operation]
    elif kernel is Kernel.fused_sm80 and operation is Operation.forward and _forward_is_in_patches(problem):
        cost = _FORWARD_PATCHES
    elif kernel is Kernel.fused_sm80 and operation is Operation.backward:
        if patches_are_faster(problem):
            cost = _PATCHES
        elif accumulating_is_faster(problem):
            cost = _ACCUMULATING
    elif kernel is Kernel.fused_sm90 and operation is Operation.backward and accumulating_is_allowed(problem):
        cost = _SM90_ACCUMULATING
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
    return 1e3 * max(compute, moved / (0.8 * hardware.bandwidth)) + 1e-3 * launches * hardware.launch_us


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


def patches_are_faster(problem: Problem) -> bool:
    """Whether fused_sm80 works by patches in its backward pass, which is deterministic then: small windows."""
    problem = nominal(problem)
    if problem.dtype == torch.float32 or problem.additional > 0 or max(problem.head_dim, problem.head_dim_v) > 64:
        return False
    return problem.slots * _padded(problem)[0] <= _MOST_PATCH_CHANNELS


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

    return seconds(_ACCUMULATING) < 0.95 * seconds(_COSTS[Kernel.fused_sm80][Operation.backward])


def _padded(problem: Problem) -> tuple[int, int]:
    largest = max(problem.head_dim, problem.head_dim_v)
    classes = _FLOAT32_HEAD_DIM_CLASSES if problem.dtype == torch.float32 else _HEAD_DIM_CLASSES
    padded = next(size for size in classes if largest <= size)
    return padded, padded
