"""Which kernel runs a call, and why.

`FAMILIES` states what each kernel family supports; `choose` takes the candidate of least estimated time (`_cost.py`)
among those that can run the call. Decisions are made in Python, once per kind of call, and at trace time under
`torch.compile`, so compiled graphs hold them as constants. `natten.explain` shows them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from natten import _cost, _library, _tuned, context
from natten._kernels import Kernel, Operation
from natten._problem import DTYPES, Problem

__all__ = ["Candidate", "Decision", "Kernel", "Operation", "choose", "kernel_from_backend", "parse_kernel"]


_FUSED = frozenset({Operation.forward, Operation.backward})
_UNFUSED = frozenset({Operation.qk, Operation.av, Operation.inverse_av})
_EVERY = frozenset(Operation)
_HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Family:
    """What a kernel family supports."""

    kernel: Kernel
    device: str
    operations: frozenset[Operation]
    dtypes: frozenset[torch.dtype]
    head_dim_multiple: int = 1
    head_dim_maximum: int | None = None
    #: The same for float32, where it differs.
    float32_head_dim_maximum: int | None = None
    #: Compute capability needed: at least `minimum_capability`; exactly `exact_capability`.
    minimum_capability: tuple[int, int] | None = None
    exact_capability: tuple[int, int] | None = None
    #: Whether addresses and strides must be multiples of 16 bytes; other tensors are copied first.
    aligned: bool = False
    #: Whether strides must be positive as well: expanded tensors are copied first.
    positive_strides: bool = False
    #: Most queries times heads of one batch item that the backward pass takes.
    most_backward_rows: int | None = None
    #: The scale must lie between these, where given.
    scale_bounds: tuple[float, float] | None = None
    #: Whether fused attention is composed of qk, softmax and av, and stores the attention weights.
    composite: bool = False
    #: Why `backward` cannot run what `forward` can, or None.
    backward_limits: Callable[[Problem], str | None] = field(default=lambda problem: None)
    #: Bytes of scratch memory that `backward` needs.
    workspace_bytes: Callable[[Problem], int] = field(default=lambda problem: 0)

    def largest_head_dim(self, dtype: torch.dtype) -> int | None:
        """The largest head dim that it takes; None without a bound."""
        if dtype == torch.float32 and self.float32_head_dim_maximum is not None:
            return self.float32_head_dim_maximum
        return self.head_dim_maximum


def _delta_bytes(problem: Problem) -> int:
    """One number per query and head: the row sums of grad_out * out, in the type of logsumexp."""
    return problem.batch * problem.queries * problem.heads * (8 if problem.dtype == torch.float64 else 4)


def _fused_sm80_bytes(problem: Problem) -> int:
    """What cpp/kernels/fused_sm80/backward.cu asks for.

    Two numbers per query and head; partial sums of the additional keys' gradients; and float32 accumulators of the
    query gradients, which save two of seven products but are added to in any order, where they are allowed and faster.
    """
    rows = problem.batch * problem.queries * problem.heads
    needed = 8 * rows
    if not isinstance(problem.additional, int) or problem.additional > 0:
        heads, parts = problem.batch * problem.heads_kv, 16
        if isinstance(heads, int) and isinstance(problem.additional, int):
            parts = min(max(512 // max(heads * -(-problem.additional // 64), 1), 1), 16)
        needed += 4 * parts * heads * problem.additional * (problem.head_dim + problem.head_dim_v)
    if not _cost.accumulating_is_faster(problem):
        return needed
    return (needed + 15) // 16 * 16 + 4 * rows * (-(-problem.head_dim // 16) * 16)


def _fused_sm90_bytes(problem: Problem) -> int:
    """What cpp/kernels/fused_sm90/backward.cu asks for.

    Two numbers per query and head, 16 bytes apart for the copy engine; and float32 sums of the query gradients, which
    save two of seven products but are added to in any order, where they are allowed.
    """
    rows = problem.batch * problem.queries * problem.heads
    needed = 16 * rows
    return needed + 4 * rows * problem.head_dim if _cost.accumulating_is_allowed(problem) else needed


def _fused_sm90_backward_limits(problem: Problem) -> str | None:
    largest = max(problem.head_dim, problem.head_dim_v)
    if largest > 128:
        return f"takes head dims up to 128 backward, not {largest}"
    if not isinstance(problem.additional, int) or problem.additional > 0:
        return "takes no additional keys backward"
    if any(isinstance(size, int) and size == 0 for size in (*problem.q_grid, *problem.kv_grid)):
        return "takes no empty grids backward"
    return None


FAMILIES: Mapping[Kernel, Family] = {
    family.kernel: family
    for family in (
        Family(Kernel.cpu_naive, "cpu", _EVERY, frozenset(DTYPES)),
        Family(Kernel.cpu, "cpu", _FUSED | _UNFUSED, frozenset(DTYPES)),
        Family(
            Kernel.naive,
            "cuda",
            _EVERY,
            frozenset(DTYPES),
            workspace_bytes=_delta_bytes,
        ),
        Family(
            Kernel.gemm,
            "cuda",
            _UNFUSED | _FUSED,
            _HALF | {torch.float32},
            head_dim_multiple=8,
            head_dim_maximum=256,
            minimum_capability=(8, 0),
            aligned=True,
            composite=True,
        ),
        Family(
            Kernel.fused_sm80,
            "cuda",
            _FUSED,
            _HALF | {torch.float32},
            head_dim_multiple=8,
            head_dim_maximum=256,
            float32_head_dim_maximum=128,
            minimum_capability=(8, 0),
            most_backward_rows=(2**31 - 1) // 64,
            aligned=True,
            workspace_bytes=_fused_sm80_bytes,
        ),
        Family(
            Kernel.fused_sm90,
            "cuda",
            _FUSED,
            _HALF,
            head_dim_multiple=8,
            head_dim_maximum=256,
            exact_capability=(9, 0),
            aligned=True,
            positive_strides=True,
            scale_bounds=(1e-6, 5e5),  # masked scores are finite, and vanish after scaling
            most_backward_rows=(2**31 - 1) // 64,
            backward_limits=_fused_sm90_backward_limits,
            workspace_bytes=_fused_sm90_bytes,
        ),
    )
}


# Share of the device's memory that the composite may take for attention weights.
_COMPOSITE_MEMORY_SHARE = 0.25

#: Kernel that `NATTEN_KERNEL` forces for calls that do not name one; read once, when natten is imported.
forced_by_environment: str | None = os.environ.get("NATTEN_KERNEL") or None

# Names of the public package's backends.
_BACKENDS: Mapping[str, Kernel | None] = {
    "cutlass-fna": Kernel.fused_sm80,
    "cutlass-fmha": Kernel.fused_sm80,
    "hopper-fna": Kernel.fused_sm90,
    "hopper-fmha": Kernel.fused_sm90,
    "flex-fna": None,
    "flex-fmha": None,
}


class Candidate(NamedTuple):
    """One kernel family's standing in a decision."""

    kernel: Kernel
    #: Why it cannot run the call, or None.
    rejected: str | None
    #: Estimated time, None where rejected or unknown.
    milliseconds: float | None
    #: Memory beyond inputs and outputs.
    memory_bytes: int


