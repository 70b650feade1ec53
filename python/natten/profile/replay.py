"""``python -m natten.profile.replay CALLS.json``: calls each kernel once, for ``ncu`` to count; see `counters`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from natten.bench.problems import DTYPES, BenchProblem
from natten.bench.run import natten_contender, pass_call


def read_problem(entry: dict[str, Any]) -> BenchProblem:
    """A problem as ``dataclasses.asdict`` leaves it in JSON, where tuples become lists."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
    return BenchProblem(**fields)


def main(path: str) -> None:
    """Every call is made twice: once to load and choose everything, and once counted, behind a marker."""
    specification = json.loads(Path(path).read_text())
    if specification["allow_tf32"]:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    device = torch.device("cuda", torch.cuda.current_device())
    for entry in specification["calls"]:
        dtype = DTYPES[entry["dtype"]]
        call = pass_call(
            natten_contender(read_problem(entry["problem"]), entry["kernel"], dtype, device), entry["pass"]
        )
        with torch.set_grad_enabled(entry["pass"] == "backward"):
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
            torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1])
