"""The C++ window arithmetic and tile planner against brute force, compiled here from the headers alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("seed", [1, 2])
def test_window_arithmetic_by_brute_force(tmp_path: Path, seed: int) -> None:
    program = tmp_path / "test_window"
    source = ROOT / "tests" / "cpp" / "test_window.cpp"
    build = [str(COMPILER), "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'cpp'}", str(source)]
    subprocess.run([*build, "-o", str(program)], check=True)
    result = subprocess.run([str(program), "6000", str(seed)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.strip() == "6000 axes, 0 failures"
