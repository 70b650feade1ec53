"""Tensors of more than 2^31 elements: slices of the results against the same piece computed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import natten
from natten.dispatch import FAMILIES, Kernel

pytestmark = [pytest.mark.large, pytest.mark.slow]

ELEMENTS = 2**31 + 2**24


def half_of(kernel: Kernel, cuda: torch.device, tensors: int) -> torch.dtype:
    """float16, or a skip: where the kernel does not take it, or `tensors` of this size do not fit."""
    if torch.float16 not in FAMILIES[kernel].dtypes:
        pytest.skip(f"{kernel.name} does not take float16")
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(cuda)[0] < tensors * 2 * ELEMENTS:
        pytest.skip(f"needs {tensors * 2 * ELEMENTS / 2**30:.0f} GiB of free memory")
    return torch.float16


def attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, **window: Any) -> tuple[Tensor, Tensor]:
    result = natten.neighborhood_attention_generic(q, k, v, **window, return_lse=True, kernel=kernel)
    assert isinstance(result, tuple)
    return result


@pytest.mark.parametrize("where", ["tokens", "batch"])
def test_more_than_two_to_the_31_elements(kernel: Kernel, cuda: torch.device, where: str) -> None:
    """One long axis, and many batch items: forward and backward, judged by the last tokens, or items."""
    if FAMILIES[kernel].composite:
        pytest.skip("stores attention weights")
    dtype = half_of(kernel, cuda, 11)
    heads, dim, size, reach = 4, 128, 9, 64  # few heads: fused_sm80 counts rows of one batch item in 25 bits
    length = 4096 if where == "batch" else ELEMENTS // (heads * dim)
    batch = -(-ELEMENTS // (length * heads * dim))
    q, k, v, grad = (torch.randn(batch, length, heads, dim, dtype=dtype, device=cuda) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out, lse = attention(kernel, q, k, v, kernel_size=size)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    # The piece holds every query that sees one of its last `reach` keys, and all of their keys.
    piece = (slice(-1, None), slice(length - 2 * reach, None)) if where == "tokens" else (slice(-1, None),)
    start = length - 2 * reach if where == "tokens" else 0
    inner = (slice(None), slice(-reach, None))
    parts = [tensor.detach()[piece].clone().requires_grad_() for tensor in (q, k, v)]
    needed = size if where == "tokens" else 0  # the first queries of the piece lack keys: leave them out
    part_out, part_lse = attention(
        kernel,
        parts[0][:, needed:],
        parts[1],
        parts[2],
        kernel_size=size,
        q_start=start + needed,
        kv_start=start,
        extent=length,
    )
    part_grads = torch.autograd.grad(part_out, parts, grad[piece][:, needed:])
    for whole, part in zip((out, lse, *grads), (part_out, part_lse, *part_grads), strict=True):
        torch.testing.assert_close(whole[piece][inner], part[inner], atol=2e-3, rtol=2e-3)
