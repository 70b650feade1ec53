"""Options and fixtures of the tests on a GPU.

    pytest tests/gpu                              every CUDA kernel that this device and library offer
    pytest tests/gpu --kernels naive              one of them
    pytest tests/gpu --kernels cpu,cpu_naive      the CPU kernels, by the same tests
    pytest tests/gpu --kernels auto               only what does not depend on the kernel

Tests that take the fixture `kernel` run once for each kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ledger import Ledger

from natten.dispatch import FAMILIES, Kernel, unavailable

AUTO = "auto"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", default=None, help="comma-separated; default: all CUDA kernels of this device")


def offered_kernels() -> list[str]:
    """Names of the CUDA kernels that this device and library offer."""
    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    return [k.name for k in Kernel if FAMILIES[k].device == "cuda" and unavailable(k, device) is None]


def chosen_kernels(config: pytest.Config) -> list[str]:
    """What `--kernels` names, or all; where there is none, tests of kernels are skipped for want of a parameter."""
    option: str | None = config.getoption("--kernels", default=None)
    return [*offered_kernels(), AUTO] if option is None else [name for name in option.split(",") if name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        names = [name for name in chosen_kernels(metafunc.config) if name != AUTO]
        metafunc.parametrize("kernel", [Kernel[name] for name in names], ids=names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kernels = chosen_kernels(config)

    def is_wanted(item: pytest.Item) -> bool:
        if "kernel" in getattr(item, "fixturenames", ()):
            return config.getoption("--kernels", default=None) != AUTO
        return AUTO in kernels

    unwanted = [item for item in items if not is_wanted(item)]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item not in unwanted]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Of the kernel under test; the current CUDA device for tests without one."""
    kernel = request.getfixturevalue("kernel") if "kernel" in request.fixturenames else None
    kind = "cuda" if kernel is None else FAMILIES[kernel].device
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for tests of what only CUDA has."""
    if device.type != "cuda":
        pytest.skip("of CUDA alone")
    return device


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Compares results with the oracle's, and reports the number of cases and the worst error."""
    result = Ledger()
    yield result
    if result.cases:
        request.node.user_properties += [
            ("cases", result.cases),
            ("worst", result.worst),
            ("worst_case", result.worst_case),
        ]
