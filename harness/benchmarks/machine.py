"""What a benchmark runs on: the machine, without which a figure means nothing, and real ranks on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from harness.errors import EXIT_FAILED, HarnessError
from harness.launching.trial import run_trial
from harness.machine import cpu_name

RANKS_LIMIT_SECONDS = 1800.0


def describe_machine(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Processor, CPUs that this process may use, GPU where the device is one, and versions (None: not installed)."""
    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {name: _version(name) for name in packages},
    }


def measured_by_ranks(what: str, module: str, arguments: Sequence[str], *, ranks: int) -> Any:
    """What the ranks of a measurement answered, see `harness.launching.trial.run_trial`.

    Raises:
        HarnessError: a rank met one and answered with it; code 1 where a process died or took too long.
    """
    try:
        return run_trial(module, arguments, ranks=ranks, limit_seconds=RANKS_LIMIT_SECONDS)
    except subprocess.SubprocessError as error:
        raise HarnessError(
            f"{what} could not be measured ({error})",
            hint="Try again when the machine has less to do, or with fewer --ranks.",
            exit_code=EXIT_FAILED,
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
