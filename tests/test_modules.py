"""The layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import natten

MODULES: dict[int, Any] = {
    1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D, 3: natten.NeighborhoodAttention3D,
}  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_is_attention_between_projections(rank: int) -> None:
    layer = MODULES[rank](12, 3, kernel_size=3, stride=2, dilation=2, is_causal=True).double()
    x = torch.randn(2, *(8, 7, 6)[:rank], 12, dtype=torch.float64, requires_grad=True)
    query, key, value = (t.unflatten(-1, (3, 4)) for t in layer.qkv(x).chunk(3, -1))
    function = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
    expected = layer.proj(function(query, key, value, 3, 2, 2, True).flatten(-2))
    result = layer(x)
    torch.testing.assert_close(result, expected)
    parameters = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(result.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_derivatives_of_the_packed_projection() -> None:
    layer = natten.NeighborhoodAttention1D(4, 2, kernel_size=3, is_causal=True).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    layer = natten.NeighborhoodAttention1D(8, 2, 3)
    x = torch.randn(1, 6, 8, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        out = layer(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert x.grad is not None


def test_state_dict_names() -> None:
    layer = natten.NeighborhoodAttention2D(8, 2, 3)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    assert shapes == {"qkv.weight": (24, 8), "qkv.bias": (24,), "proj.weight": (8, 8), "proj.bias": (8,)}
    assert "qkv.bias" not in natten.NeighborhoodAttention2D(8, 2, 3, qkv_bias=False).state_dict()


def test_scale_zero_is_honoured() -> None:
    layer = natten.NeighborhoodAttention1D(4, 1, kernel_size=-1, qk_scale=0.0)
    x = torch.randn(1, 6, 4)
    value = layer.qkv(x)[..., 8:]
    torch.testing.assert_close(layer(x), layer.proj(value.mean(1, keepdim=True)).expand(1, 6, 4))


def test_dropout() -> None:
    layer = natten.NeighborhoodAttention1D(4, 1, 3, proj_drop=1.0)
    x = torch.randn(1, 6, 4)
    assert torch.equal(layer(x), torch.zeros(1, 6, 4))
    assert not torch.equal(layer.eval()(x), torch.zeros(1, 6, 4))


def test_repr_says_the_window() -> None:
    text = repr(nn.Sequential(natten.NeighborhoodAttention2D(8, 2, (3, 5), stride=2, is_causal=(True, False))))
    assert "kernel_size=(3, 5), stride=(2, 2), dilation=(1, 1), is_causal=(True, False)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 9}, "num_heads must divide embed_dim"),
        ({"num_heads": 0}, "num_heads must divide embed_dim"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be an int or 2 of them"),
        ({"stride": 4}, "stride must not exceed kernel_size"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natten.NeighborhoodAttention2D(**{"embed_dim": 8, "num_heads": 2, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 6, 6, 7)])
def test_wrong_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input must have 4 dimensions, the last of size embed_dim = 8"):
        natten.NeighborhoodAttention2D(8, 2, 3)(torch.zeros(shape))
