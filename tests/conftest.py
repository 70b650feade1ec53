"""Settings of every test."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples are drawn from a fixed seed, so a failure in continuous integration repeats anywhere;
# `HYPOTHESIS_PROFILE=search` draws new and more ones.
_slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=100, suppress_health_check=_slow, database=None, print_blob=True
)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=_slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# What was tuned on this machine must not decide what tests run.
_tuned = tempfile.TemporaryDirectory(prefix="natten-tests-")
os.environ["NATTEN_CACHE_DIR"] = _tuned.name


# Parallel workers share the cores: as many threads each as there are cores for it.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max((os.cpu_count() or 1) // _workers, 1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
