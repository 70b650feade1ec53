"""Measures problems over kernels, passes and types, and the peers beside them in the same run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from natten import _unfused
from natten.bench import peers
from natten.bench.floors import (
    BACKWARD_FLOPS,
    OPERATORS,
    Ceilings,
    Operator,
    Work,
    attention_work,
    floor,
    unfused_work,
)
from natten.bench.peers import Contender, NotSupported
from natten.bench.problems import DTYPES, BenchProblem, Pass, ProblemList
from natten.bench.timing import Timing, graphed, measure
from natten.bench.windows import checked_problem
from natten.dispatch import FAMILIES, Kernel, Operation, choose
from natten.functional import neighborhood_attention_generic

AUTO = "auto"

OUT_OF_TIME = "out of time"

# A kernel that loses to another by more than this share was chosen wrongly.
DISPATCH_TOLERANCE = 0.05


@dataclass(frozen=True)
class Settings:
    """What a run measures and how."""

    device: torch.device
    ceilings: Ceilings
    kernels: tuple[str, ...]
    passes: tuple[Pass, ...]
    peers: tuple[str, ...]  # of PEERS
    budget_ms: float = 100.0
    limit_ms: float = 5000.0
    graph: bool = False
    allow_tf32: bool = False
    end: float = math.inf  # of `time.monotonic`: nothing is begun later


@dataclass(frozen=True)
class Row:
    """One measurement. ``pass_`` is a pass of fused attention or the name of an unfused operator."""

    problem: str
    kernel: str
    pass_: str
    dtype: str
    timing: Timing
    useful_tflops: float
    floor_share: float | None
    target_ms: float | None
    peers: Mapping[str, float]
    chosen: str | None = None  # the kernel that "auto" stands for

    def as_json(self) -> dict[str, Any]:
        return {
            "problem": self.problem,
            "kernel": self.kernel,
            "pass": self.pass_,
            "dtype": self.dtype,
            "ms": round(self.timing.ms, 5),
            "spread_ms": [round(self.timing.low_ms, 5), round(self.timing.high_ms, 5)],
            "repeats": self.timing.repeats,
            "useful_tflops": round(self.useful_tflops, 3),
            "floor_share": None if self.floor_share is None else round(self.floor_share, 4),
            "target_ms": self.target_ms,
            "chosen": self.chosen,
            "peers": {name: round(ms, 5) for name, ms in self.peers.items()},
        }


@dataclass(frozen=True)
class Skip:
    """A measurement that was not made, and why."""

    problem: str
    kernel: str
    pass_: str
    dtype: str
    reason: str

    def as_json(self) -> dict[str, str]:
        return {
            "problem": self.problem,
            "kernel": self.kernel,
            "pass": self.pass_,
            "dtype": self.dtype,
            "reason": self.reason,
        }


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def add(self, item: Row | Skip) -> None:
        if isinstance(item, Row):
            self.rows.append(item)
        else:
            self.skips.append(item)


def _estimate(problem: BenchProblem, kernel: str, operation: Operation, dtype: str, settings: Settings) -> Kernel:
    """The kernel that runs the call. Raises `NotSupported` where it cannot, or would by estimate take too long."""
    checked = checked_problem(problem, DTYPES[dtype], settings.device)
    forced = None if kernel == AUTO else Kernel[kernel]
    if forced is not None and FAMILIES[forced].composite and operation is Operation.backward:
        operation = Operation.forward  # autograd differentiates the composite's own operators
    try:
        decision = choose(checked, operation, forced)
    except (ValueError, RuntimeError) as error:
        raise NotSupported(str(error)) from None
    estimates = {candidate.kernel: candidate.milliseconds for candidate in decision.candidates}
    estimate = estimates[decision.kernel]
    if estimate is not None and estimate > settings.limit_ms:
        raise NotSupported(f"estimated at {estimate:.0f} ms, over the limit of {settings.limit_ms:.0f} ms")
    return decision.kernel


def check_time(settings: Settings) -> None:
    """Raises `NotSupported` when the time is up."""
    if time.monotonic() > settings.end:
        raise NotSupported(OUT_OF_TIME)


def check_dense_estimate(problem: BenchProblem, pass_: Pass, dtype: str, settings: Settings) -> None:
    """Raises `NotSupported` where dense attention would exceed the limit even at half of the device's product rate."""
    pairs = problem.batch * problem.heads * problem.tokens**2 * (0.5 if problem.causal == (True,) else 1.0)
    flops = pairs * 2.0 * (problem.head_dim + problem.value_dim) * (BACKWARD_FLOPS if pass_ == "backward" else 1.0)
    rate = settings.ceilings.tflops.get(dtype)
    estimate = 0.0 if rate is None else 2e-9 * flops / rate
    if estimate > settings.limit_ms:
        raise NotSupported(f"estimated at {estimate:.0f} ms, over the limit of {settings.limit_ms:.0f} ms")


