"""A problem as the dispatcher sees it, and its windows as index tables, which masks and gathers in plain torch need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natten._problem import Problem, attention_problem
from natten._settings import current_flags
from natten.bench.problems import BenchProblem


def checked_problem(problem: BenchProblem, dtype: torch.dtype, device: torch.device) -> Problem:
    """The checked problem of a call with these shapes, under the current settings; no memory is taken."""

    def tensor(heads: int, dim: int) -> Tensor:
        shape = (problem.batch, *problem.shape, heads, dim)
        return torch.empty(shape, dtype=dtype, device="meta")

    checked = attention_problem(
        problem.rank,
        tensor(problem.heads, problem.head_dim),
        tensor(problem.key_heads, problem.head_dim),
        tensor(problem.key_heads, problem.value_dim),
        problem.kernel_size,
        problem.stride,
        problem.dilation,
        problem.causal,
    )
    return replace(checked, device=device, flags=current_flags(dtype, device))


@dataclass(frozen=True)
class AxisWindows:
    """Per coordinate of an axis: dilation group, position in it, and the window's ``[begin, end)`` in such positions.

    ``keys`` holds the coordinates of every window's keys, ``[extent, slots]``; where ``valid`` is false the slot is
    empty (and repeats the window's first key).
    """

    group: Tensor
    position: Tensor
    begin: Tensor
    end: Tensor
    keys: Tensor
    valid: Tensor


def axis_windows(problem: BenchProblem, axis: int, device: torch.device) -> AxisWindows:
    window = checked_problem(problem, torch.float32, device).axes[axis]
    coordinates = torch.arange(window.extent)
    group, position = coordinates % window.dilation, coordinates // window.dilation
    ranges = [window.window(int(g), int(p)) for g, p in zip(group, position, strict=True)]
    begin, end = torch.tensor(ranges).unbind(1)
    places = begin[:, None] + torch.arange(window.slots)
    valid = places < end[:, None]
    keys = torch.where(valid, places, begin[:, None]) * window.dilation + group[:, None]
    return AxisWindows(*(table.to(device) for table in (group, position, begin, end, keys, valid)))
