"""Makes the pages of measurements from the files in docs/performance/h200, and nothing else.

    python tools/make_report.py            writes report.md, models.md, patterns' table and the pictures
    python tools/make_report.py --check    fails if a page differs from what the files say

A file that does not exist leaves a sentence that names the command which makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from natten.bench.floors import Ceilings
from natten.bench.problems import BenchProblem, load_problems
from natten.bench.report import number, replace_text
from natten.profile import plot
from natten.profile.analysis import Profile
from natten.profile.counters import Counters

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
Row = Mapping[str, Any]

# file: what it holds, in the order of the report; "file" is made by tools/measure_h200.py of the same name.
FILES = {
    "attention": "every problem of the list, every kernel, dense attention",
    "profile": "work, bytes and hardware counters",
    "sparsity": "windows from all to few tokens",
    "permutes": "copies of permuted tokens",
    "flex": "FlexAttention, gathered windows",
    "types": "element types",
    "overhead": "cost of a call",
    "rungs": "the rungs over a grid of problems",
    "models": "models",
    "limits": "largest inputs",
    "patterns": "known patterns",
}

ROOFLINE = "2d-k13-d64"  # the problem that is drawn


class Missing(Exception):
    """A file of measurements is not there."""


@dataclass(frozen=True)
class Files:
    """The folder of measurements."""

    folder: Path

    def read(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        try:
            data: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise Missing(name) from None
        return data

    def rows(self, name: str) -> list[Row]:
        rows: list[Row] = self.read(name)["rows"]
        if not rows:
            raise Missing(name)
        return rows


Section = Callable[[Files], str]


def section(make: Section, files: Files) -> str:
    """The section, or a sentence on the file that it lacks."""
    try:
        return make(files)
    except Missing as missing:
        return (
            f"Not measured yet. On an H200, `python tools/measure_h200.py {missing}` writes "
            f"`docs/performance/h200/{missing}.json`."
        )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are words, the others numbers."""
    lines = ["| " + " | ".join(titles) + " |"]
    lines.append("|" + "|".join("---" if i < words else "---:" for i in range(len(titles))) + "|")
    for row in rows:
        assert len(row) == len(titles), row
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def times(extents: Sequence[int]) -> str:
    return " x ".join(f"{extent:,}" for extent in extents)


def describe(problem: BenchProblem) -> str:
    """Shape and window in words."""
    words = f"{times(problem.shape)}, window {times(problem.kernel_size)}"
    if max(problem.stride) > 1:
        words += f", stride {times(problem.stride)}"
    if max(problem.dilation) > 1:
        words += f", dilation {times(problem.dilation)}"
    if any(problem.causal):
        words += ", causal" + ("" if all(problem.causal) else " in time")
    return f"{words}, D {problem.head_dim}"


def known_problems() -> dict[str, BenchProblem]:
    lists = ("problems_h200.json", "sparsity.json")
    return {problem.name: problem for name in lists for problem in load_problems(name).problems}


def mean_of(ratios: Iterable[float]) -> str:
    found = list(ratios)
    return number(geometric_mean(found)) if found else "-"


def ratio(slower: float | None, faster: float | None) -> str:
    return "-" if slower is None or faster is None else f"{number(slower / faster)} x"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


# ---- The report's sections ---------------------------------------------------------------------------------------


def provenance(files: Files) -> str:
    """Device and versions, and the command behind each file."""
    heads: dict[str, dict[str, Any]] = {}
    for name in FILES:
        try:
            heads[name] = files.read(name)
        except Missing:
            continue
    if not heads:
        return "No file of measurements is there yet: `python tools/measure_h200.py list` shows what can be measured."
    rows = []
    for name, head in heads.items():
        versions = ", ".join(f"{key} {value}" for key, value in head["versions"].items())
        link = f"[{name}.json](h200/{name}.json)"
        place = f"{head['device']}, driver {head['driver']}, {versions}"
        rows.append([link, FILES[name], f"`{head['command']}`", f"`{head['commit']}`, {head['date']}", place])
    return table(["file", "holds", "command", "commit, date", "device and versions"], rows, words=5)


def _kernel_times(rows: Sequence[Row], problem: str, pass_: str) -> dict[str, Row]:
    return {row["kernel"]: row for row in rows if (row["problem"], row["pass"]) == (problem, pass_)}


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["problem"], row["pass"]) for row in rows))


PUBLIC_KERNELS = ("natten_hopper", "natten_ampere")


def peer_ms(row: Row, peer: str) -> float | None:
    """A peer's time beside a row, if there is one; "public natten" is the fastest of the public package's kernels."""
    names = PUBLIC_KERNELS if peer == "public natten" else (peer,)
    return min((float(row["peers"][name]) for name in names if row["peers"].get(name) is not None), default=None)


