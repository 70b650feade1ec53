"""Medians of repeated calls, on CUDA with events and a flushed L2 cache, on the CPU with a plain clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_MIN_REPEATS = 3
_MAX_REPEATS = 200


@dataclass(frozen=True)
class Timing:
    """Median of ``repeats`` calls, and the 20 % and 80 % quantiles as their spread."""

    ms: float
    low_ms: float
    high_ms: float
    repeats: int


def summarize(samples_ms: Sequence[float]) -> Timing:
    ordered = sorted(samples_ms)
    count = len(ordered)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return Timing(middle, ordered[round(0.2 * (count - 1))], ordered[round(0.8 * (count - 1))], count)


def _repeats(first_ms: float, budget_ms: float) -> int:
    return max(_MIN_REPEATS, min(_MAX_REPEATS, int(budget_ms / max(first_ms, 1e-3))))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _measure_cuda(call: Callable[[], object], budget_ms: float, device: torch.device) -> Timing:
    """The method of ``triton.testing.do_bench``, with bounded repetitions, so that a call of a second stays affordable.

    Before each call a buffer larger than any L2 cache is overwritten: the call finds its inputs in device memory, and
    the host has the time of that write to run ahead.
    """
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device=device)

    def sample(count: int) -> list[float]:
        pairs = [(_event(), _event()) for _ in range(count)]
        for start, end in pairs:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in pairs]

    with torch.cuda.device(device):
        call()  # loads modules, compiles
        first = sample(1)
        return summarize(first + sample(_repeats(first[0], budget_ms) - 1))


def _measure_cpu(call: Callable[[], object], budget_ms: float) -> Timing:
    def sample(count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    call()
    first = sample(1)
    return summarize(first + sample(_repeats(first[0], budget_ms) - 1))


def measure(call: Callable[[], object], device: torch.device, budget_ms: float = 100.0) -> Timing:
    """Median time of ``call``, spending about ``budget_ms`` on repetitions (at least three)."""
    if device.type == "cuda":
        return _measure_cuda(call, budget_ms, device)
    return _measure_cpu(call, budget_ms)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` captured in a CUDA graph: its replay costs the device's time alone, without the host's."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
