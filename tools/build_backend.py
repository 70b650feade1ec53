"""The build backend: scikit-build-core, plus the CUDA compiler from PyPI where it is needed.

CUDA kernels are built when ``NATTEN_CUDA_ARCHS`` asks for them (unset: when a GPU is seen). If the machine has no
``nvcc`` then, the pinned compiler packages are added to what the isolated build installs. Machines with a CUDA toolkit,
and CPU-only builds, download nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import build_editable, build_sdist, build_wheel, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

Settings = dict[str, "str | list[str]"] | None


def _compiler_requirements() -> list[str]:
    wanted = os.environ.get("NATTEN_CUDA_ARCHS", "all" if shutil.which("nvidia-smi") else "none")
    if wanted in ("", "none") or shutil.which("nvcc") or "CUDACXX" in os.environ:
        return []
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return []
    lines = (Path(__file__).parent / "requirements-nvcc.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """PEP 517: what the build of a wheel needs beyond ``build-system.requires``."""
    return [*_backend.get_requires_for_build_wheel(config_settings), *_compiler_requirements()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """PEP 660: the same for an editable install."""
    return [*_backend.get_requires_for_build_editable(config_settings), *_compiler_requirements()]
