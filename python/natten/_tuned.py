"""What `natten.tune` measured: one file for each device model, read when a kernel is first chosen for it."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from natten import _library
from natten._kernels import Kernel, Operation
from natten._problem import Problem

__all__ = ["Measured", "cache_directory", "forget", "lookup", "path_for", "store"]

_FORMAT = 1


class Measured(NamedTuple):
    """The time of one pass with one kernel and plan; an empty plan leaves the tiles to the kernel."""

    kernel: Kernel
    plan: tuple[int, ...]
    milliseconds: float


_Table = dict[str, tuple[Measured, ...]]
_tables: dict[str, _Table] = {}


def cache_directory() -> Path:
    """`NATTEN_CACHE_DIR`, or `natten` in the user's cache directory."""
    override = os.environ.get("NATTEN_CACHE_DIR")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natten"


def _device_name(device: torch.device) -> str:
    """Results hold for a model of GPU, or for a number of threads of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = _library.build_info
    return f"cpu-{torch.get_num_threads()}-threads-isa-{info.cpu_instruction_set if info else 0}"


def path_for(device: torch.device) -> Path:
    """The file of a device's results."""
    return cache_directory() / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', _device_name(device)).strip('-').lower()}.json"


def _build() -> list[Any]:
    """Results of another build may name plans and kernels that this one lacks."""
    info = _library.build_info
    return [] if info is None else [info.version, info.cuda_version, *info.architectures]


def _key(problem: Problem, operation: Operation) -> str:
    parts = [
        operation.value,
        str(problem.dtype).removeprefix("torch."),
        problem.batch,
        "x".join(map(str, problem.q_grid)),
        "x".join(map(str, problem.kv_grid)),
        problem.heads,
        problem.heads_kv,
        problem.head_dim,
        problem.head_dim_v,
        problem.additional,
        ",".join(str(int(value)) for value in problem.window),
        problem.flags,
    ]
    return " ".join(map(str, parts))


def _read(path: Path) -> _Table:
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT or content["build"] != _build():
            return {}
        return {
            key: tuple(Measured(Kernel[name], tuple(map(int, plan)), float(ms)) for name, plan, ms in rows)
            for key, rows in content["results"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"natten: tuning results in {path} could not be read and are ignored: {error}", stacklevel=2)
        return {}


def lookup(problem: Problem, operation: Operation) -> tuple[Measured, ...]:
    """Measured kernels and plans for a problem on its device, fastest first; empty where nothing was measured."""
    if problem.device.type not in ("cuda", "cpu") or problem.is_symbolic:
        return ()
    if problem.device.type == "cuda" and not torch.cuda.is_available():
        return ()
    path = path_for(problem.device)
    table = _tables.get(str(path))
    if table is None:
        table = _tables[str(path)] = _read(path)
    return table.get(_key(problem, operation), ())


def store(problem: Problem, results: Mapping[Operation, Sequence[Measured]], save: bool) -> Path | None:
    """Puts results into use, and into the device's file unless `save` is false; returns the file.

    The file is read again and replaced in one step, so that processes that tune at the same time at worst lose each
    other's newest results, never the file.
    """
    path = path_for(problem.device)
    new = {_key(problem, operation): tuple(rows) for operation, rows in results.items()}
    _tables[str(path)] = _tables.get(str(path), {}) | _read(path) | new
    if not save:
        return None
    rows = {
        key: [(m.kernel.name, m.plan, round(m.milliseconds, 6)) for m in measured]
        for key, measured in _tables[str(path)].items()
    }
    content = {"format": _FORMAT, "build": _build(), "device": _device_name(problem.device), "results": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def forget() -> None:
    """Results are read from disk again when next needed."""
    _tables.clear()