def natten_contender(problem: BenchProblem, kernel: str, dtype: torch.dtype, device: torch.device) -> Contender:
    """Our own attention, through its public function."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = neighborhood_attention_generic(
            query,
            key,
            value,
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.causal,
            kernel=None if kernel == AUTO else kernel,
        )
        assert isinstance(out, Tensor)
        return out

    return Contender(attention, *peers.random_inputs(problem, problem.shape, dtype, device))


PEERS: Mapping[str, Callable[[BenchProblem, torch.dtype, torch.device], Contender]] = {
    "dense_cudnn": partial(peers.dense, backend=SDPBackend.CUDNN_ATTENTION),
    "dense_flash2": partial(peers.dense, backend=SDPBackend.FLASH_ATTENTION),
    "flex": peers.flex,
    "unfold": peers.unfold,
}


def pass_call(contender: Contender, pass_: Pass) -> Callable[[], object]:
    """One pass of a contender; the forward pass that backward needs is made here."""
    inputs = (contender.query, contender.key, contender.value)
    if pass_ == "forward":
        return partial(contender.attention, *inputs)
    for tensor in inputs:
        tensor.requires_grad_()
    out = contender.attention(*inputs)
    return partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)


def time_contender(
    make: Callable[[], Contender], pass_: Pass, device: torch.device, budget_ms: float = 100.0, graph: bool = False
) -> Timing:
    """Times one pass; backward alone, after a forward pass outside the measurement."""
    call = pass_call(make(), pass_)
    with torch.set_grad_enabled(pass_ == "backward"):
        return measure(graphed(call) if graph else call, device, budget_ms)


def attempt(action: Callable[..., Timing], *arguments: Any) -> Timing:
    """A measurement; `NotSupported` with the reason where the device or the library refuses."""
    try:
        return action(*arguments)
    except NotSupported:
        raise
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise NotSupported("out of memory") from None
    except Exception as error:  # peers refuse in many ways, and the run goes on
        if "CUDA error" in str(error):  # the context is lost: nothing after this would be a measurement
            raise
        raise NotSupported(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None


def _row(
    problem: BenchProblem,
    kernel: str,
    pass_: str,
    dtype: str,
    timing: Timing,
    work: Work,
    settings: Settings,
    **columns: Any,
) -> Row:
    bound = floor(work, dtype, settings.ceilings, settings.allow_tf32)
    return Row(
        problem=problem.name,
        kernel=kernel,
        pass_=pass_,
        dtype=dtype,
        timing=timing,
        useful_tflops=work.flops / timing.ms * 1e-9,
        floor_share=None if bound is None else bound.ms / timing.ms,
        **columns,
    )


def measure_attention(
    problem: BenchProblem, pass_: Pass, dtype: str, settings: Settings, recorded: bool
) -> Iterator[Row | Skip]:
    """Every kernel on one problem, pass and type. ``recorded``: whether the recorded times are this device's."""
    torch_dtype = DTYPES[dtype]
    timed = (settings.device, settings.budget_ms, settings.graph)
    times: dict[str, float] = {}
    target = None
    if recorded and dtype == problem.dtype:
        target = problem.target_ms.get(pass_)
        times |= {name: by_pass[pass_] for name, by_pass in problem.recorded_ms.items()}
    for name in settings.peers:
        try:
            check_time(settings)
            if name.startswith("dense"):
                check_dense_estimate(problem, pass_, dtype, settings)
            make = partial(PEERS[name], problem, torch_dtype, settings.device)
            times[name] = attempt(time_contender, make, pass_, *timed).ms
        except NotSupported as reason:
            yield Skip(problem.name, name, pass_, dtype, str(reason))
    operation = Operation[pass_]
    work = attention_work(problem, pass_, dtype)
    for kernel in settings.kernels:
        try:
            check_time(settings)
            chosen = _estimate(problem, kernel, operation, dtype, settings)
            make = partial(natten_contender, problem, kernel, torch_dtype, settings.device)
            timing = attempt(time_contender, make, pass_, *timed)
        except NotSupported as reason:
            yield Skip(problem.name, kernel, pass_, dtype, str(reason))
            continue
        yield _row(
            problem,
            kernel,
            pass_,
            dtype,
            timing,
            work,
            settings,
            target_ms=target,
            peers=times,
            chosen=chosen.name if kernel == AUTO else None,
        )


