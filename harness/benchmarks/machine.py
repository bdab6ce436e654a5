"""What a benchmark ran on: without it a figure means nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from harness.machine import cpu_name


def describe_machine(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Processor, CPUs that this process may use, GPU where the device is one, and versions (None: not installed)."""
    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
