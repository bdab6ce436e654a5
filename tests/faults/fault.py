"""Faults and what became of them: the registry behind the tests, the long form and the table."""

from __future__ import annotations

import hashlib
import random
import shutil
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.runs import INTERVAL_STEPS, Hang, Server, Stage


@dataclass(frozen=True)
class Outcome:
    """What became of one fault.

    Attributes:
        survived: all that is asked of this fault came true; see `tests.faults.check`.
        steps_lost: optimizer steps that were done, told of in metrics.jsonl, and had to be done again.
        seconds_to_detect: from the fault to the end of the process (or of all ranks), or to its message.
        seconds_to_recover: from the restart to its first new step.
        note: what went wrong, or what is worth knowing.
    """

    survived: bool
    steps_lost: int = 0
    seconds_to_detect: float | None = None
    seconds_to_recover: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Run = Callable[[Stage, int], Outcome]


class NoMoreCases(Exception):
    """A row that goes through a list of places has tried them all."""


class NotHere(Exception):
    """This machine lacks what the fault needs; says what."""


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        name: of the row, in file names.
        title: of the row, for people.
        how: how the fault is put in.
        trials: of the long form; a row with a list of places may have fewer.
        short_trials: of the short form; 0 leaves the row to the long form.
        most_steps_lost: more is not survival.
        load: "light"; "heavy" starts several Python processes, so no two of them run at once; "waiting" uses little of
            the machine for a minute or more.
    """

    name: str
    title: str
    how: str
    run: Run
    trials: int
    short_trials: int
    most_steps_lost: int
    load: str


REGISTRY: dict[str, Fault] = {}
# A process that dies loses what it did since its last whole checkpoint; while one is being written, that is the one
# before it.
SINCE_LAST_CHECKPOINT = 2 * INTERVAL_STEPS


def fault(
    name: str,
    title: str,
    how: str,
    *,
    trials: int,
    short: int = 1,
    most_steps_lost: int = SINCE_LAST_CHECKPOINT,
    load: str = "light",
) -> Callable[[Run], Run]:
    """Register a function `(stage, index) -> Outcome` as a row."""

    def register(run: Run) -> Run:
        assert name not in REGISTRY, name
        REGISTRY[name] = Fault(name, title, how, run, trials, short, most_steps_lost, load)
        return run

    return register


def _digest(folder: Path) -> str:
    """SHA-256 over all files of a folder and their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def run_trial(row: Fault, index: int, work: Path, server: Server, *, seed: int = 0) -> Outcome:
    """One fault, from a folder of its own; the folder stays when the fault was not survived.

    Raises:
        NoMoreCases: the row has no trial of this number.
        NotHere: the machine lacks something.
    """
    folder = work / "trials" / f"{row.name}-{index}"
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage(work, folder, server, random.Random(f"{seed} {row.name} {index}"))
    neighbours = {run: _digest(run) for run in work.glob("reference-*") if (run / "result.json").exists()}
    try:
        outcome = row.run(stage, index)
        assert neighbours == {run: _digest(run) for run in neighbours}, "another run was changed"
    except (NoMoreCases, NotHere):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except (Hang, AssertionError) as error:
        outcome = Outcome(False, note=f"{type(error).__name__}: {error}")
    except (OSError, ValueError, KeyError):
        outcome = Outcome(False, note=traceback.format_exc(limit=-3))
    finally:
        stage.close()
    if outcome.survived and outcome.steps_lost > row.most_steps_lost:
        note = f"{outcome.steps_lost} steps lost, more than {row.most_steps_lost}"
        outcome = Outcome(False, outcome.steps_lost, outcome.seconds_to_detect, outcome.seconds_to_recover, note)
    if outcome.survived:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome
