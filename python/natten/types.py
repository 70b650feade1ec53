"""Types of the public functions' arguments."""

from collections.abc import Sequence
from typing import TypeAlias

#: One integer for every axis, or one for each.
Dimension: TypeAlias = int | Sequence[int]
#: One flag for every axis, or one for each.
CausalFlag: TypeAlias = bool | Sequence[bool]

__all__ = ["CausalFlag", "Dimension"]
