"""Runs a case on a kernel and compares everything with the oracle; outputs are NaN before the kernel writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, settings
from ledger import Ledger
from problems import AxisCase, Case, Inputs
from tolerances import TF32, TOLERANCES, Tolerance
from torch import Tensor

import natten
from natten import reference
from natten.dispatch import FAMILIES, Kernel

HEAD_DIMS = (1, 3, 8, 16, 17, 24, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256)

# The kernels' tiles hold 64 to 128 tokens: extents here make several of them.
LONGEST = (300, 24, 10)

_phases = tuple(Phase) if os.environ.get("NATTEN_SHRINK", "1") != "0" else (Phase.explicit, Phase.generate)


def examples(count: int) -> settings:
    """That many drawn cases; `NATTEN_SHRINK=0` reports the first failure as it was drawn, which takes less time."""
    suppressed = [*settings.default.suppress_health_check, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, phases=_phases, suppress_health_check=suppressed)


def axis(extent: int, kernel_size: int, stride: int = 1, dilation: int = 1, is_causal: bool = False) -> AxisCase:
    """A whole axis."""
    return AxisCase(kernel_size, stride, dilation, is_causal, extent, 0, extent, 0, extent)


def head_dims(kernel: Kernel, dtype: torch.dtype) -> list[int]:
    """Those of `HEAD_DIMS` that the kernel takes.

    Long sums over one or three channels cancel in some row, to less than what float32's tolerance allows for.
    """
    family = FAMILIES[kernel]
    least = 8 if dtype == torch.float32 else 1
    most = family.largest_head_dim(dtype) or max(HEAD_DIMS)
    return [dim for dim in HEAD_DIMS if dim % family.head_dim_multiple == 0 and least <= dim <= most]


def refusal(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel states that it does not take the case, or None."""
    shapes = [
        (case.batch, *case.q_grid, case.heads, case.head_dim),
        (case.batch, *case.kv_grid, case.heads_kv, case.head_dim),
        (case.batch, *case.kv_grid, case.heads_kv, case.head_dim_v),
    ]
    arguments: dict[str, Any] = {**case.window_arguments, "scale": case.scale, "dtype": dtype, "device": device}
    try:
        natten.explain(*shapes, **arguments, kernel=kernel, requires_grad=False)
    except ValueError as error:
        return str(error)
    return None


class Poison:
    """How many tensors were filled with NaN on allocation."""

    def __init__(self) -> None:
        self.tensors = 0


