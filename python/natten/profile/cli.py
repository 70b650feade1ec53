"""``python -m natten profile``: the command line and its tables."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from natten._library import require_library
from natten.bench.floors import CEILINGS, Ceilings, attention_work, measure_ceilings
from natten.bench.problems import DTYPES, PASSES, BenchProblem, load_problems
from natten.bench.report import Column, RowFile, circumstances, device_name, number, print_table
from natten.bench.run import Settings, Skip
from natten.bench.windows import checked_problem
from natten.dispatch import FAMILIES, Kernel, Operation
from natten.profile import counters, plot
from natten.profile.analysis import Profile, explanation, profiles
from natten.profile.tiles import plan_pass


def _list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _per_axis(text: str) -> tuple[int, ...]:
    """``64x48`` or ``7``."""
    try:
        return tuple(int(item) for item in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by x, for example 64x48; got {text!r}") from None


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m natten profile",
        description="What every kernel makes of a problem: time, work done and needed, bytes, shares of its floors.",
    )
    add = result.add_argument
    add("problems", nargs="*", metavar="PROBLEM", help="names of the benchmark's list; or --shape and its companions")
    add("--list", default="problems_h200.json", help="problem file: a path, or one shipped with the benchmark")
    shape = result.add_argument_group("a problem of your own (lengths along axes joined by x, or one for all)")
    shape.add_argument("--shape", type=_per_axis, help="for example 64x64")
    shape.add_argument("--kernel-size", type=_per_axis, help="for example 7 or 7x9")
    shape.add_argument("--stride", type=_per_axis, default=(1,))
    shape.add_argument("--dilation", type=_per_axis, default=(1,))
    shape.add_argument("--causal", type=_per_axis, nargs="?", const=(1,), default=(0,), help="all axes, or 1x0")
    shape.add_argument("--batch", type=int, help="default 1; replaces a listed problem's")
    shape.add_argument("--heads", type=int, default=1)
    shape.add_argument("--heads-kv", type=int, help="default: heads")
    shape.add_argument("--head-dim", type=int, default=64)
    shape.add_argument("--head-dim-v", type=int, help="default: head dim")
    add("--dtype", choices=tuple(DTYPES), help="default: a listed problem's; else bfloat16, on the CPU float32")
    add("--passes", type=_list, default=list(PASSES), help="of forward, backward")
    add("--kernels", type=_list, default=[], help="default: every family of the device")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--graph", action="store_true", help="time replays of CUDA graphs: without the host's time")
    add("--tf32", action="store_true", help="allow TF32 products for float32")
    add("--budget-ms", type=float, default=100.0, help="time to spend on each measurement")
    add("--limit-ms", type=float, default=5000.0, help="skip kernels estimated to take longer per call")
    add("--seconds", type=float, default=math.inf, help="begin nothing new after this time, and end ncu then")
    add("--counters", action="store_true", help="hardware counters, by a second run under Nsight Compute's ncu")
    add("--plot", metavar="FILE", help="write a roofline picture (needs matplotlib)")
    add("--json", metavar="FILE", help="write all numbers as they come, with device, versions, commit and command")
    add("--commit", help="revision to name in the file, where the code runs outside its repository")
    add("--dry-run", action="store_true", help="show candidates and tile plans; nothing is run, no GPU is needed")
    add("--capability", help="with --dry-run: decide for this compute capability, for example 9.0")
    return result


def _axes(name: str, given: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if len(given) == 1:
        return given * rank
    if len(given) != rank:
        raise SystemExit(f"--{name}: {len(given)} values for {rank} axes")
    return given


def own_problem(arguments: argparse.Namespace, dtype: str) -> BenchProblem:
    """The problem that ``--shape`` and its companions describe."""
    if arguments.kernel_size is None:
        raise SystemExit("--shape needs --kernel-size")
    rank = len(arguments.shape)
    kernel_size = _axes("kernel-size", arguments.kernel_size, rank)
    name = "x".join(map(str, arguments.shape)) + "-k" + "x".join(map(str, dict.fromkeys(kernel_size)))
    return BenchProblem(
        name=name,
        batch=arguments.batch or 1,
        shape=arguments.shape,
        heads=arguments.heads,
        heads_kv=arguments.heads_kv,
        head_dim=arguments.head_dim,
        head_dim_v=arguments.head_dim_v,
        kernel_size=kernel_size,
        stride=_axes("stride", arguments.stride, rank),
        dilation=_axes("dilation", arguments.dilation, rank),
        causal=tuple(map(bool, _axes("causal", arguments.causal, rank))),
        dtype=dtype,
    )


def chosen_problems(arguments: argparse.Namespace, device: torch.device) -> list[BenchProblem]:
    """What to profile; checked as a call would check it."""
    if bool(arguments.problems) == (arguments.shape is not None):
        raise SystemExit("name problems, or describe one with --shape and --kernel-size")
    if arguments.shape is not None:
        found = [own_problem(arguments, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))]
    else:
        changes: dict[str, Any] = {"dtype": arguments.dtype, "batch": arguments.batch}
        changes = {name: value for name, value in changes.items() if value is not None}
        try:
            listed = load_problems(arguments.list, arguments.problems).problems
        except (OSError, ValueError) as error:
            raise SystemExit(str(error)) from None
        found = [BenchProblem(**{**vars(problem), **changes}) for problem in listed]
    for problem in found:
        try:
            checked_problem(problem, DTYPES[problem.dtype], device)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{problem.name}: {error}") from None
    return found


Table = tuple[list[Column], list[list[str]]]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def profile_table(rows: Sequence[Profile]) -> Table:
    """One line per kernel and pass; rates in the larger unit that suits the fastest."""
    unit, scale = plot.rate_unit(rows)
    columns = [Column("problem", right=False), Column("pass", right=False), Column("kernel", right=False)]
    columns += [
        Column(title)
        for title in (
            "ms",
            "useful GFLOP",
            "executed",
            "MB",
            "FLOP/B",
            f"useful {unit}",
            f"executed {unit}",
            "of bytes floor",
            "of FLOP floor",
        )
    ]
    cells = [
        [
            row.problem.name,
            row.pass_,
            row.kernel.name,
            number(row.timing.ms, 4),
            number(row.useful.flops * 1e-9, 4),
            f"x {row.executed_flops / row.useful.flops:.2f}",
            number(row.moved_bytes * 1e-6, 4),
            number(row.intensity),
            number(row.useful_tflops * scale),
            number(row.executed_tflops * scale),
            _percent(row.bytes_share),
            _percent(row.flops_share),
        ]
        for row in rows
    ]
    return columns, cells


def counters_table(counted: Sequence[counters.Counters]) -> Table:
    columns = [Column(title, right=False) for title in ("problem", "pass", "kernel", "function")]
    columns += [
        Column(title)
        for title in (
            "us",
            "DRAM MB",
            "L2 MB",
            "L2 hit %",
            "L1 hit %",
            "tensor %",
            "occupancy %",
            "of",
            "registers",
            "shared KB",
        )
    ]

    def scaled(value: float | None, factor: float) -> str:
        return number(None if value is None else value * factor)

    cells = [
        [
            call.problem,
            call.pass_,
            call.kernel,
            launch.short_name,
            number(launch.value("time_us"), 4),
            scaled(launch.dram_bytes, 1e-6),
            scaled(launch.value("l2_bytes"), 1e-6),
            *(
                number(launch.value(name))
                for name in ("l2_hit_pct", "l1_hit_pct", "tensor_pct", "occupancy_pct", "theoretical_occupancy_pct")
            ),
            number(launch.value("registers")),
            scaled(launch.shared_bytes, 1 / 1024),
        ]
        for call in counted
        for launch in call.launches
    ]
    return columns, cells


def plan_table(problems: Sequence[BenchProblem], passes: Sequence[str], kernels: Sequence[Kernel]) -> Table:
    """Tiles of every family that takes the type and head dims, on whatever device it runs."""
    columns = [Column(title, right=False) for title in ("problem", "pass", "kernel", "step")]
    columns += [Column("tile"), Column("skips by"), Column("box"), Column("useful scores"), Column("executed FLOPs")]

    def extents(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values)) or "-"

    cells = []
    for problem in problems:
        checked = checked_problem(problem, DTYPES[problem.dtype], torch.device("cpu"))
        pairs = checked.batch * checked.heads * checked.window_pairs()
        for pass_ in PASSES:
            if pass_ not in passes:
                continue
            useful = attention_work(problem, pass_, problem.dtype).flops
            for kernel in kernels:
                family = FAMILIES[kernel]
                most = family.largest_head_dim(checked.dtype) or math.inf
                if checked.dtype not in family.dtypes or any(
                    size % family.head_dim_multiple or size > most for size in (checked.head_dim, checked.head_dim_v)
                ):
                    continue
                for plan in plan_pass(kernel, checked, pass_):
                    cells.append(
                        [
                            problem.name,
                            pass_,
                            kernel.name,
                            f"{plan.step.name} (owns {plan.step.owns})",
                            extents(plan.tile),
                            extents(plan.rows),
                            extents(plan.box),
                            f"{pairs / plan.scores:.0%}",
                            f"x {plan.flops / useful:.2f}",
                        ]
                    )
    return columns, cells


def dry_run(
    problems: Sequence[BenchProblem],
    passes: Sequence[str],
    kernels: Sequence[Kernel],
    device: torch.device,
    capability: tuple[int, int] | None,
) -> int:
    """Prints the dispatcher's decisions and the tile plans; 1 if no kernel can run some problem."""
    status = 0
    for problem in problems:
        try:
            gradients = Operation.backward.name in passes
            decision = explanation(problem, problem.dtype, device, requires_grad=gradients, capability=capability)
            print(f"{problem.name}: {decision}\n")
        except RuntimeError as error:
            status = 1
            print(f"{problem.name}: {error}\n")
    print_table(*plan_table(problems, passes, kernels), title="tiles and boxes, simulated")
    return status


