"""The profiler behind ``python -m natten profile``."""

from natten.profile.cli import main

__all__ = ["main"]
