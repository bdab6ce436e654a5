"""Who may train in a run directory, and how long a job waits for it."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from harness.errors import EXIT_BAD_INPUT, EXIT_FAILED, HarnessError
from harness.files import LOCK, LOCK_SECONDS, POLL_SECONDS, Hold, Owner, take, take_over, usable
from harness.heartbeat import collective_limit_seconds, seconds_of_environment

WAIT_VARIABLE, WAIT_SECONDS = "HARNESS_LOCK_SECONDS", 60.0


def claim(path: Path, stack: ExitStack) -> Hold:
    """Make the run directory, where it is not there, and hold it until `stack` closes.

    In a job of SLURM a directory that is held is waited for, `$HARNESS_LOCK_SECONDS` or a minute. If it is held by an
    earlier start of this very job even then, it is taken over: a node that was cut off may train on, or be dead while
    the file server keeps its lock. That start looks at the lock before it writes, see `Hold.check`; what it adds to
    metrics.jsonl until then goes into the file that the newer start has replaced.

    Raises:
        HarnessError: another process holds it (exit code 1 in a job, where it may pass), a newer start of this job
            does, or it cannot be made.
    """
    own, began = Owner.this_process(), time.monotonic()
    wait_seconds = _wait_seconds() if own.job else LOCK_SECONDS
    told = False
    with usable(path, use="a run directory", hint="Give another --run-dir."):
        while (hold := take(path, own)) is None:
            holder, waited = Owner.of(path), time.monotonic() - began
            if holder is not None and holder.is_newer_start_than(own):
                raise HarnessError(
                    f"a newer start of this job trains in this run directory ({holder})",
                    where=str(path),
                    hint="Nothing to do: that start resumes the run.",
                )
            if waited >= wait_seconds:
                if not own.is_newer_start_than(holder):
                    raise _taken(path, holder, EXIT_FAILED if own.job else EXIT_BAD_INPUT)
                print(f"{path}: taken over from an earlier start of this job ({holder})", file=sys.stderr)
                hold = take_over(path, own)
                break
            if waited > LOCK_SECONDS and not told:
                told = True
                who = holder or "another process"
                print(f"{path}: held by {who}; waiting up to {wait_seconds:g} s for it", file=sys.stderr)
            time.sleep(POLL_SECONDS)
        else:
            former = Owner.of(path)
            if former is not None and former.job:
                hold.clear_signature()
    stack.callback(hold.release)
    return hold


def _wait_seconds() -> float:
    """Less than the other ranks wait for this one."""
    return min(seconds_of_environment(WAIT_VARIABLE, WAIT_SECONDS), collective_limit_seconds() / 2)


def _taken(path: Path, holder: Owner | None, exit_code: int) -> HarnessError:
    return HarnessError(
        f"another process is training in this run directory{f' ({holder})' if holder else ''}",
        where=str(path),
        hint="Give another --run-dir, or wait for that process. If it died with its node and the file server still "
        f"keeps its lock, delete {LOCK} there.",
        exit_code=exit_code,
    )
