"""qk, av and inverse_av of every kernel against the oracle: values, gradients and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import axis, check_unfused, examples, float32_precision, positional_bias, scalar_product
from hypothesis import given
from hypothesis import strategies as st
from ledger import Ledger
from problems import Case
from test_gpu_attention import drawn, of_dtype, skip_unless
from tolerances import TOLERANCES
from torch import Tensor

import natten
from natten import reference
from natten.dispatch import FAMILIES, Kernel, Operation


def skip_unless_unfused(kernel: Kernel, case: Case | None, dtype: torch.dtype, device: torch.device) -> None:
    if Operation.qk not in FAMILIES[kernel].operations:
        pytest.skip(f"{kernel.name} is fused")
    skip_unless(kernel, case, dtype, device)


@of_dtype
@examples(60)
@given(data=st.data())
def test_drawn_operators(
    ledger: Ledger, kernel: Kernel, device: torch.device, dtype: torch.dtype, data: st.DataObject
) -> None:
    skip_unless_unfused(kernel, None, dtype, device)
    case = data.draw(drawn(kernel, dtype, additional=False))
    check_unfused(ledger, case, kernel, dtype, device)


@examples(30)
@given(data=st.data())
def test_drawn_operators_with_tf32(ledger: Ledger, kernel: Kernel, device: torch.device, data: st.DataObject) -> None:
    skip_unless_unfused(kernel, None, torch.float32, device)
    case = data.draw(drawn(kernel, torch.float32, additional=False))
    check_unfused(ledger, case, kernel, torch.float32, device, allow_tf32=True)


DIRECTED = {
    "nat": Case((axis(28, 7), axis(28, 7)), batch=2, heads=2, head_dim=32, head_dim_v=32),
    "dinat": Case((axis(28, 7, 1, 4), axis(28, 7, 1, 4)), batch=2, heads=2, head_dim=32, head_dim_v=32),
    "wide-window": Case((axis(40, 23), axis(33, 31)), heads=1, head_dim=64, head_dim_v=64),
    "window-is-extent": Case((axis(17, 17), axis(13, 13)), heads=1, head_dim=32, head_dim_v=32),
    "long-1d": Case((axis(1000, 255),), heads=2, head_dim=64, head_dim_v=64),
    "volume": Case((axis(6, 5), axis(10, 7), axis(10, 3)), heads=2, head_dim=32, head_dim_v=32),
    "grouped-heads": Case((axis(30, 5), axis(30, 9)), heads=6, heads_kv=2, head_dim=64, head_dim_v=128),
    "ragged-groups": Case((axis(50, 6, 1, 7), axis(23, 3, 1, 6)), heads=2, head_dim=32, head_dim_v=32),
    "holes": Case((axis(47, -1, 1, 9), axis(30, 8, 3, 2, True)), heads=2, head_dim=32, head_dim_v=32),
    "wide-heads": Case((axis(20, 7), axis(20, 7)), heads=1, head_dim=256, head_dim_v=256),
    "no-batch": Case((axis(30, 5),), batch=0, heads=2, head_dim=32, head_dim_v=32),
    "many-batches": Case((axis(3, 3),), batch=70_000, heads=1, head_dim=32, head_dim_v=32),
}


@of_dtype
@pytest.mark.parametrize("name", DIRECTED)
def test_directed_operators(
    ledger: Ledger, kernel: Kernel, device: torch.device, dtype: torch.dtype, name: str
) -> None:
    case = DIRECTED[name]
    skip_unless_unfused(kernel, case, dtype, device)
    check_unfused(ledger, case, kernel, dtype, device)


def second_gradients(
    operators: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], t: dict[str, Tensor]
) -> list[Tensor]:
    """Gradients of a function of the gradients, by every input."""
    leaves = [tensor.requires_grad_() for name, tensor in t.items() if not name.startswith("other")]
    others = [tensor for name, tensor in t.items() if name.startswith("other_value")]
    first = torch.autograd.grad(scalar_product(operators(t), others), leaves, create_graph=True)
    directions = [tensor for name, tensor in t.items() if name.startswith("other_grad")]
    return list(torch.autograd.grad(scalar_product(first, directions), leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["nat", "volume", "holes", "grouped-heads"])
def test_second_gradients(ledger: Ledger, kernel: Kernel, device: torch.device, dtype: torch.dtype, name: str) -> None:
    case = DIRECTED[name]
    skip_unless_unfused(kernel, case, dtype, device)
    ledger.case()
    generator = case.generator()
    inputs = case.tensors(torch.float64)
    weights = torch.randn(*inputs.query.shape[:-1], case.slots, generator=generator, dtype=torch.float64)
    given_tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "weights": weights}
    bias = positional_bias(case, generator)
    if bias is not None:
        given_tensors["rpb"] = bias
    shapes = [weights.shape, inputs.grad_out.shape, *(tensor.shape for tensor in given_tensors.values())]
    for index, shape in enumerate(shapes):
        prefix = "other_value" if index < 2 else "other_grad"
        given_tensors[f"{prefix}{index}"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    tensors = {n: t.detach().to(device=device, dtype=dtype) for n, t in given_tensors.items()}
    window, scale, arguments = case.window, case.effective_scale, case.window_arguments

    def ours(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        # The squares make the second gradients depend on every input.
        logits = natten.na_qk(t["query"], t["key"], **arguments, rpb=t.get("rpb"), kernel=kernel)
        return logits**2, natten.na_av(t["weights"], t["value"], **arguments, kernel=kernel) ** 2

    def oracle(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        logits = reference.qk(t["query"], t["key"], window, scale, t.get("rpb"))
        return logits**2, reference.av(t["weights"], t["value"], window) ** 2

    tolerance = TOLERANCES[dtype]
    with float32_precision(allow_tf32=False):
        computed = second_gradients(ours, tensors)
    exact = {name: tensor.detach().double() for name, tensor in tensors.items()}
    expected = second_gradients(oracle, {name: tensor.clone() for name, tensor in exact.items()})
    bounds = second_gradients(oracle, {name: tensor.abs() for name, tensor in exact.items()})
    names = [name for name in tensors if not name.startswith("other")]
    for label, result, target, bound in zip(names, computed, expected, bounds, strict=True):
        ledger.check(f"grad_grad_{label}", result, target, bound, tolerance, case)