def unfused_call(
    problem: BenchProblem, operator: Operator, kernel: Kernel, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """One unfused operator on random inputs."""
    checked = checked_problem(problem, dtype, device)
    query, key, value = peers.random_inputs(problem, problem.shape, dtype, device)
    if operator == "qk":
        return partial(_unfused.qk, checked, query, key, None, kernel)
    weights = torch.rand((*query.shape[:-1], checked.slots), dtype=dtype, device=device) / checked.slots
    values = checked.with_head_dim(problem.value_dim, 1.0)
    if operator == "av":
        return partial(_unfused.av, values, weights, value, kernel)
    source = torch.randn((*query.shape[:-1], problem.value_dim), dtype=dtype, device=device)
    return partial(_unfused.inverse_av, values, weights, source, kernel)


def measure_unfused(problem: BenchProblem, dtype: str, settings: Settings) -> Iterator[Row | Skip]:
    """Every unfused operator on one problem and type."""
    for operator in OPERATORS:
        for name in settings.kernels:
            try:
                check_time(settings)
                chosen = _estimate(problem, name, Operation[operator], dtype, settings)
                with torch.no_grad():
                    timing = attempt(_time_unfused, problem, operator, chosen, dtype, settings)
            except NotSupported as reason:
                yield Skip(problem.name, name, operator, dtype, str(reason))
                continue
            yield _row(
                problem,
                name,
                operator,
                dtype,
                timing,
                unfused_work(problem, operator, dtype),
                settings,
                target_ms=None,
                peers={},
                chosen=chosen.name if name == AUTO else None,
            )


def _time_unfused(problem: BenchProblem, operator: Operator, kernel: Kernel, dtype: str, settings: Settings) -> Timing:
    call = unfused_call(problem, operator, kernel, DTYPES[dtype], settings.device)
    return measure(graphed(call) if settings.graph else call, settings.device, settings.budget_ms)


def run(
    problems: ProblemList, dtypes: Iterable[str], settings: Settings, recorded: bool, unfused: bool = False
) -> Iterator[Row | Skip]:
    """Measures everything asked for; ``dtypes`` empty stands for each problem's own type."""
    wanted = tuple(dtypes)
    for problem in problems.problems:
        for dtype in wanted or (problem.dtype,):
            if unfused:
                yield from measure_unfused(problem, dtype, settings)
            else:
                for pass_ in settings.passes:
                    yield from measure_attention(problem, pass_, dtype, settings, recorded)


@dataclass(frozen=True)
class Misjudged:
    """A row where the dispatcher's choice loses to another measured kernel."""

    problem: str
    pass_: str
    dtype: str
    chosen: str
    chosen_ms: float
    better: str
    better_ms: float


def check_dispatch(rows: Iterable[Row]) -> list[Misjudged]:
    """Where "auto" chose a kernel that another one beat by more than `DISPATCH_TOLERANCE`.

    Where the chosen kernel was measured by name too, that row counts: noise between two runs of it is no loss.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.problem, row.pass_, row.dtype), []).append(row)
    misjudged = []
    for (problem, pass_, dtype), members in groups.items():
        auto = next((row for row in members if row.kernel == AUTO), None)
        others = {row.kernel: row.timing.ms for row in members if row.kernel != AUTO}
        if auto is None or auto.chosen is None or not others:
            continue
        chosen_ms = others.get(auto.chosen, auto.timing.ms)
        better = min(others, key=others.__getitem__)
        if better != auto.chosen and chosen_ms > others[better] * (1 + DISPATCH_TOLERANCE):
            misjudged.append(Misjudged(problem, pass_, dtype, auto.chosen, chosen_ms, better, others[better]))
    return misjudged


def with_batch(problems: ProblemList, batch: int) -> ProblemList:
    """The problems with another batch size; the recorded times do not hold for them."""
    changed = tuple(dataclasses.replace(p, batch=batch, target_ms={}, recorded_ms={}) for p in problems.problems)
    return dataclasses.replace(problems, problems=changed)
