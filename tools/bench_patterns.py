"""Known attention patterns: natten's one operator against the usual implementation of each, on a GPU.

    python tools/bench_patterns.py --json docs/performance/h200/patterns.json
    python tools/bench_patterns.py --patterns swin,language-model

examples/patterns.py shows that both compute the same; here they are timed at the sizes of real models, in bfloat16.
The usual implementations start from the same tensors, [batch, X, Y, heads, channels], and pay for their own copies:
`partition`, blocks cut out and put back around scaled_dot_product_attention; `partition, compiled`, the same through
torch.compile; `halo`, padded, overlapping blocks gathered for it; `mask`, it with a boolean mask of all tokens. `flex`
is FlexAttention, compiled, whose tokens lie in its best order and whose block mask exists already, for free; `dense`
is attention over all tokens (causal where the pattern is): what a model pays that has no such pattern.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natten._library import require_library
from natten.bench import peers
from natten.bench.floors import attention_work
from natten.bench.peers import Attention, Contender, NotSupported
from natten.bench.problems import DTYPES, PASSES, BenchProblem
from natten.bench.report import Column, RowFile, add_run_arguments, circumstances, number, print_table
from natten.bench.run import OUT_OF_TIME, attempt, natten_contender, time_contender
from natten.bench.windows import axis_windows

Shape = tuple[int, ...]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dense attention over [B, N, H, D]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def to_blocks(x: Tensor, counts: Sequence[int], size: Shape, interleaved: bool) -> Tensor:
    """[B, X.., H, D] to [B * blocks, tokens of a block, H, D]: adjacent tokens, or every n-th one (`interleaved`)."""
    rank = len(size)
    pairs = [n for pair in zip(counts, size, strict=True) for n in (pair[::-1] if interleaved else pair)]
    split = x.reshape(x.shape[0], *pairs, *x.shape[-2:])
    outer, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    blocks, tokens = (inner, outer) if interleaved else (outer, inner)
    return split.permute(0, *blocks, *tokens, -2, -1).reshape(-1, prod(size), *x.shape[-2:])


def from_blocks(blocks: Tensor, counts: Sequence[int], size: Shape, interleaved: bool, like: Tensor) -> Tensor:
    rank = len(size)
    split = blocks.reshape(like.shape[0], *counts, *size, *blocks.shape[-2:])
    blocks_at, tokens_at = range(1, rank + 1), range(rank + 1, 2 * rank + 1)
    first, second = (tokens_at, blocks_at) if interleaved else (blocks_at, tokens_at)
    order = [axis for pair in zip(first, second, strict=True) for axis in pair]
    return split.permute(0, *order, -2, -1).reshape(*like.shape[:-1], blocks.shape[-1])


def partition(problem: BenchProblem) -> Attention:
    """Window partition: blocks of adjacent tokens (Swin) or, with a dilation, of every n-th token (MaxViT's grid)."""
    size, interleaved = problem.kernel_size, max(problem.dilation) > 1
    counts = [extent // k for extent, k in zip(problem.shape, size, strict=True)]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks = attend(*(to_blocks(x, counts, size, interleaved) for x in (query, key, value)))
        return from_blocks(blocks, counts, size, interleaved, query)

    return attention


def halo(problem: BenchProblem) -> Attention:
    """HaloNet: blocks of queries, and zero-padded blocks with a halo of keys."""
    window, block = problem.kernel_size, problem.stride
    margin = [(k - s) // 2 for k, s in zip(window, block, strict=True)]
    counts = [extent // s for extent, s in zip(problem.shape, block, strict=True)]
    assert problem.rank == 2

    def windows(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, margin[1], margin[1], margin[0], margin[0]))
        x = x.unfold(1, window[0], block[0]).unfold(2, window[1], block[1])  # [B, blocks.., H, D, window..]
        return x.permute(0, 1, 2, 5, 6, 3, 4).reshape(-1, prod(window), *x.shape[3:5])

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks = attend(to_blocks(query, counts, block, False), windows(key), windows(value))
        return from_blocks(blocks, counts, block, False, query)

    return attention


def mask(problem: BenchProblem, device: torch.device) -> Attention:
    """A boolean mask of all tokens, made in advance."""
    sees = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in range(problem.rank):
        windows = axis_windows(problem, axis, device)
        along = torch.zeros(problem.shape[axis], problem.shape[axis], dtype=torch.bool, device=device)
        along.scatter_(1, windows.keys, True)  # an empty slot repeats the window's first key
        sees = torch.kron(sees, along)
    group = problem.heads // problem.key_heads

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = (x.flatten(1, -3) for x in (query, key.repeat_interleave(group, -2), value.repeat_interleave(group, -2)))
        query_, key_, value_ = flat
        return attend(query_, key_, value_, sees).reshape(query.shape)

    return attention


def dense(problem: BenchProblem) -> Attention:
    causal, grouped = problem.causal == (True,), problem.heads != problem.key_heads

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(query.shape)

    return attention


def contender(name: str, problem: BenchProblem, dtype: torch.dtype, device: torch.device) -> Contender:
    """An implementation and its inputs."""
    if name == "natten":
        return natten_contender(problem, "auto", dtype, device)
    if name == "flex":
        return peers.flex(problem, dtype, device)
    attentions: Mapping[str, Callable[[], Attention]] = {
        "partition": partial(partition, problem),
        "partition, compiled": lambda: peers.compiled(partition(problem)),
        "halo": partial(halo, problem),
        "mask": partial(mask, problem, device),
        "dense": partial(dense, problem),
    }
    return Contender(attentions[name](), *peers.random_inputs(problem, problem.shape, dtype, device))


@dataclass(frozen=True)
class Pattern:
    """A problem, and how it is usually computed; `dense` computes something else."""

    problem: BenchProblem
    usual: tuple[str, ...]


def pattern(
    name: str,
    shape: Shape,
    kernel_size: Shape,
    usual: Sequence[str],
    *,
    batch: int = 1,
    heads: int,
    heads_kv: int | None = None,
    head_dim: int,
    stride: Shape = (),
    dilation: Shape = (),
    causal: tuple[bool, ...] = (),
) -> Pattern:
    rank = len(shape)
    problem = BenchProblem(
        name,
        batch,
        shape,
        heads,
        head_dim,
        kernel_size,
        stride or (1,) * rank,
        dilation or (1,) * rank,
        causal or (False,) * rank,
        heads_kv=heads_kv,
    )
    return Pattern(problem, tuple(usual))


_PARTITION = ("partition", "partition, compiled", "dense")
PATTERNS = (
    pattern("swin", (56, 56), (7, 7), _PARTITION, batch=128, heads=3, head_dim=32, stride=(7, 7)),
    pattern("maxvit-grid", (56, 56), (7, 7), _PARTITION, batch=128, heads=2, head_dim=32, dilation=(8, 8)),
    pattern("halonet", (64, 64), (14, 14), ("halo",), batch=32, heads=8, head_dim=64, stride=(8, 8)),
    pattern("dinat", (56, 56), (7, 7), ("dense", "flex"), batch=128, heads=2, head_dim=32, dilation=(4, 4)),
    pattern("sliding-tile", (30, 48, 80), (18, 24, 24), ("dense", "flex"), heads=4, head_dim=128, stride=(6, 8, 8)),
    pattern("strided", (128, 128), (48, 48), ("dense", "flex"), heads=16, head_dim=128, stride=(16, 16)),
    pattern(
        "language-model",
        (16384,),
        (4096,),
        ("mask", "dense", "flex"),
        heads=32,
        heads_kv=8,
        head_dim=128,
        causal=(True,),
    ),
    pattern(
        "causal-video", (16, 32, 32), (8, 9, 9), ("dense", "flex"), heads=12, head_dim=64, causal=(True, False, False)
    ),
)


def measure(what: Pattern, name: str, device: torch.device, budget_ms: float, end: float, file: RowFile) -> None:
    """Both passes of one implementation."""
    problem = what.problem
    for pass_ in PASSES:
        place = {"pattern": problem.name, "pass": pass_, "what": name}
        try:
            if time.monotonic() > end:
                raise NotSupported(OUT_OF_TIME)
            make = partial(contender, name, problem, DTYPES[problem.dtype], device)
            timing = attempt(time_contender, make, pass_, device, budget_ms)
        except NotSupported as reason:
            file.skip(**place, reason=str(reason))
            continue
        row = {"ms": round(timing.ms, 5), "spread_ms": [round(timing.low_ms, 5), round(timing.high_ms, 5)]}
        useful = attention_work(problem, pass_, problem.dtype).flops / timing.ms * 1e-9
        file.add({**place, **row, "repeats": timing.repeats, "useful_tflops": round(useful, 3)})


def show(rows: Sequence[Any]) -> None:
    columns = [Column("pattern", right=False), Column("pass", right=False), Column("what", right=False), Column("ms")]
    columns.append(Column("x natten"))
    ours = {(row["pattern"], row["pass"]): row["ms"] for row in rows if row["what"] == "natten"}
    cells = []
    for row in rows:
        base = ours.get((row["pattern"], row["pass"]))
        ratio = number(None if base is None else row["ms"] / base)
        cells.append([row["pattern"], row["pass"], row["what"], number(row["ms"]), ratio])
    print_table(columns, cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [what.problem.name for what in PATTERNS]
    parser.add_argument("--patterns", default=",".join(names), help="comma-separated")
    parser.add_argument("--budget-ms", type=float, default=60.0, help="time to spend on each measurement")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    require_library()
    device = torch.device(arguments.device)
    wanted = arguments.patterns.split(",")
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise SystemExit(f"--patterns: {', '.join(unknown)} not among {', '.join(names)}")
    command = ["python", "tools/bench_patterns.py", *(sys.argv[1:] if argv is None else argv)]
    described = [{**asdict(what.problem), "usual": what.usual} for what in PATTERNS]
    file = RowFile(arguments.json, circumstances(device, command, arguments.commit), patterns=described)
    patterns = [what for what in PATTERNS if what.problem.name in wanted]
    for slow in (False, True):  # FlexAttention compiles for as long as the others take together
        for what in patterns:
            for name in ("natten", *what.usual):
                if (name == "flex") == slow:
                    measure(what, name, device, arguments.budget_ms, end, file)
    show(file.rows)
    for skip in file.skipped:
        print("not measured:", *skip.values())
    return 0 if file.rows else 1


if __name__ == "__main__":
    sys.exit(main())
