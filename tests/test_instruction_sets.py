"""The vectorised CPU kernel in the instruction sets that would not be chosen here: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from natten._library import build_info

# As `build_info` numbers them.
LEVELS = {"baseline": 0, "avx2": 1, "avx512": 2}

PROGRAM = """
import sys
import pytest
from natten._library import build_info
assert build_info.cpu_instruction_set == int(sys.argv[1])
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not naive", sys.argv[2]]))
"""


@pytest.mark.parametrize("name", LEVELS)
def test_results(name: str) -> None:
    assert build_info is not None
    if LEVELS[name] >= build_info.cpu_instruction_set:
        pytest.skip("the set that all other tests run, or none of this processor's")
    tests = Path(__file__).with_name("test_kernels.py")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LEVELS[name]), str(tests)],
        env={**os.environ, "NATTEN_CPU_INSTRUCTION_SET": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_unknown_set_is_named() -> None:
    program = "import torch, natten; q = torch.randn(1, 8, 1, 8); natten.na1d(q, q, q, 3, kernel='cpu')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NATTEN_CPU_INSTRUCTION_SET": "abacus"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "abacus" in done.stderr
