"""The operators themselves: every element is written, nothing outside the problem is read, torch's contracts hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from problems import AxisCase, Case, Inputs, cases
from torch import Tensor

import natten
from natten.dispatch import Kernel

ops = torch.ops.natten
KERNELS = (Kernel.cpu, Kernel.cpu_naive)


def poisoned(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of NaN."""
    return torch.full(shape, torch.nan, dtype=dtype)


def run_forward(case: Case, inputs: Inputs, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """out and logsumexp, written into NaN."""
    rows = (case.batch, *case.q_grid, case.heads)
    out, lse = poisoned(*rows, case.head_dim_v), poisoned(*rows)
    tensors = [None if t is None else t.detach() for t in attention_inputs(inputs)]
    ops.na_forward(*tensors, out, lse, case.packed_window, case.effective_scale, int(kernel), 0, [])
    return out, lse


def attention_inputs(inputs: Inputs) -> list[Tensor | None]:
    """The five tensors of attention, in the operators' order."""
    return [inputs.query, inputs.key, inputs.value, inputs.additional_keys, inputs.additional_values]


def run_backward(case: Case, inputs: Inputs, out: Tensor, lse: Tensor, kernel: Kernel) -> list[Tensor | None]:
    """Every gradient, written into NaN."""
    tensors = [None if t is None else t.detach() for t in attention_inputs(inputs)]
    grads = [None if t is None else poisoned(*t.shape) for t in tensors]
    arguments: list[Any] = [inputs.grad_out, inputs.grad_lse, *tensors, out, lse, *grads, None]
    ops.na_backward(*arguments, case.packed_window, case.effective_scale, int(kernel), 0, [])
    return grads


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(case=cases())
def test_attention_writes_every_element(kernel: Kernel, case: Case) -> None:
    inputs = case.tensors()
    out, lse = run_forward(case, inputs, kernel)
    for result in (out, lse, *run_backward(case, inputs, out, lse, kernel)):
        assert result is None or not result.isnan().any()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(case=cases(additional=False))
def test_unfused_writes_every_element(kernel: Kernel, case: Case) -> None:
    inputs = case.tensors()
    query, key, value = (t.detach() for t in (inputs.query, inputs.key, inputs.value))
    rows = (case.batch, *case.q_grid, case.heads)
    window = case.packed_window
    logits = poisoned(*rows, case.slots)
    ops.na_qk(query, key, None, logits, window, 1.0, int(kernel), 0, [])
    assert not logits.isnan().any()
    out, received = poisoned(*rows, case.head_dim_v), poisoned(*value.shape)
    weights = torch.softmax(logits, -1)
    ops.na_av(weights, value, out, window, 1.0, int(kernel), 0, [])
    ops.na_inverse_av(weights, inputs.grad_out, received, window, 1.0, int(kernel), 0, [])
    assert not out.isnan().any()
    assert not received.isnan().any()
    if case.has_rpb:
        grad_rpb = poisoned(case.heads, *(2 * a.kernel_size - 1 for a in case.axes))
        ops.na_rpb_backward(logits, grad_rpb, window, int(Kernel.cpu_naive), 0, [])
        assert not grad_rpb.isnan().any()


def everything(case: Case, inputs: Inputs, kernel: Kernel) -> list[Tensor]:
    """out, lse and the gradients of query, key and value."""
    out, lse = run_forward(case, inputs, kernel)
    grads = run_backward(case, inputs, out, lse, kernel)[:3]
    return [out, lse, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("where", ["batch", "head", "group"])
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(case=cases(pieces=False, additional=False))
def test_nan_stays_in_its_batch_item_head_and_group(kernel: Kernel, where: str, case: Case) -> None:
    """What is poisoned elsewhere changes not a bit of the rest: the same numbers with and without it."""
    case = Case(case.axes, 2, 2, 2, case.head_dim, case.head_dim_v, 0, case.scale, case.layout, case.seed)
    dilation = case.axes[-1].dilation
    index: tuple[Any, ...]
    if where == "batch":
        index = (slice(1, 2),)
    elif where == "head":
        index = (..., slice(1, 2), slice(None))
    else:
        if dilation == 1:
            return
        index = (..., slice(0, None, dilation), slice(None), slice(None))
    clean, dirty = case.tensors(), case.tensors()
    for tensor in (dirty.query, dirty.key, dirty.value, dirty.grad_out):
        tensor.detach()[index] = torch.nan
    for a, b in zip(everything(case, clean, kernel), everything(case, dirty, kernel), strict=True):
        lse = a.dim() == case.rank + 2
        a, b = (t.unsqueeze(-1) if lse else t for t in (a, b))
        rest = torch.ones(a.shape, dtype=torch.bool)
        rest[index] = False
        assert torch.equal(a[rest], b[rest])
        assert b[index].isnan().any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_batch(kernel: Kernel) -> None:
    case = Case(axes=(AxisCase(3, 1, 1, False, 6, 0, 6, 0, 6),), batch=0, additional=2)
    inputs = case.tensors()
    out, lse = natten.na1d(
        inputs.query,
        inputs.key,
        inputs.value,
        3,
        additional_keys=inputs.additional_keys,
        additional_values=inputs.additional_values,
        return_lse=True,
        kernel=kernel,
    )
    assert out.shape == (0, 6, 1, 8)
    assert lse.shape == (0, 6, 1)
    grads = torch.autograd.grad(out.sum() + lse.sum(), inputs.differentiable())
    assert [g.shape for g in grads] == [t.shape for t in inputs.differentiable()]
    rpb = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    logits = natten.na_qk(inputs.query, inputs.key, 3, rpb=rpb)
    (grad_rpb,) = torch.autograd.grad(logits.sum(), rpb)
    assert torch.equal(grad_rpb, torch.zeros_like(rpb))


def operator_calls() -> list[tuple[str, Any, tuple[Any, ...]]]:
    """One call of every operator."""
    axes = (AxisCase(3, 1, 2, False, 8, 1, 6, 0, 8), AxisCase(3, 2, 1, True, 5, 0, 5, 0, 5))
    case = Case(axes, batch=2, heads=4, heads_kv=2, head_dim=4, head_dim_v=6, additional=3)
    inputs = case.tensors()
    tensors = [t.detach() for t in attention_inputs(inputs) if t is not None]
    query, key, value = tensors[:3]
    out, lse = run_forward(case, inputs, Kernel.cpu)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    weights = torch.randn(*query.shape[:-1], case.slots, dtype=torch.float64)
    end = (case.packed_window, 0.5, int(Kernel.cpu), 0, [])
    plain = Case((AxisCase(3, 1, 1, False, 8, 0, 8, 0, 8),), heads=2)
    rows = plain.tensors()
    rpb = torch.randn(2, 5, dtype=torch.float64)
    logits = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    naive = (int(Kernel.cpu_naive), 0, [])
    return [
        ("na_forward", ops.na_forward, (*tensors, out, lse, *end)),
        ("na_backward", ops.na_backward, (inputs.grad_out, inputs.grad_lse, *tensors, out, lse, *grads, None, *end)),
        ("na_qk", ops.na_qk, (query, key, None, weights.clone(), *end)),
        (
            "na_qk with rpb",
            ops.na_qk,
            (rows.query.detach(), rows.key.detach()[..., :1, :].expand(-1, -1, 2, -1).contiguous(), rpb, logits.clone(),
             plain.packed_window, 1.0, *naive),
        ),
        ("na_av", ops.na_av, (weights, value, torch.empty_like(out), *end)),
        ("na_inverse_av", ops.na_inverse_av, (weights, inputs.grad_out, torch.empty_like(value), *end)),
        ("na_rpb_backward", ops.na_rpb_backward, (logits, torch.empty_like(rpb), plain.packed_window, *naive)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "operator", "arguments"), operator_calls(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_opcheck(name: str, operator: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize(
    ("name", "operator", "arguments"), operator_calls(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_operators_refuse_wrong_shapes(name: str, operator: Any, arguments: tuple[Any, ...]) -> None:
    """Calls past the Python checks end in an error, never in an access out of bounds."""
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            short = argument[..., :-1] if argument.shape[-1] > 1 else argument[..., :0]
            changed = (*arguments[:index], short.contiguous(), *arguments[index + 1 :])
            with pytest.raises((ValueError, RuntimeError), match="natten"):  # which, depends on torch's version
                operator(*changed)
