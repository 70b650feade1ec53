"""``python -m natten bench``: the command line, its table and its file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from natten._library import require_library
from natten.bench.floors import CEILINGS, measure_ceilings
from natten.bench.problems import DTYPES, PASSES, ProblemList, load_problems
from natten.bench.report import Column, RowFile, add_run_arguments, circumstances, device_name, number, print_table
from natten.bench.run import (
    AUTO,
    DISPATCH_TOLERANCE,
    Misjudged,
    Results,
    Row,
    Settings,
    Skip,
    check_dispatch,
    run,
    with_batch,
)
from natten.dispatch import FAMILIES, Kernel

# Small enough for a minute, and every rank, dilation and both ceilings are among them.
QUICK = ("nat-s1", "dinat-s1", "nat-s3", "hdit-64", "2d-k13-d64", "3d-swin", "1d-16k-dil4", "1d-32k-w2k", "cosmos-dil")


def _list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m natten bench",
        description="Times neighborhood attention: medians, useful TFLOP/s, shares of the floors, and peers.",
    )
    result.add_argument("--problems", type=_list, default=[], help="names, comma-separated; default: all of the list")
    result.add_argument("--list", default="problems_h200.json", help="problem file: a path, or one shipped here")
    result.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, with fewer repetitions")
    result.add_argument("--batch", type=int, help="replace every problem's batch size")
    result.add_argument("--kernels", type=_list, default=[AUTO], help=f"of {AUTO}, {', '.join(Kernel.__members__)}")
    result.add_argument("--passes", type=_list, default=list(PASSES), help="of forward, backward")
    result.add_argument("--dtypes", type=_list, default=[], help="default: each problem's own")
    result.add_argument("--no-dense", action="store_true", help="leave out dense attention (SDPA, cuDNN and flash)")
    result.add_argument("--flex", action="store_true", help="time FlexAttention, compiled, too")
    result.add_argument("--unfold", action="store_true", help="time plain torch (gathered windows), compiled, too")
    result.add_argument("--unfused", action="store_true", help="time qk, av and inverse_av instead of attention")
    result.add_argument("--graph", action="store_true", help="time replays of CUDA graphs: without the host's time")
    result.add_argument("--tf32", action="store_true", help="allow TF32 products for float32")
    result.add_argument("--check-dispatch", action="store_true", help="fail where 'auto' loses to a measured kernel")
    result.add_argument("--budget-ms", type=float, help="time to spend on each measurement (default 100)")
    result.add_argument("--limit-ms", type=float, default=5000, help="skip what is estimated to take longer per call")
    add_run_arguments(result)
    return result


def _check(name: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [value for value in values if value not in allowed]
    if unknown:
        raise SystemExit(f"--{name}: {', '.join(unknown)} not among {', '.join(allowed)}")


def _microseconds(ms: float) -> str:
    return f"{ms:.4f}" if ms < 1 else number(ms, 4)


def table(rows: Sequence[Row]) -> tuple[list[Column], list[list[str]]]:
    """Columns and cells; a peer's column says how many times faster than that peer the kernel is."""
    peer_names = list(dict.fromkeys(name for row in rows for name in row.peers))
    columns = [
        Column("problem", right=False),
        Column("pass", right=False),
        Column("dtype", right=False),
        Column("kernel", right=False),
        Column("ms"),
        Column("spread"),
        Column("TFLOP/s"),
        Column("of floor"),
        Column("x target"),
        *(Column(f"x {name}") for name in peer_names),
    ]
    cells = []
    for row in rows:
        ms = row.timing.ms
        spread = (row.timing.high_ms - row.timing.low_ms) / ms
        cells.append(
            [
                row.problem,
                row.pass_,
                row.dtype,
                row.kernel if row.chosen is None else f"{row.kernel} ({row.chosen})",
                _microseconds(ms),
                f"{spread:.0%}",
                number(row.useful_tflops),
                "-" if row.floor_share is None else f"{row.floor_share:.0%}",
                number(None if row.target_ms is None else row.target_ms / ms),
                *(number(row.peers[name] / ms if name in row.peers else None) for name in peer_names),
            ]
        )
    return columns, cells


