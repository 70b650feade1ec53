"""The three rungs of neighborhood attention: naive kernels, batched GEMM, fused kernels.

    python tools/rungs.py --output docs/performance/h200/rungs
    python tools/rungs.py --seconds 60 --part recorded

Two measurements, after "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock
Level" (NeurIPS 2024):

grid      Average improvements over the naive kernels, per rank and type, over a grid of problems (see `grid`), beside
          the averages that the paper published for an A100. An improvement is naive time / rung time - 1; averages
          are arithmetic. naive and gemm are the composite qk + softmax + av in their kernels.
recorded  The problems of rungs_h200.json, on which the paper's own kernels were timed on an H200: passes and parts.

Writes OUTPUT.json and OUTPUT.txt as it goes; prints the tables. With `--seconds` the grid is sampled, evenly over ranks
and types, until the time is up; the tables say how much of the grid was covered.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from natten import na_av, na_qk
from natten._library import require_library
from natten.bench.floors import CEILINGS, Ceilings, attention_work, composite_works, floor, measure_ceilings
from natten.bench.peers import Contender, NotSupported, random_inputs
from natten.bench.problems import DTYPES, PASSES, BenchProblem, Pass, parse_problem, read_data
from natten.bench.report import Column, circumstances, device_name, number, plain_table, replace_text, write_json
from natten.bench.run import attempt, natten_contender, time_contender
from natten.bench.timing import Timing, measure
from natten.bench.windows import checked_problem
from natten.dispatch import FAMILIES, Kernel, Operation, candidates

# Published averages over naive kernels, NVIDIA A100: (rank, dtype, rung, passes) -> improvement.
PUBLISHED_A100 = {
    (1, "float32", "gemm", "forward"): 8.95,
    (2, "float32", "gemm", "forward"): 2.72,
    (1, "float16", "gemm", "forward"): 5.48,
    (2, "float16", "gemm", "forward"): 1.93,
    (1, "float16", "fused", "forward"): 17.59,
    (2, "float16", "fused", "forward"): 9.58,
    (3, "float16", "fused", "forward"): 11.35,
    (1, "float16", "fused", "forward + backward"): 8.44,
    (2, "float16", "fused", "forward + backward"): 3.85,
    (3, "float16", "fused", "forward + backward"): 4.47,
}

RUNGS = ("naive", "gemm", "fused")
PARTS = ("qk", "softmax", "av", "qk_backward", "av_backward")

_SHAPES = {1: (8, (4096,)), 2: (8, (64, 64)), 3: (4, (16, 32, 32))}  # rank: batch, extents
_WINDOWS = {1: (3, 7, 15, 31, 63), 2: (3, 5, 7, 13, 31), 3: (3, 5, 7)}
_HEADS = 4


def grid() -> list[BenchProblem]:
    """Ranks 1 to 3, head dims 32 to 128, windows 3 to 63 (2-D: 31, 3-D: 7), undilated and dilated, fp16 and fp32."""
    problems = []
    for rank, dim, dtype in itertools.product((1, 2, 3), (32, 64, 128), ("float16", "float32")):
        batch, shape = _SHAPES[rank]
        for window in _WINDOWS[rank]:
            for dilation in {1, min(shape) // window}:
                problems.append(
                    BenchProblem(
                        name="x".join(map(str, shape)) + f"-d{dim}-k{window}-dil{dilation}",
                        batch=batch,
                        shape=shape,
                        heads=_HEADS,
                        head_dim=dim,
                        kernel_size=(window,) * rank,
                        stride=(1,) * rank,
                        dilation=(dilation,) * rank,
                        causal=(False,) * rank,
                        dtype=dtype,
                    )
                )
    return problems


def evenly_sampled(problems: Sequence[BenchProblem], seed: int) -> list[BenchProblem]:
    """In an order whose every prefix covers ranks and types alike."""
    shuffled = list(problems)
    random.Random(seed).shuffle(shuffled)
    strata: dict[tuple[int, str], list[BenchProblem]] = {}
    for problem in shuffled:
        strata.setdefault((problem.rank, problem.dtype), []).append(problem)
    rounds = itertools.zip_longest(*strata.values())
    return [problem for turn in rounds for problem in turn if problem is not None]


def _window(problem: BenchProblem) -> dict[str, Any]:
    return {"kernel_size": problem.kernel_size, "stride": problem.stride, "dilation": problem.dilation}


def composite(problem: BenchProblem, kernel: Kernel, device: torch.device) -> Contender:
    """Attention as qk + softmax + av with one kernel family."""
    window = _window(problem)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = na_qk(query, key, **window, kernel=kernel)
        return na_av(torch.softmax(logits, -1), value, **window, kernel=kernel)

    return Contender(attention, *random_inputs(problem, problem.shape, DTYPES[problem.dtype], device))


def fused_kernel(problem: BenchProblem, pass_: Pass, device: torch.device) -> Kernel:
    """The dispatcher's best among the fused kernels."""
    checked = checked_problem(problem, DTYPES[problem.dtype], device)
    fused = [
        candidate
        for candidate in candidates(checked, Operation[pass_])
        if candidate.rejected is None
        and candidate.milliseconds is not None
        and candidate.kernel is not Kernel.naive
        and not FAMILIES[candidate.kernel].composite
    ]
    if not fused:
        raise NotSupported(f"no fused kernel takes {problem.dtype}")
    return min(fused, key=lambda candidate: candidate.milliseconds or 0.0).kernel