@contextlib.contextmanager
def poisoned() -> Iterator[Poison]:
    """Memory from `torch.empty` and its like holds NaN (bytes of ones for integers), in every thread.

    A kernel that leaves an element of an output unwritten, or reads its workspace before writing it, shows.
    """
    poison = Poison()

    def filling(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            if tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
                poison.tensors += 1
            return tensor

        return allocate

    with (
        mock.patch.object(torch, "empty", filling(torch.empty)),
        mock.patch.object(torch, "empty_like", filling(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", filling(torch.Tensor.new_empty)),
    ):
        yield poison


def tolerance_of(kernel: Kernel | None, dtype: torch.dtype, allow_tf32: bool) -> Tolerance:
    """For attention by this kernel, where further roundings count in rows of a few keys, which do not average them out.

    A composite stores logits and weights in the inputs' type. TF32 rounds the inputs, which are exact in 16 bits.
    """
    allow_tf32 = allow_tf32 and dtype == torch.float32
    tolerance = TF32 if allow_tf32 else TOLERANCES[dtype]
    is_composite = kernel is not None and FAMILIES[kernel].composite and dtype != torch.float32
    if not allow_tf32 and not is_composite:
        return tolerance
    return Tolerance(4 * tolerance.outputs, 4 * tolerance.gradients, tolerance.cancelled)


@contextlib.contextmanager
def float32_precision(allow_tf32: bool) -> Iterator[None]:
    """Torch's setting for float32 products."""
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allow_tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


def attend(case: Case, inputs: Inputs, kernel: Kernel | None) -> tuple[Tensor, Tensor]:
    """Output and logsumexp."""
    result = natten.neighborhood_attention_generic(
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
    assert isinstance(result, tuple)
    return result


def results(case: Case, inputs: Inputs, kernel: Kernel | None) -> list[Tensor]:
    """Output, logsumexp and every gradient, all outputs poisoned beforehand."""
    with poisoned() as poison:
        out, lse = attend(case, inputs, kernel)
        forward = poison.tensors
        grads = torch.autograd.grad((out, lse), inputs.differentiable(), (inputs.grad_out, inputs.grad_lse))
    if case.batch:
        assert forward >= 2, "out and lse were not allocated where they could be poisoned"
        assert poison.tensors >= forward + 3, "gradients were not allocated where they could be poisoned"
    return [out, lse, *grads]


def check_attention(
    ledger: Ledger,
    case: Case,
    kernel: Kernel | None,
    dtype: torch.dtype,
    device: torch.device,
    allow_tf32: bool = False,
) -> None:
    """Output, logsumexp and every gradient against the oracle."""
    ledger.case()
    inputs = case.tensors(dtype, device)
    tolerance = tolerance_of(kernel, dtype, allow_tf32)
    with float32_precision(allow_tf32):
        computed = results(case, inputs, kernel)
    for (name, oracle, magnitude), result in zip(case.expected(inputs), computed, strict=True):
        assert result.dtype == (torch.float32 if name == "lse" and dtype != torch.float64 else dtype)
        ledger.check(name, result, oracle, magnitude, tolerance, case)


Operators = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


def positional_bias(case: Case, generator: torch.Generator) -> Tensor | None:
    if not case.has_rpb:
        return None
    shape = (case.heads, *(2 * a.kernel_size - 1 for a in case.axes))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check_unfused(
    ledger: Ledger,
    case: Case,
    kernel: Kernel | None,
    dtype: torch.dtype,
    device: torch.device,
    allow_tf32: bool = False,
) -> None:
    """qk (with positional bias where it is defined) and av, and all of their gradients, against the oracle."""
    ledger.case()
    inputs = case.tensors(dtype, device)
    generator = case.generator()
    bias = positional_bias(case, generator)
    weights = torch.randn(*inputs.query.shape[:-1], case.slots, generator=generator, dtype=torch.float64)
    grad_logits = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    given = {
        "query": inputs.query,
        "key": inputs.key,
        "rpb": bias,
        "value": inputs.value,
        "weights": weights,
        "grad_logits": grad_logits,
        "grad_out": inputs.grad_out,
    }
    tensors = {n: t.detach().to(device=device, dtype=dtype) for n, t in given.items() if t is not None}
    window, scale = case.window, case.effective_scale
    arguments = case.window_arguments

    def ours(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = natten.na_qk(t["query"], t["key"], **arguments, scale=case.scale, rpb=t.get("rpb"), kernel=kernel)
        return logits, natten.na_av(t["weights"], t["value"], **arguments, kernel=kernel)

    def oracle(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = reference.qk(t["query"], t["key"], window, scale, t.get("rpb"))
        return logits, reference.av(t["weights"], t["value"], window)

    def bound(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = reference.qk(t["query"], t["key"], window, abs(scale), t.get("rpb"))
        return logits, reference.av(t["weights"], t["value"], window)

    def everything(
        function: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]], t: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        leaves = {name: tensor.requires_grad_() for name, tensor in t.items() if not name.startswith("grad")}
        logits, out = function({**t, **leaves})
        # Slots past a window's end hold -inf: nothing flows back from them.
        grad = t["grad_logits"].masked_fill(logits.detach().isinf(), 0)
        grads = torch.autograd.grad((logits, out), list(leaves.values()), (grad, t["grad_out"]))
        return {"qk": logits, "av": out, **{f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}}

    # In TF32, rows of a few slots are as exact as one product of terms that cancel.
    tolerance = replace(TF32, cancelled=1 / 2) if allow_tf32 and dtype == torch.float32 else TOLERANCES[dtype]
    with float32_precision(allow_tf32), poisoned():
        computed = everything(ours, {name: t.clone() for name, t in tensors.items()})
    exact = {name: t.double() for name, t in tensors.items()}
    expected = everything(oracle, {name: t.clone() for name, t in exact.items()})
    magnitudes = everything(bound, {name: t.abs() for name, t in exact.items()})
    for name, result in computed.items():
        ledger.check(name, result, expected[name], magnitudes[name], tolerance, case)


def scalar_product(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """A number that depends on all of the tensors."""
    terms = [(a * b).masked_fill(a.isinf(), 0).sum() for a, b in zip(tensors, others, strict=True)]
    return torch.stack(terms).sum()
