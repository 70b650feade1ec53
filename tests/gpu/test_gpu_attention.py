"""Every kernel against the oracle: output, logsumexp and gradients, over the whole space and in directed cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import LONGEST, axis, check_attention, examples, head_dims, refusal
from hypothesis import given
from hypothesis import strategies as st
from ledger import Ledger
from problems import LAYOUTS, AxisCase, Case, cases

from natten.dispatch import FAMILIES, Kernel


def drawn(kernel: Kernel, dtype: torch.dtype, additional: bool = True) -> st.SearchStrategy[Case]:
    """Any problem that the kernel takes. Explicit scales are relative to the default one: logits of tens, as a scale of
    1.5 makes at head dim 128, would turn the rounding of any logit into a relative error of its weight.
    """
    positive = FAMILIES[kernel].scale_bounds is not None

    def relative(case: Case) -> Case:
        if case.scale is None or (positive and case.scale <= 0):
            return replace(case, scale=None)
        return replace(case, scale=case.scale * case.head_dim**-0.5)

    return cases(longest=LONGEST, head_dims=head_dims(kernel, dtype), additional=additional).map(relative)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
of_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def skip_unless(kernel: Kernel, case: Case | None, dtype: torch.dtype, device: torch.device) -> None:
    """Skips what the kernel states that it does not take."""
    if dtype not in FAMILIES[kernel].dtypes:
        pytest.skip(f"{kernel.name} does not take {dtype}")
    reason = None if case is None else refusal(kernel, case, dtype, device)
    if reason is not None:
        pytest.skip(reason)


@of_dtype
@examples(60)
@given(data=st.data())
def test_drawn_problems(
    ledger: Ledger, kernel: Kernel, device: torch.device, dtype: torch.dtype, data: st.DataObject
) -> None:
    skip_unless(kernel, None, dtype, device)
    case = data.draw(drawn(kernel, dtype))
    check_attention(ledger, case, kernel, dtype, device)


@examples(30)
@given(data=st.data())
def test_drawn_problems_with_tf32(ledger: Ledger, kernel: Kernel, device: torch.device, data: st.DataObject) -> None:
    skip_unless(kernel, None, torch.float32, device)
    case = data.draw(drawn(kernel, torch.float32))
    check_attention(ledger, case, kernel, torch.float32, device, allow_tf32=True)


DIRECTED = {
    "odd-1d": Case((axis(131, 7),), batch=2, heads=3, head_dim=32, head_dim_v=32),
    "odd-2d": Case((axis(37, 9), axis(29, 5)), batch=1, heads=2, head_dim=64, head_dim_v=64),
    "odd-3d": Case((axis(7, 3), axis(11, 5), axis(13, 7)), heads=2, head_dim=32, head_dim_v=32),
    "window-is-extent": Case((axis(40, 40), axis(10, 10)), heads=2, head_dim=64, head_dim_v=64),
    "window-is-one": Case((axis(100, 1), axis(3, 1)), heads=2, head_dim=16, head_dim_v=16),
    "whole-axis": Case((axis(9, -1), axis(21, 4), axis(5, -1)), heads=1, head_dim=32, head_dim_v=32),
    "even-windows": Case((axis(33, 8), axis(18, 6)), heads=1, head_dim=32, head_dim_v=32),
    "long-window": Case((axis(1500, 1024),), heads=1, head_dim=128, head_dim_v=128),
    "blocked": Case((axis(64, 8, 8), axis(32, 16, 16)), heads=1, head_dim=64, head_dim_v=64),
    "strided": Case((axis(50, 11, 4), axis(40, 9, 7)), heads=1, head_dim=64, head_dim_v=64),
    "ragged-groups": Case((axis(50, 6, 2, 7), axis(23, 3, 1, 6)), heads=2, head_dim=32, head_dim_v=32),
    "ragged-whole-groups": Case((axis(47, -1, 1, 9), axis(10, 2, 1, 4)), heads=1, head_dim=32, head_dim_v=32),
    "groups-of-one": Case((axis(97, 1, 1, 97), axis(8, 2, 1, 4)), heads=1, head_dim=16, head_dim_v=16),
    "causal-1d": Case((axis(513, 100, 1, 1, True),), heads=2, head_dim=64, head_dim_v=64),
    "causal-strided-dilated": Case((axis(200, 20, 7, 3, True),), heads=1, head_dim=32, head_dim_v=32),
    "causal-boxes": Case((axis(9, 5, 1, 1, True), axis(14, 9), axis(12, 12, 5, 1, True)), head_dim=32, head_dim_v=32),
    "causal-whole": Case((axis(300, -1, 1, 1, True),), heads=2, head_dim=128, head_dim_v=128),
    "piece": Case(
        (AxisCase(9, 1, 1, False, 200, 90, 37, 80, 70), AxisCase(5, 2, 3, False, 30, 4, 11, 0, 30)),
        heads=2,
        head_dim=64,
        head_dim_v=64,
    ),
    "decoding": Case((AxisCase(64, 1, 1, True, 500, 499, 1, 400, 100),), batch=3, heads=4, head_dim=64, head_dim_v=64),
    "grouped-heads": Case((axis(80, 15), axis(6, 3)), batch=2, heads=8, heads_kv=2, head_dim=64, head_dim_v=64),
    "one-key-head": Case((axis(130, 33),), batch=2, heads=6, heads_kv=1, head_dim=32, head_dim_v=32),
    "wider-values": Case((axis(90, 21),), heads=2, head_dim=64, head_dim_v=128),
    "narrower-values": Case((axis(90, 21),), heads=2, head_dim=128, head_dim_v=32),
    "one-additional-key": Case((axis(20, 5), axis(14, 7)), heads=2, head_dim=64, head_dim_v=64, additional=1),
    "text-tokens": Case((axis(150, 31),), batch=2, heads=4, heads_kv=2, head_dim=64, head_dim_v=64, additional=77),
    "more-additional-than-window": Case((axis(8, 3),), heads=1, head_dim=32, head_dim_v=32, additional=300),
    "no-scale": Case((axis(90, 9),), heads=1, head_dim=32, head_dim_v=32, scale=0.0),
    "negative-scale": Case((axis(90, 9),), heads=1, head_dim=32, head_dim_v=32, scale=-0.4),
    "no-batch": Case((axis(30, 5),), batch=0, heads=2, head_dim=32, head_dim_v=32),
    "many-batches": Case((axis(3, 3),), batch=70_000, heads=1, head_dim=32, head_dim_v=32),
    "many-heads": Case((axis(3, 2),), batch=1, heads=66_000, heads_kv=33_000, head_dim=32, head_dim_v=32),
}


@of_dtype
@pytest.mark.parametrize("name", DIRECTED)
def test_directed_problems(ledger: Ledger, kernel: Kernel, device: torch.device, dtype: torch.dtype, name: str) -> None:
    case = DIRECTED[name]
    skip_unless(kernel, case, dtype, device)
    check_attention(ledger, case, kernel, dtype, device)


@of_dtype
def test_every_head_dim(ledger: Ledger, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    skip_unless(kernel, None, dtype, device)
    for dim in head_dims(kernel, dtype):
        case = Case((axis(19, 7), axis(16, 5, 2)), heads=2, head_dim=dim, head_dim_v=dim)
        check_attention(ledger, case, kernel, dtype, device)


@of_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ledger: Ledger, kernel: Kernel, device: torch.device, dtype: torch.dtype, layout: str) -> None:
    skip_unless(kernel, None, dtype, device)
    for axes in ((axis(150, 21),), (axis(20, 5), axis(17, 3, 1, 2)), (axis(5, 3), axis(6, 3), axis(9, 4))):
        case = Case(axes, batch=2, heads=4, heads_kv=2, head_dim=32, head_dim_v=32, additional=3, layout=layout)
        check_attention(ledger, case, kernel, dtype, device)
