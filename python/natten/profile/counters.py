"""Hardware counters: the measured passes once more, one call each, under Nsight Compute's ``ncu``."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natten.bench.problems import BenchProblem, Pass
from natten.dispatch import Kernel
from natten.profile.analysis import Profile

# What is collected, by the name it has here. Of several metrics the first that the device has is taken.
METRICS: Mapping[str, tuple[str, ...]] = {
    "time_us": ("gpu__time_duration.sum",),
    "dram_read_bytes": ("dram__bytes_read.sum",),
    "dram_write_bytes": ("dram__bytes_write.sum",),
    "l2_bytes": ("lts__t_bytes.sum",),
    "l2_hit_pct": ("lts__t_sector_hit_rate.pct",),
    "l1_hit_pct": ("l1tex__t_sector_hit_rate.pct",),
    "tensor_pct": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "theoretical_occupancy_pct": ("sm__maximum_warps_per_active_cycle_pct",),
    "registers": ("launch__registers_per_thread",),
    "static_shared_bytes": ("launch__shared_mem_per_block_static",),
    "dynamic_shared_bytes": ("launch__shared_mem_per_block_dynamic",),
}
# Units that ncu may scale to, in those of the names above.
_UNITS: Mapping[str, float] = {
    "": 1.0,
    "%": 1.0,
    "byte": 1.0,
    "byte/block": 1.0,
    "register/thread": 1.0,
    "ns": 1e-3,
    "nsecond": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "msecond": 1e3,
    "s": 1e6,
    "second": 1e6,
}
_PREFIXES: Mapping[str, float] = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

# A launch of torch.cuda._sleep marks where the launches of the next call begin.
MARKER = "spin_kernel"


class CountersUnavailable(Exception):
    """No counters were read; the message says why."""


@dataclass(frozen=True)
class Launch:
    """One launched CUDA kernel: its function's full name, and the metrics that the device has."""

    function: str
    metrics: Mapping[str, float]  # ncu's names, in bytes, microseconds, percent

    @property
    def short_name(self) -> str:
        """The function without template arguments and parameters."""
        name = re.sub(r"(\(anonymous namespace\)|<unnamed>)::", "", self.function.removeprefix("void "))
        while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
            name = shorter
        return name.split("(")[0].strip()

    def value(self, name: str) -> float | None:
        """A counter by its name in `METRICS`; None where the device lacks it."""
        return next((self.metrics[metric] for metric in METRICS[name] if metric in self.metrics), None)

    @property
    def dram_bytes(self) -> float | None:
        """Read and written."""
        read, written = self.value("dram_read_bytes"), self.value("dram_write_bytes")
        return None if read is None or written is None else read + written

    @property
    def shared_bytes(self) -> float | None:
        """Of a block, static and dynamic."""
        static, dynamic = self.value("static_shared_bytes"), self.value("dynamic_shared_bytes")
        return None if static is None or dynamic is None else static + dynamic

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Launch:
        """What `as_json` wrote; which of several metrics a number came from is not kept."""
        counted = {METRICS[name][0]: entry[name] for name in METRICS if entry[name] is not None}
        return cls(entry["function"], counted)

    def as_json(self) -> dict[str, Any]:
        return {"function": self.function, **{name: self.value(name) for name in METRICS}}


@dataclass(frozen=True)
class Counters:
    """The launches of one call."""

    problem: str
    pass_: str
    kernel: str
    launches: tuple[Launch, ...]

    @property
    def dram_bytes(self) -> float | None:
        """Of all launches; None where one was not counted."""
        each = [launch.dram_bytes for launch in self.launches]
        return None if not each or None in each else sum(value for value in each if value is not None)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Counters:
        """What `as_json` wrote."""
        launches = tuple(Launch.from_json(launch) for launch in entry["launches"])
        return cls(entry["problem"], entry["pass"], entry["kernel"], launches)

    def as_json(self) -> dict[str, Any]:
        return {
            "problem": self.problem,
            "pass": self.pass_,
            "kernel": self.kernel,
            "launches": [launch.as_json() for launch in self.launches],
        }


