"""Where a run starts: in which directory, from which checkpoint, and that nothing there is lost.

The first rank decides, under the directory's lock, and tells the others; so ranks cannot disagree or race.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, exit_code_of, nearest
from harness.files import Hold
from harness.recipe import Recipe, load
from harness.recipe.loading import changed_settings, differences
from harness.runs import CHECKPOINTS, is_unused, new_run_directory, run_of, runs_of
from harness.runtime import Runtime, broadcast_text
from harness.training import checkpoint
from harness.training.claiming import claim

NAMED = 3  # runs that are passed over, and settings that differ, before the rest is only counted
# Schedules whose shape follows the length of the training.
_SHAPED_BY_LENGTH = ("cosine", "poly", "tanh", "wsd")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        run_directory: where it writes.
        checkpoint: that it resumes from.
        hold: of the directory, on the first rank; None where no training had begun there: it is to be claimed.
    """

    run_directory: Path
    checkpoint: Path | None
    hold: Hold | None = None


def agree_on_start(
    recipe: Recipe, runtime: Runtime, stack: ExitStack, *, run_directory: Path | None, resume: str
) -> Start:
    """Every rank's start, as the first rank chose it.

    Args:
        stack: holds the lock of a directory that is there already.
        run_directory: as given, or None.
        resume: "auto", "never" or the path of a checkpoint or run.

    Raises:
        HarnessError: on every rank alike: the directory is another run's, in use, or no checkpoint fits.
    """
    message: dict[str, Any] | None = None
    hold = None
    if runtime.is_main:
        try:
            start = _choose(recipe, stack, run_directory, resume)
            message = {"directory": str(start.run_directory), "checkpoint": str(start.checkpoint or "")}
            hold = start.hold
        except HarnessError as error:
            message = {"what": error.what, "where": error.where, "hint": error.hint, "exit_code": error.exit_code}
        except OSError as error:
            where = str(error.filename or run_directory)
            hint = "Give a --run-dir that can be made and written to."
            code = exit_code_of(error)
            message = {"what": f"cannot be used ({error.strerror})", "where": where, "hint": hint, "exit_code": code}
    agreed = json.loads(broadcast_text(json.dumps(message), runtime))
    if "what" in agreed:
        where, hint, code = agreed["where"], agreed["hint"], agreed["exit_code"]
        raise HarnessError(agreed["what"], where=where, hint=hint, exit_code=code)
    checkpoint_path = Path(agreed["checkpoint"]) if agreed["checkpoint"] else None
    return Start(Path(agreed["directory"]), checkpoint_path, hold)


def find_checkpoint(path: Path, which: str) -> Path:
    """A checkpoint by its folder, or that of a run: "last", "best" or "step_N".

    Raises:
        HarnessError: there is none.
    """
    if (path / checkpoint.MANIFEST).exists():
        return path
    found = checkpoint.list_checkpoints(path / CHECKPOINTS)
    if not found:
        raise HarnessError(
            "no run with checkpoints here", where=str(path), hint="Give a folder like runs/<recipe>/<run-id>."
        )
    if which == "last":
        return found[-1]
    if which == "best":
        best = checkpoint.load(found[-1]).state["progress"]["best"]
        which = f"step_{best['step']}" if best else "best"
    names = [p.name for p in found]
    if which not in names:
        raise HarnessError(f'no checkpoint "{which}" in this run', where=str(path), hint=nearest(which, names))
    return path / CHECKPOINTS / which


def _choose(recipe: Recipe, stack: ExitStack, given: Path | None, resume: str) -> Start:
    source = None if resume in ("auto", "never") else find_checkpoint(Path(resume), "last")
    path = given or _directory(recipe, resume, source)
    own = source is not None and run_of(source) == path.resolve()
    empty = is_unused(path)
    if not empty and resume != "auto" and not own:
        raise HarnessError(
            "the run directory is not empty",
            where=str(path),
            hint="Go on with it by --resume auto, or give another --run-dir; nothing was overwritten.",
        )
    hold = None if empty else claim(path, stack)
    if resume == "auto" and not empty:
        source = _last_good(path, recipe)
    if source is not None and (run := run_of(source)) is not None:
        _check_same_training(recipe, run)
        _tell_of_another_length(recipe, run)
    return Start(path, source, hold)


def _directory(recipe: Recipe, resume: str, source: Path | None) -> Path:
    """A checkpoint's run goes on in its own directory, `auto` in the newest unfinished one; else a new one."""
    if source is not None and (run := run_of(source)) is not None:
        return run
    unfinished = _newest_unfinished(recipe) if resume == "auto" else None
    return unfinished or new_run_directory(recipe.name)


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
        print(f"no unfinished run with this recipe ({_first_of(passed_over, '; ')}); starting anew", file=sys.stderr)
    elif found:
        print("all runs of this recipe are finished; starting anew", file=sys.stderr)
    return None


def _first_of(texts: list[str], separator: str) -> str:
    rest = [f"{len(texts) - NAMED} more"] if len(texts) > NAMED else []
    return separator.join([*texts[:NAMED], *rest])


def _last_good(path: Path, recipe: Recipe) -> Path | None:
    """The newest whole checkpoint of a run that is this recipe's."""
    if not (path / "recipe.yaml").exists():
        raise HarnessError("is not a run directory", where=str(path), hint="Give another --run-dir.")
    _check_same_training(recipe, path)
    found, problems = checkpoint.last_good(path / CHECKPOINTS)
    for problem in problems:
        print(f"WARNING {problem}", file=sys.stderr)
    if found is None and (problems or (path / "result.json").exists()):
        raise HarnessError(
            "no whole checkpoint is left of this run",
            where=str(path),
            hint="Start a new run with another --run-dir; nothing was overwritten.",
        )
    return found


def _check_same_training(recipe: Recipe, run: Path) -> None:
    """Refuse to go on with settings that would make it another training."""
    before = run / "recipe.yaml"
    if not before.exists():
        return
    wrong = changed_settings(load(before), recipe)
    if wrong:
        listed = "; ".join(f"{k}: {old!r} → {new!r}" for k, (old, new) in wrong.items())
        raise HarnessError(
            f"the run was trained with other settings: {listed}",
            where=str(before),
            hint="Resume with the same recipe, or start a new run with another --run-dir.",
        )


def _tell_of_another_length(recipe: Recipe, run: Path) -> None:
    changed = differences(load(run / "recipe.yaml"), recipe)
    lengths = {k: v for k, v in changed.items() if k in ("training.epochs", "training.steps")}
    if not lengths:
        return
    listed = "; ".join(f"{k}: {old!r} → {new!r}" for k, (old, new) in lengths.items())
    if recipe.schedule.name in _SHAPED_BY_LENGTH:
        print(
            f"WARNING {listed}: the {recipe.schedule.name} schedule is shaped by the length, so the learning rate "
            "goes on along another curve than the one the run began with",
            file=sys.stderr,
        )
    else:
        print(f"goes on with {run.name} to another length ({listed})", file=sys.stderr)
