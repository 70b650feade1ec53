"""Fused attention below the public functions: one prepared call per kind of arguments, and its derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natten import _library, _unfused, context, dispatch
from natten._problem import DETERMINISTIC, Problem, attention_problem
from natten._settings import autocast, autocast_enabled, current_flags
from natten.dispatch import (
    FAMILIES,
    Kernel,
    Operation,
    choose,
    forced_kernel,
)
from natten.types import CausalFlag, Dimension

__all__ = ["attend", "attend_packed"]

_MAX_PREPARED = 4096


class Prepared:
    """A checked call with its kernels chosen: all that a repeated call needs."""

    __slots__ = (
        "aligned",
        "backward",
        "composite",
        "flags",
        "forced",
        "kernel",
        "lse_dtype",
        "plan",
        "positive_strides",
        "problem",
        "scale",
        "window",
    )

    def __init__(self, problem: Problem, forced: Kernel | None, requires_grad: bool) -> None:
        decision = choose(problem, Operation.forward, forced, requires_grad=requires_grad)
        self.problem = problem
        self.forced = forced
        self.kernel = int(decision.kernel)
        self.composite = decision.family.composite
        self.aligned = decision.family.aligned
        self.positive_strides = decision.family.positive_strides
        self.plan = list(decision.plan)
        self.window = problem.window
        self.scale = problem.scale
        self.flags = problem.flags
        self.lse_dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
        self.backward: tuple[Kernel, list[int], int, bool] | None = None

    def choose_backward(self) -> tuple[Kernel, list[int], int, bool]:
        """Kernel, plan and workspace bytes of the backward pass, and whether it needs aligned tensors.

        A kernel forced for the call is forced here too, where it has the backward pass; the others' results are
        interchangeable.
        """
        if self.backward is None:
            forced = dispatch.forced_backward(self.forced, self.problem)
            decision = choose(self.problem, Operation.backward, forced)
            family = decision.family
            self.backward = (decision.kernel, list(decision.plan), decision.workspace_bytes, family.aligned)
        return self.backward


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(-1), tensor.dtype, tensor.device


_prepared: dict[tuple[Any, ...], Prepared] = {}


def forget() -> None:
    """Kernels are chosen anew for repeated calls too."""
    dispatch.forget()
    _prepared.clear()


def attend(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag | None,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    q_start: Dimension | None,
    kv_start: Dimension | None,
    extent: Dimension | None,
    kernel: str | Kernel | None,
    backend: str | None,
    deterministic: bool = False,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Output and logsumexp of neighborhood attention, differentiable in both.

    `deterministic` adds to what torch's and natten's settings say: a traced call has recorded them. Without `with_lse`
    the logsumexp is left out where it costs something.
    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a torch.Tensor; got {type(query).__name__}")
    if autocast_enabled(query):
        query, key, value, additional_keys, additional_values = autocast(
            query, key, value, additional_keys, additional_values
        )
    try:
        requires_grad = torch.is_grad_enabled() and (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or (additional_keys is not None and additional_keys.requires_grad)
            or (additional_values is not None and additional_values.requires_grad)
        )
    except AttributeError:  # no tensor: the checks will name it
        requires_grad = False
    call = _prepare(
        rank,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        q_start,
        kv_start,
        extent,
        kernel,
        backend,
        current_flags(query.dtype, query.device) | (DETERMINISTIC if deterministic else 0),
        requires_grad,
    )
    if call.composite:
        tensors = (query, key, value, additional_keys, additional_values)
        return composite(call.problem, *tensors, Kernel(call.kernel), with_lse)
    if requires_grad:
        return _Attention.apply(  # type: ignore[no-untyped-call, no-any-return]
            call, query, key, value, additional_keys, additional_values
        )
    return fused_forward(call, query, key, value, additional_keys, additional_values)


def _prepare(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag | None,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    q_start: Dimension | None,
    kv_start: Dimension | None,
    extent: Dimension | None,
    kernel: str | Kernel | None,
    backend: str | None,
    flags: int,
    requires_grad: bool,
) -> Prepared:
    """The call, checked and its kernels chosen; remembered, so that a repeated call costs a lookup."""
    signature: tuple[Any, ...] | None
    try:
        signature = (
            rank,
            query.shape,
            key.shape,
            value.shape,
            query.stride(-1),
            key.stride(-1),
            value.stride(-1),
            query.dtype,
            key.dtype,
            value.dtype,
            query.device,
            key.device,
            value.device,
            kernel_size if type(kernel_size) is int else tuple(kernel_size),  # type: ignore[arg-type]
            stride if type(stride) is int else tuple(stride),  # type: ignore[arg-type]
            dilation if type(dilation) is int else tuple(dilation),  # type: ignore[arg-type]
            is_causal if type(is_causal) is bool else tuple(is_causal),  # type: ignore[arg-type]
            scale,
            kernel,
            backend,
            dispatch.forced_by_environment,
            requires_grad,
            flags,
            context._memory_usage,
            None if additional_keys is None else _signature(additional_keys),
            None if additional_values is None else _signature(additional_values),
            None
            if q_start is None and kv_start is None and extent is None
            else tuple(tuple(v) if type(v) is list else v for v in (q_start, kv_start, extent)),
        )
        call = _prepared.get(signature)
    except (TypeError, AttributeError):  # symbolic or unhashable arguments, or wrong ones that the checks will name
        signature, call = None, None
    if call is None:
        _library.require_library()
        problem = attention_problem(
            rank,
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            additional_keys,
            additional_values,
            q_start,
            kv_start,
            extent,
            flags,
        )
        call = Prepared(problem, forced_kernel(kernel, backend, query.device), requires_grad)
        if signature is not None and not problem.is_symbolic:
            if len(_prepared) >= _MAX_PREPARED:
                _prepared.clear()
            _prepared[signature] = call
    return call


def composite(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel: Kernel | None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention as qk, softmax and av; stores the weights, and is differentiable to any order."""
    logits = _unfused.qk(problem, query, key, None, kernel)
    value_problem = problem.with_head_dim(problem.head_dim_v, scale=1.0)
    if additional_keys is None or additional_values is None:
        # The dtype is named, since autocast would otherwise make it float32.
        out = _unfused.av(value_problem, torch.softmax(logits, -1, dtype=logits.dtype), value, kernel)
        return out, _logsumexp(logits) if with_lse else None
    # [B, tokens, Hkv, heads of a group, D]
    grouped = query.reshape(
        problem.batch, problem.queries, problem.heads_kv, problem.heads // problem.heads_kv, problem.head_dim
    )
    extra = torch.einsum("bthgd,bshd->bthgs", grouped, additional_keys) * problem.scale
    logits = torch.cat((logits, extra.reshape(*query.shape[:-1], problem.additional)), -1)
    weights = torch.softmax(logits, -1, dtype=logits.dtype)
    out = _unfused.av(value_problem, weights[..., : problem.slots], value, kernel)
    extra_weights = weights[..., problem.slots :].reshape(extra.shape)
    extra_out = torch.einsum("bthgs,bshd->bthgd", extra_weights, additional_values)
    return out + extra_out.reshape(out.shape), _logsumexp(logits) if with_lse else None


