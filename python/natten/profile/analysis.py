"""What a kernel did with a pass of a problem, beside what the problem needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from natten._explain import Explanation, explain
from natten.bench.floors import Work, attention_work, composite_works, floor
from natten.bench.problems import DTYPES, BenchProblem, Pass
from natten.bench.run import Row, Settings, Skip, measure_attention
from natten.bench.timing import Timing
from natten.bench.windows import checked_problem
from natten.dispatch import FAMILIES, Kernel
from natten.profile.tiles import plan_pass


@dataclass(frozen=True)
class Profile:
    """One kernel on one pass of a problem."""

    problem: BenchProblem
    pass_: Pass
    dtype: str
    kernel: Kernel
    timing: Timing
    useful: Work  # what the problem needs
    executed_flops: float
    moved_bytes: float  # what this kernel cannot avoid: the composite moves its attention weights too
    bytes_share: float  # of the two floors, over the time
    flops_share: float | None

    @property
    def intensity(self) -> float:
        """Useful FLOPs per byte that the kernel has to move."""
        return self.useful.flops / self.moved_bytes

    @property
    def useful_tflops(self) -> float:
        return self.useful.flops / self.timing.ms * 1e-9

    @property
    def executed_tflops(self) -> float:
        return self.executed_flops / self.timing.ms * 1e-9

    @classmethod
    def from_json(cls, row: Mapping[str, Any], problem: BenchProblem) -> Profile:
        """What `as_json` wrote."""
        low_ms, high_ms = row["spread_ms"]
        return cls(
            problem,
            row["pass"],
            row["dtype"],
            Kernel[row["kernel"]],
            Timing(row["ms"], low_ms, high_ms, row["repeats"]),
            Work(row["useful_flops"], row["floor_bytes"]),
            row["executed_flops"],
            row["moved_bytes"],
            row["bytes_floor_share"],
            row["flops_floor_share"],
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "problem": self.problem.name,
            "pass": self.pass_,
            "dtype": self.dtype,
            "kernel": self.kernel.name,
            "ms": round(self.timing.ms, 5),
            "spread_ms": [round(self.timing.low_ms, 5), round(self.timing.high_ms, 5)],
            "repeats": self.timing.repeats,
            "useful_flops": self.useful.flops,
            "executed_flops": self.executed_flops,
            "floor_bytes": self.useful.bytes,
            "moved_bytes": self.moved_bytes,
            "intensity": round(self.intensity, 3),
            "useful_tflops": round(self.useful_tflops, 4),
            "executed_tflops": round(self.executed_tflops, 4),
            "bytes_floor_share": round(self.bytes_share, 5),
            "flops_floor_share": None if self.flops_share is None else round(self.flops_share, 5),
        }


def explanation(problem: BenchProblem, dtype: str, device: torch.device, **choices: Any) -> Explanation:
    """`natten.explain` of the problem, with its further arguments."""
    tokens = (problem.batch, *problem.shape)
    return explain(
        (*tokens, problem.heads, problem.head_dim),
        (*tokens, problem.key_heads, problem.head_dim),
        (*tokens, problem.key_heads, problem.value_dim),
        problem.kernel_size,
        problem.stride,
        problem.dilation,
        problem.causal,
        dtype=DTYPES[dtype],
        device=device,
        **choices,
    )


def executed_flops(problem: BenchProblem, kernel: Kernel, pass_: Pass, dtype: str, device: torch.device) -> float:
    """FLOPs of the matrix products of a pass, masked and padded ones included; see `tiles`."""
    checked = checked_problem(problem, DTYPES[dtype], device)
    stated: tuple[int, ...] = ()
    if pass_ == "forward" and device.type == "cuda":
        stated = explanation(problem, dtype, device, kernel=kernel, requires_grad=False).forward.plan
    return sum(plan.flops for plan in plan_pass(kernel, checked, pass_, stated))


def profile_of(row: Row, problem: BenchProblem, pass_: Pass, settings: Settings) -> Profile:
    """A measurement of the benchmark, taken apart."""
    kernel = Kernel[row.kernel]
    useful = attention_work(problem, pass_, row.dtype)
    moved = [useful] if not FAMILIES[kernel].composite else composite_works(problem, pass_, row.dtype)
    bound = floor(useful, row.dtype, settings.ceilings, settings.allow_tf32)
    return Profile(
        problem,
        pass_,
        row.dtype,
        kernel,
        row.timing,
        useful,
        executed_flops(problem, kernel, pass_, row.dtype, settings.device),
        sum(work.bytes for work in moved),
        useful.bytes / settings.ceilings.bandwidth_tbps * 1e-9 / row.timing.ms,
        None if bound is None else bound.flops_ms / row.timing.ms,
    )


def profiles(
    problems: Iterable[BenchProblem], settings: Settings, progress: Callable[[Row | Skip], None] = lambda _: None
) -> Iterator[Profile | Skip]:
    """Every kernel on every pass of the problems, each in its own type."""
    for problem in problems:
        for pass_ in settings.passes:
            for item in measure_attention(problem, pass_, problem.dtype, settings, recorded=False):
                progress(item)
                yield item if isinstance(item, Skip) else profile_of(item, problem, pass_, settings)