def rung_floor_ms(
    problem: BenchProblem, rung: str, pass_: Pass, ceilings: Ceilings, allow_tf32: bool = False
) -> float | None:
    """The floor of a rung's own operations, one after the other: the composite has to move the weights."""
    fused = rung == "fused"
    works = [attention_work(problem, pass_, problem.dtype)] if fused else composite_works(problem, pass_, problem.dtype)
    floors = [floor(work, problem.dtype, ceilings, allow_tf32) for work in works]
    return None if None in floors else sum(bound.ms for bound in floors if bound is not None)


@dataclass(frozen=True)
class Measurement:
    """One rung on one problem; a pass's time is None where the rung has no kernel for it."""

    problem: BenchProblem
    rung: str
    kernels: tuple[str, ...]
    ms: dict[Pass, float]
    floor_share: dict[Pass, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "problem": self.problem.name,
            "rank": self.problem.rank,
            "dtype": self.problem.dtype,
            "rung": self.rung,
            "kernels": list(self.kernels),
            "ms": {pass_: round(ms, 5) for pass_, ms in self.ms.items()},
            "floor_share": {pass_: round(share, 4) for pass_, share in self.floor_share.items()},
        }


@dataclass(frozen=True)
class Settings:
    device: torch.device
    ceilings: Ceilings
    budget_ms: float
    allow_tf32: bool = False


def measure_rung(problem: BenchProblem, rung: str, settings: Settings) -> Measurement:
    ms: dict[Pass, float] = {}
    shares: dict[Pass, float] = {}
    kernels = []
    for pass_ in PASSES:
        try:
            if rung == "fused":
                kernel = fused_kernel(problem, pass_, settings.device)
                make = partial(natten_contender, problem, kernel.name, DTYPES[problem.dtype], settings.device)
            else:
                kernel = Kernel[rung]
                make = partial(composite, problem, kernel, settings.device)
            timing = attempt(time_contender, make, pass_, settings.device, settings.budget_ms)
        except NotSupported as reason:
            print(f"{problem.name} {problem.dtype} {rung} {pass_}: {reason}", file=sys.stderr)
            continue
        kernels.append(kernel.name)
        ms[pass_] = timing.ms
        bound = rung_floor_ms(problem, rung, pass_, settings.ceilings, settings.allow_tf32 and rung == "gemm")
        if bound is not None:
            shares[pass_] = bound / timing.ms
    return Measurement(problem, rung, tuple(dict.fromkeys(kernels)), ms, shares)


def sweep(problems: Sequence[BenchProblem], settings: Settings, end: float | None) -> Iterator[Measurement]:
    """Every rung on every problem, until the time is up."""
    for problem in problems:
        if end is not None and time.monotonic() > end:
            return
        for rung in RUNGS:
            yield measure_rung(problem, rung, settings)


@dataclass(frozen=True)
class Average:
    """Mean improvement of a rung over naive, on the problems that both ran."""

    rank: int
    dtype: str
    rung: str
    passes: str
    problems: int
    improvement: float
    floor_share: float | None
    published: float | None

    def as_json(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in vars(self).items()}


