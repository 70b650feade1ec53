"""Floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

Counted are the matrix products of attended (query, key) pairs: two operations per pair and channel. Dense attention is
the special case of a window over everything, so figures agree with those of scaled_dot_product_attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from natten._problem import Axis

__all__: list[str] = []

Shape = Sequence[int]


def _pairs(queries: Shape, window: Sequence[int], additional: int = 0) -> int:
    """Attended pairs of a [B, X, Y, Z, H, C] grid of queries, over batch and heads."""
    axes = [Axis(*window[i : i + 7]) for i in range(0, len(window), 7)]
    grid = queries[1:-2]
    per_head = math.prod(axis.pairs(count) for axis, count in zip(axes, grid, strict=True))
    return queries[0] * queries[-2] * (per_head + math.prod(grid) * additional)


@register_flop_formula(torch.ops.natten.na_forward)
def _forward(
    query: Shape,
    key: Shape,
    value: Shape,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    out: Shape,
    logsumexp: Shape,
    window: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    pairs = _pairs(query, window, additional_keys[1] if additional_keys else 0)
    return 2 * pairs * (query[-1] + value[-1])


@register_flop_formula(torch.ops.natten.na_backward)
def _backward(
    grad_out: Shape,
    grad_logsumexp: Shape | None,
    query: Shape,
    key: Shape,
    value: Shape,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    out: Shape,
    logsumexp: Shape,
    grad_query: Shape,
    grad_key: Shape,
    grad_value: Shape,
    grad_additional_keys: Shape | None,
    grad_additional_values: Shape | None,
    workspace: Shape | None,
    window: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    # Logits again, dQ and dK over the head dim; dP and dV over the value head dim.
    pairs = _pairs(query, window, additional_keys[1] if additional_keys else 0)
    return 2 * pairs * (3 * query[-1] + 2 * value[-1])


@register_flop_formula(torch.ops.natten.na_qk)
def _qk(
    query: Shape, key: Shape, rpb: Shape | None, attention: Shape, window: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * _pairs(query, window) * query[-1]


@register_flop_formula(torch.ops.natten.na_av)
def _av(attention: Shape, value: Shape, out: Shape, window: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * _pairs(attention, window) * value[-1]


@register_flop_formula(torch.ops.natten.na_inverse_av)
def _inverse_av(attention: Shape, source: Shape, out: Shape, window: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * _pairs(attention, window) * source[-1]


@register_flop_formula(torch.ops.natten.na_rpb_backward)
def _rpb_backward(attention: Shape, grad_rpb: Shape, window: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _pairs(attention, window)  # one addition each
