"""What a call costs on tiny problems, where kernels take no time: eager, compiled, and as a CUDA graph, beside SDPA.

    python tools/bench_overhead.py --json docs/performance/h200/overhead.json

Calls follow each other without waiting, and the clock stops when the device is idle: microseconds a call, of whatever
is slower, the host (eager, compiled) or the device (a graph of `GRAPH_CALLS` calls). Medians of `ROUNDS` rounds, the
contenders in turns, so that a change of the machine's pace meets all of them. `torch.nn.functional.
scaled_dot_product_attention` gets the same tokens and heads, dense, in its own layout. Parts of an eager call: the
operator alone, with its arguments and outputs ready; the allocation of its outputs; `torch.add` of as many tokens, the
least that torch charges for a kernel.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from natten._library import require_library
from natten.bench.peers import Contender, NotSupported, random_inputs
from natten.bench.problems import DTYPES, BenchProblem
from natten.bench.report import Column, RowFile, add_run_arguments, circumstances, number, print_table
from natten.bench.run import OUT_OF_TIME, natten_contender
from natten.bench.timing import graphed, summarize
from natten.dispatch import FAMILIES

GRAPH_CALLS = 20
ROUNDS = 9
PASSES = ("forward", "forward, gradients recorded", "forward + backward")
MODES = ("eager", "graph", "compiled")  # compiling takes the longest

Call = Callable[[], object]


def tiny(name: str, shape: Sequence[int], window: int, heads: int, dilation: int = 1) -> BenchProblem:
    rank = len(shape)
    return BenchProblem(
        name=name,
        batch=1,
        shape=tuple(shape),
        heads=heads,
        head_dim=64,
        kernel_size=(window,) * rank,
        stride=(1,) * rank,
        dilation=(dilation,) * rank,
        causal=(False,) * rank,
    )


PROBLEMS = (
    tiny("1d-128", [128], 7, 4),
    tiny("2d-14x14", [14, 14], 7, 8),
    tiny("2d-14x14-dilated", [14, 14], 7, 8, dilation=2),
    tiny("3d-4x8x8", [4, 8, 8], 3, 4),
)


def sdpa(problem: BenchProblem, dtype: torch.dtype, device: torch.device) -> Contender:
    """Dense attention, by whatever kernel torch prefers."""
    return Contender(scaled_dot_product_attention, *random_inputs(problem, None, dtype, device))


def step(contender: Contender, pass_: str) -> Call:
    """One call of a contender, with its backward pass where wanted."""
    inputs = (contender.query, contender.key, contender.value)
    for tensor in inputs:
        tensor.requires_grad_(pass_ != PASSES[0])
    if pass_ != PASSES[2]:
        return partial(contender.attention, *inputs)
    grad = torch.randn_like(contender.attention(*inputs))

    def both() -> object:
        return torch.autograd.grad(contender.attention(*inputs), inputs, grad)

    return both


def in_mode(contender: Contender, pass_: str, mode: str) -> tuple[Call, int]:
    """A callable, and the number of calls that it makes."""
    if mode == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(contender.attention, fullgraph=True, dynamic=False)
        return step(Contender(compiled, contender.query, contender.key, contender.value), pass_), 1
    call = step(contender, pass_)
    if mode == "eager":
        return call, 1

    def many() -> None:
        for _ in range(GRAPH_CALLS):
            call()

    return graphed(many), GRAPH_CALLS


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the arguments of the library's operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call: Call | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.natten.na_forward.default:
            self.call = partial(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def parts(contender: Contender) -> dict[str, Call]:
    """What an eager forward call is made of."""
    query, key, value = contender.query, contender.key, contender.value
    with _Recorder() as recorder:
        contender.attention(query, key, value)
    if recorder.call is None:
        raise NotSupported("the kernel does not run as one operator")
    rows = query.shape[:-1]

    def allocate() -> tuple[Tensor, Tensor]:
        return query.new_empty((*rows, value.shape[-1])), query.new_empty(rows, dtype=torch.float32)

    return {
        "operator alone": recorder.call,
        "allocation of its outputs": allocate,
        "torch.add": partial(torch.add, query, value),
    }


def microseconds(call: Call, device: torch.device, calls: int) -> float:
    """Of one of the calls that `call` makes, over about 4 ms."""

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    count = max(1, int(4e-3 / max(run(3) / 3, 1e-6)))
    return 1e6 * run(count) / (count * calls)


def measured(named: dict[str, tuple[Call, int]], device: torch.device) -> dict[str, dict[str, Any]]:
    """Medians and quantiles of every call, in turns, with the garbage collector at rest."""
    samples: dict[str, list[float]] = {name: [] for name in named}
    for call, _ in named.values():
        for _ in range(10):
            call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for name, (call, calls) in named.items():
                samples[name].append(microseconds(call, device, calls))
    finally:
        gc.enable()
    found = {name: summarize(values) for name, values in samples.items()}
    return {
        name: {"us": round(t.ms, 2), "spread_us": [round(t.low_ms, 2), round(t.high_ms, 2)]}
        for name, t in found.items()
    }


def contenders(problem: BenchProblem, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Ours as chosen and kernel by kernel, and dense attention."""
    dtype = DTYPES[problem.dtype]
    here = [kernel.name for kernel, family in FAMILIES.items() if family.device == device.type]
    named: dict[str, Callable[[], Contender]] = {
        "natten" if kernel == "auto" else kernel: partial(natten_contender, problem, kernel, dtype, device)
        for kernel in ("auto", *here)
    }
    return {**named, "sdpa": partial(sdpa, problem, dtype, device)}


