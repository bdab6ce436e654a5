"""Faults and what became of them: the registry behind the tests, the long form and the table."""

from __future__ import annotations

import random
import shutil
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.check import contents
from tests.faults.runs import INTERVAL_STEPS, NotHere, Stage
from tests.fork_server import ForkServer, Hang


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; `note` says what went wrong, or what is worth knowing."""

    survived: bool
    steps_lost: int = 0  # were done, recorded in metrics.jsonl, and had to be done again
    seconds_to_detect: float | None = None  # from the fault to the end of the process (or of all ranks)
    seconds_to_recover: float | None = None  # from the restart to its first new step
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class NoMoreCases(Exception):
    """A row that goes through a list of places has tried them all."""


Run = Callable[[Stage, int], None]  # raises where the fault was not survived


@dataclass(frozen=True)
class Fault:
    """A row of the table: its name in file names, its title for people, and how the fault is put in.

    Attributes:
        trials: of the long form; a row with a list of places may have fewer.
        short: trials in the tests.
        ordinary: the first trial belongs to the ordinary tests; all others are `long`.
        most_steps_lost: more is not survival.
    """

    name: str
    title: str
    how: str
    run: Run
    trials: int
    short: int
    ordinary: bool
    most_steps_lost: int


REGISTRY: dict[str, Fault] = {}
# A process that dies loses what it did since its last whole checkpoint; while one is being written, that is the one
# before it.
SINCE_LAST_CHECKPOINT = 2 * INTERVAL_STEPS


def fault(
    name: str,
    *,
    trials: int,
    short: int = 1,
    ordinary: bool = False,
    most_steps_lost: int = SINCE_LAST_CHECKPOINT,
) -> Callable[[Run], Run]:
    """Register a function `(stage, index) -> None` as a row; its docstring is `title: how the fault is put in.`"""

    def register(run: Run) -> Run:
        assert name not in REGISTRY, name
        title, _, how = " ".join(str(run.__doc__).split()).removesuffix(".").partition(": ")
        REGISTRY[name] = Fault(name, title, how, run, trials, short, ordinary, most_steps_lost)
        return run

    return register


def run_trial(row: Fault, index: int, work: Path, forks: ForkServer) -> Outcome:
    """One fault, from a folder of its own; the folder stays when the fault was not survived.

    Raises NoMoreCases where the row has no trial of this number, NotHere where the machine lacks something.
    """
    folder = work / "trials" / f"{row.name}-{index}"
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage(work, folder, forks, random.Random(f"0 {row.name} {index}"))
    neighbours = {run: contents(run) for run in work.glob("reference-*") if (run / "result.json").exists()}
    survived = False
    try:
        row.run(stage, index)
        assert neighbours == {run: contents(run) for run in neighbours}, "another run was changed"
        assert stage.lost <= row.most_steps_lost, f"{stage.lost} steps lost, more than {row.most_steps_lost}"
        survived = True
    except (NoMoreCases, NotHere):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except (Hang, AssertionError) as error:
        stage.notes.append(f"{type(error).__name__}: {error}")
    except Exception:
        stage.notes.append(traceback.format_exc(limit=-3))
    finally:
        stage.close()
    if survived:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(survived, stage.lost, stage.detect, stage.recover, "; ".join(stage.notes))
