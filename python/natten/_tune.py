"""`natten.tune`: measures the kernels and plans of a problem; the dispatcher takes the fastest from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from natten import _attention, _tuned, dispatch
from natten._explain import explain, plan_fields, with_plan
from natten._kernels import Kernel, Operation
from natten._problem import Problem
from natten._tuned import Measured
from natten.types import CausalFlag, Dimension

__all__ = ["Tuning", "tune"]

# Kernels estimated to take this many times the best are not run.
_FAR_SLOWER = 20.0
# Kernels and plans whose first call takes this many times the best are not measured further.
_HOPELESS = 3.0
_MEASUREMENT_MS = 30.0


class Tuning(NamedTuple):
    """What was measured for a problem, fastest first, and the file that keeps it; printing it gives a table."""

    problem: Problem
    forward: tuple[Measured, ...]
    #: Empty where the backward pass was not tuned.
    backward: tuple[Measured, ...]
    path: Path | None

    def __str__(self) -> str:
        lines = []
        for name, rows in (("forward", self.forward), ("backward", self.backward)):
            for row in rows:
                plan = "x".join(map(str, row.plan)) or "left to the kernel"
                lines.append(f"{name:<9}{row.kernel.name:<11}{row.milliseconds:10.4f} ms  plan: {plan}")
        return "\n".join([*lines, f"kept in {self.path}" if self.path else "not kept on disk"])


class _Tensors:
    """Random inputs of a problem, and one forward pass for the backward passes to start from."""

    def __init__(self, problem: Problem) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=problem.dtype, device=problem.device)

        b, extra = problem.batch, problem.additional
        self.problem = problem
        self.query = random(b, *problem.q_grid, problem.heads, problem.head_dim)
        self.key = random(b, *problem.kv_grid, problem.heads_kv, problem.head_dim)
        self.value = random(b, *problem.kv_grid, problem.heads_kv, problem.head_dim_v)
        self.additional_keys = random(b, extra, problem.heads_kv, problem.head_dim) if extra else None
        self.additional_values = random(b, extra, problem.heads_kv, problem.head_dim_v) if extra else None
        self.grad_out = random(b, *problem.q_grid, problem.heads, problem.head_dim_v)
        self.result: tuple[Tensor, Tensor] | None = None

    def call(self, operation: Operation, kernel: Kernel, plan: Sequence[int]) -> Callable[[], list[Tensor]]:
        """A function that runs the pass and returns what it computed."""
        inputs = (self.query, self.key, self.value, self.additional_keys, self.additional_values)
        call = _attention.Prepared(self.problem, kernel, False)
        if operation is Operation.forward:
            if call.composite:
                return lambda: [_attention.composite(self.problem, *inputs, kernel, False)[0]]
            call.plan = list(plan)
            return lambda: [_attention.fused_forward(call, *inputs)[0]]
        if self.result is None:
            self.result = _attention.fused_forward(call, *inputs)
        result = self.result
        kernel, _, workspace, aligned = call.choose_backward()
        call.backward = (kernel, list(plan), workspace, aligned)

        def backward() -> list[Tensor]:
            grads = [None if t is None else torch.empty_like(t) for t in inputs]
            _attention.fused_backward(call, (*inputs, *result), self.grad_out, None, grads)
            return [t for t in grads if t is not None]

        return backward


def _neighbours(kernel: Kernel, plan: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Plans one step away: a factor of two moved between two axes of a shape, or one number halved or doubled.

    Kernels refuse what they cannot run.
    """
    at = 0
    for _, count in plan_fields(kernel, plan):
        positions = range(at, at + count)
        at += count
        if at > len(plan):
            return
        for taken in positions:
            if count == 1:
                for value in {plan[taken] // 2, plan[taken] * 2, plan[taken] + 1, plan[taken] - 1}:
                    if value >= 0 and value != plan[taken]:
                        yield (*plan[:taken], value, *plan[taken + 1 :])
            for given in positions:
                if given != taken and plan[taken] % 2 == 0:
                    moved = list(plan)
                    moved[taken] //= 2
                    moved[given] *= 2
                    yield tuple(moved)


class _Search:
    """Measures one pass of a problem within a time."""

    def __init__(self, tensors: _Tensors, operation: Operation, seconds: float) -> None:
        self.tensors = tensors
        self.operation = operation
        self.deadline = time.monotonic() + seconds
        self.measured: dict[tuple[Kernel, tuple[int, ...]], float] = {}
        self.reference: list[Tensor] | None = None
        self.out_of_memory: torch.OutOfMemoryError | None = None

    def measure(self, kernel: Kernel, plan: tuple[int, ...] = ()) -> float | None:
        """Milliseconds; None for a plan that the kernel refuses, or that is out of the question."""
        from natten.bench import timing

        if (kernel, plan) in self.measured:
            return self.measured[kernel, plan]
        device = self.tensors.problem.device
        best = min(self.measured.values(), default=float("inf"))
        try:
            run = self.tensors.call(self.operation, kernel, plan)
            results = run()
            quick = timing.measure(run, device, 0.0).ms
        except torch.OutOfMemoryError as error:
            self.out_of_memory = error.with_traceback(None)  # which would keep the tensors
            return None
        except torch.AcceleratorError:  # a fault of the device: nothing after it can be trusted
            raise
        except (RuntimeError, ValueError):
            if plan:
                return None
            raise
        if plan and not self._agrees(results):
            raise RuntimeError(f"{kernel.name} computes something else with the plan {plan}: please report this")
        if not plan and self.reference is None:
            self.reference = results
        if quick > _HOPELESS * best:
            return None
        self.measured[kernel, plan] = timing.measure(run, device, _MEASUREMENT_MS).ms
        return self.measured[kernel, plan]

    def _agrees(self, results: list[Tensor]) -> bool:
        assert self.reference is not None
        tolerance = 0.05 if results[0].element_size() <= 2 else 1e-3
        return all(
            float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm()) + 1e-30
            for a, b in zip(results, self.reference, strict=True)
        )

    def _default_plan(self, kernel: Kernel) -> tuple[int, ...]:
        """The plan that the kernel makes for itself, where it can be asked: forward."""
        if self.operation is not Operation.forward:
            return ()
        problem = self.tensors.problem
        return with_plan(dispatch.choose(problem, self.operation, kernel), problem).plan

    def run(self, kernels: Sequence[Kernel]) -> tuple[Measured, ...]:
        """Every kernel as it plans for itself, then better plans for the fastest, step by step."""
        for kernel in kernels:
            self.measure(kernel)
        if not self.measured and self.out_of_memory is not None:
            raise self.out_of_memory
        kernel = min(self.measured, key=lambda key: self.measured[key])[0]
        plan, best = self._default_plan(kernel), self.measured[kernel, ()]
        improved = bool(plan)
        while improved:
            improved = False
            for other in _neighbours(kernel, plan):
                if time.monotonic() >= self.deadline:
                    break
                ms = self.measure(kernel, other)
                if ms is not None and ms < 0.98 * best:
                    plan, best, improved = other, ms, True
                    break
        rows = [Measured(kernel, plan, ms) for (kernel, plan), ms in self.measured.items()]
        rows.sort(key=lambda row: row.milliseconds)
        kept: dict[Kernel, Measured] = {}
        for row in rows:  # the best plan of each kernel, if it is better than the kernel's own by more than noise
            known = self.measured[row.kernel, ()]
            if row.kernel not in kept and (not row.plan or row.milliseconds < 0.98 * known):
                kept[row.kernel] = row
        return tuple(kept.values())


