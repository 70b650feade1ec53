"""What is measured: a problem, the lists of problems shipped beside this file, and how a problem counts.

A problem file holds ``device``, ``provenance``, ``peers`` (what each peer column is) and ``problems``; see
``problems_h200.json``. Times in it are ``[forward, backward]`` in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class BenchProblem:
    """One attention problem, with times of other implementations recorded earlier on a stated device."""

    name: str
    batch: int
    shape: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    dtype: str = "bfloat16"
    head_dim_v: int | None = None
    heads_kv: int | None = None
    target_ms: Mapping[Pass, float] = field(default_factory=dict)
    recorded_ms: Mapping[str, Mapping[Pass, float]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def tokens(self) -> int:
        return prod(self.shape)

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def key_heads(self) -> int:
        return self.heads if self.heads_kv is None else self.heads_kv


@dataclass(frozen=True)
class ProblemList:
    """A problem file: the device and circumstances of its recorded times, and the problems."""

    device: str
    provenance: str
    peers: Mapping[str, str]
    problems: tuple[BenchProblem, ...]


def parse_problem(entry: Mapping[str, Any]) -> BenchProblem:
    """One entry of a problem file."""
    tuples = {key: tuple(entry[key]) for key in ("shape", "kernel_size", "stride", "dilation", "causal")}
    for key, value in tuples.items():
        if len(value) != len(tuples["shape"]):
            raise ValueError(f"problem {entry['name']}: {key} has {len(value)} axes, shape has {len(tuples['shape'])}")
    recorded = {peer: dict(zip(PASSES, times, strict=True)) for peer, times in entry.get("peers_ms", {}).items()}
    return BenchProblem(
        name=entry["name"],
        batch=entry["batch"],
        heads=entry["heads"],
        head_dim=entry["head_dim"],
        dtype=entry.get("dtype", "bfloat16"),
        head_dim_v=entry.get("head_dim_v"),
        heads_kv=entry.get("heads_kv"),
        target_ms=dict(zip(PASSES, entry.get("target_ms", []), strict=False)),
        recorded_ms=recorded,
        **tuples,
    )


def read_data(name_or_path: str) -> dict[str, Any]:
    """A JSON file by path, or by its name among those shipped beside this module."""
    path = Path(name_or_path)
    text = path.read_text() if path.exists() else resources.files(__package__).joinpath(name_or_path).read_text()
    data: dict[str, Any] = json.loads(text)
    return data


def load_problems(name_or_path: str = "problems_h200.json", names: Sequence[str] = ()) -> ProblemList:
    """Problems of a list; ``names`` restricts and orders them."""
    data = read_data(name_or_path)
    problems = {entry["name"]: parse_problem(entry) for entry in data["problems"]}
    unknown = [name for name in names if name not in problems]
    if unknown:
        raise ValueError(f"no problem named {', '.join(unknown)}; the list has: {', '.join(problems)}")
    chosen = tuple(problems[name] for name in names) if names else tuple(problems.values())
    return ProblemList(data.get("device", ""), data.get("provenance", ""), data.get("peers", {}), chosen)
