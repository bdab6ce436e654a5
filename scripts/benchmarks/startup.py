"""How long commands take to begin: `harness --help`, `harness train` up to its first step, a loader's first batch."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.bench.contest import describe_machine, spread
from harness.errors import EXIT_FAILED, HarnessError

PACKAGES = ("torch", "torchvision", "accelerate", "timm", "wandb", "ffcv", "numba")
TRAIN = ("seed", "data.source=digits", "data.image_size_px=32", "tracking.wandb=disabled")
ENOUGH = ("training.epochs=null", "training.steps=1", "tracking.log_every_steps=1", "evaluation.every_epochs=1000")


def bench_startup(*, rounds: int = 5) -> dict[str, Any]:
    """Time whole commands, in turn: help, imports alone, and the seed's network from the command to its first step.

    The training has the digits, so that no download and no 10,000 test images are measured. One round that is not
    counted fills the caches (converted data, verdicts of the numerics check, compiled kernels): the others are what a
    user has from the second run on.

    Returns:
        A dict for JSON: "contestants" (for each command its seconds as median, min and max), "first_run_seconds" of the
        uncounted round, "breakdown_seconds" of the training's way to its first step, "settings" and "machine".

    Raises:
        HarnessError: `rounds` below 1, or a command that failed.
    """
    if rounds < 1:
        raise HarnessError(f"rounds must be at least 1, it is {rounds}", hint="Use --rounds 1 or more.")
    seconds: dict[str, list[float]] = {"help": [], "import_torch": [], "train_to_first_step": []}
    breakdowns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        cache = Path(folder, "cache")
        cache.mkdir()
        for number in range(rounds + 1):
            seconds["help"].append(_timed("-m", "harness", "--help"))
            seconds["import_torch"].append(_timed("-c", "import torch"))
            run = Path(folder, f"run_{number}")
            _timed("-m", "harness", "train", *TRAIN, *ENOUGH, "--run-dir", str(run), HARNESS_CACHE=str(cache))
            breakdowns.append(json.loads((run / "result.json").read_text())["startup_seconds"])
            seconds["train_to_first_step"].append(sum(breakdowns[-1].values()))
    return {
        "contestants": {name: spread("seconds", times[1:]) for name, times in seconds.items()},
        "first_run_seconds": {name: times[0] for name, times in seconds.items()},
        "breakdown_seconds": {
            phase: statistics.median(each[phase] for each in breakdowns[1:]) for phase in breakdowns[0]
        },
        "settings": {"rounds": rounds, "train": [*TRAIN, *ENOUGH]},
        "machine": describe_machine(PACKAGES),
    }


def _timed(*arguments: str, **environment: str) -> float:
    """Seconds that Python took with these arguments."""
    start = time.perf_counter()
    found = {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **found})
    if done.returncode:
        raise HarnessError(f"{' '.join(arguments)} failed: {done.stderr.strip()[-300:]}", exit_code=EXIT_FAILED)
    return time.perf_counter() - start
