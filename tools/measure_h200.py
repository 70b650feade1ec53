"""Makes every file of measurements in docs/performance/h200 again, part by part, each within a bounded time.

    python tools/measure_h200.py list
    python tools/measure_h200.py attention --seconds 100 --lane 1/4     one of four GPUs' shares
    python tools/measure_h200.py merge attention                        the shares of all lanes into attention.json
    python tools/measure_h200.py overhead profile                       several parts, one after the other
    python tools/make_report.py                                         the pages, from the files

A part is one command of the benchmark, the profiler or a tool; it writes FOLDER/PART.json row by row, and is ended at
`--seconds`, so that what was measured until then is kept. A lane measures its share of the part's problems and writes
FOLDER/PART.I-of-N.json. Lanes need nothing from each other: give each a GPU with CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natten.bench.report import write_json

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 8.0  # to end what has begun, before it is ended


@dataclass(frozen=True)
class Part:
    """A command; `option` takes the names that lanes share out ("": they are positional; None: it is not divided)."""

    command: tuple[str, ...]
    about: str
    names: str = ""  # separated by spaces: the longest first, or where time may not do for all, what matters most
    option: str | None = None
    output: tuple[str, ...] = ("--json", "{folder}/{name}.json")

    def lane(self, index: int, count: int) -> tuple[str, ...]:
        """The names of a lane's share: neighbours in `names`, which are alike, go to different lanes."""
        return tuple(self.names.split()[index - 1 :: count])


_BENCH = ("-m", "natten", "bench")
_EVERY = "auto,fused_sm90,fused_sm80,gemm,naive"
_FLOAT32 = (*_BENCH, "--dtypes", "float32", "--kernels", "auto,naive,gemm,fused_sm80", "--no-dense")
_FLOAT32_PROBLEMS = "1d-32k-w2k 3d-swin hdit-64 2d-k13-d64 nat-s1 dinat-s1"

PARTS: dict[str, Part] = {
    "attention": Part(
        (*_BENCH, "--kernels", _EVERY, "--budget-ms", "40", "--limit-ms", "1100"),
        "every problem of the list, both passes, every kernel; dense attention by cuDNN and FlashAttention-2",
        "hunyuan-na hunyuan-gna ltx-s5 wan-na flux-na flux-gna cosmos-str 1d-32k-causal-w4k cosmos-dil 1d-32k-w2k "
        "1d-32k-w2k-s2k 1d-16k-dil4 3d-swin hdit-64 2d-k13-d64 ltx-s1 nat-s1 dinat-s1 nat-s3",
        "--problems",
    ),
    "sparsity": Part(
        (*_BENCH, "--list", "sparsity.json", "--budget-ms", "25"),
        "windows from all to few of 16,384 tokens, stride 1 and block-sparse, beside dense attention",
    ),
    "types": Part(
        (*_BENCH, "--kernels", "auto", "--dtypes", "float16,bfloat16,float32", "--no-dense", "--budget-ms", "25"),
        "float16, bfloat16 and float32 (TF32 not allowed)",
        "flux-na wan-na 2d-k13-d64 hdit-64 3d-swin nat-s1 1d-32k-w2k 1d-16k-dil4",
        "--problems",
    ),
    "flex": Part(
        (*_BENCH, "--kernels", "auto", "--no-dense", "--flex", "--unfold", "--budget-ms", "30"),
        "FlexAttention and gathered windows, both compiled",
        "nat-s1 2d-k13-d64 flux-na 1d-16k-dil4 hdit-64 3d-swin wan-na",
        "--problems",
    ),
    "float32": Part(
        (*_FLOAT32, "--budget-ms", "20"),
        "every kernel in float32, TF32 not allowed",
        _FLOAT32_PROBLEMS,
        "--problems",
    ),
    "float32-tf32": Part(
        (*_FLOAT32, "--tf32", "--budget-ms", "20"),
        "every kernel in float32, TF32 allowed",
        _FLOAT32_PROBLEMS,
        "--problems",
    ),
    "profile": Part(
        ("-m", "natten", "profile", "--counters", "--budget-ms", "20"),
        "the rungs' work, bytes and hardware counters",
        "2d-k13-d64 nat-s1 1d-16k-dil4 3d-swin hdit-64",
        "",
    ),
    "overhead": Part(("tools/bench_overhead.py",), "what a call costs"),
    "models": Part(
        ("tools/bench_models.py", "--parts", "throughput", "--budget-ms", "400"),
        "throughput and memory of models",
        "video-dit dinat-base dinat-tiny",
        "--models",
    ),
    "limits": Part(
        ("tools/bench_models.py", "--parts", "limits"),
        "the largest inputs that fit",
        "naive natten gemm dense",
        "--attentions",
    ),
    "patterns": Part(
        ("tools/bench_patterns.py",),
        "known patterns against their usual implementations",
        "language-model sliding-tile strided causal-video dinat swin maxvit-grid halonet",
        "--patterns",
    ),
    "permutes": Part(
        ("tools/bench_permutes.py",),
        "what reading boxes in place saves",
        "hunyuan-na ltx-s5 flux-na wan-na cosmos-dil 2d-k13-d64 hdit-64 nat-s1 dinat-s1",
        "--problems",
    ),
    "rungs": Part(
        ("tools/rungs.py", "--budget-ms", "12"),
        "average improvements of the three rungs over a grid",
        output=("--output", "{folder}/{name}"),
    ),
}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def run(
    name: str, lane: tuple[int, int] | None, seconds: float, folder: Path, commit: str | None, further: Sequence[str]
) -> bool:
    """Runs a part, or a lane's share of it; whether it left rows. `further` arguments go to the part's command."""
    part = PARTS[name]
    stem = name
    names = part.lane(1, 1)
    if lane is not None:
        if part.option is None:
            raise SystemExit(f"part {name} is not divided into lanes")
        stem = f"{name}.{lane[0]}-of-{lane[1]}"
        names = part.lane(*lane)
        if not names:
            print(f"{stem}: nothing to do")
            return True
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder  # the command stands in the file
    arguments = [text.format(folder=shown, name=stem) for text in (*part.command, *part.output)]
    if part.option is not None:
        arguments[len(arguments) :] = names if part.option == "" else (part.option, ",".join(names))
    arguments += ["--seconds", f"{max(seconds - GRACE_S, 1.0):g}", *(["--commit", commit] if commit else []), *further]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stem}.json"
    start = time.monotonic()
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status: int | str = process.wait(seconds)
    except subprocess.TimeoutExpired:
        end_group(process)
        status = "ended at its time limit"
    except BaseException:
        end_group(process)
        raise
    rows, skipped = 0, 0
    if file.exists() and file.stat().st_mtime >= time.time() - (time.monotonic() - start) - 1:
        data = json.loads(file.read_text())
        rows, skipped = len(data["rows"]), len(data.get("skipped", []))
    took = time.monotonic() - start
    print(f"{stem}: {rows} rows, {skipped} not measured, {took:.0f} s, status {status}", flush=True)
    return rows > 0