def measure_mode(problem: BenchProblem, mode: str, device: torch.device, file: RowFile, end: float) -> None:
    for pass_ in PASSES:
        calls: dict[str, tuple[Call, int]] = {}
        for name, make in contenders(problem, device).items():
            if name not in ("natten", "sdpa") and (mode, pass_) != ("eager", PASSES[0]) and mode != "graph":
                continue  # the host's part is the same for all kernels
            try:
                if time.monotonic() > end:
                    raise NotSupported(OUT_OF_TIME)
                with torch.set_grad_enabled(pass_ != PASSES[0]):
                    calls[name] = in_mode(make(), pass_, mode)
            except (NotSupported, ValueError, RuntimeError) as reason:
                text = str(reason).splitlines()[0][:200]
                file.skip(problem=problem.name, mode=mode, **{"pass": pass_}, what=name, reason=text)
        if mode == "eager" and pass_ == PASSES[0] and "natten" in calls:
            with torch.no_grad():
                pieces = parts(natten_contender(problem, "auto", DTYPES[problem.dtype], device))
            calls |= {name: (call, 1) for name, call in pieces.items()}
        with torch.set_grad_enabled(pass_ != PASSES[0]):
            for name, timing in measured(calls, device).items():
                file.add({"problem": problem.name, "mode": mode, "pass": pass_, "what": name, **timing})


def show(rows: Sequence[Any]) -> None:
    names = list(dict.fromkeys(row["what"] for row in rows))
    columns = [Column("problem", right=False), Column("mode", right=False), Column("pass", right=False)]
    columns += [*(Column(name) for name in names), Column("natten / sdpa")]
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row["problem"], row["mode"], row["pass"]), {})[row["what"]] = row["us"]
    cells = []
    for place, line in lines.items():
        ratio = line["natten"] / line["sdpa"] if {"natten", "sdpa"} <= line.keys() else None
        cells.append([*place, *(number(line.get(name)) for name in names), number(ratio)])
    print_table(columns, cells, title="microseconds a call")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(problem.name for problem in PROBLEMS), help="comma-separated")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    require_library()
    device = torch.device(arguments.device)
    command = ["python", "tools/bench_overhead.py", *(sys.argv[1:] if argv is None else argv)]
    head = circumstances(device, command, arguments.commit)
    file = RowFile(arguments.json, head, graph_calls=GRAPH_CALLS, problems=[vars(p) for p in PROBLEMS])
    problems = [problem for problem in PROBLEMS if problem.name in arguments.problems.split(",")]
    for mode in MODES:
        for problem in problems:
            if mode != "graph" or device.type == "cuda":
                measure_mode(problem, mode, device, file, end)
    show(file.rows)
    return 0 if file.rows else 1


if __name__ == "__main__":
    sys.exit(main())
