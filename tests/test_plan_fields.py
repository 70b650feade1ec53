"""The names of a plan's numbers, for explanations and for the search for better plans."""

from __future__ import annotations

import pytest

from natten._explain import plan_fields
from natten.dispatch import Kernel


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        ((0, 1, 8, 16, 1, 8, 8), ["variant", "query tile", "key box"]),
        (
            (2, 1, 4, 4, 1, 2, 2, 14, 2),
            ["form", "query patch", "patches of a tile", "slab step", "heads of a block"],
        ),
    ],
)
def test_both_forms_of_fused_sm80_are_named(plan: tuple[int, ...], names: list[str]) -> None:
    fields = plan_fields(Kernel.fused_sm80, plan)
    assert [name for name, _ in fields] == names
    assert sum(count for _, count in fields) == len(plan)