def _total_ms(measurement: Measurement, passes: str) -> float | None:
    wanted = [measurement.ms.get(pass_) for pass_ in PASSES if pass_ in passes]
    return None if None in wanted else sum(ms for ms in wanted if ms is not None)


def _total_share(measurement: Measurement, passes: str) -> float | None:
    """Share of the floor over all of the passes."""
    total = _total_ms(measurement, passes)
    shares = [(measurement.ms.get(p), measurement.floor_share.get(p)) for p in PASSES if p in passes]
    if total is None or any(ms is None or share is None for ms, share in shares):
        return None
    return sum(ms * share for ms, share in shares if ms is not None and share is not None) / total


def averages(measurements: Sequence[Measurement]) -> list[Average]:
    """Per rank, type, rung and passes; for naive, its share of its floor."""
    naive = {(m.problem.name, m.problem.dtype): m for m in measurements if m.rung == "naive"}
    result = []
    for rank, dtype, rung, passes in itertools.product(
        (1, 2, 3), ("float16", "float32"), RUNGS, ("forward", "forward + backward")
    ):
        improvements, shares = [], []
        for m in measurements:
            if (m.problem.rank, m.problem.dtype, m.rung) != (rank, dtype, rung):
                continue
            own, base = _total_ms(m, passes), _total_ms(naive[m.problem.name, m.problem.dtype], passes)
            if own is None or base is None:
                continue
            improvements.append(base / own - 1)
            share = _total_share(m, passes)
            if share is not None:
                shares.append(share)
        if improvements:
            published = PUBLISHED_A100.get((rank, dtype, rung, passes))
            mean_share = fmean(shares) if shares else None
            result.append(
                Average(rank, dtype, rung, passes, len(improvements), fmean(improvements), mean_share, published)
            )
    return result


def averages_table(rows: Sequence[Average]) -> str:
    columns = [
        Column("rank"),
        Column("dtype", right=False),
        Column("rung", right=False),
        Column("passes", right=False),
        Column("problems"),
        Column("over naive"),
        Column("of its floor"),
        Column("published, A100"),
    ]

    def percent(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.0%}"

    cells = [
        [
            f"{row.rank}-D",
            row.dtype,
            row.rung,
            row.passes,
            str(row.problems),
            "-" if row.rung == "naive" else percent(row.improvement, "+"),
            percent(row.floor_share),
            percent(row.published, "+"),
        ]
        for row in rows
    ]
    return plain_table(columns, cells)


def part_timing(problem: BenchProblem, part: str, kernel: Kernel, settings: Settings) -> Timing:
    """One operation of the composite, or its backward pass, alone."""
    window = _window(problem)
    query, key, value = random_inputs(problem, problem.shape, DTYPES[problem.dtype], settings.device)
    call: Callable[[], object]
    if part == "qk":
        call = partial(na_qk, query, key, **window, kernel=kernel)
    elif part == "qk_backward":
        query.requires_grad_()
        key.requires_grad_()
        logits = na_qk(query, key, **window, kernel=kernel)
        grad = torch.randn_like(logits)
        call = partial(torch.autograd.grad, logits, (query, key), grad, retain_graph=True)
    else:
        logits = na_qk(query, key, **window, kernel=kernel)
        weights = torch.softmax(logits, -1)
        if part == "softmax":
            call = partial(torch.softmax, logits, -1)
        elif part == "av":
            call = partial(na_av, weights, value, **window, kernel=kernel)
        else:
            weights.requires_grad_()
            value.requires_grad_()
            out = na_av(weights, value, **window, kernel=kernel)
            call = partial(torch.autograd.grad, out, (weights, value), torch.randn_like(out), retain_graph=True)
    return measure(call, settings.device, settings.budget_ms)