def against_dense(files: Files) -> str:
    data = files.read("attention")
    rows = files.rows("attention")
    problems = known_problems()
    recorded = {(s["problem"], s["pass"], s["kernel"]) for s in data["skipped"]}
    lines = []
    gains: dict[str, list[float]] = {"dense_cudnn": [], "dense_flash2": [], "public natten": []}
    for name, pass_ in _pairs(rows):
        row = _kernel_times(rows, name, pass_).get("auto")
        if row is None:
            continue
        cells = []
        for peer, found in gains.items():
            ms = peer_ms(row, peer)
            from_list = (name, pass_, peer) in recorded or peer == "public natten"
            cells.append("-" if ms is None else f"{number(ms)} ({ratio(ms, row['ms'])}){'*' if from_list else ''}")
            if ms is not None:
                found.append(ms / row["ms"])
        cells = [number(row["ms"]), number(row["useful_tflops"]), percent(row["floor_share"]), *cells]
        lines.append([name, describe(problems[name]), pass_, f"`{row['chosen']}`", *cells])
    means = ", ".join(
        f"{mean_of(found)} x over {words}"
        for found, words in zip(
            gains.values(), ("dense cuDNN", "dense FlashAttention-2", "the public NATTEN package"), strict=True
        )
    )
    titles = ["problem", "", "pass", "kernel", "ms", "useful TFLOP/s", "of floor"]
    titles += ["cuDNN dense, ms", "FlashAttention-2 dense, ms", "public NATTEN, ms"]
    return (
        "bfloat16; what the dispatcher chooses, eager calls, medians with the L2 cache flushed. In brackets how many "
        "times longer than natten. *Of floor*: the time that no kernel can beat (bytes once, or useful products) over "
        f"the time measured. Geometric means of the speed-ups: {means}. A star: recorded earlier on the same kind of "
        "GPU, not in this run (the public package always: its fastest kernel).\n\n" + table(titles, lines, words=4)
    )


def kernels(files: Files) -> str:
    rows = files.rows("attention")
    names = ("naive", "gemm", "fused_sm80", "fused_sm90")
    lines = []
    for name, pass_ in _pairs(rows):
        found = _kernel_times(rows, name, pass_)
        ms = [found[kernel]["ms"] if kernel in found else None for kernel in names]
        best = min((value for value in ms if value is not None), default=None)
        auto = found.get("auto")
        cells = [("-" if value is None else f"**{number(value)}**" if value == best else number(value)) for value in ms]
        loss = (
            None if auto is None or best is None or auto["chosen"] not in found else found[auto["chosen"]]["ms"] / best
        )
        lines.append([name, pass_, *cells, "-" if auto is None else f"`{auto['chosen']}`", percent(loss and loss - 1)])
    return (
        "Milliseconds; bold the fastest. *Loss*: how much longer the dispatcher's choice takes than the fastest one "
        "(kernels forced by name, in the same run). A dash: the kernel has no such pass, or would have taken too "
        "long.\n\n" + table(["problem", "pass", *(f"`{n}`" for n in names), "chosen", "loss"], lines, words=2)
    )


def _weighted(launches: Sequence[Row], name: str, weight: str) -> float | None:
    """Mean of a counter over launches, by another one."""
    found = [(launch[name], launch[weight]) for launch in launches if launch[name] is not None and launch[weight]]
    total = sum(w for _, w in found)
    return sum(value * w for value, w in found) / total if total else None


def _sum(launches: Sequence[Row], *names: str) -> float | None:
    values = [launch[name] for launch in launches for name in names]
    return None if None in values else sum(values)


