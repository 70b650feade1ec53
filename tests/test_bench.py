"""The benchmark's arithmetic: useful work against brute force, floors, timing, tables, files and the dispatch check."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from natten import reference
from natten.bench import cli
from natten.bench.floors import (
    CEILINGS,
    Ceilings,
    Work,
    attention_work,
    floor,
    unfused_work,
    useful_pairs,
)
from natten.bench.peers import Contender, NotSupported, dense, flex, flex_order, unfold
from natten.bench.problems import PASSES, BenchProblem, load_problems, parse_problem, read_data
from natten.bench.report import Column, RowFile, circumstances, number, plain_table, write_json
from natten.bench.run import PEERS, Row, Settings, check_dense_estimate, check_dispatch, natten_contender
from natten.bench.timing import Timing, measure, summarize
from natten.bench.windows import axis_windows

CPU = torch.device("cpu")
PROBLEMS = [
    BenchProblem("dense", 2, (5, 6), 2, 8, (5, 6), (1, 1), (1, 1), (False, False)),
    BenchProblem("strided", 1, (4, 9, 7), 2, 8, (3, 4, 3), (2, 1, 3), (1, 2, 2), (False, False, False)),
    BenchProblem("causal", 3, (11, 8), 4, 16, (3, 4), (2, 3), (3, 1), (True, False), heads_kv=2, head_dim_v=24),
    BenchProblem("causal-strided", 1, (23,), 1, 8, (5,), (4,), (3,), (True,)),
]
named = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def window_of(problem: BenchProblem) -> reference.Window:
    zeros = (0,) * problem.rank
    return reference.Window(
        problem.kernel_size, problem.stride, problem.dilation, problem.causal, zeros, zeros, problem.shape
    )


def brute_force_pairs(problem: BenchProblem) -> int:
    """Members of the oracle's masks, counted over the whole grid."""
    window = window_of(problem)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis, extent in enumerate(problem.shape):
        mask = torch.kron(mask, window.members(axis, extent, extent))
    return int(mask.sum()) * problem.batch * problem.heads


@named
def test_useful_pairs_are_those_of_the_oracle(problem: BenchProblem) -> None:
    assert useful_pairs(problem) == brute_force_pairs(problem)


@named
def test_work_of_the_passes(problem: BenchProblem) -> None:
    pairs = brute_force_pairs(problem)
    forward, backward = (attention_work(problem, pass_, "float16") for pass_ in ("forward", "backward"))
    assert forward.flops == pairs * 2 * (problem.head_dim + problem.value_dim)
    if problem.value_dim == problem.head_dim:
        assert backward.flops == 2.5 * forward.flops
    query = torch.empty(problem.batch, *problem.shape, problem.heads, problem.head_dim)
    key = torch.empty(problem.batch, *problem.shape, problem.key_heads, problem.head_dim)
    value = torch.empty(problem.batch, *problem.shape, problem.key_heads, problem.value_dim)
    out = torch.empty(problem.batch, *problem.shape, problem.heads, problem.value_dim)
    once = 2 * sum(tensor.numel() for tensor in (query, key, value, out))
    assert forward.bytes == once
    assert backward.bytes == 2 * once  # q, k, v, out, grad_out read; grad_q, grad_k, grad_v written


@named
def test_work_of_the_unfused_operators(problem: BenchProblem) -> None:
    tokens = problem.batch * math.prod(problem.shape)
    slots = math.prod(problem.kernel_size)
    weights = tokens * problem.heads * slots
    for operator, channels in (("qk", problem.head_dim), ("av", problem.value_dim), ("inverse_av", problem.value_dim)):
        work = unfused_work(problem, operator, "float32")
        assert work.flops == 2 * brute_force_pairs(problem) * channels
        assert work.bytes == 4 * (weights + tokens * (problem.heads + problem.key_heads) * channels)