def _logsumexp(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits if logits.dtype == torch.float64 else logits.float(), -1)


def fused_forward(
    call: Prepared,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = query.shape[:-1]
    out = query.new_empty((*rows, value.shape[-1]))
    lse = query.new_empty(rows, dtype=call.lse_dtype)
    if call.aligned:
        positive = call.positive_strides
        query = _unfused.aligned(query, positive)
        key = _unfused.aligned(key, positive)
        value = _unfused.aligned(value, positive)
        if additional_keys is not None and additional_values is not None:
            additional_keys = _unfused.aligned(additional_keys, positive)
            additional_values = _unfused.aligned(additional_values, positive)
    torch.ops.natten.na_forward.default(
        query,
        key,
        value,
        additional_keys,
        additional_values,
        out,
        lse,
        call.window,
        call.scale,
        call.kernel,
        call.flags,
        call.plan,
    )
    return out, lse


def fused_backward(
    call: Prepared,
    tensors: Sequence[Any],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grads: Sequence[Tensor | None],
) -> None:
    """Writes the gradients of query, key, value and the additional ones; `tensors` are these, out and logsumexp."""
    query, key, value, additional_keys, additional_values, out, lse = tensors
    kernel, plan, workspace_bytes, aligned = call.choose_backward()
    grad_out = torch.zeros_like(out) if grad_out is None else _unfused.rows(grad_out)
    if aligned:
        grad_out, query, key, value = (_unfused.prepared(t, kernel) for t in (grad_out, query, key, value))
        if additional_keys is not None:
            additional_keys = _unfused.prepared(additional_keys, kernel)
            additional_values = _unfused.prepared(additional_values, kernel)
    workspace = query.new_empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
    torch.ops.natten.na_backward.default(
        grad_out,
        None if grad_lse is None else grad_lse.to(lse.dtype),
        query,
        key,
        value,
        additional_keys,
        additional_values,
        out,
        lse,
        *grads,
        workspace,
        call.window,
        call.scale,
        int(kernel),
        call.flags,
        plan,
    )


class _Attention(torch.autograd.Function):
    # The context is filled in `forward`: a separate `setup_context` doubles the time of a small call.
    @staticmethod
    def forward(
        ctx: Any,
        call: Prepared,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = fused_forward(call, query, key, value, additional_keys, additional_values)
        ctx.call = call
        ctx.save_for_backward(query, key, value, additional_keys, additional_values, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        call: Prepared = ctx.call
        tensors = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            # Asked for a graph of this pass: fused kernels have none, the unfused operators do, to any order.
            return (None, *_backward_with_graph(call, tensors[:5], ctx.needs_input_grad[1:], grad_out, grad_lse))
        grads = [None if t is None else t.new_empty(t.shape) for t in tensors[:5]]
        fused_backward(call, tensors, grad_out, grad_lse, grads)
        return (None, *grads)


class _PackedAttention(torch.autograd.Function):
    """Attention of a packed projection [B, X, Y, Z, 3, H, D], whose gradient is written in place, not stacked."""

    @staticmethod
    def forward(ctx: Any, call: Prepared, packed: Tensor) -> Tensor:
        query, key, value = packed.unbind(-3)
        out, lse = fused_forward(call, query, key, value, None, None)
        ctx.call = call
        ctx.save_for_backward(packed, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        packed, out, lse = ctx.saved_tensors
        parts = (*packed.unbind(-3), None, None)
        if torch.is_grad_enabled():
            needed = (True, True, True, False, False)
            return None, torch.stack(_backward_with_graph(ctx.call, parts, needed, grad_out, None)[:3], -3)
        grad = packed.new_empty(packed.shape)
        fused_backward(ctx.call, (*parts, out, lse), grad_out, None, (*grad.unbind(-3), None, None))
        return None, grad


def attend_packed(
    rank: int,
    packed: Tensor,
    kernel_size: Dimension,
    stride: Dimension,
    dilation: Dimension,
    is_causal: CausalFlag,
    scale: float,
) -> Tensor:
    """Output of neighborhood attention of the packed query, key and value [B, X, Y, Z, 3, H, D]."""
    if autocast_enabled(packed):
        (packed,) = autocast(packed)
    query, key, value = packed.unbind(-3)
    requires_grad = torch.is_grad_enabled() and packed.requires_grad
    window = (kernel_size, stride, dilation, is_causal, scale, None, None, None, None, None)
    call = _prepare(
        rank, query, key, value, *window, None, None, current_flags(packed.dtype, packed.device), requires_grad
    )
    if call.composite:
        return composite(call.problem, query, key, value, None, None, Kernel(call.kernel), with_lse=False)[0]
    if requires_grad:
        return _PackedAttention.apply(call, packed)  # type: ignore[no-untyped-call, no-any-return]
    return fused_forward(call, query, key, value, None, None)[0]


def _backward_with_graph(
    call: Prepared,
    tensors: Sequence[Any],
    needed: Sequence[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> list[Any]:
    """Gradients that can be differentiated again, through the unfused operators."""
    kernel = call.forced if call.forced is not None and call.forced in _UNFUSED_KERNELS else None
    query, key, value, additional_keys, additional_values = tensors
    outputs = composite(call.problem, query, key, value, additional_keys, additional_values, kernel)
    pairs = [(o, g) for o, g in zip(outputs, (grad_out, grad_lse), strict=True) if o is not None and g is not None]
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if need else None for need in needed]


_UNFUSED_KERNELS = frozenset(kernel for kernel, family in FAMILIES.items() if Operation.qk in family.operations)
