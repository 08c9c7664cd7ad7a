"""The machine that a worker is on: what it is, and how busy the worker keeps it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from momentum_tuner.tickets import LoadSample

_PACKAGES = ("momentum-tuner", "torch", "optuna", "numpy", "sqlalchemy")
_MEGABYTE = 1e6


def describe_machine(device: str) -> dict[str, Any]:
    """Versions and hardware that a worker's numbers depend on, as plain JSON values.

    Args:
        device: what it trains on, such as `cpu` or `cuda:1`.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count() or 1,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder of sources
        return "not installed"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class LoadMeter:
    """Says how busy this process has been since it last said so.

    Args:
        device: what it trains on.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # begins to count

    def __call__(self) -> LoadSample:
        """How busy it was."""
        gpu = None
        if self._device.startswith("cuda"):
            gpu = torch.cuda.memory_reserved(self._device) / _MEGABYTE
        return LoadSample(self._process.cpu_percent(), self._process.memory_info().rss / _MEGABYTE, gpu)
