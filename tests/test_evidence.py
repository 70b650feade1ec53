"""The tools behind the pages of measurements: what they time computes what it says, and pages say what files say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from natten.bench.peers import Contender
from natten.bench.problems import DTYPES, load_problems
from natten.bench.report import RowFile
from natten.bench.windows import checked_problem

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    tools = str(ROOT / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    return importlib.import_module(name)


def run_contender(contender: Contender) -> torch.Tensor:
    return contender.attention(contender.query, contender.key, contender.value)


# ---- Patterns ----------------------------------------------------------------------------------------------------

SMALL_PATTERNS: dict[str, dict[str, Any]] = {
    "swin": {"shape": (14, 21)},
    "maxvit-grid": {"shape": (14, 14), "dilation": (2, 2)},
    "halonet": {"shape": (24, 32)},
    "dinat": {"shape": (28, 30)},
    "sliding-tile": {"shape": (6, 8, 8), "kernel_size": (6, 6, 6), "stride": (2, 2, 2)},
    "strided": {"shape": (20, 20), "kernel_size": (9, 9), "stride": (3, 3)},
    "language-model": {"shape": (60,), "kernel_size": (16,)},
    "causal-video": {"shape": (4, 6, 6), "kernel_size": (3, 3, 3)},
}


@pytest.mark.parametrize("name", list(SMALL_PATTERNS))
def test_usual_implementations_compute_the_pattern(name: str) -> None:
    bench = load("bench_patterns")
    (pattern,) = (p for p in bench.PATTERNS if p.problem.name == name)
    changes = {"batch": 2, "heads": 4, "head_dim": 8, "dtype": "float32", **SMALL_PATTERNS[name]}
    if pattern.problem.heads_kv is not None:
        changes["heads_kv"] = 2
    problem = dataclasses.replace(pattern.problem, **changes)
    for usual in ("natten", *pattern.usual):
        if usual == "flex" or "compiled" in usual:  # tested with the benchmark; the eager one is
            continue
        torch.manual_seed(0)
        found = run_contender(bench.contender(usual, problem, torch.float32, CPU))
        torch.manual_seed(0)
        expected = run_contender(bench.contender("mask", problem, torch.float32, CPU))
        if usual == "halo":  # pads at borders, where natten moves the window
            found, expected = (x[:, 8:-8, 8:-8] for x in (found, expected))
        assert torch.allclose(found, expected, atol=2e-6) == (usual != "dense")


def test_every_pattern_is_legal_and_measured_against_something() -> None:
    bench = load("bench_patterns")
    assert set(SMALL_PATTERNS) == {pattern.problem.name for pattern in bench.PATTERNS}
    for pattern in bench.PATTERNS:
        checked_problem(pattern.problem, torch.bfloat16, CPU)
        assert pattern.usual


# ---- Permutes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "tile", "dilation"),
    [((10, 13), (4, 8), (1, 1)), ((10, 21), (2, 4), (3, 2)), ((40,), (16,), (3,)), ((5, 6, 9), (2, 2, 4), (1, 2, 1))],
)
def test_tiles_and_back_is_the_identity(
    shape: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...]
) -> None:
    bench = load("bench_permutes")
    x = torch.randn(2, *shape, 3, 8)
    tiled = bench.to_tiles(x, tile, dilation)
    assert tiled.is_contiguous()
    assert tuple(tiled.shape[-2 - len(shape) : -2]) == tile
    assert torch.equal(bench.from_tiles(tiled, len(shape), shape), x)


def test_a_tile_holds_neighbours_of_one_dilation_group() -> None:
    tiled = load("bench_permutes").to_tiles(torch.arange(12).view(1, 12, 1, 1), (2,), (3,))
    assert tiled.flatten().tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_boxes_on_a_grid_are_at_least_those_at_any_origin() -> None:
    from natten._problem import Axis
    from natten.profile.tiles import axis_boxes

    grid_boxes = load("bench_permutes").grid_boxes
    # Windows of 5 over 16 tokens, 4 queries each: [0, 6), [2, 10), [6, 14), [10, 16) in boxes of 4.
    axis = Axis(5, 1, 1, 0, 0, 0, 16)
    assert grid_boxes(axis, 4, 4) == 2 + 3 + 3 + 2
    assert axis_boxes(axis, "queries", 4, 4, 4) == 2 + 2 + 2 + 2


# ---- Overhead, models --------------------------------------------------------------------------------------------


def test_overhead_measures_calls_and_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_overhead")
    monkeypatch.setattr(bench, "MODES", ("eager",))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    output = tmp_path / "overhead.json"
    arguments = ["--problems", "1d-128", "--device", "cpu", "--json", str(output)]
    assert bench.main(arguments) == 0
    rows = json.loads(output.read_text())["rows"]
    us = {(row["pass"], row["what"]): row["us"] for row in rows}
    assert all(value > 0 for value in us.values())
    for pass_ in bench.PASSES:
        assert {"natten", "sdpa"} <= {what for name, what in us if name == pass_}
    parts = {"operator alone", "allocation of its outputs", "torch.add"}
    assert parts <= {what for name, what in us if name == "forward"}
    assert bench.main([*arguments, "--seconds", "-1"]) == 1  # everything is out of time, and said so
    assert {skip["reason"] for skip in json.loads(output.read_text())["skipped"]} == {"out of time"}


def models_run(**changes: Any) -> Any:
    settings = {"budget_s": 0.0, "step_limit_s": 60.0, "end": time.monotonic() + 600}
    return load("bench_models").Run(CPU, torch.float32, **{**settings, **changes})


def test_models_differ_in_nothing_but_the_attention() -> None:
    bench = load("bench_models")
    model = bench.video_model("small", 128, 2, (4, 6, 6), (4, 6, 6), (1, 1, 1))  # windows of all tokens
    inputs = model.inputs(2)
    outputs = []
    for kind in ("natten", "dense"):
        torch.manual_seed(0)
        outputs.append(model.make(kind)(*inputs))
    torch.testing.assert_close(*outputs)
    windowed = bench.video_model("small", 128, 2, (4, 6, 6), (2, 3, 3), (2, 3, 3))
    torch.manual_seed(0)
    sliding = windowed.make("natten")(*inputs)
    torch.manual_seed(0)
    strided = windowed.make("strided")(*inputs)
    assert not torch.allclose(sliding, outputs[0], atol=1e-4)
    assert not torch.allclose(sliding, strided, atol=1e-4)


def test_image_backbone_has_dinats_windows() -> None:
    bench = load("bench_models")
    backbone = bench.image_model("tiny", 64, 2, 3.0).make("natten")
    windows = [[block.attention.window.dilation[0] for block in level] for level in backbone.levels]
    assert [len(level) for level in windows] == [3, 4, 18, 5]
    assert [level[:2] for level in windows] == [[1, 8], [1, 4], [1, 2], [1, 1]]
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(28e6, rel=0.05)  # the paper's DiNAT-Tiny


def test_throughput_of_models_is_measured_or_its_absence_explained() -> None:
    bench = load("bench_models")
    file = RowFile(None, {})
    model = bench.video_model("small", 128, 1, (2, 4, 4), (2, 2, 2), (1, 1, 1))
    bench.throughput_rows([model], ["natten", "naive", "dense"], None, models_run(), file)
    assert [(row["attention"], row["mode"]) for row in file.rows] == [
        (kind, mode) for kind in ("natten", "dense") for mode in ("inference", "training")
    ]
    for row in file.rows:
        assert row["items_per_s"] == pytest.approx(1e3 / row["ms"], rel=1e-2)
    assert all("runs on cuda" in skip["reason"] for skip in file.skipped)
    bench.throughput_rows([model], ["natten"], None, models_run(end=0.0), late := RowFile(None, {}))
    assert [skip["reason"] for skip in late.skipped] == ["out of time"] * 2


@pytest.mark.parametrize(("power", "kind"), [(1, "natten"), (2, "dense")])
@pytest.mark.parametrize("capacity", [1000, 1337, 10**9])
def test_search_finds_the_largest_size(monkeypatch: pytest.MonkeyPatch, capacity: int, power: int, kind: str) -> None:
    """On a device whose memory holds `capacity` tokens, at 2 ms a token (to the power) of a step."""
    bench = load("bench_models")
    limit = bench.Limit("line", lambda n: (n,), bench.Window((3,), (1,), (1,)), 16)

    tried = []

    def attempt(limit: Any, kind: str, size: int, run: Any) -> Any:
        tried.append(size)
        assert 2e-3 * size**power <= 60.0 or size == limit.start
        refused = "out of memory" if size > capacity else None
        return bench.Trial(size, 2e-3 * size**power, 100 + 7 * size, refused)

    monkeypatch.setattr(bench, "attempt_size", attempt)
    best, ended_by = bench.search(limit, kind, 100 + 7 * capacity, models_run())
    by_time = (60.0 / 2e-3) ** (1 / power)
    most = min(capacity, by_time)
    assert most / 1.05 <= best.size <= most
    assert len(tried) <= 12
    assert ended_by == ("out of memory" if capacity < by_time else "time: more than 60 s a step")


def test_search_reports_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_models")
    limit = bench.LIMITS[0]
    monkeypatch.setattr(bench, "attempt_size", lambda limit, kind, size, run: bench.Trial(size, 0.0, 0, "no kernel"))
    assert bench.search(limit, "natten", 10**9, models_run()) == (None, "no kernel")


# ---- The runner --------------------------------------------------------------------------------------------------


def test_lanes_share_out_every_name() -> None:
    measure = load("measure_h200")
    for part in measure.PARTS.values():
        for count in (1, 2, 3, 4):
            shares = [name for index in range(count) for name in part.lane(index + 1, count)]
            assert sorted(shares) == sorted(part.lane(1, 1))


def test_names_of_the_parts_exist() -> None:
    measure = load("measure_h200")
    for name in ("attention", "types", "flex", "float32", "profile", "permutes"):
        load_problems(names=measure.PARTS[name].lane(1, 1))
    assert len(measure.PARTS["attention"].lane(1, 1)) == len(load_problems().problems)
    assert set(measure.PARTS["patterns"].lane(1, 1)) == set(SMALL_PATTERNS)
    models = load("bench_models")
    assert set(measure.PARTS["models"].lane(1, 1)) == {model.name for model in models.MODELS}
    assert set(measure.PARTS["limits"].lane(1, 1)) <= set(models.ATTENTIONS)
    assert set(load("make_report").FILES) <= set(measure.PARTS)


def test_a_part_is_ended_at_its_time_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = load("measure_h200")
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time\n"
        "from natten.bench.report import RowFile\n"
        "RowFile(sys.argv[2], {'names': sys.argv[4]}).add({'ms': 1.0})\n"
        "time.sleep(60)\n"
    )
    part = measure.Part((str(program),), "slow", "a b c", "--names")
    monkeypatch.setitem(measure.PARTS, "slow", part)
    start = time.monotonic()
    assert measure.main(["slow", "--lane", "1/2", "--seconds", "9", "--output", str(tmp_path)]) == 0
    assert time.monotonic() - start < 20
    assert json.loads((tmp_path / "slow.1-of-2.json").read_text())["names"] == "a,c"
    assert "1 rows" in capsys.readouterr().out


def test_lanes_are_merged(tmp_path: Path) -> None:
    measure = load("measure_h200")
    head = {"device": "H200", "driver": "1", "versions": {"torch": "2"}, "commit": "abc", "command": "one"}
    for index in (1, 2):
        file = RowFile(tmp_path / f"profile.{index}-of-2.json", head, counters=[{"lane": index}], timing="eager")
        file.add({"row": index})
        file.skip(problem=f"late {index}")
    measure.main(["merge", "profile", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    data = json.loads((tmp_path / "profile.json").read_text())
    assert data["rows"] == [{"row": 1}, {"row": 2}]
    assert data["counters"] == [{"lane": 1}, {"lane": 2}]
    assert [skip["problem"] for skip in data["skipped"]] == ["late 1", "late 2"]
    assert data["command"] == "python tools/measure_h200.py profile"
    assert data["timing"] == "eager"
    RowFile(tmp_path / "types.1-of-2.json", head)
    RowFile(tmp_path / "types.2-of-2.json", {**head, "commit": "other"})
    with pytest.raises(SystemExit, match="lanes differ in commit"):
        measure.main(["merge", "types", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="no lanes of overhead"):
        measure.main(["merge", "overhead", "--output", str(tmp_path)])


# ---- The pages ---------------------------------------------------------------------------------------------------


def test_windows_of_the_sparsity_list() -> None:
    problems = load_problems("sparsity.json").problems
    assert len({problem.name for problem in problems}) == len(problems)
    for problem in problems:
        checked_problem(problem, DTYPES[problem.dtype], CPU)
        assert problem.tokens == 16384


def test_pages_are_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("make_report").main(["--check"]) == 0, capsys.readouterr().out


def test_pages_without_any_file_say_how_to_make_them(tmp_path: Path) -> None:
    report = load("make_report")
    made = report.pages(report.Files(tmp_path))
    assert len(made) == 3
    for text in made.values():
        assert "python tools/measure_h200.py" in text
    assert report.report(report.Files(tmp_path)).count("Not measured yet") == len(report.REPORT) - 2


HEAD = {
    "device": "NVIDIA H200",
    "driver": "580",
    "versions": {"torch": "2.11"},
    "commit": "abc",
    "command": "python x",
    "date": "2026-01-01",
}


def attention_row(problem: str, kernel: str, ms: float, pass_: str = "forward", **peers: float) -> dict[str, Any]:
    return {
        "problem": problem,
        "kernel": kernel,
        "pass": pass_,
        "dtype": "bfloat16",
        "ms": ms,
        "useful_tflops": 100 / ms,
        "floor_share": 0.5,
        "chosen": "fused_sm90" if kernel == "auto" else None,
        "peers": peers,
    }


def test_report_compares_kernels_and_peers(tmp_path: Path) -> None:
    report = load("make_report")
    file = RowFile(tmp_path / "attention.json", HEAD)
    for kernel, ms in (("auto", 2.0), ("fused_sm90", 2.0), ("fused_sm80", 5.0), ("naive", 20.0)):
        file.add(attention_row("nat-s1", kernel, ms, dense_cudnn=8.0, dense_flash2=18.0, natten_hopper=4.0))
    file.skip(problem="nat-s1", kernel="dense_flash2", **{"pass": "forward"}, dtype="bfloat16", reason="over the limit")
    files = report.Files(tmp_path)
    dense = report.against_dense(files)
    assert "4.00 x over dense cuDNN, 9.00 x over dense FlashAttention-2, 2.00 x over the public NATTEN" in dense
    assert "8.00 (4.00 x) | 18.0 (9.00 x)* | 4.00 (2.00 x)* |" in dense  # stars: not of this run
    summary = report.summary(files)
    assert "- Fastest: 50.0 useful TFLOP/s (nat-s1, forward)." in summary
    assert "- Over dense attention by cuDNN: forward 4.00 to 4.00 x, 4.00 x in the geometric mean." in summary
    assert "| nat-s1 | forward | 20.0 | - | 5.00 | **2.00** | `fused_sm90` | 0% |" in report.kernels(files)
    assert "2.50 x forward, - x backward" in report.hopper(files)


def test_report_on_sparsity(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = load("make_report")
    file = RowFile(tmp_path / "sparsity.json", HEAD)
    for pass_ in ("forward", "backward"):
        file.add(attention_row("2d-k128", "auto", 4.0, pass_, dense_cudnn=4.0))
        file.add(attention_row("2d-k64", "auto", 1.25, pass_, dense_cudnn=4.0))
        file.add(attention_row("2d-k64-s16", "auto", 1.0, pass_, dense_cudnn=4.0))
    files = report.Files(tmp_path)
    text = report.sparsity(files)
    assert "| 2-D | 64 x 64 | 1 x 1 | forward | 75.0% | 1.25 | 80.0 | 4.00 | 3.20 x | 80% | - |" in text
    assert "| 2-D | 64 x 64 | 16 x 16 | backward | 75.0% | 1.00 | 100 | 4.00 | 4.00 x | 100% | - |" in text
    assert "forward, stride 1: 80% to 80%." in report.summary(files)
    assert "gains: 1.25 x" in report.block_sparse(files)
    picture = tmp_path / "sparsity.png"
    report.draw_sparsity(files, picture)
    assert picture.stat().st_size > 10_000


def test_report_on_what_is_measured_so_far(tmp_path: Path) -> None:
    """A run that was ended early leaves files that lack anything."""
    report = load("make_report")
    RowFile(tmp_path / "attention.json", HEAD).add(attention_row("nat-s1", "naive", 2.0))
    RowFile(tmp_path / "sparsity.json", HEAD).add(attention_row("2d-k64", "auto", 2.0))
    RowFile(tmp_path / "flex.json", HEAD).add(attention_row("nat-s1", "auto", 2.0))
    RowFile(tmp_path / "types.json", HEAD)
    RowFile(tmp_path / "overhead.json", HEAD).add(
        {"problem": "1d-128", "mode": "eager", "pass": "forward", "what": "sdpa", "us": 1.0}
    )
    RowFile(tmp_path / "rungs.json", HEAD).add(
        {"problem": "x", "dtype": "float16", "rung": "naive", "what": "forward", "speedup": 2.0}
    )
    row = {"part": "throughput", "model": "video-dit", "attention": "natten", "mode": "training", "batch": 1}
    RowFile(tmp_path / "models.json", HEAD).add({**row, "ms": 1.0, "items_per_s": 1.0, "peak_bytes": 1})
    RowFile(
        tmp_path / "patterns.json",
        HEAD,
        patterns=[{"name": "swin", "shape": [56, 56], "batch": 128, "heads": 3, "head_dim": 32}],
    ).add({"pattern": "swin", "pass": "forward", "what": "partition", "ms": 5.0})
    made = report.pages(report.Files(tmp_path))
    assert all(made.values())
    report.draw_sparsity(report.Files(tmp_path), tmp_path / "sparsity.png")


def test_report_on_counters_adds_up_launches(tmp_path: Path) -> None:
    report = load("make_report")
    row = {"problem": "nat-s1", "pass": "forward", "kernel": "gemm", "ms": 1.0}
    row |= {"useful_flops": 4e9, "executed_flops": 8e9, "moved_bytes": 1e8}
    launch = dict.fromkeys(("l1_hit_pct", "tensor_pct", "theoretical_occupancy_pct"))
    launch |= {"dram_read_bytes": 3e7, "dram_write_bytes": 2e7, "l2_bytes": 1e8, "l2_hit_pct": 50.0}
    launch |= {"occupancy_pct": 20.0, "time_us": 10.0}
    other = {**launch, "l2_bytes": 3e8, "l2_hit_pct": 90.0, "occupancy_pct": 60.0, "time_us": 30.0}
    counted = [{"problem": "nat-s1", "pass": "forward", "kernel": "gemm", "launches": [launch, other]}]
    RowFile(tmp_path / "profile.json", HEAD, counters=counted).add(row)
    text = report.counters(report.Files(tmp_path))
    assert (
        "| nat-s1 | forward | `gemm` | 1.00 | 40.0 | x 2.00 | 100 | 100 | 40.0 | 400 | 80.0 | - | - | 50.0 | - |"
        in text
    )


def test_report_on_the_rungs(tmp_path: Path) -> None:
    report = load("make_report")
    mean = {"rank": 1, "dtype": "float16", "rung": "fused", "passes": "forward", "problems": 3, "improvement": 2.5}
    averages = [{**mean, "floor_share": 0.25, "published": 17.59}]
    file = RowFile(tmp_path / "rungs.json", HEAD, averages=averages, covered=3, grid=4)
    for ours, what in ((2.0, "forward"), (8.0, "forward"), (None, "backward"), (3.0, "qk")):
        file.add({"problem": "x", "dtype": "float32", "rung": "gemm_fp32", "what": what, "speedup": ours})
    text = report.rungs(report.Files(tmp_path))
    assert "| 1-D | float16 | fused | forward | 3 | +250% | +1759% | 25% |" in text
    assert "| float32 | gemm, TF32 not allowed | 4.00 x | 2.0 to 8.0 | - | - |" in text


def test_other_sections_of_the_report(tmp_path: Path) -> None:
    report = load("make_report")
    flex = RowFile(tmp_path / "flex.json", HEAD)
    flex.add(attention_row("nat-s1", "auto", 2.0, flex=8.0))
    types = RowFile(tmp_path / "types.json", HEAD)
    types.add({**attention_row("nat-s1", "auto", 2.0), "dtype": "float16"})
    permutes = RowFile(tmp_path / "permutes.json", HEAD, ceilings={"bandwidth_tbps": 4.2})
    permutes.add(
        {"problem": "nat-s1", "pass": "forward", "natten_ms": 2.0, "permutes_ms": 0.5, "floor_ms": 0.2}
        | {"scores_on_grid": 0.25}
    )
    overhead = RowFile(tmp_path / "overhead.json", HEAD)
    for what, us in (("natten", 30.0), ("sdpa", 20.0), ("operator alone", 15.0), ("allocation of its outputs", 5.0)):
        overhead.add({"problem": "1d-128", "mode": "eager", "pass": "forward", "what": what, "us": us})
    files = report.Files(tmp_path)
    assert "| `fused_sm90` | 2.00 | 50.0 | 8.00 | 12.5 | 4.00 x | - | - | - |" in report.flex(files)
    assert "| `fused_sm90` | 2.00 | 50.0 | - | - | - | - | - | - |" in report.types(files)
    assert "| 2.00 | 0.500 | 25% | 0.200 | 10% | +25% |" in report.permutes(files)
    text = report.overhead(files)
    assert "| 1d-128 | eager | forward | 30.0 | 20.0 | 1.50 x |" in text
    assert "| 1d-128 | 30.0 | 10.0 | 5.00 | 15.0 | - | - |" in text
    summary = report.summary(files)
    assert "- Over FlexAttention, compiled: forward 4.00 to 4.00 x" in summary
    assert "in units of an SDPA call: eager 1.50 to 1.50." in summary
    assert report.provenance(files).count("`python x`") == 4


def test_pages_of_models_and_patterns(tmp_path: Path) -> None:
    report = load("make_report")
    models = RowFile(tmp_path / "models.json", HEAD)
    for kind, rate in (("natten", 300.0), ("dense", 100.0)):
        row = {"part": "throughput", "model": "video-dit", "attention": kind, "mode": "training", "batch": 1}
        models.add({**row, "ms": 1e3 / rate, "items_per_s": rate, "peak_bytes": 2**30})
    limits = RowFile(tmp_path / "limits.json", HEAD)
    limits.add(
        {"part": "limits", "limit": "video", "attention": "gemm", "shape": [64, 32, 32], "tokens": 65536}
        | {"window": [11, 11, 11], "step_s": 0.5, "peak_bytes": 2**37, "ended_by": "out of memory"}
    )
    text = report.models(report.Files(tmp_path))
    assert "| video-dit | training | natten | 1 | 3.33 | 300 | 3.00 x | 1.00 |" in text
    assert "- Training video-dit: 3.00 x dense SDPA." in report.summary(report.Files(tmp_path))
    assert "| GEMM | 64 x 32 x 32 | 65,536 | 0.500 | 128 | out of memory |" in text
    entry = {"name": "swin", "shape": [56, 56], "batch": 128, "heads": 3, "head_dim": 32}
    patterns = RowFile(tmp_path / "patterns.json", HEAD, patterns=[entry])
    patterns.add({"pattern": "swin", "pass": "forward", "what": "natten", "ms": 2.0})
    patterns.add({"pattern": "swin", "pass": "forward", "what": "partition", "ms": 5.0})
    page = report.patterns_page(report.Files(tmp_path))
    assert "| partition | 2.00 | 5.00 | 2.50 x | - | - | - |" in page
    assert page.index(report.BEGIN) < page.index("| partition |") < page.index(report.END)
