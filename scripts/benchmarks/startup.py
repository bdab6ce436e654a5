"""How long commands take to begin: `harness --help`, and `harness train` up to its first step."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness.bench import describe_machine, spread
from harness.errors import EXIT_FAILED, HarnessError
from harness.machine import seconds_of

TRAIN = ("seed", "data.source=digits", "data.image_size_px=32", "tracking.wandb=disabled", "training.epochs=null",
         "training.steps=1", "tracking.log_every_steps=1", "evaluation.every_epochs=1000")  # fmt: skip


def bench_startup(*, rounds: int = 5) -> dict[str, Any]:
    """Time whole commands, in turn: help, imports alone, and the seed's network from the command to its first step.

    The training has the digits, so that no download and no 10,000 test images are measured. One round that is not
    counted ("first_run_seconds") fills the caches (converted data, verdicts of the numerics check, compiled kernels):
    the others are what a user has from the second run on. "breakdown_seconds" is the training's way to its first step.

    Raises:
        HarnessError: a command failed.
    """
    seconds: dict[str, list[float]] = {"help": [], "import_torch": [], "train_to_first_step": []}
    breakdowns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        cache = tempfile.mkdtemp(dir=folder)
        for number in range(rounds + 1):
            seconds["help"].append(_seconds("-m", "harness", "--help"))
            seconds["import_torch"].append(_seconds("-c", "import torch"))
            run = Path(folder, f"run_{number}")
            _seconds("-m", "harness", "train", *TRAIN, "--run-dir", str(run), HARNESS_CACHE=cache)
            breakdowns.append(json.loads((run / "result.json").read_text())["startup_seconds"])
            seconds["train_to_first_step"].append(sum(breakdowns[-1].values()))
    return {
        "contestants": {name: spread("seconds", times[1:]) for name, times in seconds.items()},
        "first_run_seconds": {name: times[0] for name, times in seconds.items()},
        "breakdown_seconds": {name: statistics.median(each[name] for each in breakdowns[1:]) for name in breakdowns[0]},
        "settings": {"rounds": rounds, "train": TRAIN},
        "machine": describe_machine(),
    }


def _seconds(*arguments: str, **environment: str) -> float:
    """Of Python with these arguments."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, *arguments]
    try:
        return seconds_of(lambda: subprocess.run(command, check=True, capture_output=True, text=True, env=variables))
    except subprocess.CalledProcessError as error:
        what = f"{' '.join(arguments)} failed: {error.stderr.strip()[-300:]}"
        raise HarnessError(what, hint="Try it by itself.", exit_code=EXIT_FAILED) from error
