"""The definition of the window, consequence by consequence, on the oracle; and the package's own window arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from problems import AxisCase, Case, axis_cases, cases

from natten import reference
from natten._problem import Axis


def members(length: int, k: int, s: int = 1, d: int = 1, causal: bool = False) -> torch.Tensor:
    """[queries, keys] of one whole axis."""
    return AxisCase(k, s, d, causal, length, 0, length, 0, length).window().members(0, length, length)


def keys(length: int, query: int, k: int, s: int = 1, d: int = 1, causal: bool = False) -> list[int]:
    """Coordinates that a query attends."""
    return members(length, k, s, d, causal)[query].nonzero().flatten().tolist()


LEGAL = [
    (length, k, s, d)
    for length in (1, 2, 5, 8, 11)
    for d in range(1, length + 1)
    for k in range(1, length // d + 1)
    for s in range(1, k + 1)
]


@pytest.mark.parametrize(("length", "k", "s", "d"), LEGAL)
def test_window_keeps_its_size_at_borders(length: int, k: int, s: int, d: int) -> None:
    assert (members(length, k, s, d).sum(1) == k).all()


@pytest.mark.parametrize("r", [1, 2, 3])
def test_even_window_takes_one_key_more_before(r: int) -> None:
    assert keys(20, 10, 2 * r) == list(range(10 - r, 10 + r))


@pytest.mark.parametrize("r", [0, 1, 2, 3])
def test_odd_window_is_centred(r: int) -> None:
    assert keys(20, 10, 2 * r + 1) == list(range(10 - r, 10 + r + 1))


def test_window_shifts_inward() -> None:
    assert keys(10, 0, 5) == keys(10, 2, 5) == [0, 1, 2, 3, 4]
    assert keys(10, 9, 5) == keys(10, 7, 5) == [5, 6, 7, 8, 9]


def test_causal_window_shrinks_at_the_beginning() -> None:
    assert [len(keys(10, i, 4, causal=True)) for i in range(10)] == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]
    assert keys(10, 6, 4, causal=True) == [3, 4, 5, 6]


def test_causal_stride_group_shares_the_start_of_its_last_query() -> None:
    # Queries 4..7 form a group; its last query's window of 6 starts at 2.
    assert [keys(12, i, 6, s=4, causal=True) for i in range(4, 8)] == [list(range(2, i + 1)) for i in range(4, 8)]


def test_stride_group_shares_one_window() -> None:
    assert keys(12, 4, 5, s=3) == keys(12, 3, 5, s=3) == keys(12, 5, 5, s=3) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_stride_equal_to_kernel_size_is_blocked_attention(k: int) -> None:
    length = 3 * k
    blocks = torch.arange(length) // k
    assert torch.equal(members(length, k, s=k), blocks[:, None] == blocks[None, :])


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_dilation_is_attention_within_each_group(d: int) -> None:
    length = 17
    table = members(length, 3, d=d)
    for group in range(d):
        inside = table[group::d, group::d]
        assert torch.equal(inside, members(len(inside), 3))
        assert inside.sum() == table[group::d].sum(), "no key of another group"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_whole_axis(d: int, causal: bool) -> None:
    i, j = torch.meshgrid(torch.arange(11), torch.arange(11), indexing="ij")
    expected = (i % d == j % d) & ((j <= i) | (not causal))
    assert torch.equal(members(11, -1, d=d, causal=causal), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "k", "s", "d"), LEGAL)
def test_ends_are_monotone(length: int, k: int, s: int, d: int, causal: bool) -> None:
    window = AxisCase(k, s, d, causal, length, 0, length, 0, length).window()
    group, start, end = window.axis(0, length)
    for g in range(d):
        for ends in (start[group == g], end[group == g]):
            assert (ends.diff() >= 0).all()


def test_several_causal_axes_give_a_box() -> None:
    case = Case(axes=(AxisCase(3, 1, 1, True, 5, 0, 5, 0, 5),) * 2, head_dim=2, head_dim_v=1)
    query = torch.zeros(1, 5, 5, 1, 2, dtype=torch.float64)
    value = torch.arange(25.0, dtype=torch.float64).reshape(1, 5, 5, 1, 1)
    out, lse = reference.attention(query, query, value, case.window)
    # Query (3, 2) sees rows 1..3 and columns 0..2, not what precedes it in raster order.
    box = value[0, 1:4, 0:3, 0, 0]
    torch.testing.assert_close(out[0, 3, 2, 0, 0], box.mean())
    torch.testing.assert_close(lse[0, 3, 2, 0], torch.tensor(math.log(9), dtype=torch.float64))


@given(case=cases(pieces=False, layouts=("contiguous",)))
def test_piece_with_its_halo_gives_the_rows_of_the_whole(case: Case) -> None:
    whole = case.tensors()
    extra = [t for t in (whole.additional_keys, whole.additional_values) if t is not None]
    expected, expected_lse = reference.attention(whole.query, whole.key, whole.value, case.window, case.scale, *extra)
    cut_axes, q_slices, kv_slices = [], [slice(None)], [slice(None)]
    for axis in case.axes:
        first, count = axis.extent // 3, max(axis.extent // 2, 1)
        needed = axis.window().members(0, axis.extent, axis.extent)[first : first + count].any(0).nonzero()
        low, high = int(needed.min()), int(needed.max()) + 1
        q_slices.append(slice(first, first + count))
        kv_slices.append(slice(low, high))
        sizes = (first, count, low, high - low)
        cut_axes.append(AxisCase(axis.kernel_size, axis.stride, axis.dilation, axis.is_causal, axis.extent, *sizes))
    piece = Case(axes=tuple(cut_axes))
    q, kv = tuple(q_slices), tuple(kv_slices)
    out, lse = reference.attention(whole.query[q], whole.key[kv], whole.value[kv], piece.window, case.scale, *extra)
    torch.testing.assert_close(out, expected[q], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse[q], rtol=1e-12, atol=1e-12)


@given(case=cases(additional=False, layouts=("contiguous",)))
def test_unfused_with_softmax_between_is_attention(case: Case) -> None:
    inputs = case.tensors()
    expected, _ = reference.attention(inputs.query, inputs.key, inputs.value, case.window, case.scale)
    weights = reference.qk(inputs.query, inputs.key, case.window, case.scale).softmax(-1)
    torch.testing.assert_close(reference.av(weights, inputs.value, case.window), expected, rtol=1e-12, atol=1e-12)


def test_grouped_queries_read_their_key_head() -> None:
    case = Case(axes=(AxisCase(3, 1, 1, False, 7, 0, 7, 0, 7),), heads=6, heads_kv=2)
    inputs = case.tensors()
    out, _ = reference.attention(inputs.query, inputs.key, inputs.value, case.window)
    for head in range(6):
        one = [
            t[..., h : h + 1, :] for t, h in ((inputs.query, head), (inputs.key, head // 3), (inputs.value, head // 3))
        ]
        torch.testing.assert_close(out[..., head : head + 1, :], reference.attention(*one, case.window)[0])


def test_positional_bias_index() -> None:
    case = Case(axes=(AxisCase(3, 1, 2, False, 9, 0, 9, 0, 9), AxisCase(2, 1, 1, False, 4, 0, 4, 0, 4)))
    inputs = case.tensors()
    rpb = torch.randn(1, 5, 3, dtype=torch.float64)
    logits = reference.qk(inputs.query, inputs.key, case.window, 0.0, rpb)
    for (x, y), slot in itertools.product(itertools.product(range(9), range(4)), range(6)):
        position = []
        for axis, coordinate, offset in ((0, x, slot // 2), (1, y, slot % 2)):
            d, k = case.axes[axis].dilation, case.axes[axis].kernel_size
            _, start, _ = case.window.axis(axis, case.axes[axis].queries)
            position.append(int(start[coordinate]) + offset - coordinate // d + k - 1)
        torch.testing.assert_close(logits[0, x, y, 0, slot], rpb[0, position[0], position[1]])


@given(case=axis_cases(40, pieces=True))
def test_window_arithmetic_of_the_package(case: AxisCase) -> None:
    axis = Axis(
        case.kernel_size, case.stride, case.dilation, int(case.is_causal), case.q_start, case.kv_start, case.extent
    )
    window = case.window()
    group, start, end = window.axis(0, case.queries)
    for index, (g, first, last) in enumerate(zip(group.tolist(), start.tolist(), end.tolist(), strict=True)):
        assert axis.window(g, (case.q_start + index) // case.dilation) == (first, last)
    assert axis.pairs(case.queries) == int((end - start).sum())
    assert axis.missing_key(case.queries, case.keys) is None


@given(case=axis_cases(30, pieces=True))
def test_missing_keys_are_found(case: AxisCase) -> None:
    whole = AxisCase(
        case.kernel_size, case.stride, case.dilation, case.is_causal, case.extent, 0, case.extent, 0, case.extent
    )
    rows = whole.window().members(0, case.extent, case.extent)[case.q_start : case.q_start + case.queries]
    needed = rows.any(0).nonzero().flatten()
    for start, stop in ((int(needed.min()) + 1, case.extent), (0, int(needed.max()))):
        axis = Axis(case.kernel_size, case.stride, case.dilation, int(case.is_causal), case.q_start, start, case.extent)
        missing = axis.missing_key(case.queries, stop - start)
        assert missing is not None
        query, key = missing
        assert bool(rows[query - case.q_start, key])
        assert not start <= key < stop