class Decision(NamedTuple):
    """The kernel of one operation, and every candidate's standing."""

    operation: Operation
    kernel: Kernel
    plan: tuple[int, ...]
    workspace_bytes: int
    forced: bool
    candidates: tuple[Candidate, ...]
    #: Milliseconds that `natten.tune` measured, where its results decided.
    measured: float | None = None

    @property
    def family(self) -> Family:
        """The chosen kernel's row of `FAMILIES`."""
        return FAMILIES[self.kernel]


def parse_kernel(kernel: object) -> Kernel | None:
    """The kernel that a caller names; None, or a call without a name: what `NATTEN_KERNEL` says."""
    name = forced_by_environment if kernel is None else kernel
    if name is None:
        return None
    if isinstance(name, Kernel):
        return name
    if isinstance(name, str) and name in Kernel.__members__:
        return Kernel[name]
    origin = "NATTEN_KERNEL" if kernel is None else "kernel"
    raise ValueError(f"{origin} must be one of {', '.join(Kernel.__members__)}; got {name!r}")


def kernel_from_backend(backend: object, device: torch.device) -> Kernel | None:
    """The kernel for a backend name of the public NATTEN package.

    "cutlass-fna" / "cutlass-fmha" is `fused_sm80`, "hopper-fna" / "hopper-fmha" is `fused_sm90`, "reference" is the
    naive kernel of the device. "flex-fna" / "flex-fmha", there the backend that runs anywhere, leaves the choice to the
    dispatcher.
    """
    if backend == "reference":
        return Kernel.naive if device.type == "cuda" else Kernel.cpu_naive
    if not isinstance(backend, str) or backend not in _BACKENDS:
        names = ", ".join([*_BACKENDS, "reference"])
        raise ValueError(f"backend must be one of {names} (or use kernel=); got {backend!r}")
    return _BACKENDS[backend]


