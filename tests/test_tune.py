"""`natten.tune`: results decide later calls, live on disk, and are dropped when they cannot be trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import natten
from natten import _attention, _tuned
from natten._kernels import Kernel, Operation
from natten._tune import _neighbours, _Search, _Tensors

SHAPE = (1, 9, 11, 2, 16)
WINDOW = (5, 3)
SLOW = Kernel.cpu_naive  # what the dispatcher would not choose by itself


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path))
    _tuned.forget()
    _attention.forget()
    yield tmp_path
    _tuned.forget()
    _attention.forget()


def tune(**arguments: Any) -> natten.Tuning:
    return natten.tune(SHAPE, SHAPE, SHAPE, WINDOW, dtype=torch.float32, device="cpu", seconds=0.2, **arguments)


def explain(requires_grad: bool = False, **arguments: Any) -> natten.Explanation:
    return natten.explain(SHAPE, SHAPE, SHAPE, WINDOW, device="cpu", requires_grad=requires_grad, **arguments)


def prefer_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements as if the slow kernel were the fastest."""
    measure = _Search.measure

    def measured(self: _Search, kernel: Kernel, plan: tuple[int, ...] = ()) -> float | None:
        measure(self, kernel, plan)
        self.measured[kernel, plan] = 1e-3 if kernel is SLOW and not plan else 1.0
        return self.measured[kernel, plan]

    monkeypatch.setattr(_Search, "measure", measured)


def test_measures_every_kernel_and_keeps_the_fastest_first(cache: Path) -> None:
    tuning = tune()
    for rows in (tuning.forward, tuning.backward):
        assert Kernel.cpu in {row.kernel for row in rows} <= {Kernel.cpu, Kernel.cpu_naive}
        assert [row.milliseconds for row in rows] == sorted(row.milliseconds for row in rows)
        assert all(row.milliseconds > 0 for row in rows)
    assert tuning.path is not None
    assert tuning.path.parent == cache
    assert tuning.path.exists()
    assert "cpu" in str(tuning)


def test_results_decide_and_survive_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(SHAPE)
    natten.na2d(query, query, query, WINDOW)  # remembered with the estimated kernel
    assert explain().forward.kernel is Kernel.cpu
    prefer_slow(monkeypatch)
    tune()
    for _ in range(2):
        explanation = explain(requires_grad=True)
        assert explanation.backward is not None
        for decision in explanation.decisions:
            assert decision.kernel is SLOW
            assert decision.measured == 1e-3
        assert "tuned" in str(explanation)
        _tuned.forget()  # as in another process: from disk
        _attention.forget()
    prepared: list[int] = []
    forward = _attention.fused_forward
    monkeypatch.setattr(
        _attention, "fused_forward", lambda call, *rest: prepared.append(call.kernel) or forward(call, *rest)
    )
    out = natten.na2d(query, query, query, WINDOW)
    assert prepared == [int(SLOW)]
    torch.testing.assert_close(out, natten.na2d(query, query, query, WINDOW, kernel="cpu"))


def test_a_named_kernel_and_other_problems_are_not_affected(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_slow(monkeypatch)
    tune(backward=False)
    assert explain(kernel="cpu").forward.kernel is Kernel.cpu
    other = (2, *SHAPE[1:])
    assert natten.explain(other, other, other, WINDOW, device="cpu").forward.measured is None
    assert natten.explain(SHAPE, SHAPE, SHAPE, WINDOW, dilation=(1, 3), device="cpu").forward.measured is None
    backward = explain(requires_grad=True).backward
    assert backward is not None
    assert backward.measured is None


def test_nothing_is_written_without_save(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_slow(monkeypatch)
    assert tune(save=False).path is None
    assert explain().forward.kernel is SLOW
    assert list(cache.iterdir()) == []


def test_results_of_another_build_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_slow(monkeypatch)
    path = tune().path
    assert path is not None
    content = json.loads(path.read_text())
    content["build"] = ["another"]
    path.write_text(json.dumps(content))
    _tuned.forget()
    _attention.forget()
    assert explain().forward.kernel is Kernel.cpu


@pytest.mark.filterwarnings("ignore:natten. tuning results")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "build": null, "results": 3}'])
def test_a_damaged_file_warns_and_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = _tuned.path_for(torch.device("cpu"))
    path.write_text(text)
    if "build" in text:
        assert explain().forward.measured is None  # of no build that is known
    else:
        with pytest.warns(UserWarning, match="could not be read"):
            assert explain().forward.measured is None
    prefer_slow(monkeypatch)
    tune()
    assert json.loads(path.read_text())["results"]
    assert [file.name for file in cache.iterdir()] == [path.name]


def test_files_of_two_processes_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_slow(monkeypatch)
    tune()
    _tuned.forget()
    _tuned._tables[str(_tuned.path_for(torch.device("cpu")))] = {}  # a process that read before the first one wrote
    other = (2, *SHAPE[1:])
    natten.tune(other, other, other, WINDOW, device="cpu", seconds=0.1)
    _tuned.forget()
    _attention.forget()
    assert explain().forward.kernel is SLOW


def test_a_composite_is_not_taken_for_a_call_that_is_differentiated() -> None:
    problem = explain().problem
    _tuned.store(problem, {Operation.forward: [_tuned.Measured(Kernel.gemm, (), 0.1)]}, save=False)
    assert explain().forward.kernel is Kernel.cpu  # gemm does not run on the CPU


def test_neighbours_keep_the_number_of_tokens() -> None:
    plan = (64, 3, 1, 1, 8, 8, 2, 4, 8, 1)
    found = set(_neighbours(Kernel.fused_sm90, plan))
    assert (64, 3, 1, 1, 4, 16, 2, 4, 8, 1) in found
    assert all(len(other) == len(plan) and other != plan for other in found)
    for other in found:
        assert other[3] * other[4] * other[5] == 64
        assert other[6] * other[7] * other[8] == 64


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="seconds must be positive"):
        natten.tune(SHAPE, SHAPE, SHAPE, WINDOW, device="cpu", seconds=0)
    with pytest.raises(ValueError, match="kernel_size"):
        natten.tune(SHAPE, SHAPE, SHAPE, 20, device="cpu")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: RuntimeError, plans_only: bool) -> None:
    """Kernels, or only plans of them, end with the error."""
    call = _Tensors.call

    def failing(self: _Tensors, operation: Operation, kernel: Kernel, plan: tuple[int, ...]) -> Any:
        if plans_only and not plan:
            return call(self, operation, kernel, plan)
        raise error

    monkeypatch.setattr(_Tensors, "call", failing)


def test_out_of_memory_everywhere_stays_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, torch.OutOfMemoryError("no room"), plans_only=False)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        tune()


def test_a_fault_of_the_device_is_not_taken_for_a_refused_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, torch.AcceleratorError("fault"), plans_only=True)
    with pytest.raises(torch.AcceleratorError, match="fault"):
        natten.tune(SHAPE, SHAPE, SHAPE, WINDOW, dtype=torch.float32, device="cpu", seconds=30)


def test_a_refused_plan_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, RuntimeError("refused"), plans_only=True)
    assert all(row.plan == () for row in tune().forward)
