"""Disks that are full, fail or cannot be written to."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults.check import contents, reached, restarted, said_well
from tests.faults.disks import remount, small_disk
from tests.faults.fault import Outcome, fault
from tests.faults.rows_kill import touches
from tests.faults.runs import Process, Stage

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")


@fault(
    "full-run-directory",
    "Disk full under the run directory",
    "the run directory lies on a tmpfs of 4 to 120 kB (as root), which is enlarged before the restart",
    trials=16,
)
def full_run_directory(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    kilobytes = stage.rng.randrange(4, 120, 4)
    disk = small_disk(stage, "disk", kilobytes)
    stage.run = disk / "run"
    process = stage.train()
    code = process.wait()
    wrong = said_well(process.text()) if code else ["it was not full"]
    remount(disk, "size=64m")
    return _after_repair(stage, process, code, wrong, reference, f"{kilobytes} kB")


def _after_repair(stage: Stage, process: Process, code: int, wrong: list[str], reference: Path, note: str) -> Outcome:
    detect = time.monotonic() - process.started_at
    if code not in (1, 2):
        wrong = [f"exit code {code}", *wrong]
    at = reached(stage.run)
    outcome = restarted(stage, stage.train(), reference, lost_from=at, detect=detect, note="; ".join([note, *wrong]))
    if not wrong:
        return outcome
    return Outcome(False, outcome.steps_lost, detect, outcome.seconds_to_recover, outcome.note)


@fault(
    "full-cache",
    "Disk full under $HARNESS_CACHE",
    "an empty cache on a tmpfs of 4 to 400 kB (as root), which is enlarged before the restart",
    trials=8,
)
def full_cache(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    kilobytes = stage.rng.randrange(4, 400, 4)
    disk = small_disk(stage, "disk", kilobytes)
    environment = {"HARNESS_CACHE": str(disk / "cache")}
    process = stage.train(env=environment)
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = said_well(process.text())
    if code != 1 or stage.run.exists():
        wrong.append(f"exit code {code}, run directory there: {stage.run.exists()}")
    remount(disk, "size=64m")
    again = stage.train(env=environment)
    outcome = restarted(stage, again, reference, lost_from=0, detect=detect, note=f"{kilobytes} kB")
    return Outcome(False, note=f"{kilobytes} kB: {wrong}") if wrong else outcome


@fault(
    "failing-disk",
    "ENOSPC, EIO, EDQUOT or EROFS from one call",
    "in the process itself: one open, fsync, rename, mkdir or remove under the run directory fails, each in turn",
    trials=48,
)
def failing_disk(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    lines = touches(stage, "/run", "run")
    number = index * 5 % len(lines) + 1 if index < 24 else stage.rng.randrange(1, len(lines) + 1)
    if index < 24:
        number = index + 1  # the files of the start and the first save, one by one
    error = ERRORS[index % len(ERRORS)]
    process = stage.train(faults=[{"kind": "files", "under": "/run", "do": [[number, error]]}])
    code = process.wait()
    note = f"{error} from touch {number}, {lines[number - 1]}"
    wrong = said_well(process.text()) if code else []  # dropping an old checkpoint may fail: nothing depends on it
    return _after_repair(stage, process, code or 1, wrong, reference, note)


@fault(
    "read-only-run-directory",
    "Read-only run directory",
    "a run on a tmpfs is stopped by SIGTERM, the tmpfs is remounted read-only (as root) and the run resumed: code 2, "
    "nothing changed; then it is made writable and resumed again",
    trials=6,
    most_steps_lost=0,
)
def read_only(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    disk = small_disk(stage, "disk", 8192)
    stage.run = disk / "run"
    step = stage.rng.randrange(1, 18)
    assert stage.train(faults=[{"kind": "step", "step": step, "action": "SIGTERM"}]).wait() == 75
    before = contents(stage.run, leave_out=())
    remount(disk, "ro")
    process = stage.train()
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = said_well(process.text())
    if code != 2 or contents(stage.run, leave_out=()) != before:
        wrong.append(f"exit code {code}, or something was changed")
    remount(disk, "rw")
    outcome = restarted(stage, stage.train(), reference, lost_from=step, detect=detect, note=f"at step {step}")
    return Outcome(False, note=f"at step {step}: {wrong}") if wrong else outcome
