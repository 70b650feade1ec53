"""Computing in pieces, tile by tile and step by step, gives the rows of the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import AxisCase, Case, axis_cases
from torch import Tensor

import natten
from natten import _pieces
from natten.cache import KeyValueCache

WINDOW = ("kernel_size", "stride", "dilation", "is_causal")


@st.composite
def whole_grids(draw: st.DrawFn, causal_first: bool = False) -> Case:
    rank = draw(st.integers(1, 3))
    axes = [draw(axis_cases({1: 40, 2: 12, 3: 7}[rank], pieces=False)) for _ in range(rank)]
    if causal_first:
        axes[0] = replace(axes[0], is_causal=True)
    return Case(tuple(axes), batch=2, heads=2, heads_kv=draw(st.sampled_from((1, 2))), head_dim=4, head_dim_v=3)


def whole(case: Case) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor], Tensor]:
    window = {name: case.window_arguments[name] for name in WINDOW}
    inputs = case.tensors()
    tensors = (inputs.query.detach(), inputs.key.detach(), inputs.value.detach())
    out = natten.neighborhood_attention_generic(*tensors, **window)
    assert isinstance(out, Tensor)
    return window, tensors, out


@settings(max_examples=80)
@given(case=whole_grids(), data=st.data())
def test_tiled_equals_whole(case: Case, data: st.DataObject) -> None:
    window, tensors, expected = whole(case)
    tile = [data.draw(st.integers(1, n + 2)) for n in case.q_grid]
    out = torch.full_like(expected, torch.nan)
    assert natten.tiled(*tensors, **window, tile_shape=tile, out=out) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_tiled_memory_is_what_the_largest_tile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        (AxisCase(5, 1, 2, False, 30, 0, 30, 0, 30), AxisCase(7, 1, 1, True, 20, 0, 20, 0, 20)), heads=4, heads_kv=2
    )
    window, (query, key, value), _ = whole(case)
    held = []
    original = _pieces.attend_piece

    def attend_piece(axes: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = original(axes, q, k, v, *rest, **arguments)
        held.append(sum(t.numel() * t.element_size() for t in (q, k, v, out, lse)))
        return out, lse

    monkeypatch.setattr("natten._tiled.attend_piece", attend_piece)
    natten.tiled(query, key, value, **window, tile_shape=(8, 9))
    stated = natten.tiled_memory_bytes(query.to("meta"), value.to("meta"), **window, tile_shape=(8, 9))
    assert max(held) == stated


def test_tiled_refuses_what_does_not_fit() -> None:
    x = torch.zeros(1, 8, 8, 1, 4)
    with pytest.raises(ValueError, match="tile_shape must be at least 1"):
        natten.tiled(x, x, x, 3, tile_shape=0)
    with pytest.raises(ValueError, match="tile_shape must be an int or 2"):
        natten.tiled(x, x, x, 3, tile_shape=(2, 2, 2))
    with pytest.raises(ValueError, match="out must have shape"):
        natten.tiled(x, x, x, 3, tile_shape=4, out=x[:, :4])
    with pytest.raises(ValueError, match="must share batch and grid"):
        natten.tiled(x, x[:, :4], x[:, :4], 3, tile_shape=4)


@settings(max_examples=80)
@given(case=whole_grids(causal_first=True), data=st.data())
def test_cached_steps_equal_whole(case: Case, data: st.DataObject) -> None:
    window, (query, key, value), expected = whole(case)
    axis = data.draw(st.sampled_from([a for a, c in enumerate(case.axes) if c.is_causal]))
    cache = KeyValueCache(case.q_grid, **window, axis=axis)
    length, done = case.q_grid[axis], 0
    while done < length:
        new = data.draw(st.integers(1, length - done))
        parts = [t.narrow(1 + axis, done, new) for t in (query, key, value)]
        out = cache.step(*parts)
        torch.testing.assert_close(out, expected.narrow(1 + axis, done, new), rtol=0, atol=1e-13)
        done += new
    assert cache.length == length


def test_cache_keeps_no_more_than_the_window() -> None:
    cache = KeyValueCache((1000,), kernel_size=10, dilation=3, is_causal=True)
    x = torch.randn(1, 1, 2, 4)
    for _ in range(500):
        cache.step(x, x, x)
    assert cache.kept <= 10 * 3
    assert cache._buffers()[0].shape[1] <= 2 * (10 * 3 + 1)
    cache.reset()
    assert cache.kept == cache.length == 0


def test_cache_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="is_causal must hold along axis 0"):
        KeyValueCache((8, 8), 3, is_causal=(False, True))
    with pytest.raises(ValueError, match="axis must be one of the 1 axes"):
        KeyValueCache((8,), 3, axis=1)
    cache = KeyValueCache((4, 8), 3, is_causal=(True, False))
    x = torch.zeros(1, 3, 8, 1, 4)
    cache.step(x, x, x)
    with pytest.raises(ValueError, match="got 3 after 3"):
        cache.step(x, x, x)
    with pytest.raises(ValueError, match="must have the extent 8 along axis 1"):
        cache.step(x[:, :1, :4], x[:, :1, :4], x[:, :1, :4])
    with pytest.raises(ValueError, match="must have query's new positions"):
        cache.step(x[:, :1], x[:, :2], x[:, :2])


@settings(max_examples=200)
@given(axis=axis_cases(40, pieces=False), data=st.data())
def test_needed_keys_and_split_by_brute_force(axis: AxisCase, data: st.DataObject) -> None:
    table = axis.window().members(0, axis.extent, axis.extent)
    (checked,) = _pieces.window_axes((axis.extent,), axis.kernel_size, axis.stride, axis.dilation, axis.is_causal)
    begin = data.draw(st.integers(0, axis.extent - 1))
    end = data.draw(st.integers(begin + 1, axis.extent))
    seen = table[begin:end].any(0).nonzero()
    assert _pieces.needed_keys(checked, (begin, end)) == (int(seen.min()), int(seen.max()) + 1)
    keys = (data.draw(st.integers(0, begin)), data.draw(st.integers(end, axis.extent)))
    inner, outer = _pieces.split_queries((checked,), ((begin, end),), (keys,))
    covered = sorted(i for ((a, b),) in ([inner] if inner else []) + outer for i in range(a, b))
    assert covered == list(range(begin, end))
    if inner:
        first, last = inner[0]
        outside = table[first:last].clone()
        outside[:, keys[0] : keys[1]] = False
        assert not outside.any()
