"""Neighborhood attention in plain torch: dense, slow, and the oracle that every kernel is compared with.

Written from the definition of the window alone; shares nothing with the kernels or with the argument checks. Every
function is differentiable by autograd and computes in the dtype of its arguments; the tests use float64. Memory grows
with queries times keys.

Arguments are those of the public functions; `kernel_size`, `stride`, `dilation`, `is_causal`, `q_start`, `kv_start` and
`extent` are sequences with one value per axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Window", "attention", "av", "inverse_av", "qk", "rpb_gradient"]


@dataclass(frozen=True)
class Window:
    """The windows of a grid of queries over a grid of keys."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    q_start: Sequence[int]
    kv_start: Sequence[int]
    extent: Sequence[int]

    def axis(self, axis: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Dilation group, first and end position of the windows of `queries` queries along an axis."""
        k, s, d = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
        i = torch.arange(queries) + self.q_start[axis]
        g, p = i % d, i // d
        length = torch.ceil((self.extent[axis] - g) / d).long()  # of the group
        size = length if k == -1 else torch.full_like(length, k)
        if self.is_causal[axis]:
            leader = torch.minimum(p // s * s + s - 1, length - 1)
            return g, torch.clamp(leader - size + 1, min=0), p + 1
        leader = torch.minimum(p // s * s + s // 2, length - 1)
        start = torch.maximum(torch.minimum(leader - size // 2, length - size), torch.zeros_like(p))
        return g, start, start + size

    def members(self, axis: int, queries: int, keys: int) -> Tensor:
        """[queries, keys] bool: whether the window of the query holds the key, along one axis."""
        d = self.dilation[axis]
        g, start, end = (t[:, None] for t in self.axis(axis, queries))
        j = (torch.arange(keys) + self.kv_start[axis])[None, :]
        return (j % d == g) & (j // d >= start) & (j // d < end)

    def slot_keys(self, axis: int, queries: int, keys: int) -> Tensor:
        """[queries, slots]: local index of the key in each slot of the window, -1 where the window has ended."""
        k, d = self.kernel_size[axis], self.dilation[axis]
        slots = math.ceil(self.extent[axis] / d) if k == -1 else k
        g, start, end = (t[:, None] for t in self.axis(axis, queries))
        position = start + torch.arange(slots)
        local = position * d + g - self.kv_start[axis]
        inside = position < end
        if not bool(((local >= 0) & (local < keys))[inside].all()):
            raise ValueError(f"a window needs a key that was not passed, along axis {axis}")
        return torch.where(inside, local, torch.full_like(local, -1))


def _grid_product(tables: Sequence[Tensor]) -> Tensor:
    """The [queries, keys] bool tables of every axis as one over flattened grids."""
    result = torch.ones(1, 1, dtype=torch.bool)
    for table in tables:
        both = result[:, None, :, None] & table[None, :, None, :]
        result = both.reshape(result.shape[0] * table.shape[0], result.shape[1] * table.shape[1])
    return result


def _grid_slots(tables: Sequence[Tensor], keys: Sequence[int]) -> Tensor:
    """The [queries, slots] tables of every axis as one over flattened grids; -1 where any axis has ended."""
    result = torch.zeros(1, 1, dtype=torch.long)
    for table, extent in zip(tables, keys, strict=True):
        index = result[:, None, :, None] * extent + table[None, :, None, :]
        ended = (result[:, None, :, None] < 0) | (table[None, :, None, :] < 0)
        index = index.masked_fill(ended, -1)
        result = index.reshape(result.shape[0] * table.shape[0], result.shape[1] * table.shape[1])
    return result


def _dense_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, H, queries, keys]"""
    q = query.flatten(1, -3).transpose(1, 2)
    k = key.flatten(1, -3).transpose(1, 2).repeat_interleave(query.shape[-2] // key.shape[-2], 1)
    return scale * (q @ k.transpose(-1, -2))


def _slots(query: Tensor, key: Tensor, window: Window) -> Tensor:
    q_grid, kv_grid = query.shape[1:-2], key.shape[1:-2]
    tables = [window.slot_keys(a, q, k) for a, (q, k) in enumerate(zip(q_grid, kv_grid, strict=True))]
    return _grid_slots(tables, kv_grid).to(query.device)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, X, Y, Z, H, Dv]` and logsumexp `[B, X, Y, Z, H]`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q_grid, kv_grid = query.shape[1:-2], key.shape[1:-2]
    tables = [window.members(a, q, k) for a, (q, k) in enumerate(zip(q_grid, kv_grid, strict=True))]
    logits = _dense_logits(query, key, scale)
    if rpb is not None:
        logits = logits + _dense_bias(rpb, q_grid, kv_grid, window)
    logits = logits.masked_fill(~_grid_product(tables).to(query.device), -torch.inf)
    heads_per_kv = query.shape[-2] // key.shape[-2]
    values = value.flatten(1, -3).transpose(1, 2).repeat_interleave(heads_per_kv, 1)
    if additional_keys is not None and additional_values is not None:
        logits = torch.cat((logits, _dense_logits(query, additional_keys, scale)), -1)
        more = additional_values.transpose(1, 2).repeat_interleave(heads_per_kv, 1)
        values = torch.cat((values, more), 2)
    out = torch.softmax(logits, -1) @ values
    lse = torch.logsumexp(logits, -1)
    shape = query.shape[:-1]
    return out.transpose(1, 2).reshape(*shape, value.shape[-1]), lse.transpose(1, 2).reshape(shape)


def _dense_bias(rpb: Tensor, q_grid: Sequence[int], kv_grid: Sequence[int], window: Window) -> Tensor:
    """[H, queries, keys]; zero outside the windows."""
    bias = rpb
    for axis in reversed(range(len(q_grid))):
        k, d = window.kernel_size[axis], window.dilation[axis]
        p = (torch.arange(q_grid[axis]) + window.q_start[axis]) // d
        t = (torch.arange(kv_grid[axis]) + window.kv_start[axis]) // d
        index = (t[None, :] - p[:, None] + k - 1).clamp(0, 2 * k - 2)
        bias = bias.index_select(1 + axis, index.flatten().to(rpb.device))
        bias = bias.reshape(*bias.shape[: 1 + axis], *index.shape, *bias.shape[2 + axis :])
    rank = len(q_grid)
    order = [0, *(1 + 2 * a for a in range(rank)), *(2 + 2 * a for a in range(rank))]
    return bias.permute(order).reshape(rpb.shape[0], math.prod(q_grid), math.prod(kv_grid))


def qk(query: Tensor, key: Tensor, window: Window, scale: float | None = None, rpb: Tensor | None = None) -> Tensor:
    """Logits `[B, X, Y, Z, H, slots]`; -inf in slots past a window's end."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    slots = _slots(query, key, window)
    logits = _dense_logits(query, key, scale)
    if rpb is not None:
        logits = logits + _dense_bias(rpb, query.shape[1:-2], key.shape[1:-2], window)
    index = slots.clamp(min=0).expand(*logits.shape[:2], *slots.shape)
    picked = logits.gather(-1, index).masked_fill(slots < 0, -torch.inf)
    return picked.transpose(1, 2).reshape(*query.shape[:-1], slots.shape[-1])


def _dense_weights(attn: Tensor, key_like: Tensor, window: Window) -> Tensor:
    """[B, H, queries, keys], zero outside the windows."""
    slots = _slots(attn, key_like, window)
    weights = attn.flatten(1, -3).transpose(1, 2)
    weights = torch.where(slots < 0, torch.zeros_like(weights), weights)
    dense = weights.new_zeros(*weights.shape[:3], math.prod(key_like.shape[1:-2]))
    return dense.scatter_add(-1, slots.clamp(min=0).expand(weights.shape), weights)


def av(attn: Tensor, value: Tensor, window: Window, scale: float = 1.0) -> Tensor:
    """Weighted sums of the windows' values, `[B, X, Y, Z, H, D]`."""
    values = value.flatten(1, -3).transpose(1, 2).repeat_interleave(attn.shape[-2] // value.shape[-2], 1)
    out = scale * (_dense_weights(attn, value, window) @ values)
    return out.transpose(1, 2).reshape(*attn.shape[:-1], value.shape[-1])


def inverse_av(attn: Tensor, source: Tensor, key_like: Tensor, window: Window, scale: float = 1.0) -> Tensor:
    """What each key of `key_like`'s grid and heads receives, `[B, X', Y', Z', Hkv, D]`."""
    sources = source.flatten(1, -3).transpose(1, 2)
    received = scale * (_dense_weights(attn, key_like, window).transpose(-1, -2) @ sources)  # [B, H, keys, D]
    heads_kv = key_like.shape[-2]
    batch, heads, *rest = received.shape
    received = received.reshape(batch, heads_kv, heads // heads_kv, *rest).sum(2)
    return received.transpose(1, 2).reshape(*key_like.shape[:-1], source.shape[-1])


def rpb_gradient(grad_attn: Tensor, key_like: Tensor, window: Window) -> Tensor:
    """Sum of `grad_attn` over batch and queries at each relative position, `[H, 2 k - 1, ...]`."""
    shape = (grad_attn.shape[-2], *(2 * k - 1 for k in window.kernel_size))
    rpb = torch.zeros(shape, dtype=grad_attn.dtype, device=grad_attn.device, requires_grad=True)
    nothing = torch.zeros((*grad_attn.shape[:-1], 1), dtype=grad_attn.dtype, device=grad_attn.device)
    keys = torch.zeros((*key_like.shape[:-1], 1), dtype=grad_attn.dtype, device=grad_attn.device)
    with torch.enable_grad():
        logits = qk(nothing, keys, window, 0.0, rpb)
        (gradient,) = torch.autograd.grad((logits * grad_attn).sum(), rpb)
    return gradient
