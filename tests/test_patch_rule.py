"""The rule by which fused_sm80's backward pass works by patches: Python sizes the workspace by it, C++ follows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from natten import _cost
from natten._problem import Axis, Problem

SOURCE = Path(__file__).resolve().parent.parent / "cpp" / "kernels" / "fused_sm80" / "patch_backward.cu"


def problem(kernel_size: int, head_dim: int, additional: int = 0, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem(
        rank=2,
        device=torch.device("cuda"),
        dtype=dtype,
        batch=1,
        q_grid=(64, 64),
        kv_grid=(64, 64),
        heads=2,
        heads_kv=2,
        head_dim=head_dim,
        head_dim_v=head_dim,
        additional=additional,
        axes=(Axis(kernel_size, 1, 1, False, 0, 0, 64),) * 2,
        scale=1.0,
        flags=0,
    )


def test_python_and_the_kernels_have_the_same_limit() -> None:
    if not SOURCE.exists():
        pytest.skip("the sources of the kernels are not here")
    found = re.search(r"kMostChannels = (\d+) \* (\d+);", SOURCE.read_text())
    assert found is not None
    assert int(found[1]) * int(found[2]) == _cost._MOST_PATCH_CHANNELS


@pytest.mark.parametrize(
    ("kernel_size", "head_dim", "expected"),
    [(7, 32, True), (7, 64, True), (14, 64, True), (15, 64, False), (20, 32, True), (21, 24, False), (7, 72, False)],
)
def test_small_windows_are_worked_on_by_patches(kernel_size: int, head_dim: int, expected: bool) -> None:
    assert _cost.patches_are_faster(problem(kernel_size, head_dim)) is expected


def test_what_patches_do_not_take() -> None:
    assert not _cost.patches_are_faster(problem(7, 32, additional=1))
    assert not _cost.patches_are_faster(problem(7, 32, dtype=torch.float32))


def test_nothing_is_accumulated_beside_patches() -> None:
    assert not _cost.accumulating_is_faster(problem(7, 64))
    assert _cost.accumulating_is_faster(problem(40, 64))