def test_floor_is_the_longer_of_bytes_and_products() -> None:
    ceilings = Ceilings(bandwidth_tbps=2.0, tflops={"float16": 100.0, "tf32": 50.0, "float32": 10.0})
    bound = floor(Work(flops=1e12, bytes=4e9), "float16", ceilings)
    assert bound is not None
    assert (bound.flops_ms, bound.bytes_ms) == (10.0, 2.0)
    assert bound.ms == 10.0
    exact, fast = (floor(Work(1e12, 0.0), "float32", ceilings, allow_tf32=tf32) for tf32 in (False, True))
    assert exact is not None
    assert fast is not None
    assert (exact.ms, fast.ms) == (100.0, 20.0)
    assert floor(Work(1.0, 1.0), "float64", ceilings) is None


def test_shipped_problems_agree_with_the_figures_recorded_with_them() -> None:
    problems = {problem.name: problem for problem in load_problems().problems}
    for name, gigaflop, floor_ms in (
        ("hunyuan-na", 14676.71, 0.6741),
        ("flux-gna", 5153.96, 0.3835),
        ("1d-32k-causal-w4k", 1030.81, 0.1278),
        ("nat-s1", 5.04, 0.0489),
        ("cosmos-dil", 472.45, 0.2197),
    ):
        work = attention_work(problems[name], "forward", "bfloat16")
        bound = floor(work, "bfloat16", CEILINGS["NVIDIA H200"])
        assert bound is not None
        assert work.flops * 1e-9 == pytest.approx(gigaflop, rel=2e-3)
        assert bound.bytes_ms == pytest.approx(floor_ms, rel=2e-3)


def test_problem_files_are_checked() -> None:
    entry = read_data("problems_h200.json")["problems"][0]
    with pytest.raises(ValueError, match="stride has 1 axes, shape has 3"):
        parse_problem({**entry, "stride": [1]})
    with pytest.raises(ValueError, match="no problem named nonsense"):
        load_problems(names=["nonsense"])
    assert [problem.name for problem in load_problems(names=["nat-s3", "flux-na"]).problems] == ["nat-s3", "flux-na"]


@named
def test_window_tables_list_the_oracles_keys(problem: BenchProblem) -> None:
    window = window_of(problem)
    for axis, extent in enumerate(problem.shape):
        tables = axis_windows(problem, axis, CPU)
        found = torch.zeros(extent, extent, dtype=torch.bool)
        found.scatter_(1, tables.keys, True)  # empty slots repeat a key of the window
        assert torch.equal(found, window.members(axis, extent, extent))
        assert torch.equal(tables.valid.sum(1), found.sum(1))


def expected_output(problem: BenchProblem, contender: Contender) -> torch.Tensor:
    tensors = (contender.query, contender.key, contender.value)
    return reference.attention(*(tensor.double() for tensor in tensors), window_of(problem))[0]


