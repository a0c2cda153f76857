"""What a benchmark ran on: processor, threads and versions, for the head of its table."""

from __future__ import annotations

import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch


def describe(*packages: str) -> str:
    """One line: CPU model, torch threads, versions of Python, torch and ``packages``."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return f"{_cpu_model()}, {torch.get_num_threads()} threads; {', '.join(versions)}"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


class PeakMemory:
    """Peak resident memory above what the process held when the meter was made, in bytes."""

    def __init__(self) -> None:
        self.baseline = psutil.Process().memory_info().rss

    def above_baseline(self) -> int:
        """So far."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - self.baseline
