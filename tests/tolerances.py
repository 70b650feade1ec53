"""How exact a result must be, and how its error is measured.

The error of a result against the float64 oracle is `||result - oracle|| / ||oracle||`, over the whole tensor and for
the worst row (last dimension). Where terms cancel, as in the gradient of a query with one key, the oracle itself is
about zero; so neither denominator is taken smaller than a share of what the sums would be if no term cancelled
(`magnitude`). Rounding to the dtype's smallest steps, where float16 underflows, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest errors allowed, and the share of the magnitude that counts where terms cancel."""

    outputs: float  # out, logsumexp, and what the unfused operators return
    gradients: float
    cancelled: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-10, 1 / 64),
    torch.float32: Tolerance(2e-6, 1e-5, 1 / 8),
    # Weights and logit gradients are rounded to 16 bits between the products: cancelling terms carry that rounding.
    torch.float16: Tolerance(1e-3, 2e-3, 1 / 4),
    torch.bfloat16: Tolerance(6e-3, 1e-2, 1 / 4),
}

#: float32 where torch allows TF32.
TF32 = Tolerance(1e-3, 2e-3, 1 / 4)


def errors(result: Tensor, oracle: Tensor, magnitude: Tensor, tolerance: Tolerance) -> tuple[float, float]:
    """Error of the whole tensor and of its worst row."""
    assert result.shape == oracle.shape, f"shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return 0.0, 0.0
    step = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    result, oracle, magnitude = (t.detach().double().cpu() for t in (result, oracle, magnitude))
    infinite = oracle.isinf()
    assert torch.equal(result.isinf(), infinite), "infinities in other places than the oracle's"
    difference = ((result - oracle).masked_fill(infinite, 0).abs() - step).clamp_min(0)
    oracle, magnitude = oracle.masked_fill(infinite, 0), magnitude.masked_fill(infinite, 0)

    def ratio(d: Tensor, o: Tensor, m: Tensor) -> Tensor:
        return d / torch.maximum(o, tolerance.cancelled * m).clamp_min(torch.finfo(torch.float64).tiny)

    whole = ratio(difference.norm(), oracle.norm(), magnitude.norm())
    rows = ratio(difference.norm(dim=-1), oracle.norm(dim=-1), magnitude.norm(dim=-1))
    return float(whole), float(rows.max())


def assert_close(
    name: str, result: Tensor, oracle: Tensor, magnitude: Tensor, tolerance: Tolerance, limit: float
) -> None:
    """Fails when the error of the whole or of the worst row exceeds `limit`, or is NaN."""
    whole, row = errors(result, oracle, magnitude, tolerance)
    assert max(whole, row) <= limit, f"{name}: error {whole:.2e}, worst row {row:.2e}, allowed {limit:.0e}"
