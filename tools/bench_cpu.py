"""The CPU kernels against torch's matrix product, and against three ways to compute the same in torch.

    python tools/bench_cpu.py --threads 1 --output docs/performance/cpu
    python tools/bench_cpu.py --problems 2d-k7-d32 --contenders cpu,cpu_naive

Contenders: the kernels `cpu` and `cpu_naive`; `sdpa_mask`, dense attention with a boolean mask; `flex`, FlexAttention
compiled, forward only; `unfold`, gathered windows in plain torch, compiled. Masks, token orders and compilation are
outside the measurement, and so is the time of fresh memory pages. Writes OUTPUT.json and OUTPUT.md; prints the table.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from natten._library import require_library
from natten.bench import peers
from natten.bench.floors import attention_work
from natten.bench.peers import Contender, NotSupported
from natten.bench.problems import DTYPES, PASSES, BenchProblem, Pass
from natten.bench.report import Column, circumstances, number, plain_table, write_json
from natten.bench.run import attempt, natten_contender
from natten.bench.timing import Timing, summarize
from natten.bench.windows import axis_windows

CPU = torch.device("cpu")
MATMUL_SIZE = 512
NAIVE_LIMIT_GFLOP = 3.0  # a call of the naive kernel that needs more is not measured
MASK_LIMIT_TOKENS = 8192
FLEX_LIMIT_GFLOP = 3.0  # the same of FlexAttention


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: else the fresh pages of every call's results are most of what is measured."""
    if not sys.platform.startswith("linux"):
        return
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 * 2**20)  # the most that it takes
    libc.mallopt(trim_threshold, 2**31 - 1)


def problem(
    name: str,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    stride: int = 1,
    dilation: int = 1,
    causal: bool = False,
    dtype: str = "float32",
) -> BenchProblem:
    rank = len(shape)
    return BenchProblem(
        name=name,
        batch=batch,
        shape=tuple(shape),
        heads=heads,
        head_dim=head_dim,
        kernel_size=tuple(kernel_size),
        stride=(stride,) * rank,
        dilation=(dilation,) * rank,
        causal=(causal,) * rank,
        dtype=dtype,
    )


PROBLEMS = (
    problem("1d-k13-d64", [8192], [13], 4, 64),
    problem("1d-k255-d64", [8192], [255], 4, 64),
    problem("1d-k2048-d64", [8192], [2048], 2, 64),
    problem("1d-causal-k255-d64", [8192], [255], 4, 64, causal=True),
    problem("2d-k3-d32", [56, 56], [3, 3], 4, 32),
    problem("2d-k7-d32", [56, 56], [7, 7], 4, 32),
    problem("2d-k7-d32-14x14", [14, 14], [7, 7], 16, 32, batch=4),
    problem("2d-k13-d64", [64, 64], [13, 13], 4, 64),
    problem("2d-k13-d64-dilation2", [64, 64], [13, 13], 4, 64, dilation=2),
    problem("2d-k16-d64-blocked", [64, 64], [16, 16], 4, 64, stride=16),
    problem("2d-k31-d64", [64, 64], [31, 31], 4, 64),
    problem("2d-k13-d128", [64, 64], [13, 13], 4, 128),
    problem("3d-k5-d64", [16, 16, 16], [5, 5, 5], 4, 64),
    problem("3d-k3x7x7-d32", [8, 28, 28], [3, 7, 7], 4, 32),
    problem("2d-k13-d64-float64", [64, 64], [13, 13], 4, 64, dtype="float64"),
    problem("2d-k13-d64-bfloat16", [64, 64], [13, 13], 4, 64, dtype="bfloat16"),
)


def sdpa_mask(what: BenchProblem, dtype: torch.dtype, device: torch.device) -> Contender:
    """Dense attention with a boolean mask, tokens in raster order."""
    if what.tokens > MASK_LIMIT_TOKENS:
        raise NotSupported("the mask would not fit")
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in range(what.rank):
        windows = axis_windows(what, axis, device)
        sees = torch.zeros(what.shape[axis], what.shape[axis], dtype=torch.bool)
        sees.scatter_(1, windows.keys, True)  # an empty slot repeats the window's first key
        mask = torch.kron(mask, sees)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return Contender(attention, *peers.random_inputs(what, None, dtype, device))


CONTENDERS: dict[str, Callable[[BenchProblem, torch.dtype, torch.device], Contender]] = {
    "cpu": lambda what, dtype, device: natten_contender(what, "cpu", dtype, device),
    "cpu_naive": lambda what, dtype, device: natten_contender(what, "cpu_naive", dtype, device),
    "sdpa_mask": sdpa_mask,
    "flex": peers.flex,
    "unfold": peers.unfold,
}


@dataclass(frozen=True)
class Row:
    problem: str
    pass_: str
    contender: str
    ms: float
    low_ms: float  # 20 % and 80 % quantiles
    high_ms: float
    repeats: int
    useful_gflops: float
    of_matmul: float  # useful_gflops over the rate of torch's matrix product of the problem's type


