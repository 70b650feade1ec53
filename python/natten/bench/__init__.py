"""The benchmark behind ``python -m natten bench``."""

from natten.bench.cli import main

__all__ = ["main"]
