"""Command line: `python -m natten info`, `python -m natten bench ...`, `python -m natten profile ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import natten
from natten import _library
from natten.dispatch import FAMILIES, Kernel, device_capability, unavailable

_INSTRUCTION_SETS = {0: "baseline", 1: "AVX2", 2: "AVX-512"}


def _info() -> None:
    def line(name: str, text: object) -> None:
        print(f"{name:<14}{text}")

    line("natten", natten.__version__)
    line("torch", torch.__version__)
    info = _library.build_info
    if info is None:
        try:
            _library.require_library()
        except RuntimeError as error:
            line("library", error)
        return
    line("library", _library.library_path)
    line("CPU code", _INSTRUCTION_SETS.get(info.cpu_instruction_set, info.cpu_instruction_set))
    major, minor = info.cuda_version // 1000, info.cuda_version % 1000 // 10
    line("CUDA code", f"{', '.join(info.architectures)} (CUDA {major}.{minor})" if info.cuda_version else "none")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        capability = device_capability(device)
        name = "" if capability is None else torch.cuda.get_device_name(device)
        version = "" if capability is None else f", compute capability {capability[0]}.{capability[1]}"
        line(str(device), f"{name}{version}".strip(", ") or f"{torch.get_num_threads()} threads")
        for kernel in Kernel:
            if FAMILIES[kernel].device == device.type:
                line("", f"{kernel.name:<11}{unavailable(kernel, device) or 'available'}")
    if not torch.cuda.is_available():
        line("cuda", "no device is visible to this torch")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m natten", description="Neighborhood attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, the library found, devices and the kernels that run on them")
    commands.add_parser("bench", help="benchmarks (python -m natten bench --help)", add_help=False)
    commands.add_parser(
        "profile", help="what every kernel makes of a problem (python -m natten profile --help)", add_help=False
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        from natten.bench import main as bench

        return int(bench(rest) or 0)
    if arguments.command == "profile":
        from natten.profile import main as profile

        return profile(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
