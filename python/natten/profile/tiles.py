"""How many floating-point operations the kernels execute, useful or not, from the tiles and boxes that they work in.

A block owns a tile of queries (or of keys) of one dilation group and walks boxes of the other side, from the first
token that the tile needs. Every score of a box is computed for all the rows that do not skip it, in a window or not;
channels are padded to a class. The shapes are the kernel's own where it states them (the forward pass, on the device
itself), else those of the planner in C++ for tiles of that many tokens (``torch.ops.natten.plan_tiles``). The boxes are
counted here, tile by tile. Families that go from query to query compute nothing but the windows.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal

import torch

from natten import _cost
from natten._problem import ALLOW_TF32, Axis, Problem
from natten.bench.problems import Pass
from natten.dispatch import Kernel

Side = Literal["queries", "keys"]


@dataclass(frozen=True)
class Tile:
    """Tokens of a tile, rows of it that skip a box together, and tokens of a box: powers of two."""

    owned: int
    rows: int
    box: int
    #: Time of a score, in units of the family's other tiles: what makes it choose one of them.
    score_cost: float = 1.0


@dataclass(frozen=True)
class Step:
    """One kernel of a pass."""

    name: str
    owns: Side
    products: tuple[int, int]  # matrix products over the head dim, and over the value head dim, per score
    tiles: tuple[Tile, ...] = ()  # to choose from; none: exactly the scores inside windows
    box_innermost: int = 8  # the box's innermost extent is a multiple
    masked_charge: float = 0.0  # of a box that needs a mask, as the planner charges it
    head_dim: int | None = None  # that both head dims are padded to


@dataclass(frozen=True)
class StepPlan:
    """A step on a problem: extents of the tile, of the rows that skip together and of the box; scores; FLOPs."""

    step: Step
    tile: tuple[int, ...]
    rows: tuple[int, ...]
    box: tuple[int, ...]
    scores: int
    flops: float


def _wide_and_narrow(wide: tuple[int, int, int], narrow: tuple[int, int, int]) -> tuple[Tile, ...]:
    return Tile(*wide, score_cost=0.8), Tile(*narrow)


# fused_sm80, by head dim class: the wide and the narrow variant of cpp/kernels/fused_sm80/config.h.
_SM80_QUERIES: Mapping[int, tuple[Tile, ...]] = {
    32: _wide_and_narrow((128, 32, 64), (64, 16, 64)),
    64: _wide_and_narrow((128, 32, 128), (64, 16, 64)),
    96: _wide_and_narrow((128, 32, 64), (64, 16, 64)),
    128: _wide_and_narrow((128, 32, 64), (64, 16, 64)),
    192: _wide_and_narrow((128, 16, 64), (64, 16, 32)),
    256: _wide_and_narrow((128, 16, 64), (64, 16, 32)),
}
_SM80_GRAD_QUERY: Mapping[int, tuple[Tile, ...]] = {
    32: _wide_and_narrow((128, 32, 64), (64, 16, 64)),
    64: _wide_and_narrow((128, 32, 64), (64, 16, 64)),
    96: _wide_and_narrow((128, 32, 32), (64, 16, 32)),
    128: _wide_and_narrow((128, 32, 32), (64, 16, 32)),
    192: _wide_and_narrow((128, 16, 32), (64, 16, 16)),
    256: _wide_and_narrow((128, 16, 32), (64, 16, 16)),
}
_SM80_GRAD_KEY: Mapping[int, tuple[Tile, ...]] = {
    32: _wide_and_narrow((128, 32, 64), (64, 32, 64)),
    64: _wide_and_narrow((128, 32, 64), (64, 32, 64)),
    96: _wide_and_narrow((128, 32, 64), (64, 32, 64)),
    128: _wide_and_narrow((128, 32, 64), (64, 32, 64)),
    192: _wide_and_narrow((64, 32, 64), (32, 16, 32)),
    256: _wide_and_narrow((64, 32, 64), (32, 16, 32)),
}
_SM80_ACCUMULATING: Mapping[int, tuple[Tile, ...]] = {
    32: _wide_and_narrow((64, 32, 64), (64, 32, 64)),
    64: _wide_and_narrow((128, 32, 128), (64, 32, 64)),
    96: _wide_and_narrow((128, 32, 64), (128, 32, 64)),
    128: _wide_and_narrow((128, 32, 64), (128, 32, 64)),
    192: _wide_and_narrow((64, 32, 64), (64, 32, 64)),
    256: _wide_and_narrow((64, 32, 64), (64, 32, 64)),
}
# float32, by whether TF32 is allowed: forward, gradients of queries, of keys.
_SM80_FLOAT32: Mapping[bool, Mapping[int, tuple[tuple[Tile, ...], ...]]] = {
    True: {
        32: (
            _wide_and_narrow((128, 32, 64), (64, 16, 64)),
            _wide_and_narrow((128, 32, 32), (64, 16, 64)),
            _wide_and_narrow((128, 32, 32), (64, 16, 32)),
        ),
        64: (
            _wide_and_narrow((128, 32, 64), (64, 16, 64)),
            _wide_and_narrow((128, 32, 32), (64, 16, 32)),
            _wide_and_narrow((128, 32, 16), (64, 16, 32)),
        ),
        128: (
            _wide_and_narrow((128, 32, 32), (64, 16, 32)),
            _wide_and_narrow((64, 16, 32), (64, 16, 32)),
            _wide_and_narrow((64, 16, 32), (64, 16, 32)),
        ),
    },
    False: {  # one variant
        32: ((Tile(64, 16, 64),), (Tile(64, 16, 32),), (Tile(64, 16, 32),)),
        64: ((Tile(64, 16, 32),), (Tile(64, 16, 32),), (Tile(64, 16, 32),)),
        128: ((Tile(64, 16, 32),), (Tile(64, 16, 32),), (Tile(64, 16, 16),)),
    },
}
# fused_sm90, by head dim class: keys of a step, cpp/kernels/fused_sm90/config.h; a warpgroup has 64 queries.
_SM90: Mapping[int, tuple[Tile, ...]] = {
    head_dim: tuple(Tile(64, 64, keys) for keys in steps)
    for head_dim, steps in {32: (128, 64), 64: (128, 64), 96: (128, 64), 128: (128, 64), 192: (64,), 256: (64,)}.items()
}
# Its backward pass, cpp/kernels/fused_sm90/backward_config.h: 64 owned rows a warpgroup. Boxes, by head dim, where
# one kernel adds to the query gradients in memory; in the deterministic form 64 tokens.
_SM90_ACCUMULATING: Mapping[int, tuple[Tile, ...]] = {64: (Tile(64, 64, 128),), 128: (Tile(64, 64, 64),)}
_SM90_GRADIENTS = (Tile(64, 64, 64),)
_SM90_GRADIENT_CLASSES = tuple(_SM90_ACCUMULATING)
_GEMM = (Tile(64, 64, 64),)  # cpp/kernels/gemm/plan.h
_HEAD_DIM_CLASSES = tuple(_SM90)


def padded_head_dim(problem: Problem, classes: Iterable[int] = _HEAD_DIM_CLASSES) -> int:
    """The class that a fused kernel pads both head dims to."""
    return next(size for size in classes if max(problem.head_dim, problem.head_dim_v) <= size)


def steps(kernel: Kernel, problem: Problem, pass_: Pass) -> tuple[Step, ...]:
    """The kernels that a family runs for a pass of attention; none where it has no such pass."""
    forward = pass_ == "forward"
    if kernel is Kernel.gemm:
        qk, av = (Step(name, "queries", (1, 0), _GEMM) for name in ("qk", "av"))
        if forward:
            return qk, replace(av, products=(0, 1))
        inverse = Step("inverse_av", "keys", (0, 1), _GEMM, box_innermost=1)
        return replace(qk, products=(0, 1)), av, inverse, replace(inverse, products=(1, 0))
    if kernel is Kernel.fused_sm90:
        if forward:
            head_dim = padded_head_dim(problem)
            return (Step("forward", "queries", (1, 1), _SM90[head_dim], masked_charge=0.1, head_dim=head_dim),)
        if max(problem.head_dim, problem.head_dim_v) > _SM90_GRADIENT_CLASSES[-1]:
            return ()
        head_dim = padded_head_dim(problem, _SM90_GRADIENT_CLASSES)
        step = partial(Step, masked_charge=0.1, head_dim=head_dim)
        if _cost.accumulating_is_allowed(problem):
            return (step("accumulating", "keys", (3, 2), _SM90_ACCUMULATING[head_dim]),)
        step = partial(step, tiles=_SM90_GRADIENTS)
        return step("query gradient", "queries", (2, 1)), step("key gradient", "keys", (2, 2))
    if kernel is Kernel.fused_sm80:
        float32 = problem.dtype == torch.float32
        float32_tiles = _SM80_FLOAT32[bool(problem.flags & ALLOW_TF32)]
        classes = tuple(float32_tiles) if float32 else _HEAD_DIM_CLASSES
        if max(problem.head_dim, problem.head_dim_v) > classes[-1]:
            return ()
        head_dim = padded_head_dim(problem, classes)
        step = partial(Step, masked_charge=0.25, head_dim=head_dim)
        if float32:
            queries, grad_query, grad_key = float32_tiles[head_dim]
        else:
            queries, grad_query, grad_key = (t[head_dim] for t in (_SM80_QUERIES, _SM80_GRAD_QUERY, _SM80_GRAD_KEY))
        if forward:
            return (step("forward", "queries", (1, 1), queries),)
        if _cost.accumulating_is_faster(problem):
            return (step("accumulating", "keys", (3, 2), _SM80_ACCUMULATING[head_dim]),)
        return (
            step("query gradient", "queries", (2, 1), grad_query),
            step("key gradient", "keys", (2, 2), grad_key),
        )
    if forward:
        return (Step("forward", "queries", (1, 1)),)
    if kernel is Kernel.cpu_naive:
        return (Step("backward", "queries", (3, 2)),)
    return Step("query gradient", "queries", (2, 1)), Step("key gradient", "keys", (2, 2))


@functools.lru_cache(maxsize=256)
def _windows(axis: Axis, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Begins and ends of the windows of a dilation group's queries."""
    group = next(g for g in range(axis.dilation) if -(-(axis.extent - g) // axis.dilation) == length)
    ranges = [axis.window(group, position) for position in range(length)]
    return tuple(begin for begin, _ in ranges), tuple(end for _, end in ranges)


def _needed(axis: Axis, length: int, owns: Side, first: int, last: int) -> tuple[int, int]:
    """What the queries (keys) [first, last] attend (are attended by); both ends of the windows are non-decreasing."""
    begins, ends = _windows(axis, length)
    if owns == "queries":
        return begins[first], ends[last]
    return bisect_right(ends, first), bisect_right(begins, last)


@functools.lru_cache(maxsize=65536)
def axis_boxes(axis: Axis, owns: Side, tile: int, rows: int, box: int) -> int:
    """Boxes that each `rows` tokens of a tile need along one axis, summed over the rows, tiles and dilation groups."""
    lengths = [-(-(axis.extent - group) // axis.dilation) for group in range(axis.dilation)]
    total = 0
    for length in set(lengths):
        boxes = 0
        for tile_first in range(0, length, tile):
            tile_last = min(tile_first + tile, length) - 1
            origin = _needed(axis, length, owns, tile_first, tile_last)[0]
            for first in range(tile_first, tile_last + 1, rows):
                begin, end = _needed(axis, length, owns, first, min(first + rows - 1, tile_last))
                if begin < end:
                    boxes += (end - 1 - origin) // box - (begin - origin) // box + 1
        total += boxes * lengths.count(length)
    return total


def _cuts(tile: tuple[int, ...], parts: int) -> Iterator[tuple[int, ...]]:
    """Extents of the equal parts that a tile may be cut into."""
    powers = [[1 << log for log in range(extent.bit_length())] for extent in tile]
    for cut in itertools.product(*powers):
        if prod(cut) == parts:
            yield tuple(extent // count for extent, count in zip(tile, cut, strict=True))


def _planned(problem: Problem, step: Step, tile: Tile) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Extents of the tile and of the box that the planner in C++ chooses for so many tokens."""
    limits = (tile.owned, tile.box, step.box_innermost, step.masked_charge)
    plan = torch.ops.natten.plan_tiles(problem.window, problem.q_grid, problem.kv_grid, *limits)
    return tuple(plan[3 - problem.rank : 3]), tuple(plan[6 - problem.rank :])


def plan_step(kernel: Kernel, problem: Problem, step: Step, stated: tuple[int, ...] = ()) -> StepPlan:
    """The step's shapes on a whole problem (no pieces, no additional keys), and the scores that it computes.

    Args:
        stated: the plan that the kernel itself states for the problem, as `natten.explain` gives it.
    """
    assert problem.additional == 0
    assert tuple(axis.extent for axis in problem.axes) == problem.q_grid == problem.kv_grid
    copies = problem.batch * problem.heads
    head_dims = (step.head_dim or problem.head_dim, step.head_dim or problem.head_dim_v)
    products = zip(step.products, head_dims, strict=True)
    operations = 2.0 * sum(count * channels for count, channels in products)
    if not step.tiles:
        scores = copies * problem.window_pairs()
        return StepPlan(step, (), (), (), scores, scores * operations)

    def scores_of(shape: tuple[int, ...], rows: tuple[int, ...], box: tuple[int, ...]) -> int:
        along = zip(problem.axes, shape, rows, box, strict=True)
        boxes = prod(axis_boxes(axis, step.owns, *extents) for axis, *extents in along)
        return copies * boxes * prod(rows) * prod(box)

    first_axis = 3 - problem.rank
    if stated and kernel is Kernel.fused_sm90:  # keys, warpgroups, blocks, a warpgroup's box, key box, pair axis
        rows, box = stated[3 + first_axis : 6], stated[6 + first_axis : 9]
        pairs = [stated[1] if axis == stated[9] else 1 for axis in range(first_axis, 3)]
        shape = tuple(extent * count for extent, count in zip(rows, pairs, strict=True))
    else:
        if stated and kernel is Kernel.fused_sm80:  # variant, query tile, key box
            tile, shape, box = step.tiles[stated[0]], stated[1 + first_axis : 4], stated[4 + first_axis : 7]
        else:
            choices = [(tile, *_planned(problem, step, tile)) for tile in step.tiles]
            tile, shape, box = min(choices, key=lambda c: c[0].score_cost * scores_of(c[1], c[1], c[2]))
        rows = min(_cuts(shape, tile.owned // tile.rows), key=lambda rows: scores_of(shape, rows, box))
    scores = scores_of(shape, rows, box)
    return StepPlan(step, shape, rows, box, scores, scores * operations)


def plan_pass(kernel: Kernel, problem: Problem, pass_: Pass, stated: tuple[int, ...] = ()) -> tuple[StepPlan, ...]:
    """Every step of a pass; `stated` is the kernel's own plan of the forward pass, if known."""
    given = stated if pass_ == "forward" else ()
    return tuple(plan_step(kernel, problem, step, given) for step in steps(kernel, problem, pass_))
