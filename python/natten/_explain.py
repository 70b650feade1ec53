"""`natten.explain`: which kernels a call could run, which it takes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from natten._problem import Problem, attention_problem
from natten._settings import current_flags
from natten.dispatch import Decision, Kernel, Operation, choose, forced_backward, forced_kernel
from natten.types import CausalFlag, Dimension

__all__ = ["Explanation", "explain"]

#: What the numbers of a kernel's plan mean (`forward_plan` of each family in cpp/kernels).
_PLAN_FIELDS = {
    Kernel.cpu: (("tile rows", 1), ("tile columns", 1), ("key rows in a vector", 1)),
    Kernel.fused_sm80: (("variant", 1), ("query tile", 3), ("key box", 3)),
    Kernel.fused_sm90: (
        ("keys a step", 1),
        ("warpgroups", 1),
        ("blocks a multiprocessor", 1),
        ("query box", 3),
        ("key box", 3),
        ("pair axis", 1),
    ),
}
#: The form of fused_sm80 for small windows, told by the first number.
_PATCH_FORM = 2
_PATCH_FIELDS = (("form", 1), ("query patch", 3), ("patches of a tile", 3), ("slab step", 1), ("heads of a block", 1))
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # natten::ScalarType


def plan_fields(kernel: Kernel, plan: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """Names of the numbers of a kernel's plan, and how many each has."""
    if kernel is Kernel.fused_sm80 and plan and plan[0] == _PATCH_FORM:
        return _PATCH_FIELDS
    return _PLAN_FIELDS.get(kernel, ())


def with_plan(decision: Decision, problem: Problem) -> Decision:
    """The decision with the plan that the kernel will make, where it can be asked: on the device it is for."""
    ready = problem.device.type == "cpu" or (problem.device.type == "cuda" and torch.cuda.is_available())
    if decision.kernel not in _PLAN_FIELDS or decision.plan or not ready or problem.is_symbolic:
        return decision
    with torch.cuda.device(problem.device if problem.device.type == "cuda" else -1):
        plan = torch.ops.natten.forward_plan(
            int(decision.kernel),
            problem.window,
            problem.q_grid,
            problem.kv_grid,
            problem.batch,
            problem.heads,
            problem.heads_kv,
            problem.head_dim,
            problem.head_dim_v,
            problem.additional,
            _TYPES.index(problem.dtype),
            problem.flags,
        )
    return decision._replace(plan=tuple(plan))


def _origin(decision: Decision) -> str:
    if decision.measured is not None:
        return f" (tuned: {decision.measured:.4g} ms)"
    return " (forced)" if decision.forced else ""


def _plan_text(decision: Decision) -> str:
    values = iter(decision.plan)
    fields = [
        f"{name} {'x'.join(str(next(values)) for _ in range(count))}"
        for name, count in plan_fields(decision.kernel, decision.plan)
        if decision.plan
    ]
    return ", ".join(fields) or "left to the kernel"


class Explanation(NamedTuple):
    """A problem and the decision for each of its passes; printing it gives a table."""

    problem: Problem
    decisions: tuple[Decision, ...]

    @property
    def forward(self) -> Decision:
        """The decision for the forward pass."""
        return self.decisions[0]

    @property
    def backward(self) -> Decision | None:
        """The decision for the backward pass; None without one of its own."""
        return self.decisions[1] if len(self.decisions) > 1 else None

    def __str__(self) -> str:
        p = self.problem
        grid, keys = "x".join(map(str, p.q_grid)), "x".join(map(str, p.kv_grid))
        heads = f"{p.heads} heads" if p.heads == p.heads_kv else f"{p.heads} heads over {p.heads_kv} key heads"
        dims = str(p.head_dim) if p.head_dim == p.head_dim_v else f"{p.head_dim}, value head dim {p.head_dim_v}"
        lines = [
            f"na{p.rank}d on {p.device}, {str(p.dtype).removeprefix('torch.')}: batch {p.batch}, {grid} queries, "
            f"{keys} keys, {p.additional} additional keys, {heads}, head dim {dims}"
        ]
        for index, axis in enumerate(p.axes):
            causal = ", causal" if axis.causal else ""
            lines.append(
                f"  axis {index}: kernel_size {axis.kernel_size}, stride {axis.stride}, dilation {axis.dilation}"
                f"{causal}, queries from {axis.q_start}, keys from {axis.kv_start}, extent {axis.extent}"
            )
        for decision in self.decisions:
            lines.append(f"{decision.operation.value}: {decision.kernel.name}{_origin(decision)}")
            for candidate in decision.candidates:
                mark = "->" if candidate.kernel == decision.kernel else "  "
                cost = "" if candidate.milliseconds is None else f"about {candidate.milliseconds:.4g} ms"
                if candidate.memory_bytes:
                    cost += f", {candidate.memory_bytes / 2**20:.4g} MiB of scratch memory"
                verdict = f"rejected: {candidate.rejected}" if candidate.rejected else cost
                lines.append(f"  {mark} {candidate.kernel.name:<11}{verdict}")
            lines.append(f"     plan: {_plan_text(decision)}; workspace: {decision.workspace_bytes} bytes")
        return "\n".join(lines)


def explain(
    query: Tensor | Sequence[int],
    key: Tensor | Sequence[int],
    value: Tensor | Sequence[int],
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    scale: float | None = None,
    additional_keys: Tensor | Sequence[int] | None = None,
    additional_values: Tensor | Sequence[int] | None = None,
    *,
    backend: str | None = None,
    kernel: str | Kernel | None = None,
    q_start: Dimension | None = None,
    kv_start: Dimension | None = None,
    extent: Dimension | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    requires_grad: bool | None = None,
    capability: tuple[int, int] | None = None,
) -> Explanation:
    """The dispatcher's decision for a call of `na1d`, `na2d` or `na3d` with the same arguments; nothing is run.

    Args:
        query, key, value, additional_keys, additional_values: tensors, or shapes.
        dtype, device: of the tensors that shapes stand for; float16 on the current CUDA device, or float32 on the CPU.
        requires_grad: whether the call will be differentiated; by default what the tensors say.
        capability: compute capability to decide for instead of the device's own, for example `(9, 0)`.

    Raises: what the call itself would raise.
    """
    if device is None:
        device = query.device if isinstance(query, Tensor) else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:
        default = torch.float16 if device.type == "cuda" else torch.float32
        dtype = query.dtype if isinstance(query, Tensor) else default

    def tensor(given: Tensor | Sequence[int]) -> Tensor:
        return given if isinstance(given, Tensor) else torch.empty(tuple(given), dtype=dtype, device="meta")

    q, k, v = tensor(query), tensor(key), tensor(value)
    extra_keys = None if additional_keys is None else tensor(additional_keys)
    extra_values = None if additional_values is None else tensor(additional_values)
    problem = attention_problem(
        q.dim() - 3,
        q,
        k,
        v,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        extra_keys,
        extra_values,
        q_start,
        kv_start,
        extent,
        current_flags(q.dtype, device),
    )
    problem = replace(problem, device=device)
    if requires_grad is None:
        requires_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (q, k, v, extra_keys, extra_values)
        )
    forced = forced_kernel(kernel, backend, device)
    decisions = [choose(problem, Operation.forward, forced, capability, requires_grad)]
    if capability is None:
        decisions[0] = with_plan(decisions[0], problem)
    if requires_grad and not decisions[0].family.composite:
        forced = forced_backward(forced, problem)
        decisions.append(choose(problem, Operation.backward, forced, capability))
    return Explanation(problem, tuple(decisions))