def _misjudged_table(misjudged: Sequence[Misjudged]) -> tuple[list[Column], list[list[str]]]:
    columns = [
        Column(title, right=title in ("ms", "better ms"))
        for title in ("problem", "pass", "dtype", "chosen", "ms", "better", "better ms")
    ]
    cells = [
        [m.problem, m.pass_, m.dtype, m.chosen, _microseconds(m.chosen_ms), m.better, _microseconds(m.better_ms)]
        for m in misjudged
    ]
    return columns, cells


def _print_results(results: Results, title: str) -> None:
    if results.rows:
        print_table(*table(results.rows), title=title)
    if results.skips:
        print("\nnot measured:")
        for skip in results.skips:
            print(f"  {skip.problem} {skip.pass_} {skip.dtype} {skip.kernel}: {skip.reason}")


def _progress(item: Row | Skip) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{item.problem} {item.pass_} {item.kernel}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if ``--check-dispatch`` found a wrong choice or nothing could be measured."""
    arguments = parser().parse_args(argv)
    require_library()
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    kernels = list(arguments.kernels)
    _check("kernels", kernels, [AUTO, *Kernel.__members__])
    _check("passes", arguments.passes, PASSES)
    _check("dtypes", arguments.dtypes, list(DTYPES))
    if arguments.check_dispatch:
        here = [kernel.name for kernel, family in FAMILIES.items() if family.device == device.type]
        kernels = [AUTO, *(name for name in kernels if name != AUTO)] if kernels != [AUTO] else [AUTO, *here]
    names = arguments.problems or (QUICK if arguments.quick and arguments.list == "problems_h200.json" else ())
    try:
        problems: ProblemList = load_problems(arguments.list, names)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if arguments.batch is not None:
        problems = with_batch(problems, arguments.batch)
    peers = [] if arguments.no_dense or device.type != "cuda" else ["dense_cudnn", "dense_flash2"]
    peers += ["flex"] if arguments.flex else []
    peers += ["unfold"] if arguments.unfold else []
    if arguments.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    known = CEILINGS.get(device_name(device))
    ceilings = known if known is not None else measure_ceilings(device)
    settings = Settings(
        device=device,
        ceilings=ceilings,
        kernels=tuple(kernels),
        passes=tuple(arguments.passes),
        peers=tuple(peers),
        budget_ms=arguments.budget_ms or (30.0 if arguments.quick else 100.0),
        limit_ms=arguments.limit_ms,
        graph=arguments.graph,
        allow_tf32=arguments.tf32,
        end=time.monotonic() + arguments.seconds,
    )
    command = ["python", "-m", "natten", "bench", *(sys.argv[2:] if argv is None else argv)]
    head = circumstances(device, command, arguments.commit)
    recorded = problems.device == head["device"]
    results = Results()
    file = RowFile(
        arguments.json,
        head,
        ceilings={"bandwidth_tbps": ceilings.bandwidth_tbps, "tflops": dict(ceilings.tflops)},
        timing="CUDA graph replays" if settings.graph else "eager calls, host overhead included",
        recorded_peers=problems.provenance if recorded else None,
    )
    for item in run(problems, arguments.dtypes, settings, recorded, arguments.unfused):
        _progress(item)
        results.add(item)
        if isinstance(item, Row):
            file.add(item.as_json())
        else:
            file.skip(**item.as_json())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    title = f"{head['device']}, torch {torch.__version__}" + (", CUDA graphs" if settings.graph else "")
    _print_results(results, title)
    if recorded and any(row.peers for row in results.rows):
        print(f"\nrecorded peers: {problems.provenance}")
    if arguments.check_dispatch:
        if not results.rows:
            print("\nnothing was measured: the dispatcher's choices are not checked")
            return 1
        misjudged = check_dispatch(results.rows)
        if misjudged:
            print(f"\nthe dispatcher's choice loses by more than {DISPATCH_TOLERANCE:.0%}:")
            print_table(*_misjudged_table(misjudged))
            return 1
        print("\nno measured kernel beats the dispatcher's choice")
    return 0 if results.rows else 1