def forced_kernel(kernel: object, backend: object, device: torch.device) -> Kernel | None:
    """The kernel that the caller's `kernel` or `backend` argument, or the environment, asks for."""
    if backend is not None:
        if kernel is not None:
            raise ValueError(f"kernel and backend exclude each other; got {kernel!r} and {backend!r}")
        return kernel_from_backend(backend, device)
    return parse_kernel(kernel)


@functools.cache
def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


@functools.cache
def _device_memory(device: torch.device) -> int | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def _runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for one of the architectures runs there.

    Machine code: same major version, minor not newer; "90a" only on 9.0. Builds for "80" also hold PTX, which drivers
    compile for any later architecture.
    """
    if "80" in architectures and capability >= (8, 0):
        return True
    for name in architectures:
        major, minor = int(name.rstrip("a")[:-1]), int(name.rstrip("a")[-1])
        if major == capability[0] and (minor == capability[1] if name.endswith("a") else minor <= capability[1]):
            return True
    return False


def _architecture_problem(capability: tuple[int, int] | None) -> str | None:
    if capability is None:
        return "there is no CUDA device to ask for its compute capability"
    info = _library.build_info
    how = "install a CUDA wheel, or build with NATTEN_CUDA_ARCHS, for example NATTEN_CUDA_ARCHS='80;86;90a'"
    if info is None or not info.cuda_version:
        return f"this build of natten holds no CUDA kernels; {how}"
    if not _runs_on(info.architectures, capability):
        built = ", ".join(info.architectures)
        return (
            f"this build holds CUDA kernels for {built}, none for compute capability {capability[0]}.{capability[1]}; "
            f"{how}"
        )
    return None


def forced_backward(forced: Kernel | None, problem: Problem) -> Kernel | None:
    """The kernel forced for a call, where it can run the backward pass too; any other's gradients fit its results."""
    if forced is None or Operation.backward not in FAMILIES[forced].operations:
        return None
    return forced if FAMILIES[forced].backward_limits(problem) is None else None


def unavailable(kernel: Kernel, device: torch.device) -> str | None:
    """Why a kernel of the device's type runs nothing there at all, or None."""
    if FAMILIES[kernel].device == "cpu":
        return None
    capability = device_capability(device)
    return _architecture_problem(capability) or _capability_problem(FAMILIES[kernel], capability)


def _capability_problem(family: Family, capability: tuple[int, int] | None) -> str | None:
    assert capability is not None
    found = f"{capability[0]}.{capability[1]}"
    exact, least = family.exact_capability, family.minimum_capability
    if exact is not None and capability != exact:
        return f"needs compute capability {exact[0]}.{exact[1]}, not {found}"
    if least is not None and capability < least:
        return f"needs compute capability {least[0]}.{least[1]} or newer, not {found}"
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_type(device: torch.device) -> str:
    """Meta tensors have shapes only: any family would do, the CPU's are always there."""
    return "cpu" if device.type == "meta" else device.type


