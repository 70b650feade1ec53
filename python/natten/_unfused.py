"""qk, av and inverse_av: three bilinear maps, each other's derivatives, and so differentiable to any order.

qk(query, key)       logits of every query against its window
av(weights, value)   weighted sum of the window's values
inverse_av(weights, input)   the transpose: what every key receives from the queries that see it
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import SymInt, Tensor

from natten import _library
from natten._problem import Problem, check_rpb, unfused_problem, valid_slots
from natten._settings import autocast, autocast_enabled, current_flags
from natten.dispatch import FAMILIES, Kernel, Operation, choose, forced_kernel
from natten.types import CausalFlag, Dimension

__all__ = ["av", "checked_av", "checked_qk", "inverse_av", "qk"]


def checked_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag | None,
    scale: float | None,
    rpb: Tensor | None,
    q_start: Dimension | None,
    kv_start: Dimension | None,
    extent: Dimension | None,
    kernel: str | Kernel | None,
) -> Tensor:
    """`natten.na_qk` below its docstring."""
    _library.require_library()
    if isinstance(query, Tensor) and autocast_enabled(query):
        query, key, rpb = autocast(query, key, rpb)
    window = (kernel_size, stride, dilation, is_causal, scale, q_start, kv_start, extent)
    problem = unfused_problem(query, "query", key, "key", False, *window)
    if rpb is not None:
        check_rpb(rpb, problem, query)
    problem = replace(problem, flags=current_flags(query.dtype, query.device))
    return qk(problem, query, key, rpb, forced_kernel(kernel, None, query.device))


def checked_av(
    attention: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag | None,
    q_start: Dimension | None,
    kv_start: Dimension | None,
    extent: Dimension | None,
    kernel: str | Kernel | None,
) -> Tensor:
    """`natten.na_av` below its docstring."""
    _library.require_library()
    if isinstance(attention, Tensor) and autocast_enabled(attention):
        attention, value = autocast(attention, value)
    window = (kernel_size, stride, dilation, is_causal, 1.0, q_start, kv_start, extent)
    problem = replace(
        unfused_problem(attention, "attn", value, "value", True, *window),
        flags=current_flags(attention.dtype, attention.device),
    )
    return av(problem, attention, value, forced_kernel(kernel, None, attention.device))


def rows(tensor: Tensor) -> Tensor:
    """`tensor` with channel stride 1, which gradients from outside need not have."""
    # Not contiguous(): it returns an empty tensor as it is, whatever its strides.
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


# Whether tensors of these strides, offsets and types must be copied, by what the kernel needs.
_copied: dict[tuple[Any, ...], bool] = {}
_MOST_LAYOUTS = 4096


def _must_copy(tensor: Tensor, positive_strides: bool) -> bool:
    elements = 16 // tensor.dtype.itemsize
    for offset in (*tensor.stride()[:-1], tensor.storage_offset()):
        remainder = offset % elements
        if isinstance(remainder, SymInt):
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            remainder = 0 if statically_known_true(remainder == 0) else 1
        if remainder:
            return True
    return positive_strides and any(isinstance(s, int) and s == 0 for s in tensor.stride())


def aligned(tensor: Tensor, positive_strides: bool) -> Tensor:
    """`tensor`, or a copy of it if its addresses or strides are not multiples of 16 bytes, or a stride must be positive
    and is not.
    """
    if tensor.stride(-1) != 1:
        return rows(tensor)
    try:
        layout = (tensor.stride(), tensor.storage_offset() % 16, tensor.dtype, positive_strides)
        copied = _copied.get(layout)
    except TypeError:  # symbols
        copied = _must_copy(tensor, positive_strides)
    if copied is None:
        if len(_copied) >= _MOST_LAYOUTS:
            _copied.clear()
        copied = _copied[layout] = _must_copy(tensor, positive_strides)
    return tensor.clone(memory_format=torch.contiguous_format) if copied else tensor


def prepared(tensor: Tensor, kernel: Kernel) -> Tensor:
    """`tensor`, or a copy of it where the kernel needs aligned rows and it has others."""
    family = FAMILIES[kernel]
    return aligned(tensor, family.positive_strides) if family.aligned else rows(tensor)


def _raw_qk(problem: Problem, query: Tensor, key: Tensor, rpb: Tensor | None, forced: Kernel | None) -> Tensor:
    kernel = choose(problem, Operation.qk, forced).kernel
    attention = query.new_empty((*query.shape[:-1], problem.slots))
    torch.ops.natten.na_qk.default(
        prepared(query, kernel),
        prepared(key, kernel),
        None if rpb is None else rpb.contiguous(),
        attention,
        problem.window,
        problem.scale,
        int(kernel),
        problem.flags,
        [],
    )
    return attention


def _raw_av(problem: Problem, attention: Tensor, value: Tensor, forced: Kernel | None) -> Tensor:
    kernel = choose(problem, Operation.av, forced).kernel
    out = attention.new_empty((*attention.shape[:-1], value.shape[-1]))
    torch.ops.natten.na_av.default(
        rows(attention),
        prepared(value, kernel),
        out,
        problem.window,
        problem.scale,
        int(kernel),
        problem.flags,
        [],
    )
    return out


def _raw_inverse_av(problem: Problem, attention: Tensor, source: Tensor, forced: Kernel | None) -> Tensor:
    kernel = choose(problem, Operation.inverse_av, forced).kernel
    out = source.new_empty((problem.batch, *problem.kv_grid, problem.heads_kv, source.shape[-1]))
    torch.ops.natten.na_inverse_av.default(
        rows(attention),
        prepared(source, kernel),
        out,
        problem.window,
        problem.scale,
        int(kernel),
        problem.flags,
        [],
    )
    return out


def _raw_rpb_gradient(problem: Problem, grad_attention: Tensor, forced: Kernel | None) -> Tensor:
    grad_rpb = grad_attention.new_empty((problem.heads, *(2 * axis.kernel_size - 1 for axis in problem.axes)))
    torch.ops.natten.na_rpb_backward.default(
        rows(grad_attention),
        grad_rpb,
        problem.window,
        int(choose(problem, Operation.rpb_backward, forced).kernel),
        problem.flags,
        [],
    )
    return grad_rpb


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def qk(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None = None,
    kernel: Kernel | None = None,
    *,
    fill_zero: bool = False,
) -> Tensor:
    """[B, X, Y, Z, H, slots]: scale * query . key (+ rpb); slots past a window's end hold -inf, or 0 if asked."""
    if _differentiable(query, key, rpb):
        attention: Tensor = _QK.apply(problem, query, key, rpb, kernel)  # type: ignore[no-untyped-call]
    else:
        attention = _raw_qk(problem, query, key, rpb, kernel)
    valid = valid_slots(problem) if fill_zero else None
    return attention if valid is None else attention.masked_fill(~valid, 0)


