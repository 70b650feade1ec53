"""Checks a built wheel: its tag, its files, and that the library needs nothing but torch >= 2.10 and the C library.

    python tools/check_wheel.py wheelhouse/natten-*.whl [--smoke]

``--smoke`` also installs the wheel into an empty environment beside the torch of this interpreter, runs attention, and
times the import.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 60 * 2**20
GOAL_IMPORT_MS = 15.0  # beyond torch; the best of some, since what else runs on the machine can only add
MOST_IMPORT_MS = 30.0  # on a slow or busy machine
C_LIBRARY = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
NEEDED = {"libtorch.so", "libgcc_s.so.1"} | C_LIBRARY
# Found by the dynamic linker when present; null otherwise.
WEAK = {"__gmon_start__", "__cxa_pure_virtual", "aoti_torch_get_current_cuda_stream"}

SMOKE = """
import torch, natten
q, k, v = (torch.randn(1, 9, 10, 2, 16, requires_grad=True) for _ in range(3))
out = natten.na2d(q, k, v, kernel_size=(5, 3), dilation=(1, 2))
out.sum().backward()
assert out.shape == q.shape and bool(torch.isfinite(q.grad).all())
print("smoke test passed:", natten.__version__, "on torch", torch.__version__)
"""

IMPORT = """
import time, torch
start = time.perf_counter()
import natten
print((time.perf_counter() - start) * 1e3)
"""


def tool_lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def check_library(library: Path) -> list[str]:
    """Everything that is wrong with the library's dynamic section and symbols."""
    wrong = []
    dynamic = "\n".join(tool_lines("readelf", "-d", str(library)))
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    if "libtorch.so" not in needed or not needed <= NEEDED:
        wrong.append(f"needed libraries are {sorted(needed)}, allowed are {sorted(NEEDED)}")
    stable = set((ROOT / "tools" / "stable_abi_2_10.txt").read_text().split())
    for line in tool_lines("nm", "-D", "--undefined-only", str(library)):
        kind, symbol = line.split()[-2:]
        if "@GLIBC" in symbol or "@GCC_" in symbol or symbol in stable:
            continue
        if kind in "wv" and (symbol in WEAK or symbol.startswith(("_ITM_", "_ZGTt"))):
            continue
        wrong.append(f"needs the symbol {symbol}, which is not in the stable ABI of torch 2.10")
    exported = [line.split()[-1] for line in tool_lines("nm", "-D", "--defined-only", str(library))]
    if exported:
        wrong.append(f"exports {len(exported)} symbols, {exported[:3]} among them; it should export none")
    return wrong


def check_wheel(wheel: Path) -> list[str]:
    wrong = []
    if not re.fullmatch(r"natten-[^-]+-py3-none-(manylinux|linux)\w*_x86_64(\.\w+)*\.whl", wheel.name):
        wrong.append(f"the tag of {wheel.name} is not py3-none-(many)linux_x86_64")
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        wrong.append(f"{size / 2**20:.1f} MB is more than {MOST_BYTES / 2**20:.0f} MB")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for expected in ("natten/_natten.so", "natten/py.typed", "natten/__init__.py"):
            if expected not in names:
                wrong.append(f"{expected} is missing")
        wrong += [f"{name} does not belong in the wheel" for name in names if not name.startswith("natten")]
        libraries = [name for name in names if name.endswith(".so")]
        if libraries != ["natten/_natten.so"]:
            wrong.append(f"the libraries are {libraries}")
        for name in libraries:
            wrong += check_library(Path(archive.extract(name, folder)))
    if not wrong:
        print(f"{wheel.name}: {size / 2**20:.1f} MB, {len(names)} files, the stable ABI of torch 2.10 alone")
    return wrong


def smoke_test(wheel: Path) -> list[str]:
    """Installs the wheel alone; torch comes from this interpreter's site-packages, whose .pth files (an editable natten
    among them) do not count under -S."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, str(wheel)], check=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, sysconfig.get_paths()["purelib"]])}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles what it installs, users have it compiled
        python = [sys.executable, "-S", "-c"]
        subprocess.run([*python, SMOKE], check=True, env=environment, cwd=folder)
        times = []
        for _ in range(10):
            done = subprocess.run([*python, IMPORT], check=True, env=environment, cwd=folder, capture_output=True)
            times.append(float(done.stdout))
            if times[-1] < GOAL_IMPORT_MS:
                break
    print(f"import natten takes {min(times):.1f} ms beyond torch (goal: {GOAL_IMPORT_MS:.0f} ms)")
    return [] if min(times) < MOST_IMPORT_MS else [f"import takes more than {MOST_IMPORT_MS:.0f} ms beyond torch"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--smoke", action="store_true", help="install each wheel and run it")
    arguments = parser.parse_args()
    wrong = [f"{wheel.name}: {fault}" for wheel in arguments.wheels for fault in check_wheel(wheel)]
    if arguments.smoke and not wrong:
        wrong = [f"{wheel.name}: {fault}" for wheel in arguments.wheels for fault in smoke_test(wheel)]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
