"""The dispatcher: what it takes, what it refuses and why, and how a kernel is forced."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import natten
from natten import _library, dispatch
from natten._library import BuildInfo
from natten.dispatch import FAMILIES, Kernel

SHAPE = (2, 32, 32, 4, 64)


@pytest.fixture
def every_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library held CUDA kernels for every architecture."""
    monkeypatch.setattr(_library, "build_info", BuildInfo(1, 13000, ("80", "86", "90a"), 0))


def explain_cuda(
    shape: tuple[int, ...] = SHAPE, capability: tuple[int, int] = (9, 0), **arguments: object
) -> natten.Explanation:
    """The decision for a CUDA device that need not be there."""
    defaults: dict[str, object] = {
        "kernel_size": 7,
        "device": "cuda",
        "capability": capability,
        "dtype": torch.bfloat16,
    }
    return natten.explain(shape, shape, shape, **{**defaults, **arguments})  # type: ignore[arg-type]


def rejections(explanation: natten.Explanation) -> dict[Kernel, str | None]:
    """Why each kernel was not taken."""
    return {c.kernel: c.rejected for c in explanation.forward.candidates}


def test_kernel_numbers_are_the_schema() -> None:
    assert [(k.name, k.value) for k in Kernel] == [
        ("cpu_naive", 0), ("cpu", 1), ("naive", 2), ("gemm", 3), ("fused_sm80", 4), ("fused_sm90", 5),
    ]  # fmt: skip
    assert list(FAMILIES) == list(Kernel)


def test_cpu_takes_the_fast_kernel() -> None:
    tensors = [torch.randn(1, 8, 8, 1, 4, requires_grad=True) for _ in range(3)]
    explanation = natten.explain(*tensors, 3)
    assert explanation.forward.kernel is Kernel.cpu
    assert explanation.backward is not None
    assert explanation.backward.kernel is Kernel.cpu
    assert "runs on cuda, not on cpu" in str(explanation)


@pytest.mark.parametrize(
    ("dtype", "capability", "kernel"),
    [
        (torch.bfloat16, (9, 0), Kernel.fused_sm90),
        (torch.float16, (8, 0), Kernel.fused_sm80),
        (torch.float16, (8, 9), Kernel.fused_sm80),
        (torch.float64, (9, 0), Kernel.naive),
    ],
)
@pytest.mark.usefixtures("every_architecture")
def test_choice_on_cuda(dtype: torch.dtype, capability: tuple[int, int], kernel: Kernel) -> None:
    shape = (8, 128, 128, 8, 64)
    assert explain_cuda(shape, capability, dtype=dtype, kernel_size=31).forward.kernel is kernel


@pytest.mark.usefixtures("every_architecture")
def test_float32_on_tensor_cores() -> None:
    """As TF32 where torch allows it, else as three products: fused too, but for wide heads."""

    def milliseconds() -> float:
        shape = (8, 128, 128, 8, 64)
        explanation = explain_cuda(shape, dtype=torch.float32, kernel_size=31, requires_grad=True)
        assert explanation.forward.kernel is Kernel.fused_sm80
        assert explanation.backward is not None
        assert explanation.backward.kernel is Kernel.fused_sm80
        assert explanation.backward.workspace_bytes == 8 * 8 * 128 * 128 * 8, "nothing is accumulated"
        estimate = explanation.backward.candidates[Kernel.fused_sm80].milliseconds
        assert estimate is not None
        return estimate

    exact = milliseconds()
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert milliseconds() < exact
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous
    wide = explain_cuda((2, 32, 32, 4, 136), dtype=torch.float32)
    assert rejections(wide)[Kernel.fused_sm80] == "takes a head dim up to 128, not 136"
    assert rejections(explain_cuda((2, 32, 32, 4, 136)))[Kernel.fused_sm80] is None


