"""Runs as they lie on disk: finished, growing, broken off, incomplete. Nothing here writes, or imports torch.

What cannot be read is told in `Run.problems`; the rest of the run is there all the same.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from harness.errors import HarnessError, nearest
from harness.recipe.document import load_plain
from harness.run_directory import CHECKPOINTS, LOCK, RUN_FILES, RUNS, run_of
from harness.tracking import jsonl

METRICS, RESULT = "metrics.jsonl", "result.json"
State = Literal["running", "finished", "stopped", "empty"]


@dataclass(frozen=True)
class Point:
    """A value of a curve."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class Run:
    """A run directory, as it was when it was read.

    Attributes:
        path: of the directory.
        state: running (a process holds it), finished (it has a result), stopped (to be gone on with), or empty.
        settings: the resolved recipe as nested mappings; not checked, since another version may have written it.
        provenance: where it came from, as `provenance.json` has it.
        result: as `result.json` has it; None before the end.
        records: of `metrics.jsonl`, in order.
        problems: what of it is missing or broken, in words.
    """

    path: Path
    state: State
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    records: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def recipe_name(self) -> str:
        return str(self.settings.get("name") or self.path.resolve().parent.name)

    @property
    def run_id(self) -> str:
        return self.path.resolve().name

    @property
    def label(self) -> str:
        """`<recipe>/<run-id>`."""
        return f"{self.recipe_name}/{self.run_id}"

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting of the recipe by its dotted key."""
        at: Any = self.settings
        for part in key.split("."):
            if not isinstance(at, Mapping) or part not in at:
                return default
            at = at[part]
        return at

    def curve(self, split: str, key: str, *, kind: str = "epoch") -> list[Point]:
        """Values of one key in order: `split` is train, test or test_ema, `kind` epoch or step.

        Values that are not finite (a diverged run has them) are left out.
        """
        points = []
        for record in self.records:
            if record.get("kind") == kind and record.get("split") == split:
                value = _number(record.get(key))
                if value is not None and math.isfinite(value):
                    points.append(Point(int(record["step"]), _number(record.get("epoch")) or 0.0, value))
        return points

    @property
    def judged_by(self) -> str:
        """The split that decides which epoch is the best: test, or test_ema where the recipe says so."""
        return "test_ema" if self.setting("checkpoint.best_by") == "ema" else "test"

    @property
    def best(self) -> Point | None:
        """The highest accuracy on the test split, a share from 0 to 1, the first where several are equal."""
        points = self.curve(self.judged_by, "accuracy")
        return max(points, key=lambda point: point.value, default=None)

    @property
    def last(self) -> Point | None:
        """The latest accuracy on the test split."""
        points = self.curve(self.judged_by, "accuracy")
        return points[-1] if points else None

    @property
    def epoch(self) -> float:
        """How far it is."""
        return max((_number(record.get("epoch")) or 0.0 for record in self.records), default=0.0)

    @property
    def step(self) -> int:
        """The latest optimizer step of its records."""
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def length_epochs(self) -> float | None:
        """Epochs that the training is to have; of one whose length is given in steps, where its records tell."""
        epochs, steps, per_epoch = self.setting("training.epochs"), self.setting("training.steps"), self._epoch_steps
        if isinstance(epochs, int | float) and abs(epochs) < 1e15:
            return float(epochs)
        return round(steps / per_epoch, 2) if per_epoch and isinstance(steps, int) and abs(steps) < 1e15 else None

    @property
    def length_steps(self) -> int | None:
        """Optimizer steps that the training is to have; of one whose length is given in epochs as `length_epochs`."""
        epochs, steps, per_epoch = self.setting("training.epochs"), self.setting("training.steps"), self._epoch_steps
        if isinstance(steps, int) and abs(steps) < 1e15:
            return steps
        known = per_epoch and isinstance(epochs, int | float) and abs(epochs) < 1e15
        return round(epochs * per_epoch) if known else None

    @property
    def _epoch_steps(self) -> float | None:
        """Steps of an epoch, by the latest record that has both."""
        for record in reversed(self.records):
            step, epoch = float(record["step"]), float(record.get("epoch") or 0)
            if step > 0 and epoch > step / 1e15:
                return step / epoch
        return None

    @property
    def updated_unix_seconds(self) -> float | None:
        """When its latest record was written."""
        written = _number(self.records[-1].get("time_unix_seconds")) if self.records else None
        return written if written is not None and math.isfinite(written) else None


def open_run(path: str | Path, *, steps: bool = True) -> Run:
    """Read a run by its directory or one of its checkpoints, whatever state it is in.

    Args:
        path: of the directory or checkpoint.
        steps: False leaves out the records of single steps, for whoever reads hundreds of runs.

    Raises:
        HarnessError: there is no run.
    """
    path = Path(path)
    inside = run_of(path) if path.exists() else None
    path = inside if inside is not None and not _is_run(path) else path
    if not path.exists():
        near = [str(run) for run in find_run_directories(RUNS)]
        raise HarnessError("there is no such run", where=str(path), hint=_hint(str(path), near))
    if not _is_run(path):
        below = [str(run) for run in find_run_directories(path)] if path.is_dir() else []
        raise HarnessError("is not a run directory", where=str(path), hint=_hint(str(path), below))
    return _read(path, steps)


def find_run_directories(root: Path) -> list[Path]:
    """The run directories below a folder (`runs/<recipe>/<run-id>`, or the folder itself), oldest first."""
    if _is_run(root):
        return [root]
    found = [path for pattern in ("*", "*/*") for path in root.glob(pattern) if _is_run(path)]
    return sorted(found, key=lambda path: (path.name, str(path)))


def is_held(path: Path) -> bool:
    """Whether a process trains in a run directory now, on this machine or, where the file system tells, another."""
    try:
        handle = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (METRICS, RESULT)) or all(
        (path / name).is_file() for name in RUN_FILES
    )


def _hint(wanted: str, there: list[str]) -> str:
    if not there:
        return "Give a folder like runs/<recipe>/<run-id>; `harness runs` lists them."
    return nearest(wanted, there) if len(there) < 4 else f"The newest here is {there[-1]}; `harness runs` lists them."


def _read(path: Path, steps: bool) -> Run:
    problems: list[str] = []
    settings = _part(path / "recipe.yaml", load_plain, problems)
    provenance = _part(path / "provenance.json", json.loads, problems)
    result = _part(path / RESULT, json.loads, problems) if (path / RESULT).exists() else None
    records = tuple(_records(path / METRICS, problems, steps))
    if is_held(path):
        state: State = "running"
    elif result:
        state = "finished"
    else:
        state = "stopped" if records or any((path / CHECKPOINTS).glob("step_*")) else "empty"
    return Run(path, state, settings, provenance, result or None, records, tuple(problems))


def _part(path: Path, parse: Callable[[str], Any], problems: list[str]) -> Mapping[str, Any]:
    """The mapping in one of the run's files; empty, with the reason among the problems, where there is none."""
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
        return {}
    except (ValueError, yaml.YAMLError, RecursionError):
        problems.append(f"{path.name} is broken")
        return {}
    if not isinstance(data, Mapping):
        problems.append(f"{path.name} is broken")
        return {}
    return data


def _records(path: Path, problems: list[str], steps: bool) -> list[Mapping[str, Any]]:
    try:
        found = jsonl.read(path, steps=steps)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return []
    whole: list[Mapping[str, Any]] = [record for record in found if _is_record(record)]
    if len(whole) < len(found):
        problems.append(f"{path.name} has {len(found) - len(whole)} lines that are no records")
    return whole


def _is_record(record: Any) -> bool:
    if not isinstance(record, Mapping):
        return False
    step, epoch = record.get("step"), record.get("epoch", 0)
    return isinstance(step, int) and abs(step) < 1e15 and isinstance(epoch, int | float) and abs(epoch) < 1e15


def _number(value: Any) -> float | None:
    """A number of metrics.jsonl, where infinities and what is not a number are written by name."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
