"""Comparison with the oracle that remembers how close it was."""

from __future__ import annotations

import math

import torch
from problems import Case
from tolerances import Tolerance, errors
from torch import Tensor


def worst_place(result: Tensor, oracle: Tensor) -> str:
    """Where a result is furthest from the oracle, or not finite, and how many elements are."""
    result, oracle = result.detach().double().cpu(), oracle.detach().double().cpu()
    difference = (result - oracle).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    difference = difference.masked_fill(result == oracle, 0)  # equal infinities
    flat = int(difference.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape))
    wrong_rows = (difference.amax(-1) > 0.05 * oracle.masked_fill(oracle.isinf(), 0).abs().max()).nonzero()
    first = tuple(wrong_rows[0].tolist()) if len(wrong_rows) else ()
    return (
        f"furthest at {place}: {float(result[place]):.6g}, oracle {float(oracle[place]):.6g}; "
        f"{int((~result.isfinite()).sum())} of {result.numel()} not finite; {len(wrong_rows)} of "
        f"{result[..., 0].numel()} rows are off by more than 5 % of the largest value, the first {first}, "
        f"the last {tuple(wrong_rows[-1].tolist()) if len(wrong_rows) else ()}"
    )


def brief(case: object) -> str:
    """A case in one line of a table."""
    if not isinstance(case, Case):
        return str(case)
    sizes = "x".join(str(a.queries) for a in case.axes)
    window = ",".join(f"{a.kernel_size}{'c' if a.is_causal else ''}/{a.stride}/{a.dilation}" for a in case.axes)
    extra = f"+{case.additional}" if case.additional else ""
    dims = str(case.head_dim) if case.head_dim == case.head_dim_v else f"{case.head_dim},{case.head_dim_v}"
    return f"{sizes}{extra} k/s/d {window} D {dims}"


class Ledger:
    """Counts comparisons and keeps the largest error, in units of its tolerance."""

    def __init__(self) -> None:
        self.cases = 0
        self.worst = 0.0
        self.worst_case = ""

    def case(self) -> None:
        """Counts a problem."""
        self.cases += 1

    def check(
        self, name: str, result: Tensor, oracle: Tensor, magnitude: Tensor, tolerance: Tolerance, case: object
    ) -> None:
        """Fails when the error of the whole or of the worst row exceeds the tolerance, or is NaN; says where."""
        limit = tolerance.gradients if name.startswith("grad") else tolerance.outputs
        whole, row = errors(result, oracle, magnitude, tolerance)
        ratio = max(whole, row) / limit if math.isfinite(whole) and math.isfinite(row) else math.inf
        if ratio >= self.worst:
            self.worst, self.worst_case = ratio, f"{name} {brief(case)}"
        assert ratio <= 1, (
            f"{name}: error {whole:.2e}, worst row {row:.2e}, allowed {limit:.0e}; "
            f"{worst_place(result, oracle)}\n{case}"
        )
