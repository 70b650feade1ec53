"""The profiler: simulated boxes against brute force, its arithmetic, ncu's output, the command line and the picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from natten import reference
from natten.__main__ import main as natten_main
from natten._problem import Axis
from natten.bench.floors import Ceilings, attention_work, unfused_work
from natten.bench.problems import BenchProblem
from natten.bench.run import Row, Settings
from natten.bench.timing import Timing
from natten.bench.windows import checked_problem
from natten.dispatch import Kernel
from natten.profile import cli, counters, plot, tiles
from natten.profile.analysis import Profile, profile_of
from natten.profile.replay import read_problem

CPU = torch.device("cpu")
KERNELS = Path(__file__).parent.parent / "cpp" / "kernels"
SMALL = BenchProblem("small", 2, (12, 16), 2, 32, (5, 7), (1, 1), (1, 1), (False, False), dtype="float16")


def plan(problem: BenchProblem, kernel: Kernel, pass_: str) -> tuple[tiles.StepPlan, ...]:
    dtype = getattr(torch, problem.dtype)
    return tiles.plan_pass(kernel, checked_problem(problem, dtype, CPU), pass_)  # type: ignore[arg-type]


# ---- Tiles and boxes ---------------------------------------------------------------------------------------------


def brute_force_boxes(axis: Axis, owns: str, tile: int, rows: int, box: int) -> int:
    """From the oracle's mask of the axis: boxes between the first and the last token that some row needs."""
    window = reference.Window(
        (axis.kernel_size,), (axis.stride,), (axis.dilation,), (bool(axis.causal),), (0,), (0,), (axis.extent,)
    )
    mask = window.members(0, axis.extent, axis.extent)
    mask = mask if owns == "queries" else mask.T
    total = 0
    for group in range(axis.dilation):
        dense = mask[group :: axis.dilation, group :: axis.dilation]
        for first in range(0, len(dense), tile):
            origin = int(dense[first : first + tile].any(0).nonzero()[0])
            for part in dense[first : first + tile].split(rows):
                needed = part.any(0).nonzero()
                if len(needed) > 0:
                    total += len({(i - origin) // box for i in range(int(needed[0]), int(needed[-1]) + 1)})
    return total


@pytest.mark.parametrize("owns", ["queries", "keys"])
@pytest.mark.parametrize(("tile", "rows", "box"), [(8, 8, 8), (16, 4, 8), (4, 1, 2), (1, 1, 64), (32, 16, 4)])
@pytest.mark.parametrize(
    "axis",
    [
        Axis(7, 1, 1, 0, 0, 0, 40),
        Axis(6, 4, 1, 0, 0, 0, 37),
        Axis(5, 2, 3, 0, 0, 0, 38),
        Axis(9, 1, 1, 1, 0, 0, 33),
        Axis(6, 4, 2, 1, 0, 0, 45),
        Axis(-1, 1, 2, 1, 0, 0, 31),
        Axis(20, 20, 1, 0, 0, 0, 60),
    ],
    ids=str,
)
def test_boxes_are_those_of_the_oracle(axis: Axis, tile: int, rows: int, box: int, owns: str) -> None:
    assert tiles.axis_boxes(axis, owns, tile, rows, box) == brute_force_boxes(axis, owns, tile, rows, box)


def test_dense_attention_wastes_nothing() -> None:
    dense = BenchProblem("dense", 2, (16, 32), 4, 64, (16, 32), (1, 1), (1, 1), (False, False))
    forward = attention_work(dense, "forward", "bfloat16").flops
    for kernel in (Kernel.naive, Kernel.gemm, Kernel.fused_sm80, Kernel.fused_sm90):
        assert sum(step.flops for step in plan(dense, kernel, "forward")) == forward
    # Two kernels compute logits and their gradients twice: seven products where five are useful.
    backward = attention_work(dense, "backward", "bfloat16").flops
    assert sum(step.flops for step in plan(dense, Kernel.naive, "backward")) == pytest.approx(7 / 5 * backward)
    assert sum(step.flops for step in plan(dense, Kernel.cpu_naive, "backward")) == backward
    # Stored attention weights spare the composite one of five.
    assert sum(step.flops for step in plan(dense, Kernel.gemm, "backward")) == pytest.approx(4 / 5 * backward)


@pytest.mark.parametrize("kernel", list(Kernel), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_scores_hold_every_pair_once_at_least(kernel: Kernel, pass_: str) -> None:
    useful = SMALL.batch * SMALL.heads * checked_problem(SMALL, torch.float16, CPU).window_pairs()
    steps = plan(SMALL, kernel, pass_)
    assert steps
    for step in steps:
        if not step.step.tiles:
            assert step.scores == useful
            continue
        assert useful < step.scores <= SMALL.batch * SMALL.heads * 16 * 16 * 16 * 64
        tokens = [torch.Size(extents).numel() for extents in (step.tile, step.rows, step.box)]
        assert any(tokens == [tile.owned, tile.rows, tile.box] for tile in step.step.tiles)
        assert all(rows <= tile for rows, tile in zip(step.rows, step.tile, strict=True))
        assert step.box[-1] % step.step.box_innermost == 0


def test_channels_are_padded_to_a_class() -> None:
    odd = dataclasses.replace(SMALL, head_dim=72, head_dim_v=40)
    one = dataclasses.replace(SMALL, head_dim=96, head_dim_v=96)
    for kernel in (Kernel.fused_sm80, Kernel.fused_sm90):
        assert plan(odd, kernel, "forward")[0].flops == plan(one, kernel, "forward")[0].flops
    # Fewer classes backward on Hopper.
    narrow, wide = (dataclasses.replace(SMALL, head_dim=d, head_dim_v=d) for d in (16, 64))
    for step, same in zip(
        plan(narrow, Kernel.fused_sm90, "backward"), plan(wide, Kernel.fused_sm90, "backward"), strict=True
    ):
        assert step.flops == same.flops
    qk, av = plan(odd, Kernel.gemm, "forward")
    assert qk.flops / av.flops == 72 / 40


def test_plans_that_the_kernels_state() -> None:
    checked = checked_problem(SMALL, torch.float16, CPU)
    (sm90,) = tiles.plan_pass(Kernel.fused_sm90, checked, "forward", (64, 3, 1, 1, 4, 16, 1, 4, 16, 1))
    assert (sm90.tile, sm90.rows, sm90.box) == ((12, 16), (4, 16), (4, 16))
    boxes = brute_force_boxes(checked.axes[0], "queries", 12, 4, 4) * brute_force_boxes(
        checked.axes[1], "queries", 16, 16, 16
    )
    assert sm90.scores == SMALL.batch * SMALL.heads * boxes * 64 * 64
    (sm80,) = tiles.plan_pass(Kernel.fused_sm80, checked, "forward", (1, 1, 4, 16, 1, 8, 8))
    assert (sm80.tile, sm80.box) == ((4, 16), (8, 8))
    assert sm80.rows in {(1, 16), (2, 8), (4, 4)}
    # The backward pass has a plan of its own, which the kernel does not state.
    assert plan(SMALL, Kernel.fused_sm80, "backward") == tiles.plan_pass(
        Kernel.fused_sm80, checked, "backward", (1, 1, 4, 16, 1, 8, 8)
    )


def _configured(name: str, tiles_of: str) -> dict[int, list[int]]:
    """By head dim, the numbers of a kernel's configuration in the structs whose names match."""
    text = (KERNELS / "fused_sm80" / "config.h").read_text()
    struct = rf"struct {tiles_of} {{(.*?)}};"
    found = {}
    for head_dim, body in re.findall(struct, text, re.S):
        numbers = re.search(rf"using {name} =\s*\w+<\w+, \d+,([\d, \n]+)", body)
        assert numbers is not None
        found[int(head_dim)] = [int(number) for number in numbers[1].split(",") if number.strip()]
    return found


def _shapes(table: Mapping[int, Sequence[tiles.Tile]], index: int) -> dict[int, tuple[int, int, int]]:
    return {d: (choices[index].owned, choices[index].rows, choices[index].box) for d, choices in table.items()}


@pytest.mark.parametrize(("index", "variant"), [(0, "wide"), (1, "narrow")])
def test_tiles_of_fused_sm80_are_the_configured_ones(index: int, variant: str) -> None:
    structs = rf"Tiles<E, (\d+), Variant::{variant}>"
    for name, table in (("Forward", tiles._SM80_QUERIES), ("QueryGradient", tiles._SM80_GRAD_QUERY)):
        expected = {d: (16 * warps * m, 16 * m, box) for d, (warps, m, box, *_) in _configured(name, structs).items()}
        assert _shapes(table, index) == expected
    for name, table in (("KeyGradient", tiles._SM80_GRAD_KEY), ("Accumulating", tiles._SM80_ACCUMULATING)):
        expected = {d: (keys, keys // warps, box) for d, (keys, box, warps, *_) in _configured(name, structs).items()}
        assert _shapes(table, index) == expected


@pytest.mark.parametrize(
    ("allow_tf32", "index", "structs"),
    [
        (True, 0, r"Tiles<Tf32, (\d+), Variant::wide>"),
        (True, 1, r"Tiles<Tf32, (\d+), Variant::narrow>"),
        (False, -1, r"Tf32x3Tiles<(\d+)>"),
    ],
)
def test_float32_tiles_of_fused_sm80_are_the_configured_ones(allow_tf32: bool, index: int, structs: str) -> None:
    for step, name in enumerate(("Forward", "QueryGradient", "KeyGradient")):
        table = {head_dim: choices[step] for head_dim, choices in tiles._SM80_FLOAT32[allow_tf32].items()}
        expected = {d: (16 * warps * m, 16 * m, box) for d, (warps, m, box, *_) in _configured(name, structs).items()}
        assert _shapes(table, index) == expected


def test_float32_has_tiles_of_its_own_up_to_head_dim_128() -> None:
    single = dataclasses.replace(SMALL, dtype="float32", head_dim=80, head_dim_v=80)
    (forward,) = plan(single, Kernel.fused_sm80, "forward")
    assert forward.step.tiles == tiles._SM80_FLOAT32[False][128][0]
    assert plan(dataclasses.replace(single, head_dim=136), Kernel.fused_sm80, "forward") == ()


def test_tiles_of_fused_sm90_are_the_configured_ones() -> None:
    text = (KERNELS / "fused_sm90" / "config.h").read_text()
    variants = re.search(r"constexpr Variant kVariants\[\] = {(.*?)\n};", text, re.S)
    assert variants is not None
    keys: dict[int, set[int]] = {}
    for head_dim, count in re.findall(r"{(\d+), (\d+), \d+, \d+}", variants[1]):
        keys.setdefault(int(head_dim), set()).add(int(count))
    assert {d: {tile.box for tile in choice} for d, choice in tiles._SM90.items()} == keys
    assert "constexpr int kQueries = 64;" in text
    gradients = (KERNELS / "fused_sm90" / "backward_config.h").read_text()
    shapes = re.search(r"constexpr GradientShape kGradientShapes\[\] = {(.*?)\n};", gradients, re.S)
    assert shapes is not None
    walked = {(int(d), pass_, int(box)) for d, pass_, box in re.findall(r"{(\d+), Pass::(\w+), (\d+), ", shapes[1])}
    expected = {(d, "all", tile.box) for d, (tile,) in tiles._SM90_ACCUMULATING.items()}
    (tile,) = tiles._SM90_GRADIENTS
    assert walked == expected | {(d, p, tile.box) for d in tiles._SM90_GRADIENT_CLASSES for p in ("keys", "queries")}


# ---- Arithmetic --------------------------------------------------------------------------------------------------


def made_profile(kernel: Kernel = Kernel.gemm, pass_: str = "forward", ms: float = 2.0) -> Profile:
    settings = Settings(CPU, Ceilings(1.0, {"float16": 10.0}), (), ("forward", "backward"), ())
    row = Row("small", kernel.name, pass_, "float16", Timing(ms, ms, ms, 3), 0.0, None, None, {})
    return profile_of(row, SMALL, pass_, settings)  # type: ignore[arg-type]


def test_shares_rates_and_intensity() -> None:
    fused, composite = made_profile(Kernel.fused_sm80), made_profile()
    work = attention_work(SMALL, "forward", "float16")
    assert fused.useful == work
    assert fused.useful_tflops == pytest.approx(work.flops / 2e-3 * 1e-12)
    assert fused.bytes_share == pytest.approx(work.bytes / 1e12 / 2e-3)
    assert fused.flops_share == pytest.approx(work.flops / 10e12 / 2e-3)
    assert fused.intensity == pytest.approx(work.flops / work.bytes)
    assert fused.executed_tflops > fused.useful_tflops
    weights = 2 * SMALL.batch * SMALL.tokens * SMALL.heads * 35
    unfused = sum(unfused_work(SMALL, operator, "float16").bytes for operator in ("qk", "av"))  # type: ignore[arg-type]
    assert composite.moved_bytes == unfused + 2 * weights
    assert composite.bytes_share == fused.bytes_share  # the problem's floor, not the composite's


def test_profiles_are_read_as_written() -> None:
    profile = made_profile()
    assert Profile.from_json(json.loads(json.dumps(profile.as_json())), profile.problem).as_json() == profile.as_json()
    launch = counters.Launch("void f<int>(int)", {"dram__bytes_read.sum": 3.0, "gpu__time_duration.sum": 2.0})
    counted = counters.Counters("small", "forward", "gemm", (launch,))
    assert counters.Counters.from_json(json.loads(json.dumps(counted.as_json()))) == counted


def test_a_type_without_a_known_rate_has_no_compute_share() -> None:
    settings = Settings(CPU, Ceilings(1.0, {}), (), ("forward",), ())
    row = Row("small", "cpu", "forward", "float16", Timing(1, 1, 1, 3), 0.0, None, None, {})
    profile = profile_of(row, SMALL, "forward", settings)
    assert profile.flops_share is None
    assert cli.profile_table([profile])[1][0][-1] == "-"


# ---- Counters ----------------------------------------------------------------------------------------------------

NAMED = {
    "void natten::<unnamed>::statistics_kernel<float>(natten::P)": "natten::statistics_kernel",
    "void (anonymous namespace)::f<a::B<c>>(int (*)(int))": "f",
}
SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"
FUSED = "void natten::fused_sm80::forward_kernel<natten::Config<__half, (int)64, 4, 2>>(natten::Parameters)"
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def long_csv(launches: list[tuple[str, dict[str, tuple[str, str]]]]) -> str:
    """What ``ncu --csv --metrics ...`` prints: a row per launch and metric, among messages."""
    lines = [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
        "==PROF== Disconnected from process 4711",
        HEADER,
    ]
    for identity, (function, metrics) in enumerate(launches):
        place = f'"{identity}","4711","python3.12","host","{function}","1","7","(128, 1, 1)","(4096, 1, 1)","0","9.0"'
        for name, (unit, value) in metrics.items():
            lines.append(f'{place},"Command line profiler metrics","{name}","{unit}","{value}"')
    return "\n".join([*lines, ""])


METRICS = {
    "gpu__time_duration.sum": ("ns", "218,560"),
    "dram__bytes_read.sum": ("byte", "201,326,592"),
    "dram__bytes_write.sum": ("Mbyte", "67.5"),
    "lts__t_bytes.sum": ("Gbyte", "1.25"),
    "lts__t_sector_hit_rate.pct": ("%", "83.10"),
    "l1tex__t_sector_hit_rate.pct": ("%", "0"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("", "n/a"),
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "41.25"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("", "(!) n/a"),
    "sm__maximum_warps_per_active_cycle_pct": ("%", "25"),
    "launch__registers_per_thread": ("register/thread", "168"),
    "launch__shared_mem_per_block_static": ("byte/block", "0"),
    "lts__t_sectors_lookup_hit.ratio": ("", "nan"),
    "launch__shared_mem_per_block_dynamic": ("Kbyte/block", "98.30"),
}


def check_launch(launch: counters.Launch) -> None:
    assert launch.short_name == "natten::fused_sm80::forward_kernel"
    assert launch.value("time_us") == pytest.approx(218.56)
    assert launch.dram_bytes == pytest.approx(201326592 + 67.5e6)
    assert launch.value("l2_bytes") == pytest.approx(1.25e9)
    assert launch.value("l2_hit_pct") == pytest.approx(83.1)
    assert launch.value("l1_hit_pct") == 0
    assert launch.value("tensor_pct") == pytest.approx(41.25)  # the second name: the device lacks the first
    assert launch.value("occupancy_pct") is None
    assert launch.value("registers") == 168
    assert "lts__t_sectors_lookup_hit.ratio" not in launch.metrics
    assert launch.shared_bytes == pytest.approx(98300)


@pytest.mark.parametrize("function", list(NAMED))
def test_short_names_of_functions(function: str) -> None:
    assert counters.Launch(function, {}).short_name == NAMED[function]


def test_ncu_rows_per_metric() -> None:
    text = long_csv([(SPIN, METRICS), (FUSED, METRICS)])
    noisy = text.replace(HEADER, "a line of the program, with a comma\n" + HEADER) + "==WARNING== something\nthe end\n"
    spin, fused = counters.parse_csv(noisy)
    assert spin.short_name == "at::cuda::spin_kernel"
    check_launch(fused)


def test_ncu_columns_of_rules_may_be_missing_from_rows() -> None:
    text = long_csv([(FUSED, METRICS)])
    check_launch(counters.parse_csv(text.replace(HEADER, HEADER + ',"Rule Name","Rule Type"'))[0])
    check_launch(counters.parse_csv(text + '"9","4711"\n')[0])


def test_ncu_rows_per_launch() -> None:
    """``--page raw``: one column per metric, and a row of units below the header."""
    names = ["ID", "Process ID", "Kernel Name", "Block Size", *METRICS]
    units = ["", "", "", "", *(unit for unit, _ in METRICS.values())]
    values = ["0", "4711", FUSED, "(128, 1, 1)", *(value for _, value in METRICS.values())]
    lines = [",".join(f'"{cell}"' for cell in row) for row in (names, units, values)]
    (launch,) = counters.parse_csv("==PROF== Connected\n" + "\n".join(lines))
    check_launch(launch)


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM - no permission\n", '"ID","Name"\n"0","x"\n'])
def test_ncu_without_a_table_yields_nothing(text: str) -> None:
    assert counters.parse_csv(text) == []


def test_launches_are_split_at_markers() -> None:
    a, b, spin = (counters.Launch(name, {}) for name in ("a", "b", SPIN))
    assert counters.split_calls([a, spin, a, b, spin, spin, b]) == [[a, b], [], [b]]


def fake_ncu(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, status: int = 0) -> None:
    """An ``ncu`` that writes the text to its log and leaves its arguments and the specification behind."""
    script = folder / "ncu"
    (folder / "text").write_text(text)
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "shutil.copy(folder / 'text', sys.argv[sys.argv.index('--log-file') + 1])\n"
        "shutil.copy(sys.argv[-1], folder / 'specification.json')\n"
        "(folder / 'arguments').write_text('\\n'.join(sys.argv[1:]))\n"
        f"sys.exit({status})\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(folder))


def test_counting_runs_the_measured_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_ncu(monkeypatch, tmp_path, long_csv([(SPIN, METRICS), (FUSED, METRICS), (SPIN, METRICS)]))
    measured = [made_profile(Kernel.fused_sm80), made_profile(Kernel.naive, "backward")]
    with pytest.raises(counters.CountersUnavailable, match="counted 2 of 1 calls"):
        counters.count(measured[:1], allow_tf32=False)
    first, second = counters.count(measured, allow_tf32=True)
    assert (first.problem, first.pass_, first.kernel) == ("small", "forward", "fused_sm80")
    check_launch(first.launches[0])
    assert first.dram_bytes == first.launches[0].dram_bytes
    assert second.launches == ()
    assert second.dram_bytes is None
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[arguments.index("--clock-control") + 1] == "none"
    assert arguments[arguments.index("--profile-from-start") + 1] == "off"
    assert arguments[-4:-1] == [sys.executable, "-m", "natten.profile.replay"]
    specification = json.loads((tmp_path / "specification.json").read_text())
    assert specification["allow_tf32"] is True
    assert [(call["kernel"], call["pass"]) for call in specification["calls"]] == [
        ("fused_sm80", "forward"),
        ("naive", "backward"),
    ]
    assert read_problem(specification["calls"][0]["problem"]) == SMALL
    columns, cells = cli.counters_table([first])
    shown = dict(zip([column.title for column in columns], cells[0], strict=True))
    assert shown["DRAM MB"] == "269"
    assert shown["occupancy %"] == "-"
    assert shown["shared KB"] == "96.0"


def test_counting_says_why_it_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_ncu(monkeypatch, tmp_path, "==ERROR== ERR_NVGPUCTRPERM - no permission\n==PROF== more\n", status=1)
    with pytest.raises(counters.CountersUnavailable, match=r"exit status 1\) counted 0 of 1 calls: .*NVGPUCTRPERM"):
        counters.count([made_profile()], allow_tf32=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(counters.CountersUnavailable, match="not on PATH"):
        counters.count([made_profile()], allow_tf32=False)


# ---- The command line --------------------------------------------------------------------------------------------

OWN = ["--shape", "12x10", "--kernel-size", "5x3", "--heads", "2", "--head-dim", "16", "--device", "cpu"]


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "measure_ceilings", lambda device: Ceilings(0.02, {"float32": 0.1}))


@pytest.mark.usefixtures("known_ceilings")
def test_profiles_every_kernel_of_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "profile.json"
    assert natten_main(["profile", *OWN, "--budget-ms", "1", "--dilation", "2x1", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "12x10-k5x3" in printed
    assert "GFLOP/s" in printed
    data = json.loads(target.read_text())
    assert {(row["kernel"], row["pass"]) for row in data["rows"]} == {
        (kernel, pass_) for kernel in ("cpu", "cpu_naive") for pass_ in ("forward", "backward")
    }
    for row in data["rows"]:
        assert row["useful_flops"] == 120 * 15 * 2 * 4 * 16 * (1 if row["pass"] == "forward" else 2.5)
        assert row["floor_bytes"] == 4 * (4 if row["pass"] == "forward" else 8) * 120 * 2 * 16
        assert row["bytes_floor_share"] == pytest.approx(row["floor_bytes"] / 0.02e12 / row["ms"] * 1e3, rel=0.05)
    assert data["ceilings"] == {"bandwidth_tbps": 0.02, "tflops": {"float32": 0.1}}
    assert "profile" in data["command"]


@pytest.mark.usefixtures("known_ceilings")
def test_kernels_that_cannot_run_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*OWN, "--kernels", "fused_sm90", "--passes", "forward"]) == 1
    assert "fused_sm90: kernel fused_sm90 cannot run forward here" in capsys.readouterr().out


def test_dry_run_shows_candidates_and_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["2d-k13-d64", "--dry-run", "--device", "cpu", "--kernels", "fused_sm80,fused_sm90,cpu"]) == 0
    printed = capsys.readouterr().out
    assert "rejected: runs on cuda" in printed
    assert re.search(r"forward +fused_sm90 +forward \(owns queries\) +16x4 +16x4 +4x16 +39% +x 2\.56", printed)
    assert re.search(r"backward +fused_sm80 +key gradient \(owns keys\)", printed)
    assert re.search(r"backward +fused_sm90 +accumulating \(owns keys\)", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name problems"),
        (["nat-s1", "--shape", "8x8"], "name problems"),
        (["no-such"], "no problem named no-such"),
        (["--shape", "8x8"], "needs --kernel-size"),
        (["--shape", "8x8", "--kernel-size", "3x3x3"], "3 values for 2 axes"),
        (["--shape", "8x8", "--kernel-size", "9"], "kernel_size"),
        (["nat-s1", "--kernels", "cpu,best"], "best not among"),
        (["nat-s1", "--passes", "sideways"], "sideways not among"),
        (["nat-s1", "--counters", "--device", "cpu"], "a GPU's counters"),
        (["nat-s1", "--dry-run", "--capability", "nine"], "expected two numbers"),
    ],
)
def test_bad_arguments_are_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)


def test_a_picture_without_matplotlib_is_refused_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'natten\[bench\]'"):
        cli.main([*OWN, "--plot", "picture.png"])


def test_problem_from_arguments() -> None:
    text = (
        "--shape 9x8x7 --kernel-size 3 --stride 1x2x3 --causal 1x0x0 --heads 4 --heads-kv 2 --head-dim-v 24 --batch 3"
    )
    arguments = cli.parser().parse_args(text.split())
    assert cli.own_problem(arguments, "float16") == BenchProblem(
        "9x8x7-k3", 3, (9, 8, 7), 4, 64, (3, 3, 3), (1, 2, 3), (1, 1, 1), (True, False, False), "float16", 24, 2
    )


def test_listed_problems_take_another_batch_and_type() -> None:
    arguments = cli.parser().parse_args(["nat-s1", "--batch", "2", "--dtype", "float32"])
    (problem,) = cli.chosen_problems(arguments, CPU)
    assert (problem.name, problem.batch, problem.dtype, problem.shape) == ("nat-s1", 2, "float32", (56, 56))


# ---- The picture -------------------------------------------------------------------------------------------------


def test_roofline_shows_kernels_ceilings_and_counted_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    save: Callable[..., None] = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    rows = [made_profile(kernel, ms=ms) for kernel, ms in ((Kernel.naive, 9.0), (Kernel.gemm, 3.0))]
    rows += [made_profile(Kernel.fused_sm80, pass_) for pass_ in ("forward", "backward")]
    counted = [SimpleNamespace(problem="small", pass_="forward", kernel="naive", dram_bytes=2 * rows[0].moved_bytes)]
    target = tmp_path / "roofline.png"
    plot.draw(target, rows, Ceilings(1.0, {"float16": 10.0}), "made", counted)  # type: ignore[arg-type]
    assert target.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    lines = [(list(line.get_xdata()), list(line.get_ydata()), line.get_marker()) for line in axes.lines]
    scale = 1e3  # GFLOP/s: nothing reaches a TFLOP/s
    points = [(x[0], y[0]) for x, y, marker in lines if marker in ("o", "s")]
    for row in rows:
        assert (pytest.approx(row.intensity), pytest.approx(row.useful_tflops * scale)) in points
    assert (pytest.approx(rows[0].intensity / 2), pytest.approx(rows[0].useful_tflops * scale)) in points
    assert len(points) == len(rows) + 1
    memory, products = (line for line in lines if line[2] == "None" and len(line[0]) == 2 and line[1][1] == 10 * scale)
    assert memory[0][1] == products[0][0] == pytest.approx(10.0)  # they meet at the ridge
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["naive", "GEMM", "fused, Ampere and later", "forward", "backward", "over the bytes counted"]