def _value(text: str, unit: str) -> float | None:
    """A number as ncu prints it, with separators of thousands; None for "n/a" and other words."""
    factor = _UNITS.get(unit)
    if factor is None:
        prefix, base = unit[:1], unit[1:]
        if prefix not in _PREFIXES or base not in _UNITS:
            return None
        factor = _PREFIXES[prefix] * _UNITS[base]
    try:
        value = float(text.replace(",", "")) * factor
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse_csv(text: str) -> list[Launch]:
    """The launches in what ``ncu --csv`` prints, in order.

    The table may stand among other output: messages (``==PROF== ...``) and what the program prints. It has a row per
    launch and metric (``--page details``), or a row per launch, below one of units (``--page raw``).
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return []
    rows = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    column = {name: index for index, name in enumerate(rows[0])}
    if "Kernel Name" not in column:
        return []
    needed = 1 + max(index for name, index in column.items() if "__" in name or name in ("Kernel Name", "Metric Value"))
    body = [row for row in rows[1:] if len(row) >= needed]
    functions: dict[str, str] = {}
    metrics: dict[str, dict[str, float]] = {}
    units: list[str] | None = None
    for row in body:
        identity = row[column["ID"]]
        if not identity.isdigit():
            units = row
            continue
        functions.setdefault(identity, row[column["Kernel Name"]])
        found = metrics.setdefault(identity, {})
        if "Metric Name" in column:
            cells = [(row[column["Metric Name"]], row[column["Metric Unit"]], row[column["Metric Value"]])]
        elif units is not None:
            cells = [(name, units[index], row[index]) for name, index in column.items() if "__" in name]
        else:
            cells = []
        for name, unit, cell in cells:
            value = _value(cell, unit)
            if value is not None:
                found[name] = value
    return [Launch(functions[identity], metrics[identity]) for identity in functions]


def split_calls(launches: Iterable[Launch]) -> list[list[Launch]]:
    """The launches of each call, without the marker that precedes them."""
    calls: list[list[Launch]] = []
    for launch in launches:
        if MARKER in launch.function:
            calls.append([])
        elif calls:
            calls[-1].append(launch)
    return calls


def command(ncu: str, specification: Path, log: Path) -> list[str]:
    """The command that counts; the program prints to the terminal, ncu into the log."""
    metrics = ",".join(metric for alternatives in METRICS.values() for metric in alternatives)
    return [
        ncu,
        *("--clock-control", "none"),
        *("--profile-from-start", "off"),
        *("--target-processes", "all"),
        *("--print-units", "base"),
        *("--metrics", metrics),
        *("--log-file", str(log)),
        "--csv",
        *(sys.executable, "-m", "natten.profile.replay", str(specification)),
    ]


def write_specification(path: Path, calls: Sequence[tuple[BenchProblem, Pass, str, Kernel]], allow_tf32: bool) -> None:
    """What `natten.profile.replay` is to call."""
    entries = [
        {"problem": dataclasses.asdict(problem), "pass": pass_, "dtype": dtype, "kernel": kernel.name}
        for problem, pass_, dtype, kernel in calls
    ]
    path.write_text(json.dumps({"allow_tf32": allow_tf32, "calls": entries}))


def count(profiles: Sequence[Profile], allow_tf32: bool, timeout_s: float = 600.0) -> list[Counters]:
    """Runs every measured pass once under ncu. Raises `CountersUnavailable` with the reason."""
    if timeout_s <= 0:
        raise CountersUnavailable("out of time")
    ncu = shutil.which("ncu")
    if ncu is None:
        raise CountersUnavailable("ncu is not on PATH; it comes with Nsight Compute and with the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        specification, log = Path(folder, "calls.json"), Path(folder, "ncu.csv")
        write_specification(specification, [(p.problem, p.pass_, p.dtype, p.kernel) for p in profiles], allow_tf32)
        try:
            done = subprocess.run(
                command(ncu, specification, log), capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise CountersUnavailable(f"ncu took longer than {timeout_s:.0f} s") from None
        text = log.read_text() if log.exists() else ""
        calls = split_calls(parse_csv(text))
        if len(calls) != len(profiles):
            said = [line for line in (text + done.stdout + done.stderr).splitlines() if line and line[0] != '"']
            errors = [line for line in said if "ERROR" in line or "Error" in line] or said[-3:]
            raise CountersUnavailable(
                f"ncu (exit status {done.returncode}) counted {len(calls)} of {len(profiles)} calls: {' '.join(errors)}"
            )
    return [
        Counters(profile.problem.name, profile.pass_, profile.kernel.name, tuple(launches))
        for profile, launches in zip(profiles, calls, strict=True)
    ]
