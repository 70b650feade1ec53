"""Derivatives, to second order, and through the logsumexp."""

from __future__ import annotations

import pytest
import torch
from problems import AxisCase, Case
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import natten

FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
CASES = {
    "plain": Case((AxisCase(3, 1, 1, False, 5, 0, 5, 0, 5),), head_dim=2, head_dim_v=2),
    "grouped heads, strided, additional keys": Case(
        (AxisCase(3, 2, 1, False, 4, 0, 4, 0, 4), AxisCase(2, 1, 2, True, 4, 0, 4, 0, 4)),
        heads=2, heads_kv=1, head_dim=2, head_dim_v=1, additional=2,
    ),
    "piece of a volume": Case(
        (
            AxisCase(2, 1, 1, False, 4, 1, 2, 0, 3),
            AxisCase(-1, 1, 2, False, 3, 0, 3, 0, 3),
            AxisCase(2, 2, 1, True, 3, 0, 2, 0, 3),
        ),
        head_dim=1, head_dim_v=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["cpu", "cpu_naive"])
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, kernel: str) -> None:
    case = CASES[name]
    inputs = case.differentiable_tensors()

    def function(query: Tensor, key: Tensor, value: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = extra if extra else (None, None)
        return FUNCTIONS[case.rank](
            query, key, value, **case.window_arguments, additional_keys=keys, additional_values=values,
            return_lse=True, kernel=kernel,
        )  # fmt: skip

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kernel", ["cpu", "cpu_naive"])
@pytest.mark.parametrize("name", CASES)
def test_qk(name: str, kernel: str) -> None:
    case = CASES[name]
    query, key = case.differentiable_tensors()[:2]
    rpb = torch.randn(case.heads, *(2 * a.kernel_size - 1 for a in case.axes)).double() if case.has_rpb else None

    def function(query: Tensor, key: Tensor, *bias: Tensor) -> Tensor:
        logits = natten.na_qk(query, key, **case.window_arguments, rpb=bias[0] if bias else None, kernel=kernel)
        return logits.masked_fill(logits == -torch.inf, 0)

    inputs = (query, key) if rpb is None else (query, key, rpb.requires_grad_())
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_qk_third_order() -> None:
    case = CASES["plain"]
    query, key = case.differentiable_tensors()[:2]
    rpb = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)

    def gradient(query: Tensor, key: Tensor, rpb: Tensor) -> tuple[Tensor, ...]:
        logits = natten.na_qk(query, key, 3, rpb=rpb, kernel=None)
        return torch.autograd.grad((logits**3).sum(), (query, key, rpb), create_graph=True)

    assert gradgradcheck(gradient, (query, key, rpb), fast_mode=True)


@pytest.mark.parametrize("kernel", ["cpu", "cpu_naive"])
@pytest.mark.parametrize("name", CASES)
def test_av(name: str, kernel: str) -> None:
    case = CASES[name]
    query, _, value = case.differentiable_tensors()[:3]
    weights = torch.randn(*query.shape[:-1], case.slots, dtype=torch.float64, requires_grad=True)

    def function(weights: Tensor, value: Tensor) -> Tensor:
        return natten.na_av(weights, value, **case.window_arguments, kernel=kernel)

    assert gradcheck(function, (weights, value))
    assert gradgradcheck(function, (weights, value), fast_mode=True)


def test_softmax_between_causal_operators_has_no_nan() -> None:
    case = Case((AxisCase(4, 1, 1, True, 6, 0, 6, 0, 6),))
    query, key, value = case.differentiable_tensors()[:3]
    weights = natten.na_qk(query, key, 4, is_causal=True).softmax(-1)
    out = natten.na_av(weights, value, 4, is_causal=True)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (query, key, value))
    assert not any(g.isnan().any() for g in (*grads, *second))


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_only_what_is_asked_for(which: str) -> None:
    case = CASES["plain"]
    inputs = dict(zip(("query", "key", "value"), case.differentiable_tensors(), strict=False))
    expected = torch.autograd.grad(natten.na1d(**inputs, kernel_size=3).square().sum(), inputs[which])[0]
    alone = {name: t if name == which else t.detach() for name, t in inputs.items()}
    result = torch.autograd.grad(natten.na1d(**alone, kernel_size=3).square().sum(), inputs[which])[0]
    assert torch.equal(result, expected)


def test_logsumexp_alone() -> None:
    case = CASES["plain"]
    query, key, value = case.differentiable_tensors()
    _, lse = natten.na1d(query, key, value, 3, return_lse=True)
    grad_query, grad_value = torch.autograd.grad(lse.square().sum(), (query, value))
    assert grad_query.norm() > 0.1
    assert torch.equal(grad_value, torch.zeros_like(value))


def test_expanded_gradient_from_outside() -> None:
    case = CASES["plain"]
    inputs = case.differentiable_tensors()
    out = natten.na1d(*inputs, kernel_size=3)
    dense = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), inputs), dense, strict=True):
        assert torch.equal(a, b)


def test_gradient_of_the_gradient_matches_the_unfused_operators() -> None:
    case = CASES["grouped heads, strided, additional keys"]
    inputs = case.differentiable_tensors()[:3]
    arguments = case.window_arguments

    def penalty(out: Tensor) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    fused = penalty(natten.na2d(*inputs, **arguments))
    weights = natten.na_qk(inputs[0], inputs[1], **arguments).softmax(-1)
    for a, b in zip(fused, penalty(natten.na_av(weights, inputs[2], **arguments)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