def recorded_rows(settings: Settings, end: float | None) -> Iterator[dict[str, Any]]:
    """Passes and parts of the problems that the paper's own kernels were timed on, until the time is up."""
    for entry in read_data("rungs_h200.json")["problems"]:
        if end is not None and time.monotonic() > end:
            break
        problem = parse_problem(entry)
        for name, theirs in entry["rungs_ms"].items():
            rung = name.split("_")[0]
            tf32 = name == "gemm_tf32"
            torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
            measurement = measure_rung(problem, rung, Settings(**{**vars(settings), "allow_tf32": tf32}))
            measured: dict[str, float] = {str(pass_): ms for pass_, ms in measurement.ms.items()}
            for part in PARTS if rung != "fused" else ():
                try:
                    measured[part] = attempt(part_timing, problem, part, Kernel[rung], settings).ms
                except NotSupported as reason:
                    print(f"{problem.name} {problem.dtype} {name} {part}: {reason}", file=sys.stderr)
            recorded = {**{pass_: theirs[pass_] for pass_ in PASSES}, **theirs.get("parts", {})}
            for what, recorded_ms in recorded.items():
                ms = measured.get(what)
                yield {
                    "problem": problem.name,
                    "dtype": problem.dtype,
                    "rung": name,
                    "kernels": list(measurement.kernels),
                    "what": what,
                    "ms": None if ms is None else round(ms, 5),
                    "recorded_ms": recorded_ms,
                    "speedup": None if ms is None else round(recorded_ms / ms, 3),
                }
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def recorded_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per problem and rung: our ms (times faster than recorded) for each pass and part."""
    whats = (*PASSES, *PARTS)
    columns = [Column("problem", right=False), Column("dtype", right=False), Column("rung", right=False)]
    columns += [Column(what) for what in whats]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        if row["ms"] is not None:
            line = lines.setdefault((row["problem"], row["dtype"], row["rung"]), {})
            line[row["what"]] = f"{number(row['ms'])} (x{number(row['speedup'], 2)})"
    return plain_table(columns, [[*key, *(line.get(what, "-") for what in whats)] for key, line in lines.items()])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("grid", "recorded", "both"), default="both")
    parser.add_argument("--seconds", type=float, help="begin no problem after this time; the grid is sampled")
    parser.add_argument("--seed", type=int, default=0, help="of the grid's order")
    parser.add_argument("--budget-ms", type=float, default=20.0, help="time to spend on each measurement")
    parser.add_argument("--rank", type=int, choices=(1, 2, 3), help="only this rank of the grid")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 products for float32 in the grid")
    parser.add_argument("--output", help="write OUTPUT.json and OUTPUT.txt")
    parser.add_argument("--commit", help="revision to name, where the code runs outside its repository")
    arguments = parser.parse_args(argv)
    require_library()
    if not torch.cuda.is_available():
        raise SystemExit("the rungs are CUDA kernels; no CUDA device is visible")
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = CEILINGS.get(device_name(device)) or measure_ceilings(device)
    settings = Settings(device, ceilings, arguments.budget_ms, arguments.tf32)
    head = circumstances(
        device, ["python", "tools/rungs.py", *(argv if argv is not None else sys.argv[1:])], arguments.commit
    )
    end = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    rows: list[dict[str, Any]] = []
    measurements: list[Measurement] = []
    problems = [problem for problem in grid() if arguments.rank in (None, problem.rank)]
    extra: dict[str, Any] = {}
    if arguments.part != "grid":
        recorded = read_data("rungs_h200.json")
        extra["recorded"] = f"{recorded['provenance']} {recorded['units']}"

    def report() -> str:
        """The tables of what is measured so far; written with the rows, so that the run may be ended at any time."""
        text = [f"{head['device']}, driver {head['driver']}, torch {torch.__version__}, {head['date']}"]
        if rows:
            text.append("ms (times faster than the recorded kernels of the paper)\n" + recorded_table(rows))
        if measurements:
            means = averages(measurements)
            covered = len({(m.problem.name, m.problem.dtype) for m in measurements})
            extra.update(grid=len(problems), covered=covered, averages=[mean.as_json() for mean in means])
            text.append(f"averages over {covered} of {len(problems)} problems\n" + averages_table(means))
        if arguments.output:
            write_json(arguments.output + ".json", head, [*rows, *(m.as_json() for m in measurements)], **extra)
            replace_text(arguments.output + ".txt", "\n\n".join(text) + "\n")
        return "\n\n".join(text)

    if arguments.part != "grid":
        for row in recorded_rows(settings, end):
            rows.append(row)
            report()
    if arguments.part != "recorded":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if arguments.tf32 else "ieee"
        order = problems if end is None else evenly_sampled(problems, arguments.seed)
        for measurement in sweep(order, settings, end):
            measurements.append(measurement)
            if measurement.rung == RUNGS[-1]:  # averages compare whole problems
                report()
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
