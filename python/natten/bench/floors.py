"""How fast a problem could run: useful FLOPs and unavoidable bytes, over the rates of the device.

Only (query, key) pairs inside a window count. A pair costs ``2 D + 2 Dv`` FLOPs forward (``4 D`` when ``Dv == D``) and
two and a half times that backward: five matrix products where forward has two. Bytes are each tensor once: forward
reads q, k, v and writes out; backward reads q, k, v, out, grad_out and writes grad_q, grad_k, grad_v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from natten.bench.problems import DTYPES, BenchProblem, Pass
from natten.bench.timing import measure
from natten.bench.windows import checked_problem

Operator = Literal["qk", "av", "inverse_av"]
OPERATORS: tuple[Operator, ...] = ("qk", "av", "inverse_av")

BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: memory bandwidth (read + written), and dense matrix products per input type."""

    bandwidth_tbps: float
    tflops: Mapping[str, float]


# Measured: a large device-to-device copy, and large matrix products on random data. "tf32": float32 with TF32 allowed.
CEILINGS: Mapping[str, Ceilings] = {
    "NVIDIA H200": Ceilings(4.2, {"bfloat16": 790.0, "float16": 790.0, "tf32": 354.0, "float32": 51.0}),
}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes that an operation cannot do without."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """Lower bounds on the time of an operation on a device."""

    bytes_ms: float
    flops_ms: float

    @property
    def ms(self) -> float:
        return max(self.bytes_ms, self.flops_ms)


def useful_pairs(problem: BenchProblem) -> int:
    """(query, key) pairs inside a window, over all batch items and heads."""
    checked = checked_problem(problem, DTYPES[problem.dtype], torch.device("cpu"))
    return problem.batch * problem.heads * checked.attention_pairs()


def attention_work(problem: BenchProblem, pass_: Pass, dtype: str) -> Work:
    pairs = useful_pairs(problem)
    flops = pairs * 2.0 * (problem.head_dim + problem.value_dim)
    tokens = problem.batch * problem.tokens
    query = tokens * problem.heads * problem.head_dim
    key = tokens * problem.key_heads * problem.head_dim
    value = tokens * problem.key_heads * problem.value_dim
    out = tokens * problem.heads * problem.value_dim
    itemsize = DTYPES[dtype].itemsize
    if pass_ == "forward":
        return Work(flops, itemsize * (query + key + value + out))
    return Work(BACKWARD_FLOPS * flops, itemsize * 2 * (query + key + value + out))


def unfused_work(problem: BenchProblem, operator: Operator, dtype: str) -> Work:
    """One of the unfused operators; the attention weights count once, as do the tensors on both sides of them."""
    checked = checked_problem(problem, DTYPES[dtype], torch.device("cpu"))
    tokens = problem.batch * problem.tokens
    weights = tokens * problem.heads * checked.slots
    channels = problem.head_dim if operator == "qk" else problem.value_dim
    flops = 2.0 * useful_pairs(problem) * channels
    return Work(flops, DTYPES[dtype].itemsize * (weights + tokens * (problem.heads + problem.key_heads) * channels))


def composite_works(problem: BenchProblem, pass_: Pass, dtype: str) -> list[Work]:
    """The operations of attention as qk, softmax and av, which have to move the attention weights between them."""
    operators: tuple[Operator, ...] = ("qk", "av") if pass_ == "forward" else ("qk", "av", "inverse_av", "inverse_av")
    slots = checked_problem(problem, DTYPES[dtype], torch.device("cpu")).slots
    weights_bytes = problem.batch * problem.tokens * problem.heads * slots * DTYPES[dtype].itemsize
    softmax = Work(0.0, (2 if pass_ == "forward" else 3) * weights_bytes)
    return [*(unfused_work(problem, operator, dtype) for operator in operators), softmax]


def floor(work: Work, dtype: str, ceilings: Ceilings, allow_tf32: bool = False) -> Floor | None:
    """None where the device's rate for this type is not known."""
    rate = ceilings.tflops.get("tf32" if dtype == "float32" and allow_tf32 else dtype)
    if rate is None:
        return None
    return Floor(work.bytes / ceilings.bandwidth_tbps * 1e-9, work.flops / rate * 1e-9)


def measure_ceilings(device: torch.device) -> Ceilings:
    """For a device that the table lacks: one copy and one matrix product per type, on random data."""
    on_gpu = device.type == "cuda"
    size_bytes = 2**31 if on_gpu else 2**28
    source = torch.randn(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2e-9 * size_bytes / measure(partial(target.copy_, source), device).ms
    del source, target
    extent = 8192 if on_gpu else 1536
    rates = {}
    types = ("bfloat16", "float16", "tf32", "float32") if on_gpu else ("float32", "float64")
    for name in types:
        dtype = DTYPES["float32" if name == "tf32" else name]
        a = torch.randn(extent, extent, dtype=dtype, device=device)
        b = torch.randn(extent, extent, dtype=dtype, device=device)
        previous = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        try:
            rates[name] = 2e-9 * extent**3 / measure(partial(torch.matmul, a, b), device).ms
        finally:
            torch.backends.cuda.matmul.fp32_precision = previous
    return Ceilings(bandwidth, rates)