def _rejection(
    family: Family, problem: Problem, operation: Operation, capability: tuple[int, int] | None, architecture: str | None
) -> str | None:
    """Why the family cannot run the operation, or None."""
    if family.device != _device_type(problem.device):
        return f"runs on {family.device}, not on {problem.device.type}"
    if operation not in family.operations:
        return f"has no {operation.value}"
    if problem.dtype not in family.dtypes:
        return f"does not take {_dtype_name(problem.dtype)}"
    for name, size in (("head dim", problem.head_dim), ("value head dim", problem.head_dim_v)):
        if size % family.head_dim_multiple != 0:
            return f"needs a {name} that is a multiple of {family.head_dim_multiple}, not {size}"
        most = family.largest_head_dim(problem.dtype)
        if most is not None and size > most:
            return f"takes a {name} up to {most}, not {size}"
    if operation is Operation.backward and family.most_backward_rows is not None:
        rows = problem.queries * problem.heads
        if not isinstance(rows, torch.SymInt) and rows > family.most_backward_rows:
            return f"takes up to {family.most_backward_rows} queries times heads backward, not {rows}"
    if operation is Operation.backward and (limit := family.backward_limits(problem)) is not None:
        return limit
    if family.scale_bounds is not None and not family.scale_bounds[0] <= problem.scale <= family.scale_bounds[1]:
        return f"needs a scale from {family.scale_bounds[0]:g} to {family.scale_bounds[1]:g}, not {problem.scale}"
    if family.device == "cuda":
        return architecture or _capability_problem(family, capability)
    return None


def _memory_rejection(memory_bytes: int, device: torch.device) -> str | None:
    preference = context.get_memory_usage_preference()
    if preference == "unrestricted":
        return None
    gib = memory_bytes / 2**30
    if preference == "strict":
        return f"would store {gib:.2f} GiB of attention weights, and the memory usage preference is strict"
    total = _device_memory(device)
    if total is not None and memory_bytes > _COMPOSITE_MEMORY_SHARE * total:
        return f"would store {gib:.1f} GiB of attention weights, over a quarter of the device's {total / 2**30:.1f} GiB"
    return None


def candidates(
    problem: Problem,
    operation: Operation,
    capability: tuple[int, int] | None = None,
    requires_grad: bool = False,
) -> tuple[Candidate, ...]:
    """Every family's standing for the operation; `capability` overrides the device's own."""
    architecture = None
    if problem.device.type == "cuda":
        capability = capability or device_capability(problem.device)
        architecture = _architecture_problem(capability)
    typical = _cost.nominal(problem)
    result = []
    for family in FAMILIES.values():
        rejected = _rejection(family, problem, operation, capability, architecture)
        if rejected is not None:
            result.append(Candidate(family.kernel, rejected, None, 0))
            continue
        milliseconds = _cost.milliseconds(family.kernel, typical, operation, capability, family.composite)
        memory = 0
        if family.composite and operation in _FUSED:
            # Logits and weights in the forward pass; the backward pass adds the gradient of each.
            memory = _cost.attention_weights_bytes(typical) * (4 if requires_grad else 2)
            if operation is Operation.backward:
                rejected = "differentiates only its own forward pass"
            if requires_grad:
                milliseconds += _cost.milliseconds(
                    family.kernel, typical, Operation.backward, capability, family.composite
                )
        elif operation is Operation.backward:
            memory = family.workspace_bytes(typical)
        result.append(Candidate(family.kernel, rejected, milliseconds, memory))
    if operation is Operation.forward and requires_grad:
        # Kernels share the convention of logsumexp, so each forward pass may be paired with the best backward pass.
        backward = [c.milliseconds for c in candidates(problem, Operation.backward, capability) if c.rejected is None]
        fastest = min((ms for ms in backward if ms is not None), default=0.0)
        result = [
            c
            if c.milliseconds is None or FAMILIES[c.kernel].composite
            else Candidate(c.kernel, c.rejected, c.milliseconds + fastest, c.memory_bytes)
            for c in result
        ]
    return tuple(result)


