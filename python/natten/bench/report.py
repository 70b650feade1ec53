"""Tables, and JSON files that say where their numbers come from."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that measures takes: the device, a limit of time, and the file with its revision."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after this time")
    parser.add_argument(
        "--json", help="write the rows here as they come, with device, versions, commit, command and date"
    )
    parser.add_argument("--commit", help="revision to name in the file, where the code runs outside its repository")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def _output_of(*command: str, directory: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    revision = _output_of("git", "rev-parse", "--short=12", "HEAD", directory=here)
    if revision is None:
        return None
    return revision + (", modified" if _output_of("git", "status", "--porcelain", "-uno", directory=here) else "")


def circumstances(
    device: torch.device, command: Sequence[str] | None = None, commit: str | None = None
) -> dict[str, Any]:
    """Device, driver, versions, commit, command and date: the head of every file of measurements.

    ``commit`` names the revision where the code runs outside of its repository.
    """
    driver = None
    if device.type == "cuda":
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None and device.type == "cuda":
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return {
        "device": device_name(device),
        "driver": driver,
        "versions": versions,
        "commit": commit or _commit(),
        "command": shlex.join(command if command is not None else sys.argv),
        "date": datetime.date.today().isoformat(),
    }


def write_json(path: str | Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """A file of measurements: ``head`` (see :func:`circumstances`), further keys, then ``rows``, one a line."""
    fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**head, **extra}.items()]
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    fields.append(f'"rows": [\n{lines}\n  ]')
    replace_text(path, "{\n  " + ",\n  ".join(fields) + "\n}\n")


def replace_text(path: str | Path, text: str) -> None:
    """Writes a file in one step: who reads it, or kills the writer, sees the old text or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(target)


class RowFile:
    """A file of measurements that is whole after every row: the run that writes it may be ended at any time.

    Holds ``head`` (see :func:`circumstances`), further keys, ``skipped`` (what was not measured, with the reason), and
    the rows. Without a path nothing is written.
    """

    def __init__(self, path: str | Path | None, head: Mapping[str, Any], **extra: Any) -> None:
        self.path = path
        self.head = head
        self.extra = extra
        self.rows: list[Mapping[str, Any]] = []
        self.skipped: list[Mapping[str, Any]] = []
        self.save()

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.head, self.rows, **self.extra, skipped=self.skipped)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    def skip(self, **what: Any) -> None:
        self.skipped.append(what)
        self.save()


@dataclass(frozen=True)
class Column:
    title: str
    right: bool = True


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text, two spaces between columns."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row of {len(row)} cells in a table of {len(columns)} columns: {row}")
    table = [[column.title for column in columns], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(table[0]), rule, *(line(row) for row in rows)])


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """On a terminal through ``rich`` when it is installed, else as plain aligned text."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title or None, title_justify="left")
            for column in columns:
                table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    if title:
        print(title)
    print(plain_table(columns, rows), flush=True)


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and no exponent; a dash for None."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
