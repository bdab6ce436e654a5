"""Where runs are kept, and when a run directory may be taken. Imports nothing heavy."""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path

RUNS = Path("runs")
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
RUN_FILES = ("recipe.yaml", "provenance.json")
EXIT_CODE = "exit_code"  # how the training ended, as whoever started it wrote it down
JOB = "slurm"  # what the scheduler's job keeps there: its script, its recipe, what it prints


def runs_of(recipe_name: str) -> Path:
    """The folder of a recipe's runs, below the working directory."""
    return RUNS / recipe_name


def new_run_directory(recipe_name: str) -> Path:
    """`runs/<recipe>/<run-id>`: sortable, and unique among runs started in the same second. Nothing is made on disk."""
    return runs_of(recipe_name) / (datetime.datetime.now().strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2))


def is_unused(path: Path) -> bool:
    """Whether no training has begun in a directory: it is not there, or holds only a lock, what those who started a
    training keep there and what a process that died left half written."""
    return not path.exists() or all(
        entry.name in (LOCK, JOB, EXIT_CODE) or _is_half_written(entry) for entry in path.iterdir()
    )


def _is_half_written(entry: Path) -> bool:
    return entry.name.startswith(".") and entry.name.endswith(".tmp")


def run_of(checkpoint_or_run: Path) -> Path | None:
    """The run directory that a checkpoint lies in, or that a path is; None for a checkpoint taken out of its run."""
    path = checkpoint_or_run.resolve()
    for run in (path, path.parent.parent if path.parent.name == CHECKPOINTS else path):
        if (run / CHECKPOINTS).is_dir() and all((run / name).is_file() for name in RUN_FILES):
            return run
    return None


def has_checkpoints(run: Path) -> bool:
    """Whether a checkpoint was ever finished in a run."""
    return any((run / CHECKPOINTS).glob("step_*"))