@named
def test_unfold_computes_the_same_attention(problem: BenchProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    contender = unfold(problem, torch.float64, CPU)
    out = contender.attention(contender.query, contender.key, contender.value)
    torch.testing.assert_close(out, expected_output(problem, contender))


@named
def test_dispatched_attention_computes_the_same(problem: BenchProblem) -> None:
    contender = natten_contender(problem, "auto", torch.float64, CPU)
    out = contender.attention(contender.query, contender.key, contender.value)
    torch.testing.assert_close(out, expected_output(problem, contender))


@named
def test_flex_computes_the_same_attention_in_its_own_order(
    problem: BenchProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    contender = flex(problem, torch.float32, CPU)
    order = flex_order(problem)
    assert torch.equal(order.sort().values, torch.arange(problem.tokens))

    def raster(tensor: torch.Tensor) -> torch.Tensor:
        """[B, H, tokens in FlexAttention's order, D] as [B, X, Y, H, D]."""
        ordered = torch.empty_like(tensor)
        ordered[:, :, order] = tensor
        return ordered.transpose(1, 2).unflatten(1, problem.shape)

    out = contender.attention(contender.query, contender.key, contender.value)
    tensors = [raster(tensor).double() for tensor in (contender.query, contender.key, contender.value)]
    expected = reference.attention(*tensors, window_of(problem))[0]
    torch.testing.assert_close(raster(out).double(), expected, atol=1e-5, rtol=1e-5)


def test_dense_is_the_whole_attention() -> None:
    problem = PROBLEMS[0]
    contender = dense(problem, torch.float64, CPU, backend=SDPBackend.MATH)
    out = contender.attention(contender.query, contender.key, contender.value)
    weights = (contender.query @ contender.key.mT * problem.head_dim**-0.5).softmax(-1)
    torch.testing.assert_close(out, weights @ contender.value)


def test_summary_is_the_median_with_its_spread() -> None:
    assert summarize([5.0, 1.0, 2.0, 4.0, 3.0, 100.0]) == Timing(3.5, 2.0, 5.0, 6)
    assert summarize([7.0]) == Timing(7.0, 7.0, 7.0, 1)


def test_measuring_repeats_within_the_budget() -> None:
    calls = []
    timing = measure(lambda: calls.append(None), CPU, budget_ms=5.0)
    assert timing.repeats >= 3
    assert len(calls) == timing.repeats + 1  # one to warm up
    assert 0 <= timing.low_ms <= timing.ms <= timing.high_ms


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.0"), (0.012345, "0.0123"), (1.0, "1.00"), (123.4, "123"), (98765.0, "98765")],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_plain_table_is_aligned() -> None:
    text = plain_table([Column("name", right=False), Column("ms")], [["a", "1.5"], ["longer", "100.25"]])
    assert text.splitlines() == ["name        ms", "------  ------", "a          1.5", "longer  100.25"]
    with pytest.raises(ValueError, match="row of 1 cells in a table of 2 columns"):
        plain_table([Column("a"), Column("b")], [["only"]])


def row(kernel: str, ms: float, chosen: str | None = None, pass_: str = "forward") -> Row:
    return Row("p", kernel, pass_, "float16", Timing(ms, ms, ms, 3), 1.0, 0.5, None, {}, chosen)


def test_dispatch_check_finds_the_loss() -> None:
    rows = [row("auto", 1.2, "fused_sm80"), row("fused_sm80", 1.2), row("naive", 1.0), row("gemm", 1.1)]
    (found,) = check_dispatch(rows)
    assert (found.chosen, found.better, found.better_ms) == ("fused_sm80", "naive", 1.0)


def test_dispatch_check_passes_within_five_percent_and_within_noise() -> None:
    assert check_dispatch([row("auto", 1.04, "fused_sm80"), row("naive", 1.0)]) == []
    # The chosen kernel itself, measured by name, was no slower: the difference is noise.
    assert check_dispatch([row("auto", 1.5, "naive"), row("naive", 1.0), row("gemm", 1.0)]) == []
    # Passes are judged apart.
    assert check_dispatch([row("auto", 2.0, "fused_sm80"), row("naive", 1.0, pass_="backward")]) == []


def test_file_of_measurements_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.json"
    write_json(path, circumstances(CPU, ["a", "b c"], commit="abc"), [{"ms": 1.5}, {"ms": 2.0}], extra=[1])
    data = json.loads(path.read_text())
    assert set(data) == {"device", "driver", "versions", "commit", "command", "date", "extra", "rows"}
    assert data["command"] == "a 'b c'"
    assert data["commit"] == "abc"
    assert data["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"])
    assert data["rows"] == [{"ms": 1.5}, {"ms": 2.0}]


SMALL_LIST: dict[str, Any] = {
    "device": "elsewhere",
    "problems": [
        {
            "name": "small",
            "batch": 1,
            "shape": [6, 6],
            "heads": 1,
            "head_dim": 8,
            "kernel_size": [3, 3],
            "stride": [1, 1],
            "dilation": [1, 2],
            "causal": [False, True],
            "dtype": "float32",
            "peers_ms": {"other": [1.0, 2.0]},
            "target_ms": [1.0, 2.0],
        }
    ],
}
ROW_KEYS = {
    "problem",
    "kernel",
    "pass",
    "dtype",
    "ms",
    "spread_ms",
    "repeats",
    "useful_tflops",
    "floor_share",
    "target_ms",
    "chosen",
    "peers",
}


@pytest.fixture
def small_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(SMALL_LIST))
    monkeypatch.setattr(cli, "measure_ceilings", lambda device: Ceilings(0.02, {"float32": 0.1}))
    return ["--list", str(path), "--device", "cpu", "--budget-ms", "1"]