def counters(files: Files) -> str:
    data = files.read("profile")
    rows = files.rows("profile")
    counted = {(c["problem"], c["pass"], c["kernel"]): c["launches"] for c in data["counters"]}
    problems = known_problems()
    lines = []
    for row in rows:
        launches = counted.get((row["problem"], row["pass"], row["kernel"]))
        cells = [
            number(row["ms"]),
            number(row["useful_flops"] / row["moved_bytes"]),
            f"x {row['executed_flops'] / row['useful_flops']:.2f}",
            number(row["moved_bytes"] * 1e-6),
        ]
        if launches:
            dram = _sum(launches, "dram_read_bytes", "dram_write_bytes")
            l2 = _sum(launches, "l2_bytes")
            cells += [
                number(None if dram is None else dram * 1e-6),
                number(None if not dram else row["useful_flops"] / dram),
                number(None if l2 is None else l2 * 1e-6),
                *(
                    number(_weighted(launches, name, weight))
                    for name, weight in (
                        ("l2_hit_pct", "l2_bytes"),
                        ("l1_hit_pct", "l2_bytes"),
                        ("tensor_pct", "time_us"),
                        ("occupancy_pct", "time_us"),
                        ("theoretical_occupancy_pct", "time_us"),
                    )
                ),
            ]
        else:
            cells += ["-"] * 8
        lines.append([row["problem"], row["pass"], f"`{row['kernel']}`", *cells])
    named = dict.fromkeys(row["problem"] for row in rows)
    shown = "; ".join(f"{name}: {describe(problems[name])}" for name in named if name in problems)
    titles = ["problem", "pass", "kernel", "ms", "FLOP/B", "executed", "MB to move", "DRAM MB", "FLOP/DRAM B", "L2 MB"]
    titles += ["L2 hit %", "L1 hit %", "tensor %", "occupancy %", "of"]
    return (
        "`natten profile --counters`: each pass once more under Nsight Compute (`--clock-control none`), all of its "
        "launches together, caches emptied before each. *FLOP/B*: useful FLOPs over the bytes that the kernel cannot "
        "avoid to move; *executed*: products computed, in units of the useful ones; *FLOP/DRAM B*: useful FLOPs over "
        "what really crossed the memory bus. Hit rates are means by L2 bytes, pipe and occupancy by time. "
        f"[What each column means](../profiler.md#counters). {shown}.\n\n"
        + table(titles, lines, words=3)
        + f"\n\n![Roofline of {ROOFLINE}: the rungs under memory's slope and the products' ceiling](h200/roofline.png)"
        f"\n\n*{ROOFLINE}: filled marks over the bytes that a kernel has to move, hollow ones over those that crossed "
        "the memory bus.*"
    )


def draw_roofline(files: Files, path: Path) -> None:
    try:
        data = files.read("profile")
    except Missing:
        return
    problem = known_problems()[ROOFLINE]
    profiles = [Profile.from_json(row, problem) for row in data["rows"] if row["problem"] == ROOFLINE]
    counted = [Counters.from_json(entry) for entry in data["counters"] if entry["problem"] == ROOFLINE]
    if profiles:
        plot.draw(path, profiles, Ceilings(**data["ceilings"]), f"{describe(problem)} ({data['device']})", counted)


def _share_of_pairs(problem: BenchProblem) -> float:
    """Keys of a window over all tokens."""
    return prod(problem.kernel_size) / problem.tokens


def _sparsity_points(files: Files) -> list[tuple[BenchProblem, str, Row]]:
    problems = known_problems()
    return [(problems[row["problem"]], row["pass"], row) for row in files.rows("sparsity") if row["kernel"] == "auto"]


def sparsity(files: Files) -> str:
    lines = []
    for problem, pass_, row in _sparsity_points(files):
        ideal = 1 / _share_of_pairs(problem)
        cudnn, flash = (row["peers"].get(name) for name in ("dense_cudnn", "dense_flash2"))
        gain = None if cudnn is None else cudnn / row["ms"]
        cells = [f"{1 - 1 / ideal:.1%}", number(row["ms"]), number(row["useful_tflops"]), number(ideal)]
        cells += [ratio(cudnn, row["ms"]), percent(None if gain is None else gain / ideal), ratio(flash, row["ms"])]
        lines.append([f"{problem.rank}-D", times(problem.kernel_size), times(problem.stride), pass_, *cells])
    titles = ["rank", "window", "stride", "pass", "sparsity", "ms", "useful TFLOP/s", "ideal", "over cuDNN dense"]
    titles += ["of ideal", "over FlashAttention-2 dense"]
    return (
        "![Speed-up over dense attention against sparsity, with the ideal line](h200/sparsity.png)\n\n"
        "16,384 tokens as a sequence, an image of 128 x 128, and a video of 16 x 32 x 32; 16 heads of 128, bfloat16. "
        "*Ideal*: all pairs over the pairs in windows, which is what the same rate of useful products as dense "
        "attention would give; *of ideal* compares with dense cuDNN of the same run.\n\n"
        + table(titles, lines, words=4)
    )


