"""A roofline: useful work per second over useful work per byte, under what memory and products allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from natten.bench.floors import Ceilings
from natten.bench.report import number
from natten.dispatch import Kernel
from natten.profile.analysis import Profile
from natten.profile.counters import Counters

# Names and colours (distinguishable for the colour-blind: Okabe and Ito) of the families.
_FAMILIES: Mapping[Kernel, tuple[str, str]] = {
    Kernel.naive: ("naive", "#56B4E9"),
    Kernel.gemm: ("GEMM", "#E69F00"),
    Kernel.fused_sm80: ("fused, Ampere and later", "#009E73"),
    Kernel.fused_sm90: ("fused, Hopper", "#D55E00"),
    Kernel.cpu_naive: ("CPU, naive", "#56B4E9"),
    Kernel.cpu: ("CPU", "#009E73"),
}
_MARKERS = {"forward": "o", "backward": "s"}


def rate_unit(profiles: Sequence[Profile]) -> tuple[str, float]:
    """The unit for rates, and how many of it are a TFLOP/s."""
    fast = max(profile.useful_tflops for profile in profiles) >= 1
    return ("TFLOP/s", 1.0) if fast else ("GFLOP/s", 1e3)


def _bandwidth(tbps: float) -> str:
    return f"{number(tbps)} TB/s" if tbps >= 1 else f"{number(1e3 * tbps)} GB/s"


def draw(
    path: str | Path,
    profiles: Sequence[Profile],
    ceilings: Ceilings,
    title: str,
    counters: Sequence[Counters] = (),
    allow_tf32: bool = False,
) -> None:
    """Writes the picture; its format follows from the file's name. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import StrMethodFormatter

    measured = {(c.problem, c.pass_, c.kernel): c.dram_bytes for c in counters}
    points = []
    for profile in profiles:
        dram = measured.get((profile.problem.name, profile.pass_, profile.kernel.name))
        points.append((profile, profile.useful.flops / dram if dram else None))
    unit, scale = rate_unit(profiles)
    slope = ceilings.bandwidth_tbps * scale
    rates = {
        name: rate * scale
        for name in dict.fromkeys(profile.dtype for profile in profiles)
        if (rate := ceilings.tflops.get("tf32" if name == "float32" and allow_tf32 else name)) is not None
    }
    intensities = [x for profile, dram in points for x in (profile.intensity, dram) if x is not None]
    ridges = [rate / slope for rate in rates.values()]
    left, right = min([*intensities, *ridges]) / 3, max([*intensities, *ridges]) * 4
    top = max([*rates.values(), *(profile.useful_tflops * scale for profile in profiles)]) * 2.5
    bottom = min(profile.useful_tflops for profile in profiles) * scale / 3

    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))

    ridge = max(ridges, default=right)
    axes.plot([left, ridge], [left * slope, ridge * slope], color="#404040", lw=1.5)
    # Along the part of the line that is visible, a little above it.
    x = max(left, bottom / slope) * 1.15
    memory = axes.annotate(
        f"memory: {_bandwidth(ceilings.bandwidth_tbps)}",
        (x, x * slope),
        xytext=(0, 4),
        textcoords="offset points",
        rotation_mode="anchor",
        color="#404040",
    )
    for name, rate in rates.items():
        axes.plot([rate / slope, right], [rate, rate], color="#404040", lw=1.5)
        label = f"{'TF32' if name == 'float32' and allow_tf32 else name} products: {number(rate)} {unit}"
        axes.annotate(label, (right, rate), xytext=(-4, 4), textcoords="offset points", ha="right", color="#404040")

    several = len({profile.problem.name for profile in profiles}) > 1
    for profile, dram in points:
        colour = _FAMILIES[profile.kernel][1]
        marker = _MARKERS[profile.pass_]
        y = profile.useful_tflops * scale
        if dram is not None:
            axes.plot([profile.intensity, dram], [y, y], color=colour, lw=0.8, zorder=2)
            axes.plot(dram, y, marker, ms=8, mfc="white", mec=colour, mew=1.5, zorder=3)
        axes.plot(profile.intensity, y, marker, ms=8, color=colour, mec="white", mew=0.8, zorder=4)
        share = max(profile.bytes_share, profile.flops_share or 0.0)
        label = f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"
        axes.annotate(
            f"{label} {profile.problem.name}" if several else label,
            (profile.intensity, y),
            xytext=(7, 2 if profile.pass_ == "forward" else -2),
            textcoords="offset points",
            va="bottom" if profile.pass_ == "forward" else "top",
            fontsize=8,
            color=colour,
        )

    handles = [
        Line2D([], [], ls="", marker="D", ms=7, color=_FAMILIES[kernel][1], label=_FAMILIES[kernel][0])
        for kernel in _FAMILIES
        if any(profile.kernel is kernel for profile in profiles)
    ]
    handles += [
        Line2D([], [], ls="", marker=marker, ms=7, color="#808080", label=pass_)
        for pass_, marker in _MARKERS.items()
        if any(profile.pass_ == pass_ for profile in profiles)
    ]
    if any(dram is not None for _, dram in points):
        handles.append(
            Line2D([], [], ls="", marker="o", ms=7, mfc="white", mec="#808080", label="over the bytes counted")
        )
    figure.legend(
        handles=handles,
        loc="outside right upper",
        title="%: the longer floor\nover the time measured",
        title_fontsize=8,
        fontsize=9,
        frameon=False,
    )
    axes.set_xlabel("useful FLOPs per byte that has to move")
    axes.set_ylabel(f"useful {unit}")
    axes.set_title(title, loc="left", fontsize=10)
    figure.draw_without_rendering()  # settles the layout, and with it the line's angle
    (x0, y0), (x1, y1) = axes.transData.transform([(left, left * slope), (ridge, ridge * slope)])
    memory.set_rotation(math.degrees(math.atan2(y1 - y0, x1 - x0)))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
