"""Every CPU kernel against the oracle, over the whole space of problems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from problems import Case, cases
from tolerances import TOLERANCES, assert_close

import natten
from natten import reference

KERNELS = ("cpu", "cpu_naive")
FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


def check_attention(case: Case, kernel: str, dtype: torch.dtype) -> None:
    """Output, logsumexp and every gradient."""
    inputs = case.tensors(dtype)
    out, lse = FUNCTIONS[case.rank](
        inputs.query,
        inputs.key,
        inputs.value,
        **case.window_arguments,
        scale=case.scale,
        additional_keys=inputs.additional_keys,
        additional_values=inputs.additional_values,
        return_lse=True,
        kernel=kernel,
    )
    assert out.dtype == dtype
    grads = torch.autograd.grad((out, lse), inputs.differentiable(), (inputs.grad_out, inputs.grad_lse))
    tolerance = TOLERANCES[dtype]
    for (name, oracle, magnitude), result in zip(case.expected(inputs), (out, lse, *grads), strict=True):
        limit = tolerance.gradients if name.startswith("grad") else tolerance.outputs
        assert_close(name, result, oracle, magnitude, tolerance, limit)


def check_unfused(case: Case, kernel: str, dtype: torch.dtype) -> None:
    """qk, av and inverse_av (the gradient of av by its values), forwards."""
    inputs = case.tensors(dtype)
    query, key, value = (t.detach() for t in (inputs.query, inputs.key, inputs.value))
    generator = case.generator()
    rpb = None
    if case.has_rpb:
        shape = (case.heads, *(2 * a.kernel_size - 1 for a in case.axes))
        rpb = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(*query.shape[:-1], case.slots, generator=generator, dtype=torch.float64).to(dtype)
    source = inputs.grad_out
    wide = {"query": query, "key": key, "value": value, "weights": weights, "source": source}
    q, k, v, w, s = (tensor.double() for tensor in wide.values())
    bias = None if rpb is None else rpb.double()
    window, scale = case.window, case.effective_scale

    logits = natten.na_qk(query, key, **case.window_arguments, scale=case.scale, rpb=rpb, kernel=kernel)
    value = value.requires_grad_()
    out = natten.na_av(weights, value, **case.window_arguments, kernel=kernel)
    (received,) = torch.autograd.grad(out, value, source)
    absolute = None if bias is None else bias.abs()
    oracles = (
        (
            "qk",
            logits,
            reference.qk(q, k, window, scale, bias),
            reference.qk(q.abs(), k.abs(), window, abs(scale), absolute),
        ),
        ("av", out, reference.av(w, v, window), reference.av(w.abs(), v.abs(), window)),
        (
            "inverse_av",
            received,
            reference.inverse_av(w, s, v, window),
            reference.inverse_av(w.abs(), s.abs(), v, window),
        ),
    )
    tolerance = TOLERANCES[dtype]
    for name, result, oracle, magnitude in oracles:
        assert_close(name, result, oracle, magnitude, tolerance, tolerance.outputs)


@pytest.mark.parametrize("kernel", KERNELS)
@given(case=cases())
def test_attention_float64(kernel: str, case: Case) -> None:
    check_attention(case, kernel, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(case=cases())
def test_attention(kernel: str, dtype: torch.dtype, case: Case) -> None:
    check_attention(case, kernel, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(case=cases(additional=False))
def test_unfused(kernel: str, dtype: torch.dtype, case: Case) -> None:
    check_unfused(case, kernel, dtype)
