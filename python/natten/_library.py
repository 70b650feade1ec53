"""The compiled library: where it is found, what it was built with, and how tracing sees its operators."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["HAS_LIBNATTEN", "BuildInfo", "build_info", "library_path", "require_library"]

_FILE_NAME = "_natten.so"
_OPERATORS = ("na_forward", "na_backward", "na_qk", "na_av", "na_inverse_av", "na_rpb_backward")
_ARCHITECTURES = ((1, "80"), (2, "86"), (4, "90a"))

# Operators defined in Python (torch.ops.natten.na1d, ...) live in this fragment of the namespace.
fragment: torch.library.Library = torch.library.Library("natten", "FRAGMENT")  # type: ignore[no-untyped-call]


class BuildInfo(NamedTuple):
    """What the loaded library holds."""

    version: int
    cuda_version: int  # 13000 for CUDA 13.0; 0 without CUDA kernels
    architectures: tuple[str, ...]  # of the CUDA kernels, for example ("80", "86", "90a")
    cpu_instruction_set: int


def _find() -> Path | None:
    """`NATTEN_LIBRARY` if it is set, else `_natten.so` in the package."""
    override = os.environ.get("NATTEN_LIBRARY")
    if override:
        return Path(override)
    package = sys.modules[__package__ or "natten"]
    for directory in package.__path__:
        path = Path(directory) / _FILE_NAME
        if path.exists():
            return path
    return None


def _load() -> tuple[Path | None, str]:
    path = _find()
    if path is None:
        return None, f"{_FILE_NAME} is not in {Path(__file__).parent}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return None, f"{path} could not be loaded: {error.__cause__ or error}"
    for name in _OPERATORS:
        # Every operator writes into its arguments and returns nothing.
        fragment.impl(name, _returns_nothing, "Meta")  # type: ignore[no-untyped-call]
    return path, ""


def _returns_nothing(*args: object, **kwargs: object) -> None:
    return None


def _read_build_info() -> BuildInfo | None:
    if library_path is None:
        return None
    version, mask, cuda_version, instruction_set = torch.ops.natten.build_info()[:4]
    architectures = tuple(name for bit, name in _ARCHITECTURES if mask & bit)
    return BuildInfo(version, cuda_version, architectures, instruction_set)


library_path, _failure = _load()
build_info = _read_build_info()

#: Whether the compiled library was found and loaded.
HAS_LIBNATTEN: bool = library_path is not None


def require_library() -> None:
    """Raises `RuntimeError`, saying why and what to do, when the compiled library is missing."""
    if library_path is None:
        raise RuntimeError(
            f"natten's compiled library is missing: {_failure}. Install a wheel, or build it with `pip install .` in a "
            "checkout; NATTEN_LIBRARY may name a library built elsewhere."
        )
