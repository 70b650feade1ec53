"""Names of the kernel families, and of what they are asked to compute."""

from __future__ import annotations

import enum

__all__ = ["Kernel", "Operation"]


class Kernel(enum.IntEnum):
    """Kernel families; the values are part of the operators' schema (`natten::Kernel` in cpp/kernels/arguments.h)."""

    cpu_naive = 0
    cpu = 1
    naive = 2
    gemm = 3
    fused_sm80 = 4
    fused_sm90 = 5


class Operation(enum.Enum):
    """What a kernel is asked to compute: a pass of fused attention, or an unfused operator."""

    forward = "forward"
    backward = "backward"
    qk = "qk"
    av = "av"
    inverse_av = "inverse_av"
    rpb_backward = "rpb_backward"