def draw_sparsity(files: Files, path: Path) -> None:
    """Speed-ups over dense cuDNN, both passes, logarithmic, with the ideal line."""
    try:
        points = _sparsity_points(files)
    except Missing:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    colours = {1: "#0072B2", 2: "#009E73", 3: "#D55E00"}
    for index, pass_ in enumerate(("forward", "backward")):
        axes = figure.add_subplot(1, 2, index + 1)
        largest = 1.0
        for (rank, colour), strided in ((item, s) for item in colours.items() for s in (False, True)):
            found = sorted(
                (1 / _share_of_pairs(problem), row["peers"]["dense_cudnn"] / row["ms"])
                for problem, name, row in points
                if name == pass_
                and problem.rank == rank
                and "dense_cudnn" in row["peers"]
                and (strided == (max(problem.stride) > 1) or _share_of_pairs(problem) == 1)
            )
            if not found:
                continue
            largest = max(largest, found[-1][0])
            label = f"{rank}-D, " + ("block-sparse stride" if strided else "stride 1")
            marker, line, fill = ("s", "--", "white") if strided else ("o", "-", colour)
            axes.plot(*zip(*found, strict=True), line, marker=marker, mfc=fill, color=colour, ms=5, lw=1.3, label=label)
        axes.plot(
            [1, largest], [1, largest], color="#404040", lw=1, ls=":", label="ideal: useful products at dense rate"
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{1 - 1 / x:.1%}" if x > 1 else "0 %")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g} x")
        axes.grid(color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        axes.set_title(pass_, loc="left")
        axes.set_xlabel("sparsity (keys outside the window)")
        if index == 0:
            axes.set_ylabel("speed-up over dense cuDNN attention")
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def block_sparse(files: Files) -> str:
    """Pairs of problems that differ in the stride alone."""
    found: dict[tuple[Any, ...], dict[bool, tuple[BenchProblem, Row]]] = {}
    problems = known_problems()
    rows: list[Row] = []
    missing: list[Missing] = []
    for name in ("sparsity", "attention"):
        try:
            rows += [row for row in files.rows(name) if row["kernel"] == "auto"]
        except Missing as error:
            missing.append(error)
    if not rows:
        raise missing[0]
    for row in rows:
        problem = problems[row["problem"]]
        key = (problem.shape, problem.kernel_size, problem.heads, problem.dilation, problem.causal, row["pass"])
        found.setdefault(key, {})[max(problem.stride) > 1] = (problem, row)
    lines, gains = [], []
    for pair in found.values():
        if len(pair) < 2:
            continue
        (problem, dense), (strided, sparse) = pair[False], pair[True]
        gains.append(dense["ms"] / sparse["ms"])
        where = f"{times(problem.shape)}, window {times(problem.kernel_size)}"
        cells = [number(dense["ms"]), number(dense["useful_tflops"]), number(sparse["ms"])]
        cells += [number(sparse["useful_tflops"]), ratio(dense["ms"], sparse["ms"])]
        lines.append([where, times(strided.stride), dense["pass"], *cells])
    titles = ["problem", "stride", "pass", "stride 1, ms", "TFLOP/s", "with the stride, ms", "TFLOP/s", "gain"]
    return (
        "The same window with stride 1, where every query has its own, and with a stride that gives a block of queries "
        "one window in common, so that no key box is computed in part. Geometric mean of the gains: "
        f"{mean_of(gains)} x.\n\n" + table(titles, lines, words=3)
    )


def hopper(files: Files) -> str:
    rows = files.rows("attention")
    problems = known_problems()
    lines = []
    gains: dict[str, list[float]] = {"forward": [], "backward": []}
    for name, pass_ in _pairs(rows):
        found = _kernel_times(rows, name, pass_)
        if not {"fused_sm80", "fused_sm90"} <= found.keys():
            continue
        older, newer = found["fused_sm80"]["ms"], found["fused_sm90"]["ms"]
        gains[pass_].append(older / newer)
        rates = [number(found[kernel]["useful_tflops"]) for kernel in ("fused_sm80", "fused_sm90")]
        lines.append([name, describe(problems[name]), pass_, number(older), number(newer), *rates, ratio(older, newer)])
    titles = ["problem", "", "pass", "`fused_sm80`, ms", "`fused_sm90`, ms", "TFLOP/s", "TFLOP/s", "gain"]
    return (
        "`fused_sm80` is the best that this library does with `cp.async` and `mma.sync`; `fused_sm90` uses the copy "
        "engine (TMA), `wgmma` and specialised warps. Both run here on the same GPU. Geometric means: "
        f"{mean_of(gains['forward'])} x forward, {mean_of(gains['backward'])} x backward.\n\n"
        + table(titles, lines, words=3)
    )


def permutes(files: Files) -> str:
    rows = files.rows("permutes")
    problems = known_problems()
    lines = []
    for row in rows:
        more, ours = row["scores_on_grid"], row["natten_ms"]
        cells = [number(ours), number(row["permutes_ms"]), percent(row["permutes_ms"] / ours), number(row["floor_ms"])]
        cells += [percent(row["floor_ms"] / ours), "-" if more is None else f"{more:+.0%}"]
        lines.append([row["problem"], describe(problems[row["problem"]]), row["pass"], *cells])
    copied, ideal = ([row[key] / row["natten_ms"] for row in rows] for key in ("permutes_ms", "floor_ms"))
    titles = ["problem", "", "pass", "natten, ms", "permutes, ms", "of natten's time", "at full bandwidth, ms"]
    titles += ["of natten's time", "more scores on a grid"]
    return (
        "The copy engine reads spatial boxes in place, dilated ones too. A kernel for tiles of consecutive tokens has "
        "tokens permuted and padded before, and results permuted back: *permutes* is the time of these copies "
        "alone (the faster of torch eager and compiled), which natten does not spend; *at full bandwidth* what perfect "
        f"copies without padding would take at {files.read('permutes')['ceilings']['bandwidth_tbps']:g} TB/s. They "
        f"would add {percent(min(copied))} to {percent(max(copied))} of natten's whole time, perfect ones "
        f"{percent(min(ideal))} to {percent(max(ideal))}. Permuted tokens also fix where key boxes may start: the last "
        "column is how many more scores the same boxes would then hold.\n\n" + table(titles, lines, words=3)
    )


def flex(files: Files) -> str:
    rows = files.rows("flex")
    problems = known_problems()
    lines = []
    gains: dict[str, list[float]] = {"flex": [], "unfold": []}
    for row in rows:
        if row["kernel"] != "auto":
            continue
        cells = [f"`{row['chosen']}`", number(row["ms"]), number(row["useful_tflops"])]
        for peer, found in gains.items():
            ms = row["peers"].get(peer)
            rate = None if ms is None else row["useful_tflops"] * row["ms"] / ms
            cells += [number(ms), number(rate), ratio(ms, row["ms"])]
            if ms is not None:
                found.append(ms / row["ms"])
        lines.append([row["problem"], describe(problems[row["problem"]]), row["pass"], *cells])
    titles = ["problem", "", "pass", "kernel", "natten, ms", "TFLOP/s", "FlexAttention, ms", "TFLOP/s", "gain"]
    titles += ["gathered, ms", "TFLOP/s", "gain"]
    return (
        "Both compiled by torch. FlexAttention gets its tokens in its best order and its block mask made in advance, "
        "for free; *gathered* is plain torch: every window gathered, multiplied, softmax, multiplied. Geometric means: "
        f"{mean_of(gains['flex'])} x over FlexAttention, {mean_of(gains['unfold'])} x over gathered windows. A dash: "
        "it failed, or would not have fitted, or there was no time (the file says which).\n\n"
        + table(titles, lines, words=4)
    )


def types(files: Files) -> str:
    rows = files.rows("types")
    problems = known_problems()
    names = ("float16", "bfloat16", "float32")
    lines = []
    for name, pass_ in _pairs(rows):
        found = {row["dtype"]: row for row in rows if (row["problem"], row["pass"]) == (name, pass_)}
        cells = []
        for dtype in names:
            row = found.get(dtype)
            cells += (
                ["-"] * 3 if row is None else [f"`{row['chosen']}`", number(row["ms"]), number(row["useful_tflops"])]
            )
        lines.append([name, describe(problems[name]), pass_, *cells])
    titles = ["problem", "", "pass"] + [f"{t}{u}" for t in names for u in (" kernel", ", ms", ", TFLOP/s")]
    return (
        "What the dispatcher chooses for each type. float32 products are real ones here: TF32 is not allowed.\n\n"
        + table(titles, lines, words=3)
    )


def overhead(files: Files) -> str:
    rows = files.rows("overhead")
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    places = list(dict.fromkeys((row["problem"], row["mode"], row["pass"]) for row in rows))
    us = {(row["problem"], row["mode"], row["pass"], row["what"]): row["us"] for row in rows}
    lines = []
    for place in places:
        ours, theirs = us.get((*place, "natten")), us.get((*place, "sdpa"))
        lines.append([place[0], place[1], place[2], number(ours), number(theirs), ratio(ours, theirs)])
    parts = []
    names = ("natten", "operator alone", "allocation of its outputs", "torch.add")
    for problem in problems:
        found = [us.get((problem, "eager", "forward", name)) for name in names]
        device = us.get((problem, "graph", "forward", "natten"))
        total, operator, allocation = found[:3]
        rest = None if None in found[:3] else total - operator - allocation  # type: ignore[operator]
        parts.append([problem, *(number(value) for value in (total, rest, allocation, operator, found[3], device))])
    return (
        "Microseconds a call on problems of a few hundred tokens, batch 1, heads of 64, bfloat16: calls follow each "
        "other, so eager and compiled rows show the host's time, and CUDA graphs (of many calls) the device's. SDPA is "
        "torch's own dense attention of the same tokens. *x SDPA* aims at 1.5 at most.\n\n"
        + table(["problem", "mode", "pass", "natten", "SDPA", "x SDPA"], lines, words=3)
        + "\n\nWhere an eager forward call spends its time: checks and dispatch in Python, the allocation of output "
        "and logsumexp, the operator itself (torch's dispatcher, our checks, planning, tensor maps, launch); beside it "
        "`torch.add`, the least that torch charges for a kernel, and the kernel's own time.\n\n"
        + table(["problem", "call", "Python", "allocation", "operator", "`torch.add`", "on the device"], parts)
    )


def rungs(files: Files) -> str:
    data = files.read("rungs")
    lines = []
    for mean in data.get("averages", []):
        published = "" if mean["published"] is None else f"{mean['published']:+.0%}"
        gain = "" if mean["rung"] == "naive" else f"{mean['improvement']:+.0%}"
        where = [f"{mean['rank']}-D", mean["dtype"], mean["rung"], mean["passes"]]
        lines.append([*where, str(mean["problems"]), gain, published, percent(mean["floor_share"])])
    titles = ["rank", "type", "rung", "passes", "problems", "over naive", "published, A100", "of its floor"]
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in data["rows"]:
        if row.get("speedup") is not None and row["what"] in ("forward", "backward"):
            by_pass = found.setdefault((row["dtype"], row["rung"]), {"forward": [], "backward": []})
            by_pass[row["what"]].append(row["speedup"])
    over = []
    for (dtype, rung), by_pass in found.items():
        cells = []
        for values in by_pass.values():
            cells += (
                [f"{mean_of(values)} x", f"{number(min(values), 2)} to {number(max(values), 2)}"]
                if values
                else ["-"] * 2
            )
        over.append([dtype, rung.replace("_fp32", ", TF32 not allowed").replace("_tf32", ", TF32"), *cells])
    return (
        f"Averages of improvements over our own naive kernels, over {data.get('covered', 0)} of the "
        f"{data.get('grid', 0)} problems of a grid, beside those that the NeurIPS work published for an A100 over its "
        "own: a fast naive rung makes ours small.\n\n"
        + table(titles, lines, words=4)
        + "\n\nAgainst the original work's kernels, which were timed on an H200 too: how many times faster ours are, "
        "geometric mean and range over ten problems. Its GEMM kernels multiply float32 in TF32. Passes and parts: "
        "[rungs.txt](h200/rungs.txt).\n\n"
        + table(["type", "rung", "forward", "range", "backward", "range"], over, words=2)
    )


def _span(values: Sequence[float]) -> str:
    return f"{number(min(values))} to {number(max(values))} x, {mean_of(values)} x in the geometric mean"


def _gains(rows: Sequence[Row], peer: str, pass_: str) -> list[float]:
    ours = [row for row in rows if row["kernel"] == "auto" and row["pass"] == pass_]
    return [ms / row["ms"] for row in ours if (ms := peer_ms(row, peer)) is not None]


def _speed_lines(files: Files) -> list[str]:
    rows = files.rows("attention")
    ours = [row for row in rows if row["kernel"] == "auto"]
    if not ours:
        return []
    fastest = max(ours, key=lambda row: row["useful_tflops"])
    lines = [f"Fastest: {number(fastest['useful_tflops'])} useful TFLOP/s ({fastest['problem']}, {fastest['pass']})."]
    for peer, words in (
        ("public natten", "the public NATTEN package's fastest kernel (recorded)"),
        ("dense_cudnn", "dense attention by cuDNN"),
        ("dense_flash2", "dense attention by FlashAttention-2"),
    ):
        parts = [f"{pass_} {_span(g)}" for pass_ in ("forward", "backward") if (g := _gains(rows, peer, pass_))]
        if parts:
            lines.append(f"Over {words}: {'; '.join(parts)}.")
    return lines


def _flex_lines(files: Files) -> list[str]:
    rows = files.rows("flex")
    parts = [f"{pass_} {_span(g)}" for pass_ in ("forward", "backward") if (g := _gains(rows, "flex", pass_))]
    return [f"Over FlexAttention, compiled: {'; '.join(parts)}."] if parts else []


def _sparsity_lines(files: Files) -> list[str]:
    found = [
        (problem, row)
        for problem, pass_, row in _sparsity_points(files)
        if pass_ == "forward" and "dense_cudnn" in row["peers"] and _share_of_pairs(problem) < 1
    ]
    shares = [row["peers"]["dense_cudnn"] / row["ms"] * _share_of_pairs(problem) for problem, row in found]
    lines = []
    for strided, words in ((False, "stride 1"), (True, "block-sparse strides")):
        part = [share for share, (p, _) in zip(shares, found, strict=True) if (max(p.stride) > 1) == strided]
        if part:
            lines.append(
                f"Of the ideal speed-up over dense cuDNN at the same sparsity, forward, {words}: "
                f"{percent(min(part))} to {percent(max(part))}."
            )
    return lines


def _model_lines(files: Files) -> list[str]:
    rows = [row for row in files.rows("models") if row["mode"] == "training"]
    rates = {(row["model"], row["attention"]): row["items_per_s"] for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ours = rates.get((model, "natten"))
        others = [
            f"{number(ours / rates[model, kind])} x {_KINDS[kind]}"
            for kind in ("naive", "gemm", "dense")
            if ours is not None and (model, kind) in rates
        ]
        if others:
            lines.append(f"Training {model}: {', '.join(others)}.")
    return lines


def _overhead_lines(files: Files) -> list[str]:
    us = {(row["problem"], row["mode"], row["what"], row["pass"]): row["us"] for row in files.rows("overhead")}
    parts = []
    for mode in ("eager", "compiled", "graph"):
        found = [
            us[problem, mode, "natten", pass_] / us[problem, mode, "sdpa", pass_]
            for problem, m, what, pass_ in us
            if (m, what, pass_) == (mode, "natten", "forward") and (problem, mode, "sdpa", pass_) in us
        ]
        if found:
            parts.append(f"{mode} {number(min(found))} to {number(max(found))}")
    return [f"A tiny forward call takes, in units of an SDPA call: {'; '.join(parts)}."] if parts else []


def summary(files: Files) -> str:
    """What the files say in a line or two each; files that are not there are left out."""
    lines: list[str] = []
    for make in (_speed_lines, _flex_lines, _sparsity_lines, _model_lines, _overhead_lines):
        try:
            lines += make(files)
        except Missing:
            continue
    return "\n".join(f"- {line}" for line in lines) or "Nothing is measured yet."


REPORT: tuple[tuple[str, Section], ...] = (
    ("In short", summary),
    ("Useful work against dense attention", against_dense),
    ("Kernel by kernel", kernels),
    ("The rungs: work, bytes, counters", counters),
    ("The rungs: averages", rungs),
    ("Speed-up against sparsity", sparsity),
    ("Block-sparse strides against stride 1", block_sparse),
    ("What Hopper's kernels bring", hopper),
    ("What reading boxes in place saves", permutes),
    ("Against FlexAttention and plain torch", flex),
    ("Types", types),
    ("What a call costs", overhead),
    ("Files", provenance),
)


def report(files: Files) -> str:
    parts = [
        "# Measured on one H200",
        "This page is made by `python tools/make_report.py` from the files listed [at its end](#files), with device, "
        "versions and command of each; `python tools/measure_h200.py PART` makes a file again. "
        "[How it is measured](index.md). Models have [their own page](models.md), known patterns "
        "[theirs](../patterns.md).",
    ]
    for title, make in REPORT:
        parts += [f"## {title}", section(make, files)]
    return "\n\n".join(parts) + "\n"


# ---- Models ------------------------------------------------------------------------------------------------------

_KINDS = {"natten": "natten", "strided": "natten, strided", "gemm": "GEMM", "naive": "naive", "dense": "dense SDPA"}


def _gibibytes(count: float) -> str:
    return number(count / 2**30)


def throughput(files: Files) -> str:
    rows = files.rows("models")
    lines = []
    for row in rows:
        others = [r for r in rows if (r["model"], r["mode"]) == (row["model"], row["mode"])]
        dense = next((r["items_per_s"] for r in others if r["attention"] == "dense"), None)
        gain = "-" if dense is None else f"{row['items_per_s'] / dense:.2f} x"
        cells = [str(row["batch"]), number(row["ms"]), number(row["items_per_s"]), gain, _gibibytes(row["peak_bytes"])]
        lines.append([row["model"], row["mode"], _KINDS[row["attention"]], *cells])
    titles = ["model", "mode", "attention", "batch", "ms a step", "items/s", "x dense", "peak GiB"]
    return (
        "`dinat-tiny`, `dinat-base`: DiNAT backbones on 224 x 224 pixels (windows of 7 x 7, every second block "
        "dilated). `video-dit`: a diffusion transformer of 12 blocks, 768 channels, 12 heads, on 16 x 32 x 32 tokens, "
        "window 8 x 16 x 16; *strided* with strides 4 x 8 x 8. A training step is forward, backward and AdamW; *items* "
        "are images or videos.\n\n" + table(titles, lines, words=3)
    )


def limits(files: Files) -> str:
    rows = files.rows("limits")
    lines = []
    for name in dict.fromkeys(row["limit"] for row in rows):
        found = [row for row in rows if row["limit"] == name]
        for row in found:
            window = times(row["window"])
            cells = [times(row["shape"]), f"{row['tokens']:,}", number(row["step_s"]), _gibibytes(row["peak_bytes"])]
            lines.append([f"{name}, window {window}", _KINDS[row["attention"]], *cells, row["ended_by"]])
    titles = ["task", "attention", "largest grid", "tokens", "s a step", "peak GiB", "ended by"]
    return (
        "Two transformer blocks of 512 channels and 8 heads, batch 1: the largest grid on which a forward and a "
        "backward pass run, found by bisection to 3 %. *naive* and *GEMM* are qk, softmax and av, which store the "
        "attention weights; dense attention stores none either, but its time grows with the square of the tokens: its "
        "limit is the time that a step may take.\n\n" + table(titles, lines, words=2)
    )


def models(files: Files) -> str:
    heads = []
    for name in ("models", "limits"):
        try:
            head = files.read(name)
        except Missing:
            continue
        versions = ", ".join(f"{key} {value}" for key, value in head["versions"].items())
        heads.append(
            f"[{name}.json](h200/{name}.json): {head['device']}, driver {head['driver']}, {versions}, commit "
            f"`{head['commit']}`, `{head['command']}`."
        )
    parts = [
        "# Models",
        "Made by `python tools/make_report.py` from files of `tools/bench_models.py`: whole models whose attention "
        "alone differs, bfloat16, eager, random weights. `natten` is what the dispatcher chooses; *naive* and *GEMM* "
        "are the composite of qk, softmax and av in those kernels; *dense SDPA* is "
        "`scaled_dot_product_attention` over all tokens.",
        "## Throughput and memory",
        section(throughput, files),
        "## The largest input that fits",
        section(limits, files),
        *heads,
    ]
    return "\n\n".join(parts) + "\n"


# ---- Patterns ----------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def patterns(files: Files) -> str:
    data = files.read("patterns")
    rows = files.rows("patterns")
    described = {entry["name"]: entry for entry in data["patterns"]}
    lines = []
    for name in dict.fromkeys(row["pattern"] for row in rows):
        entry = described[name]
        where = (
            f"{name}: {times(entry['shape'])}, batch {entry['batch']}, {entry['heads']} heads of {entry['head_dim']}"
        )
        for what in dict.fromkeys(row["what"] for row in rows if row["pattern"] == name):
            if what == "natten":
                continue
            ms = {(r["what"], r["pass"]): r["ms"] for r in rows if r["pattern"] == name}
            cells = []
            for pass_ in ("forward", "backward"):
                ours, theirs = ms.get(("natten", pass_)), ms.get((what, pass_))
                cells += [number(ours), number(theirs), ratio(theirs, ours)]
            lines.append([where, what, *cells])
    versions = ", ".join(f"{key} {value}" for key, value in data["versions"].items())
    titles = ["pattern", "usual implementation", "natten forward, ms", "usual, ms", "gain"]
    titles += ["natten backward, ms", "usual, ms", "gain"]
    return (
        table(titles, lines, words=2)
        + f"\n\n{data['device']}, driver {data['driver']}, {versions}, commit `{data['commit']}`; `{data['command']}`, "
        "[patterns.json](performance/h200/patterns.json)."
    )


def patterns_page(files: Files) -> str:
    """The page as it stands, with the table between its marks replaced."""
    text = (DOCS / "patterns.md").read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"docs/patterns.md must hold one {BEGIN} and one {END}")
    middle = f"{BEGIN}\n\n{section(patterns, files)}\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: middle, text, flags=re.DOTALL)


def pages(files: Files) -> dict[Path, str]:
    return {
        DOCS / "performance" / "report.md": report(files),
        DOCS / "performance" / "models.md": models(files),
        DOCS / "patterns.md": patterns_page(files),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DOCS / "performance" / "h200", help="of the files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    arguments = parser.parse_args(argv)
    files = Files(arguments.folder)
    made = pages(files)
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the files say: run python tools/make_report.py")
        return 1 if stale else 0
    for path in stale:
        replace_text(path, made[path])
        print(f"wrote {path.relative_to(ROOT)}")
    pictures = DOCS / "performance" / "h200"
    draw_sparsity(files, pictures / "sparsity.png")
    draw_roofline(files, pictures / "roofline.png")
    absent = [name for name in FILES if not (arguments.folder / f"{name}.json").exists()]
    if absent:
        print(f"not measured yet: {', '.join(absent)} (python tools/measure_h200.py NAME, on an H200)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