_MAX_DECISIONS = 4096
_decisions: dict[tuple[object, ...], Decision] = {}


def forget() -> None:
    """Decisions are made anew."""
    _decisions.clear()


def choose(
    problem: Problem,
    operation: Operation,
    forced: Kernel | None = None,
    capability: tuple[int, int] | None = None,
    requires_grad: bool = False,
) -> Decision:
    """The kernel of least estimated time among those that can run the operation, or the forced one.

    Raises `ValueError` when the forced kernel cannot run the call and `RuntimeError` when none can, with the reasons.
    """
    settings = (context.get_memory_usage_preference(), _library.build_info)
    signature = (problem, operation, forced, capability, requires_grad, settings)
    try:
        decision = _decisions.get(signature)
    except TypeError:  # a symbol is not hashable
        return _decide(problem, operation, forced, capability, requires_grad)
    if decision is None:
        decision = _decide(problem, operation, forced, capability, requires_grad)
        if len(_decisions) >= _MAX_DECISIONS:
            _decisions.clear()
        _decisions[signature] = decision
    return decision


def _decide(
    problem: Problem,
    operation: Operation,
    forced: Kernel | None,
    capability: tuple[int, int] | None,
    requires_grad: bool,
) -> Decision:
    standing = candidates(problem, operation, capability, requires_grad)
    tuned: _tuned.Measured | None = None
    if forced is not None:
        mine = standing[list(FAMILIES).index(forced)]
        if mine.rejected is not None:
            raise ValueError(f"kernel {forced.name} cannot run {operation.value} here: it {_sentence(mine.rejected)}")
        chosen = mine
    else:
        standing = tuple(_limit_memory(candidate, problem, operation) for candidate in standing)
        possible = [c for c in standing if c.rejected is None and c.milliseconds is not None]
        if not possible:
            _library.require_library()
            local = [c for c in standing if FAMILIES[c.kernel].device == _device_type(problem.device)]
            if not local:
                raise RuntimeError(f"no kernel runs on {problem.device.type}; tensors must be on cpu or cuda")
            reasons = "; ".join(dict.fromkeys(f"{c.rejected}" for c in local))
            raise RuntimeError(f"no kernel can run {operation.value} on {problem.device}: {reasons}")
        chosen = min(possible, key=lambda c: c.milliseconds or 0.0)
        if capability is None:
            usable = {c.kernel for c in possible if not (requires_grad and FAMILIES[c.kernel].composite)}
            tuned = next((m for m in _tuned.lookup(problem, operation) if m.kernel in usable), None)
    kernel, plan, measured = (
        (chosen.kernel, (), None) if tuned is None else (tuned.kernel, tuned.plan, tuned.milliseconds)
    )
    workspace = FAMILIES[kernel].workspace_bytes(problem) if operation is Operation.backward else 0
    return Decision(operation, kernel, plan, workspace, forced is not None, standing, measured)


def _limit_memory(candidate: Candidate, problem: Problem, operation: Operation) -> Candidate:
    if candidate.rejected is not None or operation not in _FUSED or not FAMILIES[candidate.kernel].composite:
        return candidate
    reason = _memory_rejection(candidate.memory_bytes, problem.device)
    return (
        candidate
        if reason is None
        else Candidate(candidate.kernel, reason, candidate.milliseconds, candidate.memory_bytes)
    )


def _sentence(reason: str) -> str:
    """Reasons are predicates ("needs ..."), or clauses of their own ("this build ...", "there is ...")."""
    return f"is unavailable, because {reason}" if reason.startswith(("this ", "there ")) else reason
