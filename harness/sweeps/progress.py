"""How far each run of a sweep is, as the disk tells."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_FAILED, HarnessError
from harness.files import write_text
from harness.run_directory import EXIT_CODE, is_unused
from harness.runs import Run, is_held, open_run
from harness.sweeps.plan import Plan, Trial

FAILURES = {EXIT_FAILED: "broke off", EXIT_BAD_INPUT: "bad input", EXIT_DIVERGED: "diverged"}
State = Literal["new", "queued", "running", "stopped", "failed", "finished"]


@dataclass(frozen=True)
class Status:
    """A run of a sweep.

    Attributes:
        state: new (not begun), queued (a job of SLURM has it), running (a process holds it), stopped (a checkpoint
            waits), failed (with `exit_code`), or finished.
        run: as it lies on disk; None before its first record.
    """

    trial: Trial
    state: State
    exit_code: int | None = None
    run: Run | None = None

    def is_due(self, *, retry_failed: bool) -> bool:
        """Whether it is to be trained now."""
        return self.state in ("new", "stopped") or (self.state == "failed" and retry_failed)

    def words(self) -> str:
        if self.state == "failed" and self.exit_code is not None:
            return f"failed: {FAILURES.get(self.exit_code, 'ended')} (exit code {self.exit_code})"
        return self.state


def statuses(plan: Plan, queued: Collection[str] = ()) -> list[Status]:
    """The status of each run, in the order of the plan.

    Args:
        queued: names of runs that a scheduler has.
    """
    return [status_of(trial, queued=trial.name in queued) for trial in plan.trials]


def status_of(trial: Trial, *, queued: bool = False) -> Status:
    """The status of one run."""
    path = trial.directory
    run = None if is_unused(path) else _run(path)
    code = read_exit_code(path)
    if is_held(path):
        return Status(trial, "running", run=run)
    if run is not None and run.state == "finished":
        return Status(trial, "finished", run=run)
    if queued:
        return Status(trial, "queued", run=run)
    if code in FAILURES:
        return Status(trial, "failed", code, run)
    return Status(trial, "new" if run is None else "stopped", run=run)


def write_exit_code(path: Path, code: int) -> None:
    """Write down how the training of a run directory ended; the directory is made where the training made none."""
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / EXIT_CODE, f"{code}\n")


def read_exit_code(path: Path) -> int | None:
    """How the training of a run directory ended, where that was written down."""
    try:
        return int((path / EXIT_CODE).read_text())
    except (OSError, ValueError):
        return None


def count_states(found: Iterable[Status]) -> str:
    """The states with their numbers, in words.

    Returns:
        such as "2 finished, 1 failed".
    """
    numbers = Counter(status.state for status in found)
    order: tuple[State, ...] = ("finished", "running", "queued", "stopped", "failed", "new")
    return ", ".join(f"{numbers[state]} {state}" for state in order if numbers[state])


def _run(path: Path) -> Run | None:
    try:
        return open_run(path)
    except HarnessError:
        return None


def read_json_list(path: Path) -> list[dict[str, object]]:
    """The objects of a file of ours; none where it is missing or broken."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