def merged(files: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """One file of several lanes': same device, versions and commit; rows and other lists one after the other."""
    result = dict(files[0])
    for other in files[1:]:
        for key in ("device", "driver", "versions", "commit"):
            if other.get(key) != result.get(key):
                raise SystemExit(f"{name}: lanes differ in {key}: {result.get(key)} and {other.get(key)}")
        for key, value in other.items():
            if isinstance(value, list) and value != result.get(key):
                result[key] = [*result.get(key, []), *value]
    result["command"] = f"python tools/measure_h200.py {name}"
    result["commands"] = [file["command"] for file in files]
    return result


def merge(name: str, folder: Path) -> None:
    """The lanes' files of a part into one, which replaces them."""
    paths = sorted(folder.glob(f"{name}.*-of-*.json"), key=lambda path: int(path.name.split(".")[-2].split("-")[0]))
    if not paths:
        raise SystemExit(f"{folder} holds no lanes of {name}")
    counts = {path.name.split("-of-")[1] for path in paths}
    if len(counts) > 1:
        raise SystemExit(f"{folder} holds lanes of several divisions: {', '.join(path.name for path in paths)}")
    result = merged([json.loads(path.read_text()) for path in paths], name)
    rows = result.pop("rows")
    write_json(folder / f"{name}.json", result, rows)
    for path in paths:
        path.unlink()
    print(f"{name}.json: {len(rows)} rows of {len(paths)} lanes")


def _lane(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected for example 1/4; got {text!r}")
    return int(index), int(count)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="parts; or list; or merge and parts")
    parser.add_argument("--lane", type=_lane, help="I/N: only this share of the part's problems")
    parser.add_argument("--seconds", type=float, default=100.0, help="for each part; it is ended then")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance" / "h200", help="folder")
    parser.add_argument("--commit", help="revision to name, where the code runs outside its repository")
    arguments, further = parser.parse_known_args(argv)
    if arguments.what == ["list"]:
        for name, part in PARTS.items():
            lanes = f" (lanes: {len(part.lane(1, 1))} names)" if part.option is not None else ""
            print(f"{name:10} {part.about}{lanes}")
        return 0
    merging = arguments.what[0] == "merge"
    names = arguments.what[1:] if merging else arguments.what
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise SystemExit(f"no part named {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    folder = arguments.output.resolve()
    if merging:
        for name in names:
            merge(name, folder)
        return 0
    done = [run(name, arguments.lane, arguments.seconds, folder, arguments.commit, further) for name in arguments.what]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