@pytest.mark.usefixtures("every_architecture")
def test_reasons_on_cuda() -> None:
    reasons = rejections(explain_cuda((2, 32, 32, 4, 20)))
    assert reasons[Kernel.fused_sm90] == "needs a head dim that is a multiple of 8, not 20"
    assert reasons[Kernel.naive] is None
    assert rejections(explain_cuda((2, 32, 32, 4, 264)))[Kernel.gemm] == "takes a head dim up to 256, not 264"
    assert rejections(explain_cuda(dtype=torch.float64))[Kernel.fused_sm80] == "does not take float64"
    assert rejections(explain_cuda(capability=(8, 6)))[Kernel.fused_sm90] == "needs compute capability 9.0, not 8.6"
    assert rejections(explain_cuda())[Kernel.cpu] == "runs on cpu, not on cuda"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("80",), (8, 0), True),
        (("80",), (8, 9), True),
        (("86",), (8, 0), False),
        (("86",), (9, 0), False),
        (("80", "86"), (9, 0), True),  # PTX of sm_80
        (("80",), (12, 0), True),
        (("90a",), (9, 0), True),
        (("90a",), (10, 0), False),
        (("80", "86", "90a"), (7, 5), False),
    ],
)
def test_architectures_that_run(
    monkeypatch: pytest.MonkeyPatch, architectures: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(_library, "build_info", BuildInfo(1, 13000, architectures, 0))
    if runs:
        assert explain_cuda(capability=capability).forward.kernel in FAMILIES
    else:
        found = f"{capability[0]}.{capability[1]}"
        with pytest.raises(RuntimeError, match=f"none for compute capability {found}.*NATTEN_CUDA_ARCHS"):
            explain_cuda(capability=capability)


def test_library_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "build_info", BuildInfo(1, 0, (), 0))
    with pytest.raises(
        RuntimeError, match="this build of natten holds no CUDA kernels; install a CUDA wheel, or build"
    ):
        explain_cuda()
    with pytest.raises(ValueError, match=r"fused_sm90 cannot run forward here: .*holds no CUDA kernels"):
        explain_cuda(kernel="fused_sm90")


@pytest.mark.usefixtures("every_architecture")
def test_memory_preference_rules_the_composite() -> None:
    def of_gemm() -> str | None:
        return rejections(explain_cuda())[Kernel.gemm]

    assert of_gemm() is None
    natten.set_memory_usage_preference("strict")
    try:
        assert natten.is_memory_usage_strict()
        assert "memory usage preference is strict" in str(of_gemm())
        assert explain_cuda(kernel="gemm").forward.kernel is Kernel.gemm
    finally:
        natten.set_memory_usage_preference()
    assert natten.is_memory_usage_default()
    with pytest.raises(ValueError, match="'lavish'"):
        natten.set_memory_usage_preference("lavish")


@pytest.mark.usefixtures("every_architecture")
def test_backward_pass_has_its_own_decision() -> None:
    decision = explain_cuda(requires_grad=True, kernel="fused_sm90")
    assert decision.forward.kernel is Kernel.fused_sm90
    assert decision.backward is not None
    assert "backward" in {operation.value for operation in FAMILIES[decision.backward.kernel].operations}
    assert explain_cuda(requires_grad=True, kernel="gemm").backward is None


@pytest.mark.usefixtures("every_architecture")
def test_a_forced_kernel_leaves_gradients_it_has_not_to_others() -> None:
    def backward(dim: int, **arguments: object) -> Kernel:
        decision = explain_cuda((2, 32, 32, 4, dim), requires_grad=True, kernel="fused_sm90", **arguments)
        assert decision.forward.kernel is Kernel.fused_sm90
        assert decision.backward is not None
        return decision.backward.kernel

    assert backward(128) is Kernel.fused_sm90
    assert backward(136) is Kernel.fused_sm80
    tokens = (2, 5, 4, 64)
    assert backward(64, additional_keys=tokens, additional_values=tokens) is Kernel.fused_sm80


@pytest.mark.usefixtures("every_architecture")
def test_workspace_of_the_backward_pass() -> None:
    """The formulas of the kernels' sources: the kernels refuse less."""

    def workspace(**arguments: object) -> int:
        decision = explain_cuda(requires_grad=True, **arguments).backward
        assert decision is not None
        return decision.workspace_bytes

    rows = 2 * 32 * 32 * 4
    assert workspace(kernel="naive") == 4 * rows
    assert workspace(kernel="naive", dtype=torch.float64) == 8 * rows
    statistics, accumulators = 8 * rows, 4 * 64 * rows
    assert workspace(kernel="fused_sm90") == 2 * statistics + accumulators
    assert workspace(kernel="fused_sm80", kernel_size=7) == statistics, "small windows: two kernels"
    assert workspace(kernel="fused_sm80", kernel_size=32) == statistics + accumulators
    extra = {"additional_keys": (2, 100, 4, 64), "additional_values": (2, 100, 4, 64)}
    partial = 4 * 16 * 2 * 100 * 4 * 128  # 512 / (2 * 4 * 2 tiles) = 32 parts, at most 16
    assert workspace(kernel="fused_sm80", kernel_size=32, **extra) == statistics + partial + accumulators
    natten.use_deterministic_algorithms()
    try:
        assert workspace(kernel="fused_sm80", kernel_size=32) == statistics
        assert workspace(kernel="fused_sm90") == 2 * statistics
    finally:
        natten.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("every_architecture")
