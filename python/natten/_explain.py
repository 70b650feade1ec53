"""`natten.explain`: which kernels a call could run, which it takes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natten._problem import Problem, attention_problem
from natten._settings import current_flags
from natten.dispatch import FAMILIES, Decision, Kernel, Operation, choose, forced_kernel
from natten.types import CausalFlag, Dimension

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
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
            lines.append(f"{decision.operation.value}: {decision.kernel.name}{' (forced)' if decision.forced else ''}")
            for candidate in decision.candidates:
                mark = "->" if candidate.kernel == decision.kernel else "  "
                cost = "" if candidate.milliseconds is None else f"about {candidate.milliseconds:.4g} ms"
                if candidate.memory_bytes:
                    cost += f", {candidate.memory_bytes / 2**20:.4g} MiB of scratch memory"
                verdict = f"rejected: {candidate.rejected}" if candidate.rejected else cost
                lines.append(f"  {mark} {candidate.kernel.name:<11}{verdict}")
            plan = ", ".join(map(str, decision.plan)) or "left to the kernel"
            lines.append(f"     plan: {plan}; workspace: {decision.workspace_bytes} bytes")
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
    if requires_grad and not decisions[0].family.composite:
        if forced is not None and Operation.backward not in FAMILIES[forced].operations:
            forced = None
        decisions.append(choose(problem, Operation.backward, forced, capability))
    return Explanation(problem, tuple(decisions))
