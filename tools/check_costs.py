#!/usr/bin/env python3
"""Checks the dispatcher's estimates against measurements, and fits their constants.

    tools/check_costs.py measure --json costs.json    random problems on this GPU, every kernel that can run them
    tools/check_costs.py report costs.json ...        how often the estimates choose well, and where they do not
    tools/check_costs.py fit costs.json ...           constants for python/natten/_cost.py (needs scipy)

`measure` writes a row for each problem and pass as it comes: {problem, pass, ms: {kernel: milliseconds}}. A choice is
good when it takes at most 5 % longer than the fastest kernel that was measured. `report` and `fit` need no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import natten
from natten import _cost, _tune, dispatch
from natten._kernels import Kernel, Operation
from natten._problem import ALLOW_TF32, Problem
from natten.bench.problems import load_problems
from natten.bench.report import Column, plain_table

CAPABILITY = (9, 0)
GOOD = 1.05
FAR_SLOWER = 12.0  # kernels estimated at more times the best are not run
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def build(spec: dict[str, Any], device: str) -> Problem:
    """The problem of a specification: extents, window, heads and type."""
    query = (spec["batch"], *spec["shape"], spec["heads"], spec["dim"])
    key = (spec["batch"], *spec["shape"], spec["heads_kv"], spec["dim"])
    problem = natten.explain(
        query,
        key,
        key,
        spec["window"],
        spec["stride"],
        spec["dilation"],
        spec["causal"],
        dtype=DTYPES[spec["dtype"]],
        device=device,
        requires_grad=False,
    ).problem
    return replace(problem, flags=problem.flags | ALLOW_TF32) if spec.get("tf32") else problem


def random_specification(generator: random.Random) -> dict[str, Any]:
    """A problem of a size that a layer of a model has."""
    while True:
        rank = generator.choice((1, 2, 2, 3, 3))
        tokens = 2 ** generator.uniform(10, {1: 15.5, 2: 16, 3: 16}[rank])
        ratios = [2 ** generator.uniform(-0.7, 0.7) for _ in range(rank)]
        scale = (tokens / math.prod(ratios)) ** (1 / rank)
        shape = [max(round(scale * ratio), 4) for ratio in ratios]
        longest = {1: 2048, 2: 63, 3: 15}[rank]
        window = [min(round(2 ** generator.uniform(1.5, math.log2(longest))), extent) for extent in shape]
        if generator.random() < 0.5:
            window = [min(window[0], extent) for extent in shape]
        dilation = [generator.randint(1, max(extent // size, 1)) for extent, size in zip(shape, window, strict=True)]
        if generator.random() < 0.7:
            dilation = [1] * rank
        stride = [generator.randint(1, size) if generator.random() < 0.2 else 1 for size in window]
        causal = [generator.random() < 0.15 for _ in range(rank)]
        heads = generator.choice((1, 2, 4, 8, 12, 16, 24))
        heads_kv = heads if generator.random() < 0.85 else generator.choice([h for h in (1, 2, 4) if heads % h == 0])
        dim = generator.choice((32, 32, 64, 64, 64, 128, 128, 40, 80, 96, 192))
        rows = 2 ** generator.uniform(14, 20.5)
        batch = max(round(rows / (math.prod(shape) * heads)), 1)
        dtype = generator.choice(("bfloat16", "float16", "bfloat16", "float16", "float32"))
        spec = {
            "batch": batch,
            "shape": shape,
            "heads": heads,
            "heads_kv": heads_kv,
            "dim": dim,
            "window": window,
            "stride": stride,
            "dilation": dilation,
            "causal": causal,
            "dtype": dtype,
            "tf32": dtype == "float32" and generator.random() < 0.5,
        }
        pairs = batch * heads * math.prod(shape) * math.prod(window)
        if pairs * dim * 4 < 6e11 and batch * math.prod(shape) * heads * dim < 3e8:
            return spec


def listed_specifications() -> Iterator[dict[str, Any]]:
    """The benchmark's problem list."""
    for problem in load_problems().problems:
        yield {
            "name": problem.name,
            "batch": problem.batch,
            "shape": list(problem.shape),
            "heads": problem.heads,
            "heads_kv": problem.key_heads,
            "dim": problem.head_dim,
            "window": list(problem.kernel_size),
            "stride": list(problem.stride),
            "dilation": list(problem.dilation),
            "causal": list(problem.causal),
            "dtype": problem.dtype,
            "tf32": False,
        }