def tune(
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
    q_start: Dimension | None = None,
    kv_start: Dimension | None = None,
    extent: Dimension | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backward: bool = True,
    seconds: float = 10.0,
    save: bool = True,
) -> Tuning:
    """Measures every kernel that can run a call of `na1d`, `na2d` or `na3d`, then other tile shapes for the fastest.

    Later calls of the same shapes, types and window take what was fastest: in this process at once, and, unless `save`
    is false, in every process on a device of the same model, from a file in `NATTEN_CACHE_DIR` (by default `natten` in
    the user's cache directory). Results of another version of the library are ignored. Calls that name a kernel, and
    graphs already compiled, are not affected. Kernels estimated at more than twenty times the fastest are not run.
    Measurements use random tensors of the given shapes; the arguments' values are not touched.

    Args:
        query, key, value, additional_keys, additional_values: tensors, or shapes.
        dtype, device: of the tensors that shapes stand for, as for `explain`.
        backward: whether to tune the backward pass too.
        seconds: about how long to measure, both passes together; each kernel is timed as it plans for itself in any
            case.

    Raises: what the call itself would raise; `OSError` when the results cannot be written.
    """
    problem = explain(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        q_start=q_start,
        kv_start=kv_start,
        extent=extent,
        dtype=dtype,
        device=device,
        requires_grad=False,
    ).problem
    if seconds <= 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    passes = [Operation.forward, Operation.backward] if backward else [Operation.forward]
    tensors = _Tensors(problem)
    results: dict[Operation, tuple[Measured, ...]] = {}
    with torch.no_grad():
        for operation in passes:
            standing = dispatch.choose(problem, operation).candidates
            possible = [c for c in standing if c.rejected is None and c.milliseconds is not None]
            possible.sort(key=lambda candidate: candidate.milliseconds or 0.0)
            most = _FAR_SLOWER * (possible[0].milliseconds or 0.0)
            search = _Search(tensors, operation, seconds / len(passes))
            results[operation] = search.run([c.kernel for c in possible if (c.milliseconds or 0.0) <= most])
    path = _tuned.store(problem, results, save)
    _attention.forget()
    return Tuning(problem, results[Operation.forward], results.get(Operation.backward, ()), path)
