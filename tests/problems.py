"""Problems for tests, drawn from all that docs/semantics.md allows, with their oracle's results.

`cases()` is a hypothesis strategy; every kernel, device and operator is tested over it. `Case.tensors` makes fresh
random inputs, `Case.expected` what the float64 oracle says about them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from natten import reference

LAYOUTS = ("contiguous", "packed", "heads_first", "padded")


@dataclass(frozen=True)
class AxisCase:
    """One axis: its window, the queries and keys passed, and where they stand in the global grid."""

    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    extent: int
    q_start: int
    queries: int
    kv_start: int
    keys: int

    def window(self) -> reference.Window:
        """As a window of one axis."""
        one = ((self.kernel_size,), (self.stride,), (self.dilation,), (self.is_causal,))
        return reference.Window(*one, (self.q_start,), (self.kv_start,), (self.extent,))


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem; the additional ones may be absent."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None
    additional_values: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor

    def differentiable(self) -> list[Tensor]:
        """The inputs of attention that are there."""
        given = (self.query, self.key, self.value, self.additional_keys, self.additional_values)
        return [t for t in given if t is not None]


NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value", "grad_additional_keys", "grad_additional_values")


@dataclass(frozen=True)
class Case:
    """A problem: everything but numbers."""

    axes: tuple[AxisCase, ...]
    batch: int = 1
    heads: int = 1
    heads_kv: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    additional: int = 0
    scale: float | None = None
    layout: str = "contiguous"
    seed: int = 0

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.axes)

    @property
    def q_grid(self) -> tuple[int, ...]:
        """Queries per axis."""
        return tuple(axis.queries for axis in self.axes)

    @property
    def kv_grid(self) -> tuple[int, ...]:
        """Keys per axis."""
        return tuple(axis.keys for axis in self.axes)

    @property
    def window(self) -> reference.Window:
        """For the oracle."""
        names = ("kernel_size", "stride", "dilation", "is_causal", "q_start", "kv_start", "extent")
        return reference.Window(*(tuple(getattr(axis, name) for axis in self.axes) for name in names))

    @property
    def window_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the public functions."""
        w = self.window
        arguments: dict[str, Any] = {
            "kernel_size": w.kernel_size, "stride": w.stride, "dilation": w.dilation, "is_causal": w.is_causal,
        }  # fmt: skip
        is_local = not any(w.q_start) and not any(w.kv_start) and self.q_grid == self.kv_grid == tuple(w.extent)
        if not is_local:
            arguments.update(q_start=w.q_start, kv_start=w.kv_start, extent=w.extent)
        return arguments

    @property
    def packed_window(self) -> list[int]:
        """The `window` argument of the operators."""
        return [
            value
            for a in self.axes
            for value in (a.kernel_size, a.stride, a.dilation, int(a.is_causal), a.q_start, a.kv_start, a.extent)
        ]

    @property
    def effective_scale(self) -> float:
        """`scale`, or its default."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def slots(self) -> int:
        """Window slots of the unfused operators."""
        return math.prod(math.ceil(a.extent / a.dilation) if a.kernel_size == -1 else a.kernel_size for a in self.axes)

    @property
    def has_rpb(self) -> bool:
        """Whether positional bias is defined for it."""
        return all(a.stride == 1 and not a.is_causal and a.kernel_size != -1 for a in self.axes)

    def generator(self) -> torch.Generator:
        """The case's own random numbers."""
        return torch.Generator().manual_seed(self.seed)

    def tensors(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Inputs:
        """Fresh random inputs in the case's memory layout, all of them requiring gradients but those from outside."""
        generator = self.generator()

        def make(grid: Sequence[int], heads: int, channels: int, layout: str = self.layout) -> Tensor:
            numbers = torch.randn(self.batch, *grid, heads, channels, generator=generator, dtype=torch.float64)
            return laid_out(numbers.to(device=device, dtype=dtype), layout)

        query = make(self.q_grid, self.heads, self.head_dim)
        key = make(self.kv_grid, self.heads_kv, self.head_dim)
        value = make(self.kv_grid, self.heads_kv, self.head_dim_v)
        extra: list[Tensor | None] = [None, None]
        if self.additional:
            extra = [
                make((self.additional,), self.heads_kv, self.head_dim),
                make((self.additional,), self.heads_kv, self.head_dim_v),
            ]
        grad_out = make(self.q_grid, self.heads, self.head_dim_v)
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        grad_lse = make(self.q_grid, self.heads, 1, "contiguous")[..., 0].to(lse_dtype)
        inputs = Inputs(query, key, value, extra[0], extra[1], grad_out, grad_lse)
        for tensor in inputs.differentiable():
            tensor.requires_grad_()
        return inputs

    def differentiable_tensors(self) -> tuple[Tensor, ...]:
        """Query, key, value and the additional ones, in float64."""
        return tuple(self.tensors().differentiable())

    def expected(self, inputs: Inputs) -> list[tuple[str, Tensor, Tensor]]:
        """(name, oracle, magnitude) of out, lse and every gradient, in float64 from the inputs' numbers."""
        tensors = [t.detach().double().requires_grad_() for t in inputs.differentiable()]
        query, key, value, *extra = tensors
        grad_out, grad_lse = inputs.grad_out.double(), inputs.grad_lse.double()
        results = reference.attention(query, key, value, self.window, self.scale, *extra)
        grads = torch.autograd.grad(results, tensors, (grad_out, grad_lse))
        magnitudes = self._magnitudes([t.detach() for t in tensors], results[0].detach(), grad_out, grad_lse)
        return list(zip(NAMES, (*results, *grads), magnitudes, strict=False))

    def _magnitudes(self, tensors: list[Tensor], out: Tensor, grad_out: Tensor, grad_lse: Tensor) -> list[Tensor]:
        """What out, lse and the gradients would be if every term counted with its absolute value."""
        query, key, value, *extra = tensors
        mask = torch.ones(1, 1, dtype=torch.bool)
        for axis in self.axes:
            table = axis.window().members(0, axis.queries, axis.keys)
            mask = (mask[:, None, :, None] & table[None, :, None, :]).reshape(len(mask) * len(table), -1)
        mask = mask.to(query.device)
        group = self.heads // self.heads_kv

        def by_head(tensor: Tensor, repeats: int = 1) -> Tensor:  # [B, H, tokens, C]
            return tensor.flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, 1)

        keys, values = by_head(key, group), by_head(value, group)
        if extra:
            keys = torch.cat((keys, by_head(extra[0], group)), 2)
            values = torch.cat((values, by_head(extra[1], group)), 2)
            mask = torch.cat((mask, mask.new_ones(len(mask), self.additional)), 1)
        scale = abs(self.effective_scale)
        logits = self.effective_scale * (by_head(query) @ keys.transpose(-1, -2))
        weights = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1)
        g = by_head(grad_out).abs()
        outside = (g * (weights @ values.abs())).sum(-1, keepdim=True) + by_head(grad_lse.unsqueeze(-1)).abs()
        d_logits = weights * (g @ values.abs().transpose(-1, -2) + outside)

        def from_heads(tensor: Tensor, like: Tensor) -> Tensor:
            tensor = tensor.transpose(1, 2)
            if tensor.shape[2] != like.shape[-2]:
                tensor = tensor.unflatten(2, (like.shape[-2], group)).sum(3)
            return tensor.reshape(like.shape)

        grad_query = scale * (d_logits @ keys.abs())
        grad_keys = scale * (d_logits.transpose(-1, -2) @ by_head(query).abs())
        grad_values = weights.transpose(-1, -2) @ g
        tokens = math.prod(self.kv_grid)
        lse = scale * (weights * (by_head(query).abs() @ keys.abs().transpose(-1, -2))).sum(-1, keepdim=True) + 1
        magnitudes = [
            from_heads(weights @ values.abs(), out),
            from_heads(lse, query[..., :1]).squeeze(-1),
            from_heads(grad_query, query),
            from_heads(grad_keys[:, :, :tokens], key),
            from_heads(grad_values[:, :, :tokens], value),
        ]
        if extra:
            magnitudes.append(from_heads(grad_keys[:, :, tokens:], extra[0]))
            magnitudes.append(from_heads(grad_values[:, :, tokens:], extra[1]))
        return magnitudes


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, stored in another way; the channel stride is 1 in each."""
    if layout == "packed":  # one of three views of a packed projection
        storage = torch.full(
            (*tensor.shape[:-2], 3, *tensor.shape[-2:]), torch.nan, dtype=tensor.dtype, device=tensor.device
        )
        view = storage.select(-3, 1)
    elif layout == "heads_first":
        storage = torch.empty_like(tensor.movedim(-2, 1), memory_format=torch.contiguous_format)
        view = storage.movedim(1, -2)
    elif layout == "padded":  # NaN on every side of every axis
        storage = torch.full([n + 2 for n in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = storage[tuple(slice(1, n + 1) for n in tensor.shape)]
    else:
        return tensor.clone(memory_format=torch.contiguous_format)
    with torch.no_grad():
        view.copy_(tensor)
    return view.detach()


@st.composite
def axis_cases(draw: st.DrawFn, longest: int, pieces: bool) -> AxisCase:
    """One axis of up to `longest` tokens; a piece of a larger grid now and then."""
    extent = draw(st.integers(1, longest))
    dilation = draw(st.one_of(st.just(1), st.integers(1, extent)))
    kernel_size = draw(st.one_of(st.just(-1), st.integers(1, extent // dilation)))
    most = math.ceil(extent / dilation) if kernel_size == -1 else kernel_size
    stride = draw(st.one_of(st.just(1), st.just(most), st.integers(1, most)))
    whole = AxisCase(kernel_size, stride, dilation, draw(st.booleans()), extent, 0, extent, 0, extent)
    if not pieces or draw(st.booleans()):
        return whole
    q_start = draw(st.integers(0, extent - 1))
    queries = draw(st.integers(1, extent - q_start))
    needed = whole.window().members(0, extent, extent)[q_start : q_start + queries].any(0).nonzero()
    kv_start = draw(st.integers(0, int(needed.min())))
    kv_end = draw(st.integers(int(needed.max()) + 1, extent))
    causal = whole.is_causal
    return AxisCase(kernel_size, stride, dilation, causal, extent, q_start, queries, kv_start, kv_end - kv_start)


@st.composite
def cases(
    draw: st.DrawFn,
    ranks: Sequence[int] = (1, 2, 3),
    longest: Sequence[int] = (40, 12, 7),
    head_dims: Sequence[int] = (1, 3, 4, 8, 17),
    pieces: bool = True,
    additional: bool = True,
    layouts: Sequence[str] = LAYOUTS,
) -> Case:
    """Any legal problem; `longest` bounds the extents for rank 1, 2 and 3."""
    rank = draw(st.sampled_from(ranks))
    heads_kv = draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from(head_dims))
    return Case(
        axes=tuple(draw(axis_cases(longest[rank - 1], pieces)) for _ in range(rank)),
        batch=draw(st.integers(1, 2)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.one_of(st.just(head_dim), st.sampled_from(head_dims))),
        additional=draw(st.one_of(st.just(0), st.integers(1, 5))) if additional else 0,
        scale=draw(st.one_of(st.none(), st.sampled_from((0.0, 0.3, -0.5, 1.5)))),
        layout=draw(st.sampled_from(layouts)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
