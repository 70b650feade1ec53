"""Other ways to compute the same, or the dense, attention in torch: what the kernels are compared with.

Each peer is prepared outside the timed region: it gets its tokens in the layout and order it likes best, for free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from natten.bench.problems import BenchProblem
from natten.bench.windows import AxisWindows, axis_windows

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotSupported(Exception):
    """A contender cannot run a problem; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A callable and inputs for it, in its own layout."""

    attention: Attention
    query: Tensor
    key: Tensor
    value: Tensor


def random_inputs(
    problem: BenchProblem, layout: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, heads last, or ``[B, H, tokens, D]`` when ``layout`` is None."""

    def draw(heads: int, dim: int) -> Tensor:
        sizes = [heads, problem.tokens, dim] if layout is None else [*layout, heads, dim]
        return torch.randn([problem.batch, *sizes], dtype=dtype, device=device)

    return (
        draw(problem.heads, problem.head_dim),
        draw(problem.key_heads, problem.head_dim),
        draw(problem.key_heads, problem.value_dim),
    )


def dense(problem: BenchProblem, dtype: torch.dtype, device: torch.device, *, backend: SDPBackend) -> Contender:
    """Dense attention over the flattened tokens: more work, by the library's best kernels.

    A causal 1-D problem is dense causal attention; causal axes of higher ranks have no dense counterpart.
    """
    causal = problem.causal == (True,)
    grouped = problem.key_heads != problem.heads

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    return Contender(attention, *random_inputs(problem, None, dtype, device))


Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiled by torch for the shapes that it meets; its backward pass may be repeated on one graph.

    Earlier compiled functions are forgotten: torch counts new masks and shapes of one function as its recompilations,
    and refuses after a few. Graphs have no donated buffers, which could be used once; the setting stays, because it
    has to hold when the backward pass is compiled, which is at its first call.
    """
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    torch._dynamo.reset()
    return cast(Function, torch.compile(function, dynamic=False, fullgraph=True))


# Extents of the spatial tile that makes one block of 128 tokens, per rank.
_FLEX_TILE = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}


def flex_order(problem: BenchProblem) -> Tensor:
    """Raster index of each token in FlexAttention's best order: by dilation group, spatial tile, place in the tile."""
    coordinates = torch.meshgrid(*(torch.arange(extent) for extent in problem.shape), indexing="ij")
    order = torch.zeros(problem.shape, dtype=torch.int64)
    digits = []
    for coordinate, dilation in zip(coordinates, problem.dilation, strict=True):
        digits.append((coordinate % dilation, dilation))
    for place in ("tile", "inside"):
        for axis, (coordinate, dilation, extent) in enumerate(
            zip(coordinates, problem.dilation, problem.shape, strict=True)
        ):
            tile = _FLEX_TILE[problem.rank][axis]
            position = coordinate // dilation
            digits.append((position // tile, extent // tile + 1) if place == "tile" else (position % tile, tile))
    for digit, base in digits:
        order = order * base + digit
    return order.flatten().argsort()


def flex(problem: BenchProblem, dtype: torch.dtype, device: torch.device) -> Contender:
    """FlexAttention, compiled, tokens already ordered by spatial tile, its block mask made in advance."""
    from torch.nn.attention.flex_attention import flex_attention

    blocks = _block_mask(problem, device)
    grouped = problem.key_heads != problem.heads
    fused = compiled(flex_attention)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = fused(query, key, value, block_mask=blocks, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out

    return Contender(attention, *random_inputs(problem, None, dtype, device))


_block_masks: dict[tuple[Any, ...], Any] = {}  # the last one: both passes of a problem need it


def _block_mask(problem: BenchProblem, device: torch.device) -> Any:
    """The problem's windows, for tokens in `flex_order`."""
    from torch.nn.attention.flex_attention import create_block_mask

    window = (problem.shape, problem.kernel_size, problem.stride, problem.dilation, problem.causal, device)
    if window in _block_masks:
        return _block_masks[window]
    order = flex_order(problem).to(device)
    coordinates = torch.unravel_index(order, problem.shape)
    axes = [axis_windows(problem, axis, device) for axis in range(problem.rank)]
    group = [axis.group[c] for axis, c in zip(axes, coordinates, strict=True)]
    position = [axis.position[c] for axis, c in zip(axes, coordinates, strict=True)]
    begin = [axis.begin[c] for axis, c in zip(axes, coordinates, strict=True)]
    end = [axis.end[c] for axis, c in zip(axes, coordinates, strict=True)]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = query >= 0
        for a in range(problem.rank):
            place = position[a][key]
            inside = inside & (group[a][query] == group[a][key])
            inside = inside & (place >= begin[a][query]) & (place < end[a][query])
        return inside

    _block_masks.clear()
    _block_masks[window] = torch.compile(create_block_mask)(
        mask, None, None, problem.tokens, problem.tokens, device=device
    )
    return _block_masks[window]


def _gather_windows(tensor: Tensor, axes: list[AxisWindows]) -> Tensor:
    """``[B, X.., H, D]`` to ``[B, X.., k0, k1.., H, D]``: every token's window, by one indexing of all the axes."""
    rank = len(axes)
    index: list[Tensor | slice] = [slice(None)]
    for a, axis in enumerate(axes):
        length, slots = axis.keys.shape
        view = [1] * (2 * rank)
        view[a], view[rank + a] = length, slots
        index.append(axis.keys.view(view))
    return tensor[tuple(index)]


def unfold(problem: BenchProblem, dtype: torch.dtype, device: torch.device) -> Contender:
    """Plain torch: gather every window, multiply, softmax, multiply; compiled, so that the gathers may fuse."""
    axes = [axis_windows(problem, axis, device) for axis in range(problem.rank)]
    slots = prod(axis.keys.shape[1] for axis in axes)
    gathered_bytes = problem.batch * problem.tokens * slots * problem.heads * problem.head_dim * dtype.itemsize
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    if gathered_bytes > free_bytes // 8:
        raise NotSupported(f"the gathered windows would take {gathered_bytes / 2**30:.0f} GiB")
    rank = problem.rank
    outside = torch.zeros([1] * (2 * rank), dtype=torch.bool, device=device)
    for a, axis in enumerate(axes):
        view = [1] * (2 * rank)
        view[a], view[rank + a] = axis.valid.shape
        outside = outside | ~axis.valid.view(view)
    outside = outside.flatten(rank)[..., None]
    scale = problem.head_dim**-0.5
    group = problem.heads // problem.key_heads

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys = _gather_windows(key.repeat_interleave(group, -2), axes).flatten(rank + 1, 2 * rank)
        values = _gather_windows(value.repeat_interleave(group, -2), axes).flatten(rank + 1, 2 * rank)
        logits = (query.unsqueeze(rank + 1) * keys).sum(-1) * scale
        weights = logits.masked_fill(outside, float("-inf")).softmax(rank + 1)
        out: Tensor = (weights.unsqueeze(-1) * values).sum(rank + 1)
        return out

    return Contender(compiled(attention), *random_inputs(problem, problem.shape, dtype, device))
