"""What a call asks for: every argument checked once, in the user's words, and packed for the operators."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor

from natten.types import CausalFlag, Dimension

__all__ = ["Axis", "Problem", "attention_problem", "unfused_problem", "valid_slots"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 3

# Bits of the operators' `flags` argument (cpp/kernels/arguments.h).
ALLOW_TF32 = 1
DETERMINISTIC = 2


class Axis(NamedTuple):
    """One axis of the window, as the operators' `window` argument packs it."""

    kernel_size: int  # -1: the whole dilation group
    stride: int
    dilation: int
    causal: int
    q_start: int
    kv_start: int
    extent: int  # global

    @property
    def slots(self) -> int:
        """Window slots of the unfused operators; the longest dilation group's length where kernel_size is -1."""
        return -(-self.extent // self.dilation) if self.kernel_size == -1 else self.kernel_size

    @property
    def has_holes(self) -> bool:
        """Whether some window is shorter than `slots`."""
        return bool(self.causal) or (self.kernel_size == -1 and self.extent % self.dilation != 0)

    def window(self, group: int, position: int) -> tuple[int, int]:
        """Key positions [start, end) that the query at `position` of dilation group `group` attends."""
        length = -(-(self.extent - group) // self.dilation)
        kernel_size = length if self.kernel_size == -1 else self.kernel_size
        block = position // self.stride * self.stride
        if self.causal:
            leader = min(block + self.stride - 1, length - 1)
            return max(leader - kernel_size + 1, 0), position + 1
        leader = min(block + self.stride // 2, length - 1)
        start = min(max(leader - kernel_size // 2, 0), length - kernel_size)
        return start, start + kernel_size

    def key_range(self, coordinate: int) -> tuple[int, int]:
        """Global coordinates of the first key, and one past the last, that the query at `coordinate` attends."""
        group, position = coordinate % self.dilation, coordinate // self.dilation
        start, end = self.window(group, position)
        return start * self.dilation + group, (end - 1) * self.dilation + group + 1

    def pairs(self, queries: int) -> int:
        """Number of (query, key) pairs on this axis for `queries` queries from `q_start` on."""
        if not self.has_holes:
            return queries * self.slots
        total = 0
        for group in range(min(self.dilation, queries)):
            first = self.q_start + group  # the first query of its dilation group
            begin = first // self.dilation
            end = begin + -(-(queries - group) // self.dilation)  # positions [begin, end) in the group
            length = -(-(self.extent - first % self.dilation) // self.dilation)
            if self.causal:
                total += (begin + 1 + end) * (end - begin) // 2
                total -= self._sum_of_starts(end, length) - self._sum_of_starts(begin, length)
            else:
                total += (end - begin) * length
        return total

    def _sum_of_starts(self, count: int, length: int) -> int:
        """Sum of the causal windows' first positions over the first `count` positions of a group."""
        kernel_size, stride = length if self.kernel_size == -1 else self.kernel_size, self.stride
        blocks, rest = divmod(count, stride)
        first = max(-(-(kernel_size - stride) // stride), 0)  # block whose window does not start at 0
        later = max(blocks - first, 0)
        total = stride * (later * (stride - kernel_size) + stride * (first + blocks - 1) * later // 2)
        leader = min((blocks + 1) * stride, length) - 1
        return total + rest * max(leader - kernel_size + 1, 0)

    def missing_key(self, queries: int, keys: int) -> tuple[int, int] | None:
        """A global (query, key) pair whose key is needed but was not passed, or None."""
        if self.kv_start == 0 and keys == self.extent:
            return None
        for group in range(self.dilation):
            first = self.q_start + (group - self.q_start) % self.dilation
            if first >= self.q_start + queries:
                continue
            last = first + (self.q_start + queries - 1 - first) // self.dilation * self.dilation
            # Both ends of the windows are non-decreasing, so the first and the last query decide.
            begin, end = self.key_range(first)[0], self.key_range(last)[1]
            if begin < self.kv_start:
                return first, begin
            if end > self.kv_start + keys:
                return last, end - 1
        return None


@dataclass(frozen=True)
class Problem:
    """A checked call. Extents and the batch may be `torch.SymInt` while a graph with dynamic shapes is traced."""

    rank: int
    batch: int
    q_grid: tuple[int, ...]
    kv_grid: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    additional: int  # number of additional keys
    axes: tuple[Axis, ...]
    dtype: torch.dtype
    device: torch.device
    scale: float
    flags: int

    @property
    def window(self) -> list[int]:
        """The operators' `window` argument."""
        return [value for axis in self.axes for value in axis]

    @property
    def slots(self) -> int:
        """Window slots of the unfused operators."""
        return math.prod(axis.slots for axis in self.axes)

    @property
    def is_symbolic(self) -> bool:
        """Whether some extent is a symbol, so that nothing may be decided from it."""
        values = (self.batch, self.additional, *self.q_grid, *self.kv_grid, *self.window)
        return any(isinstance(value, SymInt) for value in values)

    @property
    def queries(self) -> int:
        """Number of query tokens per batch item."""
        return math.prod(self.q_grid)

    @property
    def keys(self) -> int:
        """Number of key tokens per batch item, without the additional ones."""
        return math.prod(self.kv_grid)

    def attention_pairs(self) -> int:
        """Number of (query, key) pairs of one batch item and head, additional keys included."""
        return self.window_pairs() + self.queries * self.additional

    def window_pairs(self) -> int:
        """Number of (query, key) pairs of one batch item and head inside the windows."""
        return math.prod(axis.pairs(queries) for axis, queries in zip(self.axes, self.q_grid, strict=True))

    def with_head_dim(self, head_dim: int, scale: float) -> Problem:
        """The same window with another head dim and scale, for the gradients of the unfused operators."""
        return replace(self, head_dim=head_dim, head_dim_v=head_dim, scale=scale)


def _per_axis(name: str, value: object, rank: int, kind: str) -> list[Any]:
    if isinstance(value, str) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
        return [value] * rank
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be {kind} or a sequence of them, not a tensor")
    items = value if isinstance(value, Sequence) else value.tolist()
    if not isinstance(items, Sequence):  # a numpy scalar
        return [items] * rank
    if len(items) != rank:
        raise ValueError(f"{name} must be {kind} or {rank} of them (one per axis); got {len(items)}: {tuple(items)}")
    return list(items)


def _integers(name: str, value: object, rank: int) -> list[int]:
    result: list[Any] = []
    for axis, item in enumerate(_per_axis(name, value, rank, "an int")):
        if isinstance(item, SymInt):
            result.append(item)
            continue
        if isinstance(item, bool):
            raise TypeError(f"{name} must be an int along axis {axis}; got the bool {item}")
        try:
            result.append(operator.index(item))
        except TypeError:
            raise TypeError(
                f"{name} must be an int along axis {axis}; got {item!r} of type {type(item).__name__}"
            ) from None
    return result


def _flags(name: str, value: object, rank: int) -> list[bool]:
    result = []
    for axis, item in enumerate(_per_axis(name, False if value is None else value, rank, "a bool")):
        if not isinstance(item, bool) and type(item).__name__ not in ("bool", "bool_"):  # numpy's
            raise TypeError(f"{name} must be a bool along axis {axis}; got {item!r} of type {type(item).__name__}")
        result.append(bool(item))
    return result


def check_window_arguments(
    rank: int, kernel_size: Dimension, stride: Dimension, dilation: Dimension, is_causal: CausalFlag | None
) -> tuple[list[int], list[int], list[int], list[bool]]:
    """The rules that need no tensor; returns one value per axis for each argument."""
    sizes = _integers("kernel_size", kernel_size, rank)
    strides = _integers("stride", stride, rank)
    dilations = _integers("dilation", dilation, rank)
    causal = _flags("is_causal", is_causal, rank)
    for axis, (k, s, d) in enumerate(zip(sizes, strides, dilations, strict=True)):
        if k != -1 and k < 1:
            raise ValueError(f"kernel_size must be at least 1, or -1 for the whole axis; got {k} along axis {axis}")
        if s < 1:
            raise ValueError(f"stride must be at least 1; got {s} along axis {axis}")
        if d < 1:
            raise ValueError(f"dilation must be at least 1; got {d} along axis {axis}")
        if k != -1 and s > k:
            raise ValueError(f"stride must not exceed kernel_size; got {s} > {k} along axis {axis}")
    return sizes, strides, dilations, causal


def _axes(
    q_grid: Sequence[int],
    kv_grid: Sequence[int],
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag | None,
    q_start: Dimension | None,
    kv_start: Dimension | None,
    extent: Dimension | None,
) -> tuple[Axis, ...]:
    rank = len(q_grid)
    window = check_window_arguments(rank, kernel_size, stride, dilation, is_causal)
    is_local = q_start is None and kv_start is None and extent is None
    q_starts = _integers("q_start", 0 if q_start is None else q_start, rank)
    kv_starts = _integers("kv_start", 0 if kv_start is None else kv_start, rank)
    if extent is None:
        extents = [start + keys for start, keys in zip(kv_starts, kv_grid, strict=True)]
    else:
        extents = _integers("extent", extent, rank)
    axes = []
    for axis, (k, s, d, causal) in enumerate(zip(*window, strict=True)):
        queries, keys, length = q_grid[axis], kv_grid[axis], extents[axis]
        if is_local and queries != keys:
            raise ValueError(
                f"query and key must have the same extent along axis {axis} unless q_start, kv_start or extent place "
                f"them in a larger grid; got {queries} and {keys}"
            )
        if queries < 1:
            raise ValueError(f"query must hold at least one token along axis {axis}; got {queries}")
        for name, start, count in (("q_start", q_starts[axis], queries), ("kv_start", kv_starts[axis], keys)):
            if start < 0:
                raise ValueError(f"{name} must not be negative; got {start} along axis {axis}")
            if start + count > length:
                raise ValueError(
                    f"{name} + length must not exceed the extent {length} along axis {axis}; got {start} + {count}"
                )
        if d > length:
            raise ValueError(f"dilation must not exceed the extent {length} along axis {axis}; got {d}")
        if k != -1 and k * d > length:
            raise ValueError(
                f"kernel_size * dilation must not exceed the extent {length} along axis {axis}; got {k} * {d}"
            )
        result = Axis(k, s, d, int(causal), q_starts[axis], kv_starts[axis], length)
        if k == -1 and s > result.slots:
            raise ValueError(
                f"stride must not exceed the window of {result.slots} that kernel_size -1 stands for; got {s} along "
                f"axis {axis}"
            )
        if not any(isinstance(value, SymInt) for value in (queries, keys, *result)):
            # With symbolic extents the operator makes this check when it runs.
            missing = result.missing_key(queries, keys)
            if missing is not None:
                raise ValueError(
                    f"the window of the query at global coordinate {missing[0]} along axis {axis} needs the key at "
                    f"{missing[1]}, which was not passed: keys cover [{result.kv_start}, {result.kv_start + keys})"
                )
        axes.append(result)
    return tuple(axes)


def _check_tensor(name: str, tensor: object, dimensions: int, layout: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16; got {tensor.dtype}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, {layout}; got shape {tuple(tensor.shape)}")
    if tensor.shape[-1] < 1:
        raise ValueError(f"{name}'s last dimension must be at least 1; got shape {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name}'s last dimension must have stride 1; got strides {tensor.stride()}")
    return tensor


def _check_same(name: str, tensor: Tensor, query: Tensor, reference: str = "query") -> None:
    if tensor.dtype != query.dtype:
        raise ValueError(f"{name} must have {reference}'s dtype {query.dtype}; got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on {reference}'s device {query.device}; got {tensor.device}")
    if tensor.shape[0] != query.shape[0]:
        raise ValueError(f"{name} must have {reference}'s batch size {query.shape[0]}; got {tensor.shape[0]}")


def _check_heads(heads: int, heads_kv: int, query: str = "query", key: str = "key") -> None:
    if heads < 1 or heads_kv < 1 or heads % heads_kv != 0:
        raise ValueError(
            f"{key}'s number of heads must divide {query}'s and both be at least 1; got {heads_kv} and {heads}"
        )


def _check_scale(scale: object, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, (bool, Tensor)):
        raise TypeError(f"scale must be a number; got {type(scale).__name__}")
    try:
        value: float = float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a number; got {scale!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite; got {value}")
    return value


_LAYOUT = {
    1: "[batch, X, heads, head_dim]",
    2: "[batch, X, Y, heads, head_dim]",
    3: "[batch, X, Y, Z, heads, head_dim]",
}


def attention_problem(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    q_start: Dimension | None = None,
    kv_start: Dimension | None = None,
    extent: Dimension | None = None,
    flags: int = 0,
) -> Problem:
    """Checks the arguments of fused attention; raises `ValueError` or `TypeError` naming argument, value and rule."""
    _check_tensor("query", query, rank + 3, _LAYOUT[rank])
    for name, tensor in (("key", key), ("value", value)):
        _check_tensor(name, tensor, rank + 3, _LAYOUT[rank])
        _check_same(name, tensor, query)
    heads, head_dim = int(query.shape[-2]), int(query.shape[-1])
    heads_kv, head_dim_v = int(key.shape[-2]), int(value.shape[-1])
    _check_heads(heads, heads_kv)
    if int(key.shape[-1]) != head_dim:
        raise ValueError(f"key must have query's head dim {head_dim}; got {key.shape[-1]}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have key's shape but for the last dimension; got {tuple(value.shape)} and {tuple(key.shape)}"
        )
    q_grid, kv_grid = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    axes = _axes(q_grid, kv_grid, kernel_size, stride, dilation, is_causal, q_start, kv_start, extent)
    additional = 0
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if additional_keys is not None and additional_values is not None:
        for name, tensor, channels in (
            ("additional_keys", additional_keys, head_dim),
            ("additional_values", additional_values, head_dim_v),
        ):
            _check_tensor(name, tensor, 4, "[batch, tokens, heads, head_dim]")
            _check_same(name, tensor, query)
            if int(tensor.shape[2]) != heads_kv or int(tensor.shape[3]) != channels:
                raise ValueError(
                    f"{name} must have key's {heads_kv} heads and head dim {channels}; got shape {tuple(tensor.shape)}"
                )
        additional = additional_keys.shape[1]
        if additional_values.shape[1] != additional:
            raise ValueError(
                f"additional_values must hold as many tokens as additional_keys, {additional}; got "
                f"{additional_values.shape[1]}"
            )
    return Problem(
        rank=rank,
        batch=query.shape[0],
        q_grid=q_grid,
        kv_grid=kv_grid,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        additional=additional,
        axes=axes,
        dtype=query.dtype,
        device=query.device,
        scale=_check_scale(scale, head_dim),
        flags=flags,
    )


def unfused_problem(
    queries: Tensor,
    queries_name: str,
    keys: Tensor,
    keys_name: str,
    are_weights: bool,
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag | None,
    scale: float | None,
    q_start: Dimension | None,
    kv_start: Dimension | None,
    extent: Dimension | None,
) -> Problem:
    """Checks the arguments that the unfused operators share.

    `queries` is on the grid of queries: query, or attention weights (`are_weights`), whose last dimension are window
    slots. `keys` is on the grid of keys: key, or value.
    """
    if not isinstance(queries, Tensor):
        raise TypeError(f"{queries_name} must be a torch.Tensor; got {type(queries).__name__}")
    rank = queries.dim() - 3
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{queries_name} must have 4, 5 or 6 dimensions; got shape {tuple(queries.shape)}")
    _check_tensor(queries_name, queries, rank + 3, _LAYOUT[rank])
    _check_tensor(keys_name, keys, rank + 3, _LAYOUT[rank])
    _check_same(keys_name, keys, queries, queries_name)
    channels = int(keys.shape[-1])
    if not are_weights and channels != int(queries.shape[-1]):
        raise ValueError(f"{keys_name} must have {queries_name}'s head dim {queries.shape[-1]}; got {channels}")
    heads, heads_kv = int(queries.shape[-2]), int(keys.shape[-2])
    _check_heads(heads, heads_kv, queries_name, keys_name)
    q_grid, kv_grid = tuple(queries.shape[1:-2]), tuple(keys.shape[1:-2])
    axes = _axes(q_grid, kv_grid, kernel_size, stride, dilation, is_causal, q_start, kv_start, extent)
    problem = Problem(
        rank=rank,
        batch=queries.shape[0],
        q_grid=q_grid,
        kv_grid=kv_grid,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=channels,
        head_dim_v=channels,
        additional=0,
        axes=axes,
        dtype=queries.dtype,
        device=queries.device,
        scale=_check_scale(scale, channels),
        flags=0,
    )
    if are_weights and queries.shape[-1] != problem.slots:
        raise ValueError(
            f"{queries_name} must have one weight per window slot, {problem.slots}, in its last dimension; got "
            f"{queries.shape[-1]}"
        )
    return problem


def check_rpb(rpb: Tensor, problem: Problem, query: Tensor) -> None:
    """The rules of relative positional bias."""
    if not isinstance(rpb, Tensor):
        raise TypeError(f"rpb must be a torch.Tensor; got {type(rpb).__name__}")
    for index, axis in enumerate(problem.axes):
        if axis.causal:
            raise ValueError(f"rpb does not go with causal axes; axis {index} is causal")
        if axis.stride != 1:
            raise ValueError(f"rpb does not go with stride > 1; got {axis.stride} along axis {index}")
        if axis.kernel_size == -1:
            raise ValueError(f"rpb needs an explicit kernel_size; got -1 along axis {index}")
    if rpb.dtype != query.dtype or rpb.device != query.device:
        raise ValueError(
            f"rpb must have query's dtype {query.dtype} and device {query.device}; got {rpb.dtype} on {rpb.device}"
        )
    expected = (problem.heads, *(2 * axis.kernel_size - 1 for axis in problem.axes))
    if tuple(rpb.shape) != expected:
        raise ValueError(f"rpb must have shape [heads, 2 * kernel_size - 1, ...] = {expected}; got {tuple(rpb.shape)}")


def valid_slots(problem: Problem) -> Tensor | None:
    """Which window slots hold a key: bool [X, Y, Z, 1, slots], or None where all of them do."""
    if not any(axis.has_holes for axis in problem.axes):
        return None
    device = problem.device
    result = torch.ones((1,) * (problem.rank + 2), dtype=torch.bool, device=device)
    for index, (axis, queries) in enumerate(zip(problem.axes, problem.q_grid, strict=True)):
        coordinate = torch.arange(axis.q_start, axis.q_start + queries, device=device)
        position = coordinate // axis.dilation
        length = (axis.extent - coordinate % axis.dilation + axis.dilation - 1) // axis.dilation
        size = length if axis.kernel_size == -1 else torch.full_like(length, axis.kernel_size)
        if axis.causal:
            leader = torch.minimum(position // axis.stride * axis.stride + axis.stride - 1, length - 1)
            size = position + 1 - (leader - size + 1).clamp_min(0)
        valid = torch.arange(axis.slots, device=device) < size[:, None]  # [queries, slots of this axis]
        shape = [1] * (problem.rank + 1) + [1, 1]
        shape[index], shape[-1] = queries, axis.slots
        grown = result.unsqueeze(-1) & valid.reshape(shape)
        result = grown.flatten(-2)
    return result
