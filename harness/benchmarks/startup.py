"""How long commands take to begin: `harness --help`, and `harness train` up to its first step."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.benchmarks.machine import describe_machine
from harness.errors import HarnessError

PACKAGES = ("torch", "torchvision", "accelerate", "timm", "wandb", "ffcv", "numba")
TRAIN = ("recipes/seed.yaml", "data.source=digits", "data.image_size_px=32", "tracking.wandb=disabled")
ENOUGH = ("training.epochs=null", "training.steps=1", "tracking.log_every_steps=1", "evaluation.every_epochs=1000")


def bench_startup(*, rounds: int = 5) -> dict[str, Any]:
    """Time whole commands, in turn: help, imports alone, and the seed's network from the command to its first step.

    The training has the digits, so that no download and no 10,000 test images are measured. One round that is not
    counted fills the caches (converted data, verdicts of the numerics check, compiled kernels): "warm" is what a user
    has from the second run on.

    Returns:
        A dict for JSON: "seconds" (for each command median, min and max), "first_run_seconds" of the uncounted round,
        "breakdown_seconds" of the training's way to its first step, "settings" and "machine".

    Raises:
        HarnessError: `rounds` below 1, no recipe here, or a command that failed.
    """
    if rounds < 1:
        raise HarnessError(f"rounds must be at least 1, it is {rounds}", hint="Use --rounds 1 or more.")
    if not Path(TRAIN[0]).exists():
        raise HarnessError("the benchmark's recipe is not here", where=TRAIN[0], hint="Run it in a checkout.")
    seconds: dict[str, list[float]] = {"help": [], "import_torch": [], "train_to_first_step": []}
    breakdowns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        for number in range(rounds + 1):
            seconds["help"].append(_timed([sys.executable, "-m", "harness", "--help"]))
            seconds["import_torch"].append(_timed([sys.executable, "-c", "import torch"]))
            breakdowns.append(_train(Path(folder, f"run_{number}"), Path(folder, "cache")))
            seconds["train_to_first_step"].append(sum(breakdowns[-1].values()))
    return {
        "seconds": {
            name: {"median": statistics.median(times[1:]), "min": min(times[1:]), "max": max(times[1:])}
            for name, times in seconds.items()
        },
        "first_run_seconds": {name: times[0] for name, times in seconds.items()},
        "breakdown_seconds": {
            phase: statistics.median(each[phase] for each in breakdowns[1:]) for phase in breakdowns[0]
        },
        "settings": {"rounds": rounds, "train": [*TRAIN, *ENOUGH]},
        "machine": describe_machine(torch.device("cpu"), PACKAGES),
    }


def _timed(command: list[str], environment: Mapping[str, str] | None = None) -> float:
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if result.returncode:
        raise HarnessError(f"{' '.join(command)} failed: {result.stderr.strip()[-300:]}", exit_code=1)
    return time.perf_counter() - start


def _train(run_directory: Path, cache: Path) -> dict[str, float]:
    """Seconds of each phase of the way to the first step, as the run itself tells."""
    cache.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "harness", "train", *TRAIN, *ENOUGH, "--run-dir", str(run_directory)]
    _timed(command, {"HARNESS_CACHE": str(cache)})
    found: dict[str, float] = json.loads((run_directory / "result.json").read_text())["startup_seconds"]
    return found
