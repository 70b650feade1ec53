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

    def of_form(self, kernel: Kernel, form: str) -> float:
        composite = dispatch.FAMILIES[kernel].composite
        return _cost._milliseconds(_cost._FORMS[form], kernel, self.problem, self.operation, CAPABILITY, composite)

    def taken_form(self, kernel: Kernel) -> str:
        return min(_cost._forms(kernel, self.problem, self.operation), key=lambda form: self.of_form(kernel, form))

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
    """Least squares of the logarithms, for each form of a kernel, over its constants."""
    from scipy.optimize import least_squares  # type: ignore[import-untyped, unused-ignore]

    names = ("efficiency", "score_ps", "tile_ns", "bandwidth")
    low, high = (0.01, 1e-3, 1e-3, 0.1), (1.3, 60.0, 900.0, 1.0)
    for _ in range(2):  # which form is taken depends on the constants of all
        for form, start in list(_cost._FORMS.items()):
            mine = [(row, kernel) for row in rows for kernel in row.measured if row.taken_form(kernel) == form]
            if len(mine) < 6:
                continue

            def candidate(x: Sequence[float], start: _cost.Cost = start) -> _cost.Cost:
                values: dict[str, Any] = dict(zip(names, map(math.exp, x), strict=True))
                return replace(start, **values)

            def residuals(x: Sequence[float], mine: Any = mine, form: str = form, candidate: Any = candidate) -> Any:
                _cost._FORMS[form] = candidate(x)
                # A row in which this kernel is far from the best decides nothing.
                return [
                    math.log(row.of_form(kernel, form) / row.measured[kernel])
                    * min(1.0, 2 * min(row.measured.values()) / row.measured[kernel])
                    for row, kernel in mine
                ]

            x0 = [
                math.log(min(max(getattr(start, name), 1.01 * least), 0.99 * most))
                for name, least, most in zip(names, low, high, strict=True)
            ]
            bounds = ([math.log(value) for value in low], [math.log(value) for value in high])
            found = least_squares(residuals, x0, bounds=bounds, loss="soft_l1", diff_step=1e-3)
            best = _cost._FORMS[form] = candidate(found.x)
            text = ", ".join(f"{name}={getattr(best, name):.3g}" for name in names)
            print(f"{form:<34}{text}  # {rms(residuals(found.x)):.0%} of {len(mine)} rows")
            _cost._FORMS[form] = best
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
