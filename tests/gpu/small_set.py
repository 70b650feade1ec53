"""A few small problems on the named kernels, for compute-sanitizer (see tools/gpu_check): forward, backward, operators.

compute-sanitizer --tool memcheck python tests/gpu/small_set.py naive fused_sm80
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checks import axis, check_attention, check_unfused, refusal
from ledger import Ledger
from problems import AxisCase, Case

from natten.dispatch import FAMILIES, Kernel, Operation

CASES = (
    Case((axis(150, 21),), heads=2, head_dim=64, head_dim_v=64),
    Case((axis(19, 7, 2), axis(23, 5, 1, 3)), batch=2, heads=4, heads_kv=2, head_dim=32, head_dim_v=32, additional=5),
    Case((axis(5, 3), axis(9, 4, 1, 1, True), axis(11, 5)), heads=1, head_dim=128, head_dim_v=128, layout="packed"),
    Case((AxisCase(9, 1, 1, False, 90, 30, 37, 20, 60),), heads=1, head_dim=16, head_dim_v=40),
)


def main() -> None:
    ledger = Ledger()
    for name in sys.argv[1:]:
        kernel = Kernel[name]
        family = FAMILIES[kernel]
        device = torch.device(family.device)
        for dtype in sorted(family.dtypes & {torch.float32, torch.float16}, key=str):
            for case in CASES:
                if refusal(kernel, case, dtype, device) is not None:
                    continue
                print(name, dtype, case, flush=True)
                check_attention(ledger, case, kernel, dtype, device)
                if Operation.qk in family.operations:
                    check_unfused(ledger, case, kernel, dtype, device)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{ledger.cases} cases, worst error {ledger.worst:.2f} of its tolerance")


if __name__ == "__main__":
    main()