def av(problem: Problem, attention: Tensor, value: Tensor, kernel: Kernel | None = None) -> Tensor:
    """[B, X, Y, Z, H, D]: scale * the window's values, weighted."""
    if _differentiable(attention, value):
        return _AV.apply(problem, attention, value, kernel)  # type: ignore[no-untyped-call, no-any-return]
    return _raw_av(problem, attention, value, kernel)


def inverse_av(problem: Problem, attention: Tensor, source: Tensor, kernel: Kernel | None = None) -> Tensor:
    """[B, X', Y', Z', Hkv, D]: scale * the sum over the queries that see a key of their weight times `source`."""
    if _differentiable(attention, source):
        return _InverseAV.apply(problem, attention, source, kernel)  # type: ignore[no-untyped-call, no-any-return]
    return _raw_inverse_av(problem, attention, source, kernel)


def rpb_gradient(problem: Problem, grad_attention: Tensor) -> Tensor:
    """[H, 2 k - 1, ...]: the sum over batch and queries of `grad_attention` at each relative position."""
    if _differentiable(grad_attention):
        return _RpbGradient.apply(problem, grad_attention)  # type: ignore[no-untyped-call, no-any-return]
    return _raw_rpb_gradient(problem, grad_attention, None)


class _QK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, query: Tensor, key: Tensor, rpb: Tensor | None, kernel: Kernel | None
    ) -> Tensor:
        ctx.problem, ctx.kernel = problem, kernel
        ctx.save_for_backward(query, key)
        return _raw_qk(problem, query, key, rpb, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_query = av(ctx.problem, grad, key, ctx.kernel) if needs[1] else None
        grad_key = inverse_av(ctx.problem, grad, query, ctx.kernel) if needs[2] else None
        # The bias gradient is a reduction, not a product: a kernel forced for the products does not apply to it.
        grad_rpb = rpb_gradient(ctx.problem, grad) if needs[3] else None
        return None, grad_query, grad_key, grad_rpb, None


class _AV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, attention: Tensor, value: Tensor, kernel: Kernel | None) -> Tensor:
        ctx.problem, ctx.kernel = problem, kernel
        ctx.save_for_backward(attention, value)
        return _raw_av(problem, attention, value, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        attention, value = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_attention = qk(ctx.problem, grad, value, None, ctx.kernel, fill_zero=True) if needs[1] else None
        grad_value = inverse_av(ctx.problem, attention, grad, ctx.kernel) if needs[2] else None
        return None, grad_attention, grad_value, None


class _InverseAV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, attention: Tensor, source: Tensor, kernel: Kernel | None) -> Tensor:
        ctx.problem, ctx.kernel = problem, kernel
        ctx.save_for_backward(attention, source)
        return _raw_inverse_av(problem, attention, source, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        attention, source = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_attention = qk(ctx.problem, source, grad, None, ctx.kernel, fill_zero=True) if needs[1] else None
        grad_source = av(ctx.problem, attention, grad, ctx.kernel) if needs[2] else None
        return None, grad_attention, grad_source, None


class _RpbGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, grad_attention: Tensor) -> Tensor:
        ctx.problem = problem
        return _raw_rpb_gradient(problem, grad_attention, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Its transpose looks the bias up: qk of nothing, plus the bias.
        problem: Problem = replace(ctx.problem, scale=0.0, head_dim=8, head_dim_v=8)
        nothing = grad.new_zeros(8)
        query = nothing.expand(problem.batch, *problem.q_grid, problem.heads, 8)
        key = nothing.expand(problem.batch, *problem.kv_grid, problem.heads_kv, 8)
        return None, qk(problem, query, key, grad)