def measure_problem(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The time of every kernel that can run the problem and is not estimated to be far slower, for each pass."""
    problem = build(spec, "cuda")
    tensors = _tune._Tensors(problem)
    for operation in (Operation.forward, Operation.backward):
        standing = dispatch.candidates(problem, operation)
        possible = [c for c in standing if c.rejected is None and c.milliseconds is not None]
        best = min(c.milliseconds or 0.0 for c in possible)
        search = _tune._Search(tensors, operation, math.inf)
        times = {}
        for candidate in sorted(possible, key=lambda c: c.milliseconds or 0.0):
            if (candidate.milliseconds or 0.0) <= FAR_SLOWER * best:
                ms = search.measure(candidate.kernel)
                if ms is not None:
                    times[candidate.kernel.name] = round(ms, 5)
        yield {"problem": spec, "pass": operation.value, "ms": times}


def write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def measure(arguments: argparse.Namespace) -> int:
    generator = random.Random(arguments.seed)
    specs: list[dict[str, Any]] = list(listed_specifications()) if arguments.list else []
    specs += [random_specification(generator) for _ in range(arguments.count)]
    specs = specs[arguments.part :: arguments.parts]
    end = time.monotonic() + arguments.seconds
    content: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "natten": natten.__version__},
        "command": f"tools/check_costs.py measure --count {arguments.count} --seed {arguments.seed}",
        "commit": arguments.commit,
        "rows": [],
    }
    done = 0
    with torch.no_grad():
        for spec in specs:
            if time.monotonic() > end:
                break
            try:
                content["rows"] += measure_problem(spec)
            except (RuntimeError, ValueError) as error:
                print(f"{spec}: {error}")
            done += 1
            write(Path(arguments.json), content)
    print(f"{done} of {len(specs)} problems, {len(content['rows'])} rows in {arguments.json}")
    return 0


@dataclass(frozen=True)
class Row:
    """One problem and pass: what was measured, and what is estimated now."""

    spec: dict[str, Any]
    operation: Operation
    problem: Problem
    measured: dict[Kernel, float]

    def estimate(self, kernel: Kernel) -> float:
        composite = dispatch.FAMILIES[kernel].composite
        return _cost.milliseconds(kernel, self.problem, self.operation, CAPABILITY, composite)

    @property
    def chosen(self) -> Kernel:
        return min(self.measured, key=self.estimate)

    @property
    def loss(self) -> float:
        """Time of the choice over that of the fastest."""
        return self.measured[self.chosen] / min(self.measured.values())


def load(paths: Sequence[str]) -> list[Row]:
    rows = []
    for path in paths:
        for row in json.loads(Path(path).read_text())["rows"]:
            times = {Kernel[name]: ms for name, ms in row["ms"].items()}
            if times:
                rows.append(Row(row["problem"], Operation(row["pass"]), build(row["problem"], "cpu"), times))
    return rows


def describe(spec: dict[str, Any]) -> str:
    def join(values: Sequence[int]) -> str:
        return "x".join(map(str, values))

    text = f"{spec['batch']}x{join(spec['shape'])} H{spec['heads']}/{spec['heads_kv']} D{spec['dim']} {spec['dtype']}"
    text += f" k{join(spec['window'])}"
    for letter, name, trivial in (("s", "stride", 1), ("d", "dilation", 1), ("c", "causal", False)):
        if any(value != trivial for value in spec[name]):
            text += f" {letter}{join([int(value) for value in spec[name]])}"
    return str(spec.get("name", text + (" tf32" if spec["tf32"] else "")))


def report(rows: Sequence[Row]) -> None:
    contested = [row for row in rows if len(row.measured) > 1]
    for name, some in (("listed", [r for r in rows if "name" in r.spec]), ("all", list(rows))):
        if some:
            losses = [row.loss for row in some]
            share = sum(loss <= GOOD for loss in losses) / len(losses)
            print(f"{name}: {len(some)} rows, within 5 %: {share:.1%}, worst {max(losses):.2f}x")
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        for kernel, ms in row.measured.items():
            errors[kernel.name, row.operation.value].append(math.log(row.estimate(kernel) / ms))
    lines = [
        [kernel, operation, str(len(e)), f"{math.exp(sum(e) / len(e)):.2f}", f"{rms(e):.0%}"]
        for (kernel, operation), e in sorted(errors.items())
    ]
    columns = [
        Column("kernel", right=False),
        Column("pass", right=False),
        Column("rows"),
        Column("bias"),
        Column("rms"),
    ]
    print(plain_table(columns, lines))
    worst = sorted((row for row in contested if row.loss > GOOD), key=lambda row: -row.loss)
    names = ("loss", "pass", "chosen", "measured ms (estimated)", "problem")
    print(
        plain_table(
            [Column(name, right=name == "loss") for name in names],
            [
                [
                    f"{row.loss:.2f}",
                    row.operation.value,
                    row.chosen.name,
                    ", ".join(f"{k.name} {ms:.3f} ({row.estimate(k):.3f})" for k, ms in row.measured.items()),
                    describe(row.spec),
                ]
                for row in worst[:40]
            ],
        )
    )


def rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def fit(rows: Sequence[Row]) -> None:
    """Least squares of the logarithms, for each kernel and pass, over efficiency, score_ps and tile_ns."""
    from scipy.optimize import least_squares  # type: ignore[import-untyped, unused-ignore]

    costs = {kernel: dict(table) for kernel, table in _cost._COSTS.items()}
    _cost._COSTS = costs  # estimates read what is fitted
    for kernel in (Kernel.naive, Kernel.gemm, Kernel.fused_sm80, Kernel.fused_sm90):
        for operation in (Operation.forward, Operation.backward):
            mine = [row for row in rows if row.operation is operation and kernel in row.measured]
            start = costs[kernel].get(operation)
            if start is None or len(mine) < 8:
                continue

            def candidate(x: Sequence[float], start: _cost.Cost = start) -> _cost.Cost:
                return replace(start, efficiency=math.exp(x[0]), score_ps=math.exp(x[1]), tile_ns=math.exp(x[2]))

            def residuals(
                x: Sequence[float],
                mine: list[Row] = mine,
                kernel: Kernel = kernel,
                operation: Operation = operation,
                candidate: Any = candidate,
            ) -> list[float]:
                costs[kernel][operation] = candidate(x)
                # A row in which this kernel is far from the best decides nothing.
                return [
                    math.log(row.estimate(kernel) / row.measured[kernel])
                    * min(1.0, 2 * min(row.measured.values()) / row.measured[kernel])
                    for row in mine
                ]

            x0 = [math.log(max(value, 1e-3)) for value in (start.efficiency, start.score_ps, start.tile_ns)]
            bounds = ([math.log(0.02), math.log(1e-3), math.log(1e-3)], [math.log(1.2), math.log(40), math.log(800)])
            x0 = [min(max(x, low + 1e-6), high - 1e-6) for x, low, high in zip(x0, *bounds, strict=True)]
            found = least_squares(residuals, x0, bounds=bounds, loss="soft_l1", diff_step=1e-3)
            costs[kernel][operation] = best = candidate(found.x)
            print(
                f"{kernel.name:<11}{operation.value:<9}efficiency={best.efficiency:.3f}, score_ps={best.score_ps:.3f}, "
                f"tile_ns={best.tile_ns:.2f}  # {rms(residuals(found.x)):.0%} of {len(mine)} rows"
            )
    print()
    report(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--json", required=True)
    measuring.add_argument("--count", type=int, default=200)
    measuring.add_argument("--seed", type=int, default=1)
    measuring.add_argument("--list", action="store_true", help="the benchmark's problem list too")
    measuring.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after this time")
    measuring.add_argument("--part", type=int, default=0, help="this one of --parts, for several GPUs")
    measuring.add_argument("--parts", type=int, default=1)
    measuring.add_argument("--commit", default="", help="revision to name in the file")
    for name in ("report", "fit"):
        commands.add_parser(name).add_argument("files", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        return measure(arguments)
    rows = load(arguments.files)
    if arguments.command == "report":
        report(rows)
    else:
        fit(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
