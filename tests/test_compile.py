"""torch.compile and torch.export: whole graphs, static and dynamic, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import natten

Function = Callable[..., Tensor]


def window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return natten.na2d(query, key, value, (3, 5), stride=(1, 2), is_causal=(False, True)).cos()


def with_lse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, lse = natten.na2d(query, key, value, 3, dilation=2, return_lse=True)
    return out * lse.unsqueeze(-1)


def additional(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return natten.na2d(query, key, value, 3, additional_keys=key[:, 0, :3], additional_values=value[:, 0, :3])


def unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = natten.na_qk(query, key, 3, is_causal=(True, False)).softmax(-1)
    return natten.na_av(weights, value, 3, is_causal=(True, False))


def forced(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return natten.na2d(query, key, value, 3, kernel="cpu_naive")


def piece(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return natten.na2d(
        query[:, 2:4], key, value, 3, q_start=(2, 0), kv_start=0, extent=(query.shape[1], query.shape[2])
    )


def whole_axis(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return natten.na2d(query, key, value, (-1, 3))


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return natten.attention(query.flatten(1, 2), key.flatten(1, 2)[:, :20], value.flatten(1, 2)[:, :20], is_causal=True)


def merged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = [natten.na2d(query, key, value, k, return_lse=True) for k in (3, 5)]
    return natten.merge_attentions([p[0] for p in parts], [p[1] for p in parts])[0]


FUNCTIONS = (window, with_lse, additional, unfused, forced, piece, whole_axis, dense, merged)


def tensors(batch: int, x: int, y: int) -> list[Tensor]:
    """query, key and value; no two sizes are equal, lest symbols be shared."""
    return [torch.randn(batch, x, y, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def results(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """The output and every gradient."""
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def assert_same(compiled: Function, function: Function, inputs: list[Tensor]) -> None:
    """Output and gradients agree."""
    for a, b in zip(results(compiled, inputs), results(function, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class CountGraphs:
    """A backend that runs what AOTAutograd traces, and counts the graphs it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_static(function: Function) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = tensors(2, 8, 9)
    assert_same(compiled, function, inputs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dynamic_shapes_need_one_graph(function: Function) -> None:
    torch._dynamo.reset()
    backend = CountGraphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 8, 9), (3, 11, 10), (5, 13, 7)):
        assert_same(compiled, function, tensors(*shape))
    assert backend.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("function", [window, unfused])
def test_inductor(function: Function) -> None:
    torch._dynamo.reset()
    assert_same(torch.compile(function, fullgraph=True), function, tensors(2, 8, 9))


def test_wrong_arguments_raise_while_tracing() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: natten.na2d(*t, 9), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="must not exceed the extent 8 along axis 0; got 9"):
        compiled(*tensors(2, 8, 9))


def test_deterministic_setting_is_recorded() -> None:
    torch._dynamo.reset()
    seen: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(node.args[-1] for node in graph.graph.nodes if "na2d" in str(node.target))
        return graph

    compiled = torch.compile(window, fullgraph=True, backend=backend)
    inputs = tensors(2, 8, 9)
    compiled(*inputs)
    natten.use_deterministic_algorithms()
    try:
        compiled(*inputs)
    finally:
        natten.use_deterministic_algorithms(False)
    assert seen == [False, True]


def test_autocast_inside_a_graph() -> None:
    torch._dynamo.reset()

    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return natten.na1d(*inputs, 3)

    inputs = [torch.randn(2, 8, 2, 4) for _ in range(3)]
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, function(*inputs))


def test_module() -> None:
    torch._dynamo.reset()
    layer = natten.NeighborhoodAttention2D(8, 2, 3)
    x = torch.randn(2, 6, 7, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    layer = natten.NeighborhoodAttention2D(8, 2, 3, is_causal=(True, False))
    batch, rows = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("rows", min=3, max=64)
    exported = torch.export.export(
        layer, (torch.randn(2, 6, 7, 8),), dynamic_shapes={"x": {0: batch, 1: rows}}, strict=strict
    )
    assert "natten.na2d" in exported.graph_module.code
    for shape in ((2, 6, 7, 8), (5, 9, 7, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_callable_operators(rank: int) -> None:
    query, key, value = (torch.randn(2, *(6, 7, 5)[:rank], 2, 4, requires_grad=True) for _ in range(3))
    function = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
    operator = getattr(torch.ops.natten, f"na{rank}d")
    out = operator(query, key, value, [3] * rank, is_causal=[True] * rank)
    expected = function(query, key, value, 3, is_causal=True, return_lse=True)
    assert torch.equal(out, expected[0])
    assert out.requires_grad
    for a, b in zip(operator.with_lse(query, key, value, [3] * rank, is_causal=[True] * rank), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["na1d", "na1d.with_lse", "qk", "av"])
def test_opcheck_of_callable_operators(name: str) -> None:
    query, key, value = (torch.randn(2, 6, 2, 4, requires_grad=True) for _ in range(3))
    weights = torch.randn(2, 6, 2, 3, requires_grad=True)
    window = ([3], [1], [1], [False])
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.natten, base), overload or "default")
    first = {"qk": (query, key), "av": (weights, value)}.get(base, (query, key, value))
    torch.library.opcheck(operator, (*first, *window))
