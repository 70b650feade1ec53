"""Public functions of the package.

Names and keywords are those of the public NATTEN package, so that programs written for it run unchanged; `kernel`,
`q_start`, `kv_start` and `extent` are additions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol, cast, overload

import torch
from torch import Tensor

from natten import context
from natten._attention import attend
from natten._unfused import checked_av, checked_qk
from natten.dispatch import Kernel
from natten.types import CausalFlag, Dimension

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "na_av",
    "na_qk",
    "neighborhood_attention_generic",
]


def traced() -> bool:
    """Whether a graph is being captured from Python: then one composite operator of ours stands for the call."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def _list(value: Any, rank: int) -> list[Any]:
    """One value per axis, for the schema of the composite operators."""
    return [value] * rank if not isinstance(value, Sequence) else list(value)


def _check_hints(**shapes: Dimension | None) -> None:
    for name, shape in shapes.items():
        for size in () if shape is None else (shape if isinstance(shape, Sequence) else (shape,)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must hold positive ints; got {shape!r}")


def neighborhood_attention_generic(
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
    attention_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Dimension | None = None,
    kv_tile_shape: Dimension | None = None,
    backward_q_tile_shape: Dimension | None = None,
    backward_kv_tile_shape: Dimension | None = None,
    backward_kv_splits: Dimension | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    kernel: str | Kernel | None = None,
    q_start: Dimension | None = None,
    kv_start: Dimension | None = None,
    extent: Dimension | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention of the rank that `query` has: see `na1d`, `na2d` and `na3d`."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a torch.Tensor; got {type(query).__name__}")
    rank = query.dim() - 3
    if rank not in (1, 2, 3):
        raise ValueError(f"query must have 4, 5 or 6 dimensions; got shape {tuple(query.shape)}")
    if q_tile_shape or kv_tile_shape or backward_q_tile_shape or backward_kv_tile_shape or backward_kv_splits:
        _check_hints(
            q_tile_shape=q_tile_shape,
            kv_tile_shape=kv_tile_shape,
            backward_q_tile_shape=backward_q_tile_shape,
            backward_kv_tile_shape=backward_kv_tile_shape,
            backward_kv_splits=backward_kv_splits,
        )
    return _attention(
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
        return_lse,
    )


def _attention(
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
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if traced():
        operator = getattr(torch.ops.natten, f"na{rank}d").with_lse
        out, lse = operator(
            query,
            key,
            value,
            _list(kernel_size, rank),
            _list(stride, rank),
            _list(dilation, rank),
            _list(bool(is_causal) if is_causal is None else is_causal, rank),
            scale,
            additional_keys,
            additional_values,
            None if q_start is None else _list(q_start, rank),
            None if kv_start is None else _list(kv_start, rank),
            None if extent is None else _list(extent, rank),
            kernel.name if isinstance(kernel, Kernel) else kernel,
            backend,
            context.are_deterministic_algorithms_enabled(),
        )
    else:
        out, lse = attend(
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
            with_lse=return_lse,
        )
    return (out, cast(Tensor, lse)) if return_lse else out


class NeighborhoodAttention(Protocol):
    """Type of `na1d`, `na2d` and `na3d`."""

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Dimension,
        stride: Dimension = ...,
        dilation: Dimension = ...,
        is_causal: CausalFlag | None = ...,
        scale: float | None = ...,
        additional_keys: Tensor | None = ...,
        additional_values: Tensor | None = ...,
        attention_kwargs: Mapping[str, Any] | None = ...,
        backend: str | None = ...,
        q_tile_shape: Dimension | None = ...,
        kv_tile_shape: Dimension | None = ...,
        backward_q_tile_shape: Dimension | None = ...,
        backward_kv_tile_shape: Dimension | None = ...,
        backward_kv_splits: Dimension | None = ...,
        backward_use_pt_reduction: bool = ...,
        run_persistent_kernel: bool = ...,
        kernel_schedule: str | None = ...,
        torch_compile: bool = ...,
        return_lse: Literal[False] = ...,
        *,
        kernel: str | Kernel | None = ...,
        q_start: Dimension | None = ...,
        kv_start: Dimension | None = ...,
        extent: Dimension | None = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Dimension,
        stride: Dimension = ...,
        dilation: Dimension = ...,
        is_causal: CausalFlag | None = ...,
        scale: float | None = ...,
        additional_keys: Tensor | None = ...,
        additional_values: Tensor | None = ...,
        attention_kwargs: Mapping[str, Any] | None = ...,
        backend: str | None = ...,
        q_tile_shape: Dimension | None = ...,
        kv_tile_shape: Dimension | None = ...,
        backward_q_tile_shape: Dimension | None = ...,
        backward_kv_tile_shape: Dimension | None = ...,
        backward_kv_splits: Dimension | None = ...,
        backward_use_pt_reduction: bool = ...,
        run_persistent_kernel: bool = ...,
        kernel_schedule: str | None = ...,
        torch_compile: bool = ...,
        *,
        return_lse: Literal[True],
        kernel: str | Kernel | None = ...,
        q_start: Dimension | None = ...,
        kv_start: Dimension | None = ...,
        extent: Dimension | None = ...,
    ) -> tuple[Tensor, Tensor]: ...


_DOCUMENTATION = """{rank}-D neighborhood attention: each query attends the keys of a window around it.

    Source: Neighborhood Attention Transformer (CVPR 2023); dilation: Dilated Neighborhood Attention Transformer (2022);
    fused: Faster Neighborhood Attention (NeurIPS 2024); stride: Generalized Neighborhood Attention (2025). The exact
    definition of the window is in docs/semantics.md.

    Args:
        query: `[batch, {axes}, heads, head_dim]`; float64, float32, float16 or bfloat16. The last dimension has
            stride 1, the others any (views of a packed QKV tensor are read in place).
        key: `[batch, {axes}, heads_kv, head_dim]`; `heads_kv` divides `heads` (grouped-query attention).
        value: `[batch, {axes}, heads_kv, head_dim_v]`.
        kernel_size: window size in tokens, one int or one per axis; -1 is the whole axis. `kernel_size * dilation` must
            not exceed the axis. Even sizes reach one token further back than ahead.
        stride: queries per stride group, all of which share the window of the group's leader; `1 <= stride <=
            kernel_size`. `stride == kernel_size` is blocked attention.
        dilation: distance in tokens between the window's keys.
        is_causal: per axis, whether keys after the query are excluded.
        scale: factor of the logits; `head_dim ** -0.5` by default.
        additional_keys: `[batch, tokens, heads_kv, head_dim]`, attended by every query besides its window, in one
            softmax with it.
        additional_values: `[batch, tokens, heads_kv, head_dim_v]`.
        attention_kwargs: accepted for compatibility; additional keys need no second operator here.
        backend: kernel by its name in the public NATTEN package: "cutlass-fna" (`fused_sm80`), "hopper-fna"
            (`fused_sm90`), "flex-fna" (the dispatcher's choice), "reference" (the naive kernel of the device).
        q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape, backward_kv_splits: accepted for
            compatibility and checked to be positive ints; kernels plan their tiles themselves.
        backward_use_pt_reduction, run_persistent_kernel, kernel_schedule, torch_compile: accepted for compatibility.
        return_lse: also return the logsumexp.
        kernel: forces a kernel: "cpu_naive", "cpu", "naive", "gemm", "fused_sm80" or "fused_sm90". The environment
            variable NATTEN_KERNEL, read at import, forces one for every call. `natten.explain` shows the candidates.
        q_start, kv_start: global coordinate of the first query and key, one int or one per axis (default 0).
        extent: global extent of the grid that windows are defined on (default: where the keys end). With these three a
            piece of a larger grid, passed with the keys around it, gives exactly the rows of the whole problem.

    Returns:
        `[batch, {axes}, heads, head_dim_v]` in query's dtype; with `return_lse` also the logsumexp of the logits,
        natural logarithm, `[batch, {axes}, heads]`, float32 (float64 for float64). Both are differentiable, to any
        order: differentiating a gradient again goes through the unfused operators, which store the attention weights.

    Raises:
        ValueError: an argument breaks a rule above (the message names argument, axis, value and rule), a window needs
            a key that was not passed, or the forced kernel cannot run the call.
        TypeError: an argument has the wrong type.
        RuntimeError: no kernel of this build can run the call.
    """


def _of_rank(rank: int) -> NeighborhoodAttention:
    def function(query: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(query, Tensor) and query.dim() != rank + 3:
            raise ValueError(
                f"query must have {rank + 3} dimensions for na{rank}d, [batch, {axes}, heads, head_dim]; got shape "
                f"{tuple(query.shape)}"
            )
        return neighborhood_attention_generic(query, *args, **kwargs)

    axes = ", ".join("XYZ"[:rank])
    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__module__ = __name__
    function.__doc__ = _DOCUMENTATION.format(rank=rank, axes=axes)
    function.__signature__ = inspect.signature(neighborhood_attention_generic)  # type: ignore[attr-defined]
    return cast(NeighborhoodAttention, function)


na1d = _of_rank(1)
na2d = _of_rank(2)
na3d = _of_rank(3)


def na_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    *,
    kernel: str | Kernel | None = None,
    q_start: Dimension | None = None,
    kv_start: Dimension | None = None,
    extent: Dimension | None = None,
) -> Tensor:
    """Attention logits of every query against its window, for ranks 1 to 3.

    Args:
        query: `[batch, X, Y, Z, heads, head_dim]` (fewer axes for lower ranks).
        key: `[batch, X, Y, Z, heads_kv, head_dim]`.
        rpb: relative positional bias `[heads, 2 * kernel_size - 1, ...]` in query's dtype, added to the logit of query
            position p and key position t at index `t - p + kernel_size - 1` per axis. Not with causal axes, stride > 1
            or kernel_size -1.

    The other arguments are those of `na2d`.

    Returns:
        `[batch, X, Y, Z, heads, slots]`: `scale * query . key + rpb`, row-major over the window's offsets. Slots past
        the end of a shorter window (causal axes; kernel_size -1 over dilation groups of unequal length) hold -inf.
        Differentiable to any order.

    Raises: as `na2d`.
    """
    if traced():
        rank = query.dim() - 3
        return cast(
            Tensor,
            torch.ops.natten.qk.default(
                query,
                key,
                _list(kernel_size, rank),
                _list(stride, rank),
                _list(dilation, rank),
                _list(bool(is_causal) if is_causal is None else is_causal, rank),
                scale,
                rpb,
                None if q_start is None else _list(q_start, rank),
                None if kv_start is None else _list(kv_start, rank),
                None if extent is None else _list(extent, rank),
                kernel.name if isinstance(kernel, Kernel) else kernel,
            ),
        )
    return checked_qk(
        query, key, kernel_size, stride, dilation, is_causal, scale, rpb, q_start, kv_start, extent, kernel
    )


def na_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    *,
    kernel: str | Kernel | None = None,
    q_start: Dimension | None = None,
    kv_start: Dimension | None = None,
    extent: Dimension | None = None,
) -> Tensor:
    """Sums of the windows' values with the given weights, for ranks 1 to 3.

    Args:
        attn: `[batch, X, Y, Z, heads, slots]` weights, as `na_qk` arranges logits; they need not be a softmax.
            Slots past the end of a shorter window are ignored.
        value: `[batch, X, Y, Z, heads_kv, head_dim]`.

    The other arguments are those of `na2d`.

    Returns:
        `[batch, X, Y, Z, heads, head_dim]`, differentiable to any order.

    Raises: as `na2d`.
    """
    if traced():
        rank = attn.dim() - 3
        return cast(
            Tensor,
            torch.ops.natten.av.default(
                attn,
                value,
                _list(kernel_size, rank),
                _list(stride, rank),
                _list(dilation, rank),
                _list(bool(is_causal) if is_causal is None else is_causal, rank),
                None if q_start is None else _list(q_start, rank),
                None if kv_start is None else _list(kv_start, rank),
                None if extent is None else _list(extent, rank),
                kernel.name if isinstance(kernel, Kernel) else kernel,
            ),
        )
    return checked_av(attn, value, kernel_size, stride, dilation, is_causal, q_start, kv_start, extent, kernel)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    kernel: str | Kernel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to every key, through the kernels of `na1d`.

    Args:
        query: `[batch, tokens, heads, head_dim]`.
        key: `[batch, tokens_kv, heads_kv, head_dim]`; `heads_kv` divides `heads`.
        value: `[batch, tokens_kv, heads_kv, head_dim_v]`.
        is_causal: query i attends keys 0..i (the mask's corner is top left).
        scale: factor of the logits; `head_dim ** -0.5` by default.
        seqlens_Q, seqlens_KV: int tensors `[sequences]`: sequences of these lengths are packed along the token
            dimension of a batch of 1. One call per sequence: lengths are read on the host, which waits for the device.
        cumulative_seqlen_Q, cumulative_seqlen_KV: int tensors `[sequences + 1]`, the same lengths, summed from 0.
        max_seqlen_Q, max_seqlen_KV: accepted for compatibility.
        q_tile_size, kv_tile_size, backward_q_tile_size, backward_kv_tile_size, backward_kv_splits: accepted for
            compatibility and checked to be positive; kernels plan their tiles themselves.
        backend, kernel, return_lse and the other arguments: as in `na1d` ("cutlass-fmha", "hopper-fmha", "flex-fmha").

    Returns:
        `[batch, tokens, heads, head_dim_v]`; with `return_lse` also the logsumexp `[batch, tokens, heads]`.

    Raises: as `na1d`.
    """
    _check_hints(
        q_tile_size=q_tile_size,
        kv_tile_size=kv_tile_size,
        backward_q_tile_size=backward_q_tile_size,
        backward_kv_tile_size=backward_kv_tile_size,
        backward_kv_splits=backward_kv_splits,
    )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, [batch, tokens, heads, dim]; got {tuple(tensor.shape)}")
        if tensor.shape[1] < 1:
            raise ValueError(f"{name} must hold at least one token; got shape {tuple(tensor.shape)}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool; got {is_causal!r}")
    bounds = _sequence_bounds(query, key, seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV)
    if bounds is None:
        out, lse = _dense(query, key, value, is_causal, scale, kernel, backend)
    else:
        parts = [
            _dense(query[:, a:b], key[:, c:d], value[:, c:d], is_causal, scale, kernel, backend)
            for (a, b), (c, d) in bounds
            if a < b
        ]
        out, lse = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _sequence_bounds(
    query: Tensor,
    key: Tensor,
    lengths_q: Tensor | None,
    lengths_kv: Tensor | None,
    cumulative_q: Tensor | None,
    cumulative_kv: Tensor | None,
) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """First and last token of every packed sequence in query and key; None where nothing is packed."""
    if (lengths_q is None) != (lengths_kv is None):
        raise ValueError("seqlens_Q and seqlens_KV must be given together")
    if (cumulative_q is None) != (cumulative_kv is None):
        raise ValueError("cumulative_seqlen_Q and cumulative_seqlen_KV must be given together")
    if lengths_q is None and cumulative_q is None:
        return None
    if lengths_q is not None and cumulative_q is not None:
        raise ValueError("seqlens_Q, seqlens_KV and cumulative_seqlen_Q, cumulative_seqlen_KV exclude each other")
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch size of 1; got {query.shape[0]}")
    result = []
    for suffix, lengths, cumulative, tokens in (
        ("Q", lengths_q, cumulative_q, query.shape[1]),
        ("KV", lengths_kv, cumulative_kv, key.shape[1]),
    ):
        given = lengths if cumulative is None else cumulative
        name = f"seqlens_{suffix}" if cumulative is None else f"cumulative_seqlen_{suffix}"
        assert given is not None
        if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(f"{name} must be a 1-D tensor of ints; got {given.dtype} of shape {tuple(given.shape)}")
        values = given.tolist()
        ends = values if cumulative is not None else [0, *(sum(values[: i + 1]) for i in range(len(values)))]
        if not ends or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
            raise ValueError(f"{name} must divide the {tokens} tokens into sequences; got {values}")
        result.append(list(pairwise(ends)))
    if len(result[0]) != len(result[1]):
        raise ValueError(f"query and key must hold as many sequences; got {len(result[0])} and {len(result[1])}")
    for (a, b), (c, d) in zip(*result, strict=True):
        if a < b and c == d:
            raise ValueError("every sequence with queries must have keys; found one without")
    return list(zip(*result, strict=True))


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    kernel: str | Kernel | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key, as neighborhood attention over the whole axis of keys.

    A query's place on that axis matters to causal attention only, so queries beyond the last key are given places of
    their own: as further rows of a grid whose every row holds all keys (a view, nothing is repeated).
    """
    tokens, tokens_kv = query.shape[1], key.shape[1]

    def call(q: Tensor, k: Tensor, v: Tensor, size: tuple[int, ...], extent: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        causal = (False,) * (len(size) - 1) + (is_causal and len(size) == 1,)
        start = (0,) * len(size)
        out, lse = _attention(
            len(size), q, k, v, size, 1, 1, causal, scale, None, None, start, start, extent, kernel, backend, True
        )
        return cast(Tensor, out), lse

    if tokens <= tokens_kv:
        return call(query, key, value, (-1,), (tokens_kv,))
    if is_causal:
        early = _dense(query[:, :tokens_kv], key, value, True, scale, kernel, backend)
        late = _dense(query[:, tokens_kv:], key, value, False, scale, kernel, backend)
        return torch.cat((early[0], late[0]), 1), torch.cat((early[1], late[1]), 1)
    rows = tokens // tokens_kv
    whole = rows * tokens_kv
    out, lse = call(
        query[:, :whole].reshape(query.shape[0], rows, tokens_kv, *query.shape[2:]),
        key.unsqueeze(1).expand(-1, rows, -1, -1, -1),
        value.unsqueeze(1).expand(-1, rows, -1, -1, -1),
        (1, -1),
        (rows, tokens_kv),
    )
    out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    if whole == tokens:
        return out, lse
    rest = call(query[:, whole:], key, value, (-1,), (tokens_kv,))
    return torch.cat((out, rest[0]), 1), torch.cat((lse, rest[1]), 1)


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = False,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merges attentions of the same queries to disjoint sets of keys into the attention to their union.

    Args:
        outputs: two or more tensors `[batch, ..., heads, head_dim]` of one shape and dtype.
        lse_tensors: their logsumexps `[batch, ..., heads]`.
        torch_compile: run the arithmetic through `torch.compile`.
        use_autograd_fix: accepted for compatibility; gradients flow through outputs and logsumexps.

    Returns:
        Output in the dtype of `outputs[0]`, logsumexp in float32 (float64 where an input is).

    Raises: `ValueError` where numbers or shapes do not match.
    """
    if len(outputs) < 2:
        raise ValueError(f"outputs must hold at least two tensors; got {len(outputs)}")
    if len(outputs) != len(lse_tensors):
        raise ValueError(f"lse_tensors must hold one tensor per output, {len(outputs)}; got {len(lse_tensors)}")
    for index, (output, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if output.shape != outputs[0].shape or output.dtype != outputs[0].dtype:
            raise ValueError(
                f"outputs must agree in shape and dtype; got {tuple(outputs[0].shape)}, {outputs[0].dtype} and, at "
                f"index {index}, {tuple(output.shape)}, {output.dtype}"
            )
        if lse.shape != output.shape[:-1]:
            raise ValueError(
                f"lse_tensors[{index}] must have the shape of its output but for the last dimension, "
                f"{tuple(output.shape[:-1])}; got {tuple(lse.shape)}"
            )
    merge = _compiled_merge() if torch_compile else _merge
    return merge(list(outputs), list(lse_tensors))


def _merge(outputs: list[Tensor], lse_tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in (*outputs, *lse_tensors)) else torch.float32
    parts = torch.stack([lse.to(dtype) for lse in lse_tensors])
    lse = torch.logsumexp(parts, 0)
    # Where no part holds a key, every weight is zero rather than exp(-inf + inf).
    weights = torch.exp(parts - lse.masked_fill(lse == -torch.inf, 0))
    merged = weights[0].unsqueeze(-1) * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        merged = merged + weight.unsqueeze(-1) * output
    return merged.to(outputs[0].dtype), lse


@functools.cache
def _compiled_merge() -> Any:
    return torch.compile(_merge, fullgraph=True)