@pytest.mark.parametrize(
    ("backend", "kernel"), [("cutlass-fna", "fused_sm80"), ("hopper-fna", "fused_sm90"), ("reference", "naive")]
)
def test_backend_names(backend: str, kernel: str) -> None:
    explanation = explain_cuda(backend=backend)
    assert explanation.forward.kernel is Kernel[kernel]
    assert explanation.forward.forced


def test_estimates_grow_with_the_problem() -> None:
    small, large = (
        natten.explain(*[(1, n, n, 2, 16)] * 3, kernel_size=5, device="cpu", dtype=torch.float32) for n in (64, 128)
    )
    for a, b in zip(small.forward.candidates, large.forward.candidates, strict=True):
        if a.milliseconds is not None and b.milliseconds is not None:
            assert 3 < b.milliseconds / a.milliseconds < 5


def test_explain_takes_tensors_or_shapes() -> None:
    tensors = [torch.randn(1, 8, 2, 4) for _ in range(3)]
    assert str(natten.explain(*tensors, 3)) == str(natten.explain(*[(1, 8, 2, 4)] * 3, 3, device="cpu"))


def test_forced_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    forward = torch.ops.natten.na_forward.default

    class Recorder:
        @staticmethod
        def default(*arguments: object) -> None:
            used.append(arguments[9])  # type: ignore[arg-type]
            forward(*arguments)

    monkeypatch.setattr(torch.ops.natten, "na_forward", Recorder)
    tensors = [torch.randn(1, 8, 2, 4) for _ in range(3)]
    natten.na1d(*tensors, 3, kernel="cpu_naive")
    natten.na1d(*tensors, 3, kernel=Kernel.cpu)
    natten.na1d(*tensors, 3, backend="reference")
    monkeypatch.setattr(dispatch, "forced_by_environment", "cpu_naive")
    natten.na1d(*tensors, 3)
    natten.na1d(*tensors, 3, kernel="cpu")
    assert used == [0, 1, 0, 0, 1]
    monkeypatch.setattr(dispatch, "forced_by_environment", "fastest")
    with pytest.raises(ValueError, match=r"NATTEN_KERNEL must be one of .*'fastest'"):
        natten.na1d(*tensors, 3)


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_environment_variable() -> None:
    code = "import natten; print(natten.explain(*[(1, 8, 2, 4)] * 3, 3, device='cpu').forward.kernel.name)"
    assert run_python(code, NATTEN_KERNEL="cpu_naive").strip() == "cpu_naive"


def test_missing_library_is_said() -> None:
    code = (
        "import natten, torch\n"
        "assert not natten.HAS_LIBNATTEN\n"
        "try: natten.na1d(*[torch.randn(1, 8, 2, 4)] * 3, 3)\n"
        "except RuntimeError as error: print(error)\n"
    )
    said = run_python(code, NATTEN_LIBRARY="/nonexistent/_natten.so")
    assert "compiled library is missing: /nonexistent/_natten.so could not be loaded" in said
    assert "pip install" in said


def test_info_command() -> None:
    from natten.__main__ import main

    assert main(["info"]) == 0
    with pytest.raises(SystemExit):
        main(["info", "--nonsense"])


def test_import_brings_no_compiler() -> None:
    code = "import sys, torch; before = set(sys.modules); import natten; print(*sorted(set(sys.modules) - before))"
    loaded = run_python(code).split()
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.fx.experimental.symbolic_shapes",
        "natten.bench",
        "natten.reference",
    )
    assert not [name for name in loaded if name.startswith(heavy)]


@pytest.mark.usefixtures("every_architecture")
def test_more_rows_than_a_kernel_counts_go_elsewhere() -> None:
    def backward(tokens: int) -> dispatch.Decision:
        problem = explain_cuda((1, tokens, 2, 64), (8, 0)).problem
        return dispatch.choose(problem, dispatch.Operation.backward, capability=(8, 0))

    assert backward(2**20).kernel is Kernel.fused_sm80
    assert backward(2**25).kernel is Kernel.naive


def test_explain_shows_the_kernels_plan() -> None:
    explanation = natten.explain(*[(1, 30, 40, 2, 16)] * 3, kernel_size=5)
    rows, columns, fold = explanation.forward.plan
    assert rows >= 1
    assert columns >= 1
    assert fold >= 1
    assert f"tile rows {rows}, tile columns {columns}, key rows in a vector {fold}" in str(explanation)
