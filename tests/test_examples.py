"""The examples run and do what they say, and so does the code in the documentation."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from natten.dispatch import FAMILIES, Kernel

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch, *needs: str) -> ModuleType:
    """An example or a tool as a module; the test is skipped where a package that it needs is missing."""
    for package in needs:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Training steps this small gain nothing from threads, and lose where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_pattern_equals_its_plain_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patterns = load("patterns", monkeypatch, "rich")
    patterns.main()
    assert capsys.readouterr().out.count(" ok ") == len(patterns.PATTERNS) >= 8


def test_a_wrong_pattern_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = load("patterns", monkeypatch, "rich")

    def wrong() -> tuple[torch.Tensor, torch.Tensor]:
        ours, usual = patterns.swin()
        ours[0, 3, 5] += 1e-2
        return ours, usual

    monkeypatch.setattr(
        patterns, "PATTERNS", {"wrong": wrong, "not a number": lambda: (torch.tensor([torch.nan]),) * 2}
    )
    with pytest.raises(SystemExit, match="wrong, not a number"):
        patterns.main()


def test_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = load("pieces", monkeypatch, "rich")
    pieces.main()
    assert capsys.readouterr().out.count(" ok ") == len(pieces.EXAMPLES) == 2


def test_sharded_training_follows_the_whole() -> None:
    command = [sys.executable, str(EXAMPLES / "sharded_volume.py"), "--steps", "25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    difference = re.search(r"largest relative difference of the loss: (\S+)", done.stdout)
    assert difference is not None
    assert float(difference.group(1)) < 1e-3


@pytest.mark.usefixtures("one_thread")
def test_digits_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load("digits", monkeypatch, "sklearn", "skimage", "matplotlib", "tqdm", "rich")
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = digits.load_split(seed=0)
    assert len(train_images) + len(test_images) == 1797
    assert train_images.max() == 1
    model = digits.DigitClassifier()
    digits.train(model, train_images[:64], train_labels[:64], epochs=50)
    assert digits.accuracy(model, train_images[:64], train_labels[:64]) > 0.5  # guessing gives 0.1
    assert digits.accuracy(model, test_images, test_labels) > 0.3


@pytest.mark.usefixtures("one_thread")
def test_digits_fails_below_its_requirement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load("digits", monkeypatch, "sklearn", "skimage", "matplotlib", "tqdm", "rich")
    full = digits.load_split
    monkeypatch.setattr(digits, "load_split", lambda seed: tuple(x[:64] for x in full(seed)))
    picture = tmp_path / "windows.png"
    monkeypatch.setattr(sys, "argv", ["digits.py", "--epochs", "1", "--picture", str(picture)])
    with pytest.raises(SystemExit, match="below 97%"):
        digits.main()
    assert 10_000 < picture.stat().st_size < 400_000
    out = capsys.readouterr().out
    for layer in range(4):
        assert f"blocks.{layer}.attention" in out
    assert "forward: cpu" in out
    assert "backward: cpu" in out


def test_windows_of_the_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = load("windows", monkeypatch, "skimage", "matplotlib")
    tokens = windows.descriptors(windows.photograph())
    for flavour in windows.FLAVOURS:
        weights = windows.attention_of_query(tokens, flavour)
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        assert weights[windows.QUERY] == weights.max()
        assert (weights > 0).sum() == 225


def test_drawn_windows_are_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_windows = load("draw_windows", monkeypatch, "matplotlib")
    drawn = draw_windows.attended((16,), kernel_size=6, stride=3)
    starts = [0, 0, 0, 1, 1, 1, 4, 4, 4, 7, 7, 7, 10, 10, 10, 10]
    expected = [[start <= key < start + 6 for key in range(16)] for start in starts]
    assert drawn.tolist() == expected


def test_drawn_halos_are_what_windows_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_halos = load("draw_halos", monkeypatch, "matplotlib")
    inner, outer, halo = draw_halos.Case((24,), (3,), (1,), {"kernel_size": 6}).parts().values()
    assert inner.nonzero()[0].tolist() == [11, 12, 13]
    assert outer.nonzero()[0].tolist() == [8, 9, 10, 14, 15]
    assert halo.nonzero()[0].tolist() == [5, 6, 7, 16, 17]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/index.md",
        "docs/quickstart.md",
        "docs/switching.md",
        "docs/dispatch.md",
        "docs/distributed.md",
        "docs/patterns.md",
    ],
)
def test_code_in_the_documentation_runs(page: str) -> None:
    blocks = python_blocks(page)
    assert blocks
    namespace: dict[str, object] = {"torch": torch}
    exec("import natten\nquery, key, value = torch.randn(3, 1, 24, 24, 2, 16)", namespace)
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_table_of_kernels_is_the_dispatchers() -> None:
    """docs/dispatch.md states what `FAMILIES` states."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs/dispatch.md").read_text(), flags=re.MULTILINE)
    assert {name for name, _ in rows} == set(Kernel.__members__)
    for name, row in rows:
        family = FAMILIES[Kernel[name]]
        runs_on, dtypes, head_dims, operations = (cell.strip() for cell in row.split("|"))
        assert set(dtypes.split(", ")) == {str(dtype).removeprefix("torch.") for dtype in family.dtypes}
        multiple, most = family.head_dim_multiple, family.head_dim_maximum
        stated = f"multiples of {multiple} up to {most}" if multiple > 1 else "any"
        if family.float32_head_dim_maximum is not None:
            stated += f", float32 {family.float32_head_dim_maximum}"
        assert head_dims == stated
        assert set(operations.split(", ")) == {
            operation.value for operation in family.operations if operation.value in ("forward", "backward", "qk", "av")
        }
        assert ("CUDA" if family.device == "cuda" else "CPU") in runs_on
        capability = family.exact_capability or family.minimum_capability
        if capability is not None:
            assert f"compute capability {capability[0]}.{capability[1]}" in runs_on
            assert runs_on.endswith("and newer") == (family.exact_capability is None)
