"""Where a run starts: in which directory, from which checkpoint, and that nothing there is lost.

The first rank decides, under the directory's lock, and tells the others; so ranks cannot disagree or race.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.distributed.heartbeat import collective_limit_seconds, seconds_of_environment
from harness.distributed.runtime import Runtime, broadcast_text
from harness.errors import EXIT_BAD_INPUT, EXIT_FAILED, HarnessError, exit_code_of, nearest
from harness.files import LOCK_SECONDS, POLL_SECONDS, Hold, Owner, take, take_over, usable
from harness.recipe import Recipe, load
from harness.recipe.loading import changed_settings, differences
from harness.runs import CHECKPOINTS, LOCK, is_unused, new_run_directory, run_of, runs_of
from harness.training import checkpoint

NAMED = 3  # runs that are passed over, and settings that differ, before the rest is only counted
WAIT_VARIABLE, WAIT_SECONDS = "HARNESS_LOCK_SECONDS", 60.0
# Schedules whose shape follows the length of the training.
_SHAPED_BY_LENGTH = ("cosine", "poly", "tanh", "wsd")


@dataclass(frozen=True)
class Start:
    """Where a run writes, what it resumes from, and on the first rank the lock of a directory that was in use."""

    run_directory: Path
    checkpoint: Path | None
    lock: Hold | None = None


def agree_on_start(
    recipe: Recipe, runtime: Runtime, stack: ExitStack, *, run_directory: Path | None, resume: str
) -> Start:
    """Every rank's start, as the first rank chose it; `resume` is "auto", "never" or the path of a checkpoint or run.

    `stack` holds the lock of a directory that is there already. Raises HarnessError, on every rank alike: the directory
    is another run's, in use, or no checkpoint fits.
    """
    message: dict[str, Any] = {}
    lock = None
    if runtime.is_main:
        try:
            start = _choose(recipe, stack, run_directory, resume)
            message = {"directory": str(start.run_directory), "checkpoint": str(start.checkpoint or "")}
            lock = start.lock
        except HarnessError as error:
            message = {name: getattr(error, name) for name in ("what", "where", "hint", "exit_code")}
        except OSError as error:
            message = {
                "what": f"cannot be used ({error.strerror})",
                "where": str(error.filename or run_directory),
                "hint": "Give a --run-dir that can be made and written to.",
                "exit_code": exit_code_of(error),
            }
    agreed = json.loads(broadcast_text(json.dumps(message), runtime))
    if "what" in agreed:
        raise HarnessError(agreed.pop("what"), hint=agreed.pop("hint"), **agreed)
    return Start(Path(agreed["directory"]), Path(agreed["checkpoint"]) if agreed["checkpoint"] else None, lock)


def find_checkpoint(path: Path, which: str) -> Path:
    """A checkpoint by its folder, or that of a run: "last", "best" or "step_N". Raises HarnessError: there is none."""
    if (path / checkpoint.MANIFEST).exists():
        return path
    found = checkpoint.list_checkpoints(path / CHECKPOINTS)
    if not found:
        beside = [p.name for p in checkpoint.list_checkpoints(path.parent)]
        hint = nearest(path.name, beside) if beside else "Give a folder like runs/<recipe>/<run-id>."
        raise HarnessError("no run with checkpoints here", where=str(path), hint=hint)
    if which == "last":
        return found[-1]
    if which == "best" and (best := checkpoint.load(found[-1]).progress.best):
        which = f"step_{best['step']}"
    names = [p.name for p in found]
    if which not in names:
        raise HarnessError(f'no checkpoint "{which}" in this run', where=str(path), hint=nearest(which, names))
    return path / CHECKPOINTS / which


def take_directory(path: Path, stack: ExitStack) -> Hold:
    """Make the run directory, where it is not there, and hold its lock until `stack` closes.

    In a job of SLURM a directory that is held is waited for, `$HARNESS_LOCK_SECONDS` or a minute. If it is held by an
    earlier start of this very job even then, it is taken over: a node that was cut off may train on, or be dead while
    the file server keeps its lock. That start looks at the lock before it writes, see `Hold.check`; what it adds to
    metrics.jsonl until then goes into the file that the newer start has replaced. HarnessError says who has it
    otherwise; in a job, where that may pass, with exit code 1.
    """
    own, began = Owner.this_process(), time.monotonic()
    wait_seconds = LOCK_SECONDS
    if own.job:  # less than the other ranks wait for this one
        wait_seconds = min(seconds_of_environment(WAIT_VARIABLE, WAIT_SECONDS), collective_limit_seconds() / 2)
    announced = False
    with usable(path, use="a run directory", hint="Give another --run-dir."):
        while (lock := take(path, own)) is None:
            holder, waited = Owner.of(path), time.monotonic() - began
            if holder is not None and holder.is_newer_start_than(own):
                what = f"a newer start of this job trains in this run directory ({holder})"
                raise HarnessError(what, where=str(path), hint="Nothing to do: that start resumes the run.")
            if waited >= wait_seconds:
                if not own.is_newer_start_than(holder):
                    raise _taken(path, holder, EXIT_FAILED if own.job else EXIT_BAD_INPUT)
                print(f"{path}: taken over from an earlier start of this job ({holder})", file=sys.stderr)
                lock = take_over(path, own)
                break
            if waited > LOCK_SECONDS and not announced:
                announced = True
                who = holder or "another process"
                print(f"{path}: held by {who}; waiting up to {wait_seconds:g} s for it", file=sys.stderr)
            time.sleep(POLL_SECONDS)
        else:
            former = Owner.of(path)
            if former is not None and former.job:
                lock.clear_signature()
    stack.callback(lock.release)
    return lock


def _taken(path: Path, holder: Owner | None, exit_code: int) -> HarnessError:
    return HarnessError(
        f"another process is training in this run directory{f' ({holder})' if holder else ''}",
        where=str(path),
        hint="Give another --run-dir, or wait for that process. If it died with its node and the file server still "
        f"keeps its lock, delete {LOCK} there.",
        exit_code=exit_code,
    )


def _choose(recipe: Recipe, stack: ExitStack, given: Path | None, resume: str) -> Start:
    source = None if resume in ("auto", "never") else find_checkpoint(Path(resume), "last")
    run = run_of(source) if source is not None else None
    # A checkpoint's run resumes in its own directory, `auto` in the newest unfinished one; else a new one begins.
    unfinished = _newest_unfinished(recipe) if resume == "auto" and given is None else None
    path = given or run or unfinished or new_run_directory(recipe.name)
    empty = is_unused(path)
    if not empty and resume != "auto" and run != path.resolve():
        hint = "Resume it by --resume auto, or give another --run-dir; nothing was overwritten."
        raise HarnessError("the run directory is not empty", where=str(path), hint=hint)
    lock = None if empty else take_directory(path, stack)
    if resume == "auto" and not empty:
        if not (path / "recipe.yaml").exists():
            raise HarnessError("is not a run directory", where=str(path), hint="Give another --run-dir.")
        _check_same_training(recipe, path)
        source = _last_good(path)
    elif run is not None:
        _check_same_training(recipe, run)
    return Start(path, source, lock)


def _newest_unfinished(recipe: Recipe) -> Path | None:
    """The newest run with this recipe that is not finished; where others are passed over, that is said."""
    passed_over: list[str] = []
    found = sorted(runs_of(recipe.name).glob("*/recipe.yaml"), reverse=True)
    for path in found:
        run = path.parent
        if (run / "result.json").exists():
            continue
        if not checkpoint.list_checkpoints(run / CHECKPOINTS):
            passed_over.append(f"{run.name} has no checkpoint")
            continue
        try:
            changed = changed_settings(load(path), recipe)
        except HarnessError:
            passed_over.append(f"the recipe of {run.name} cannot be read")
            continue
        if not changed:
            return run
        passed_over.append(f"{run.name} differs in {_first_of(list(changed), ', ')}")
    if passed_over:
        print(
            f"no unfinished run with this recipe ({_first_of(passed_over, '; ')}); starting a new one", file=sys.stderr
        )
    elif found:
        print("all runs of this recipe are finished; starting a new one", file=sys.stderr)
    return None


def _first_of(texts: list[str], separator: str) -> str:
    rest = [f"{len(texts) - NAMED} more"] if len(texts) > NAMED else []
    return separator.join([*texts[:NAMED], *rest])


def _check_same_training(recipe: Recipe, run: Path) -> None:
    """Refuse to resume with settings that would make it another training; say so where it has another length."""
    before = load(run / "recipe.yaml")
    if wrong := changed_settings(before, recipe):
        what = f"the run was trained with other settings: {_listed(wrong)}"
        hint = "Resume with the same recipe, or start a new run with another --run-dir."
        raise HarnessError(what, where=str(run / "recipe.yaml"), hint=hint)
    changed = differences(before, recipe)
    lengths = {k: v for k, v in changed.items() if k in ("training.epochs", "training.steps")}
    if lengths and recipe.schedule.name in _SHAPED_BY_LENGTH:
        print(
            f"WARNING {_listed(lengths)}: the {recipe.schedule.name} schedule is shaped by the length, so the learning "
            "rate follows another curve than the one the run began with",
            file=sys.stderr,
        )
    elif lengths:
        print(f"resumes {run.name} to another length ({_listed(lengths)})", file=sys.stderr)


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{k}: {old!r} → {new!r}" for k, (old, new) in changes.items())


def _last_good(path: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found, problems = checkpoint.last_good(path / CHECKPOINTS)
    for problem in problems:
        print(f"WARNING {problem}", file=sys.stderr)
    if found is None and (problems or (path / "result.json").exists()):
        hint = "Start a new run with another --run-dir; nothing was overwritten."
        raise HarnessError("no whole checkpoint is left of this run", where=str(path), hint=hint)
    return found
