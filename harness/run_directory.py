"""Where runs are kept, and when a run directory may be taken. Imports nothing heavy."""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path

RUNS = Path("runs")
LOCK = ".lock"
JOB = "slurm"  # what the scheduler's job keeps there: its script, its recipe, what it prints


def runs_of(recipe_name: str) -> Path:
    """The folder of a recipe's runs, below the working directory."""
    return RUNS / recipe_name


def new_run_directory(recipe_name: str) -> Path:
    """`runs/<recipe>/<run-id>`: sortable, and unique among runs started in the same second. Nothing is made on disk."""
    return runs_of(recipe_name) / (datetime.datetime.now().strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2))


def is_unused(path: Path) -> bool:
    """Whether no training has begun in a directory: it is not there, or holds only a lock and the job's own files."""
    return not path.exists() or all(entry.name in (LOCK, JOB) for entry in path.iterdir())