def test_command_measures_kernels_and_passes(
    small_list: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    assert cli.main([*small_list, "--kernels", "cpu_naive,auto,naive", "--json", str(output)]) == 0
    data = json.loads(output.read_text())
    assert [(r["kernel"], r["pass"]) for r in data["rows"]] == [
        (kernel, pass_) for pass_ in ("forward", "backward") for kernel in ("cpu_naive", "auto")
    ]
    for r in data["rows"]:
        assert set(r) == ROW_KEYS
        assert r["ms"] > 0
        assert r["peers"] == {}  # recorded on another device
        assert r["target_ms"] is None
        assert (r["chosen"] is None) == (r["kernel"] != "auto")
        work = attention_work(parse_problem(SMALL_LIST["problems"][0]), r["pass"], "float32")
        assert r["useful_tflops"] == pytest.approx(work.flops / r["ms"] * 1e-9, abs=1e-3)
    assert data["skipped"][0]["reason"] == "kernel naive cannot run forward here: it runs on cuda, not on cpu"
    shown = capsys.readouterr().out
    assert "TFLOP/s" in shown
    assert "it runs on cuda, not on cpu" in shown


def test_command_measures_unfused_operators(small_list: list[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    assert cli.main([*small_list, "--kernels", "cpu_naive", "--unfused", "--json", str(output)]) == 0
    assert [r["pass"] for r in json.loads(output.read_text())["rows"]] == ["qk", "av", "inverse_av"]


def test_command_fails_where_the_dispatcher_errs(small_list: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "check_dispatch", lambda rows: [])
    assert cli.main([*small_list, "--check-dispatch", "--passes", "forward"]) == 0
    loss = check_dispatch([row("auto", 2.0, "cpu"), row("cpu_naive", 1.0)])
    monkeypatch.setattr(cli, "check_dispatch", lambda rows: loss)
    assert cli.main([*small_list, "--check-dispatch", "--passes", "forward"]) == 1


def test_command_checks_nothing_where_nothing_was_measured(
    small_list: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*small_list, "--check-dispatch", "--seconds", "-1"]) == 1
    shown = capsys.readouterr().out
    assert "nothing was measured" in shown
    assert "no measured kernel beats" not in shown


def test_command_names_what_it_had_no_time_for(small_list: list[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    assert cli.main([*small_list, "--seconds", "-1", "--json", str(output)]) == 1
    data = json.loads(output.read_text())
    assert data["rows"] == []
    assert [(s["pass"], s["reason"]) for s in data["skipped"]] == [
        ("forward", "out of time"),
        ("backward", "out of time"),
    ]


@pytest.mark.parametrize("option", [["--kernels", "fast"], ["--passes", "sideways"], ["--dtypes", "int8"]])
def test_command_rejects_unknown_names(small_list: list[str], option: list[str]) -> None:
    with pytest.raises(SystemExit, match="not among"):
        cli.main([*small_list, *option])


def test_every_peer_has_a_name_for_the_recorded_columns() -> None:
    assert {"dense_cudnn", "dense_flash2"} <= set(PEERS) & set(read_data("problems_h200.json")["peers"])


@pytest.fixture(scope="module")
def rungs() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "tools" / "rungs.py"
    spec = importlib.util.spec_from_file_location("rungs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rungs"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_every_problem_of_the_grid_is_legal(rungs: ModuleType) -> None:
    problems = rungs.grid()
    assert len({(problem.name, problem.dtype) for problem in problems}) == len(problems)
    for problem in problems:
        assert useful_pairs(problem) == problem.batch * problem.heads * problem.tokens * math.prod(problem.kernel_size)
    assert {problem.rank for problem in problems} == {1, 2, 3}
    assert any(max(problem.dilation) > 1 for problem in problems)


def test_a_sampled_grid_covers_every_rank_and_type_from_the_start(rungs: ModuleType) -> None:
    order = rungs.evenly_sampled(rungs.grid(), seed=1)
    assert sorted(p.name + p.dtype for p in order) == sorted(p.name + p.dtype for p in rungs.grid())
    for turn in (0, 1, 2):
        strata = {(p.rank, p.dtype) for p in order[6 * turn : 6 * turn + 6]}
        assert len(strata) == 6


def test_improvements_are_averaged_over_what_both_rungs_ran(rungs: ModuleType) -> None:
    first, second = rungs.grid()[:2]

    def rung(problem: BenchProblem, name: str, forward: float, backward: float | None) -> Any:
        ms = {"forward": forward} | ({} if backward is None else {"backward": backward})
        return rungs.Measurement(problem, name, (name,), ms, dict.fromkeys(ms, 0.5))

    rows = rungs.averages(
        [
            rung(first, "naive", 10.0, 20.0),
            rung(first, "fused", 2.0, 4.0),
            rung(second, "naive", 6.0, 6.0),
            rung(second, "fused", 3.0, None),
        ]
    )
    fused = {row.passes: row for row in rows if row.rung == "fused"}
    assert fused["forward"].improvement == pytest.approx((4.0 + 1.0) / 2)
    assert fused["forward"].problems == 2
    assert fused["forward + backward"].improvement == pytest.approx(4.0)
    assert fused["forward + backward"].problems == 1
    assert fused["forward"].floor_share == pytest.approx(0.5)
    assert fused["forward"].published == 17.59


def test_floor_of_the_composite_moves_the_weights_between_its_operations(rungs: ModuleType) -> None:
    problem = dataclasses.replace(rungs.grid()[0], dtype="float16")
    ceilings = Ceilings(bandwidth_tbps=1.0, tflops={"float16": 1e9})  # bytes alone
    weights = 2 * problem.batch * problem.tokens * problem.heads * problem.kernel_size[0]
    tensor = 2 * problem.batch * problem.tokens * problem.heads * problem.head_dim
    forward = rungs.rung_floor_ms(problem, "gemm", "forward", ceilings)
    assert forward == pytest.approx((4 * weights + 4 * tensor) * 1e-9)  # qk, softmax reads and writes, av
    backward = rungs.rung_floor_ms(problem, "gemm", "backward", ceilings)
    assert backward == pytest.approx((7 * weights + 8 * tensor) * 1e-9)  # four operators, softmax's three
    assert rungs.rung_floor_ms(problem, "fused", "forward", ceilings) == pytest.approx(4 * tensor * 1e-9)


def test_a_file_of_rows_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    file = RowFile(path, {"device": "here"}, unit="ms")
    assert json.loads(path.read_text()) == {"device": "here", "unit": "ms", "skipped": [], "rows": []}
    file.add({"ms": 1.5})
    file.skip(problem="large", reason="out of memory")
    data = json.loads(path.read_text())
    assert data["rows"] == [{"ms": 1.5}]
    assert data["skipped"] == [{"problem": "large", "reason": "out of memory"}]
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]  # nothing unfinished is left
    RowFile(None, {}).add({"ms": 1.0})  # no path: nothing is written


def test_dense_attention_too_long_for_the_limit_is_not_begun() -> None:
    problem = dataclasses.replace(PROBLEMS[0], shape=(1000,), kernel_size=(3,), causal=(False,), dtype="float16")
    settings = Settings(CPU, Ceilings(1.0, {"float16": 2e-3}), ("cpu",), PASSES, (), limit_ms=66.0)
    # 2 x 2 x 1000^2 pairs, 32 operations each, at half the rate: 128 ms forward
    with pytest.raises(NotSupported, match="estimated at 128 ms"):
        check_dense_estimate(problem, "forward", "float16", settings)
    causal = dataclasses.replace(problem, causal=(True,))
    check_dense_estimate(causal, "forward", "float16", settings)
    with pytest.raises(NotSupported, match="160 ms"):
        check_dense_estimate(causal, "backward", "float16", settings)
    check_dense_estimate(problem, "forward", "float32", settings)  # no rate, no estimate