def measure(call: Callable[[], object], budget_ms: float) -> Timing:
    """Median time of `call`, of at least three calls.

    With one thread this is CPU time, which other processes hardly disturb; with more it is the wall clock's.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    samples: list[float] = []
    while len(samples) < 3 or sum(samples) < budget_ms:
        start = clock()
        call()
        samples.append((clock() - start) * 1e3)
    return summarize(samples)


def time_pass(make: Callable[[], Contender], pass_: Pass, budget_ms: float) -> Timing:
    """One pass; backward alone, after a forward pass outside the measurement."""
    contender = make()
    inputs = (contender.query, contender.key, contender.value)
    if pass_ == "forward":
        with torch.no_grad():
            return measure(partial(contender.attention, *inputs), budget_ms)
    for tensor in inputs:
        tensor.requires_grad_()
    out = contender.attention(*inputs)
    return measure(partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True), budget_ms)


def matmul_gflops(dtype: torch.dtype) -> float:
    """Rate of `torch.mm` on square matrices of MATMUL_SIZE."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = measure(partial(torch.mm, a, b, out=out), 300.0)
    return 2 * MATMUL_SIZE**3 / timing.ms / 1e6


def refusal(what: BenchProblem, name: str, pass_: Pass) -> str | None:
    gflop = attention_work(what, pass_, what.dtype).flops / 1e9
    if name == "cpu_naive" and gflop > NAIVE_LIMIT_GFLOP:
        return f"{gflop:.1f} GFLOP are more than the limit of {NAIVE_LIMIT_GFLOP}"
    if name == "flex" and pass_ == "backward":
        return "forward only"
    if name == "flex" and (gflop > FLEX_LIMIT_GFLOP or what.dtype == "float64"):
        return "left out"
    return None


def measure_row(what: BenchProblem, name: str, pass_: Pass, matmul: float, budget_ms: float) -> Row:
    reason = refusal(what, name, pass_)
    if reason is not None:
        raise NotSupported(reason)
    make = partial(CONTENDERS[name], what, DTYPES[what.dtype], CPU)
    timing = attempt(time_pass, make, pass_, budget_ms)
    gflops = attention_work(what, pass_, what.dtype).flops / timing.ms / 1e6
    return Row(
        what.name, pass_, name, timing.ms, timing.low_ms, timing.high_ms, timing.repeats, gflops, gflops / matmul
    )


def table(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[Column], list[list[str]]]:
    """One line for each problem and pass: our time and rate, and how many times longer the others take."""
    others = [name for name in names if name != "cpu"]
    columns = [Column("problem", right=False), Column("pass", right=False), Column("cpu ms"), Column("GFLOP/s")]
    columns += [Column("of matmul"), *(Column(f"x {name}") for name in others)]
    cells = []
    for row in rows:
        if row.contender != "cpu":
            continue
        times = {r.contender: r.ms for r in rows if (r.problem, r.pass_) == (row.problem, row.pass_)}
        ratios = [number(times[name] / row.ms) if name in times else "-" for name in others]
        cells.append(
            [row.problem, row.pass_, number(row.ms), number(row.useful_gflops), number(row.of_matmul, 2), *ratios]
        )
    return columns, cells


def markdown_table(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> str:
    lines = [[column.title for column in columns], ["---:" if column.right else "---" for column in columns], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(head: dict[str, object], matmul: dict[str, float], listing: str) -> str:
    rates = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in matmul.items())
    return f"""# CPU performance

Written by `{head["command"]}`; the numbers, with quantiles, are in `cpu.json`.

{head["device"]}, torch {torch.__version__}. `torch.mm` of {MATMUL_SIZE} x {MATMUL_SIZE} matrices: {rates}.

Medians through the public functions: CPU times with one thread, wall-clock times with more, the allocator told to keep
freed memory. Useful GFLOP/s count `4 D` for each pair of a query and a key of its window, 2.5 times that in the
backward pass; *of matmul* divides by the rate of `torch.mm` in the same type. The other columns say how many times
longer than `cpu` the same problem takes: in the naive kernel, with `scaled_dot_product_attention` and a dense boolean
mask, with FlexAttention (compiled, forward only), and with windows gathered in plain torch (compiled). A dash: not
measured, for memory or time.

{listing}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(p.name for p in PROBLEMS)
    parser.add_argument("--problems", default=names, help="names, comma-separated")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="names, comma-separated")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--budget-ms", type=float, default=400.0, help="time to spend on each measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="path without suffix")
    arguments = parser.parse_args()
    require_library()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    wanted, contenders = arguments.problems.split(","), arguments.contenders.split(",")
    problems = [p for p in PROBLEMS if p.name in wanted]
    passes = [p for p in PASSES if p in arguments.passes.split(",")]
    matmul = {dtype: matmul_gflops(DTYPES[dtype]) for dtype in dict.fromkeys(p.dtype for p in problems)}

    rows, skipped = [], []
    for what in problems:
        for pass_ in passes:
            for name in contenders:
                try:
                    rows.append(measure_row(what, name, pass_, matmul[what.dtype], arguments.budget_ms))
                    print(rows[-1], file=sys.stderr, flush=True)
                except NotSupported as reason:
                    skipped.append({"problem": what.name, "pass": pass_, "contender": name, "reason": str(reason)})

    columns, cells = table(rows, contenders)
    print(plain_table(columns, cells))
    if arguments.output:
        head = circumstances(CPU, ["python", *sys.argv])
        described = [asdict(p) for p in problems]
        write_json(
            arguments.output + ".json",
            head,
            [asdict(row) for row in rows],
            threads=torch.get_num_threads(),
            matmul_gflops=matmul,
            problems=described,
            skipped=skipped,
        )
        with open(arguments.output + ".md", "w") as file:
            file.write(page(head, matmul, markdown_table(columns, cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