def _progress(item: object) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{item.problem} {item.pass_} {item.kernel}", end="", file=sys.stderr, flush=True)  # type: ignore[attr-defined]


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise SystemExit(f"--capability: expected two numbers such as 9.0; got {text!r}")
    return int(major), int(minor)


def _ceilings_text(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{number(rate)} TFLOP/s in {name}" for name, rate in ceilings.tflops.items())
    return f"ceilings: {number(ceilings.bandwidth_tbps)} TB/s; {rates}"


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles problems; 1 if nothing could be measured, or counters were asked for and not read."""
    arguments = parser().parse_args(argv)
    require_library()
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    for name, values, allowed in (
        ("passes", arguments.passes, PASSES),
        ("kernels", arguments.kernels, tuple(Kernel.__members__)),
    ):
        unknown = [value for value in values if value not in allowed]
        if unknown:
            raise SystemExit(f"--{name}: {', '.join(unknown)} not among {', '.join(allowed)}")
    problems = chosen_problems(arguments, device)
    if arguments.dry_run:
        capability = None if arguments.capability is None else _capability(arguments.capability)
        shown = [Kernel[name] for name in arguments.kernels] or list(Kernel)
        return dry_run(problems, arguments.passes, shown, device, capability)
    if arguments.counters and device.type != "cuda":
        raise SystemExit("--counters reads a GPU's counters; the device is the CPU")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib, which the extra `bench` brings: pip install 'natten[bench]'")
    if arguments.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    ceilings = CEILINGS.get(device_name(device)) or measure_ceilings(device)
    here = [kernel.name for kernel, family in FAMILIES.items() if family.device == device.type]
    settings = Settings(
        device=device,
        ceilings=ceilings,
        kernels=tuple(arguments.kernels or here),
        passes=tuple(arguments.passes),
        peers=(),
        budget_ms=arguments.budget_ms,
        limit_ms=arguments.limit_ms,
        graph=arguments.graph,
        allow_tf32=arguments.tf32,
        end=time.monotonic() + arguments.seconds,
    )
    command = ["python", "-m", "natten", "profile", *(sys.argv[2:] if argv is None else argv)]
    head = circumstances(device, command, arguments.commit)
    rows: list[Profile] = []
    skips: list[Skip] = []
    counted: list[counters.Counters] = []
    file = RowFile(
        arguments.json,
        head,
        ceilings={"bandwidth_tbps": ceilings.bandwidth_tbps, "tflops": dict(ceilings.tflops)},
        timing="CUDA graph replays" if settings.graph else "eager calls, host overhead included",
        counters=[],
    )
    for item in profiles(problems, settings, _progress):
        if isinstance(item, Profile):
            rows.append(item)
            file.add(item.as_json())
        else:
            skips.append(item)
            file.skip(**item.as_json())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)

    types = ", ".join(dict.fromkeys(problem.dtype for problem in problems))
    title = f"{head['device']}, torch {torch.__version__}, {types}{', CUDA graphs' if settings.graph else ''}"
    if rows:
        print_table(*profile_table(rows), title=title)
        print(_ceilings_text(ceilings))
    if skips:
        print("\nnot measured:")
        for skip in skips:
            print(f"  {skip.problem} {skip.pass_} {skip.kernel}: {skip.reason}")

    status = 0 if rows else 1
    if arguments.counters:
        for problem in problems:
            group = [row for row in rows if row.problem.name == problem.name]
            try:
                if group:
                    counted += counters.count(group, arguments.tf32, min(600.0, settings.end - time.monotonic()))
            except counters.CountersUnavailable as reason:
                print(f"\nno counters of {problem.name}: {reason}")
                status = 1
            file.extra["counters"] = [call.as_json() for call in counted]
            file.save()
        if counted:
            print()
            print_table(*counters_table(counted), title="counters of one call, caches empty before each launch")
    if arguments.plot and rows:
        names = ", ".join(dict.fromkeys(row.problem.name for row in rows))
        plot.draw(arguments.plot, rows, ceilings, f"{names} ({title})", counted, arguments.tf32)
    return status
