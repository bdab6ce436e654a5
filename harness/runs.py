"""What a run on disk is: its files, its state, its best, and which runs are of one experiment. The only home of these.

Nothing here writes, or imports torch. What cannot be read is named in `Run.problems`; the rest is still there.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.errors import HarnessError, nearest
from harness.files import LOCK, is_held
from harness.tracking import metrics

RUNS = Path("runs")
CHECKPOINTS, METRICS, RESULT = "checkpoints", "metrics.jsonl", "result.json"
RUN_FILES = ("recipe.yaml", "provenance.json")
EXIT_CODE = "exit_code"  # how the training ended, as whoever started it wrote it down
JOB = "slurm"  # what the scheduler's job keeps there: its script, its recipe, what it prints
# A process holds it; it has a result; it can be resumed; or nothing of a training is there.
State = Literal["running", "finished", "stopped", "empty"]
LARGEST = 1e15  # a larger number in a file is no figure of a training
# In these runs of one experiment may differ: on two machines the data lies elsewhere, and another loader reads it.
_SAME_EXPERIMENT = ("seed", "name", "tracking", "data.path", "data.loader", "data.workers")


class Point(NamedTuple):
    """A value of a curve."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class Run:
    """A run directory, as it was when it was read."""

    path: Path
    state: State
    settings: Mapping[str, Any] = field(default_factory=dict)  # not checked: another version may have written them
    provenance: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    records: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl, in order, each with a step and an epoch
    problems: tuple[str, ...] = ()  # what is missing or broken, in words

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

    @property
    def is_broken(self) -> bool:
        """Whether something of it is missing or unreadable, and no training is about to write it."""
        return bool(self.problems) and self.state != "running"

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        """Each start of the training as provenance.json has it, the latest last."""
        starts = self.provenance.get("starts")
        return [start for start in starts if isinstance(start, Mapping)] if isinstance(starts, list) else []

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting of the recipe by its dotted key."""
        value: Any = self.settings
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def seed(self) -> Any:
        """As JSON has it; None where it is not known."""
        return _as_json(self.setting("seed"))

    @property
    def experiment(self) -> dict[str, Any]:
        """The recipe by dotted keys, as far as it says what is learned: runs in which it is equal are one experiment.

        Empty where the recipe cannot be read; such a run is like no other.
        """
        from harness.recipe.document import flatten

        settings = flatten(self.settings).items()
        return {k: _as_json(v) for k, v in settings if k not in _SAME_EXPERIMENT and not k.startswith("tracking.")}

    def curve(self, split: str, key: str, *, kind: str = "epoch") -> list[Point]:
        """Values of one key in order: `split` is train, test or test_ema, `kind` epoch or step.

        Values that are not finite (a diverged run has them) are left out.
        """
        return [
            Point(record["step"], record["epoch"], value)
            for record in self.records
            if record.get("kind") == kind and record.get("split") == split
            if (value := finite(record.get(key), below=1e300)) is not None
        ]

    def last_in(self, split: str, key: str = "accuracy") -> Point | None:
        """The latest value of a split."""
        return next(reversed(self.curve(split, key)), None)

    def best_in(self, split: str) -> Point | None:
        """The highest accuracy of a split, a share from 0 to 1; the first where several are equal."""
        return max(self.curve(split, "accuracy"), key=lambda point: point.value, default=None)

    @property
    def judged_by(self) -> str:
        """The split that decides which epoch is the best: test, or test_ema where the recipe says so."""
        return "test_ema" if self.setting("checkpoint.best_by") == "ema" else "test"

    @property
    def best(self) -> Point | None:
        """The epoch that the recipe calls the best."""
        return self.best_in(self.judged_by)

    def recorded_accuracy(self, which: str, weights: str) -> float | None:
        """Test accuracy of the "last" or "best" checkpoint with "raw" or "ema" weights, as the training noted it."""
        points, best = self.curve("test_ema" if weights == "ema" else "test", "accuracy"), self.best
        if which == "best" and best is not None:
            points = [point for point in points if point.step == best.step]
        return points[-1].value if points else None

    @property
    def epoch(self) -> float:
        """How far it is."""
        return max((record["epoch"] for record in self.records), default=0.0)

    @property
    def step(self) -> int:
        """The latest optimizer step of its records."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def length(self) -> tuple[float | None, int | None]:
        """Epochs and optimizer steps that it is to have; what the recipe does not give follows from the records."""
        epochs, steps = finite(self.setting("training.epochs")), finite(self.setting("training.steps"))
        timed = (record for record in reversed(self.records) if record["step"] > 0 and record["epoch"] > 1e-9)
        if latest := next(timed, None):
            steps_per_epoch = latest["step"] / latest["epoch"]
            if epochs is None and steps is not None:
                epochs = round(steps / steps_per_epoch, 2)
            elif steps is None and epochs is not None:
                steps = epochs * steps_per_epoch
        return epochs, None if steps is None else round(steps)

    @property
    def updated_unix_seconds(self) -> float:
        """When its latest record was written, or else its folder changed."""
        written = finite(self.records[-1].get("time_unix_seconds")) if self.records else None
        if written is not None:
            return written
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0


def runs_of(recipe_name: str) -> Path:
    """The folder of a recipe's runs, below the working directory."""
    return RUNS / recipe_name


def new_run_directory(recipe_name: str) -> Path:
    """`runs/<recipe>/<run-id>`: sortable, and unique among runs started in the same second. Nothing is made on disk."""
    return runs_of(recipe_name) / (datetime.datetime.now().strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2))


def is_unused(path: Path) -> bool:
    """Whether no training has begun in a directory; those who start one, and a process that died, may leave files."""
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    half_written = [name for name in names if name.startswith(".") and name.endswith(".tmp")]
    return set(names) <= {LOCK, JOB, EXIT_CODE, *half_written}


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


def open_run(path: str | Path, *, steps: bool = True) -> Run:
    """Read a run by its directory or one of its checkpoints, whatever state it is in; HarnessError where there is none.

    Without `steps` the records of single steps are left out, for whoever reads hundreds of runs.
    """
    path = Path(path)
    there = path.exists()
    if there and (run := path if _is_run(path) else run_of(path)):
        return _read(run, steps)
    known = [str(folder) for folder in _run_folders(path if there else RUNS) if _is_run(folder)]
    if 0 < len(known) < 4:
        hint = nearest(str(path), known)
    else:
        hint = f"The newest here is {known[-1]}" if known else "Give a folder like runs/<recipe>/<run-id>"
        hint += ";"
    what = "is not a run directory" if there else "there is no such run"
    raise HarnessError(what, where=str(path), hint=f"{hint} `harness runs` lists them.")


def list_runs(root: Path = RUNS, *, recipe: str | None = None) -> list[Run]:
    """The runs below a folder (`root/<recipe>/<run-id>`, `root/<run-id>` or `root` itself), the newest last.

    Records of single steps are left out. No run makes it raise: what cannot be read is in the run's problems.
    HarnessError where there is no such folder, or no run of that recipe.
    """
    if not root.is_dir() and root != RUNS:
        hint = "Give the folder that the runs are in, such as runs."
        raise HarnessError("there is no such folder", where=str(root), hint=hint)
    found = [_read(path, steps=False) for path in _run_folders(root)]
    runs = sorted(found, key=lambda run: (run.updated_unix_seconds, str(run.path)))
    chosen = [run for run in runs if recipe is None or run.recipe_name == recipe]
    if recipe is not None and not chosen:
        hint = nearest(recipe, {run.recipe_name for run in runs})
        raise HarnessError(f'no run of the recipe "{recipe}"', where=str(root), hint=hint)
    return chosen


def finite(value: Any, *, below: float = LARGEST) -> float | None:
    """A number from a run's files as a float; None for anything else, NaN, infinity and what is larger than that."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < below
    return float(value) if known else None


def _is_run(path: Path) -> bool:
    there = {name for name in (METRICS, RESULT, *RUN_FILES) if (path / name).is_file()}
    return bool(there & {METRICS, RESULT}) or there.issuperset(RUN_FILES)


def _run_folders(root: Path) -> list[Path]:
    """Every folder that is a run or was one, at most two below: what is broken beyond recognition is listed too."""
    found: set[Path] = set()
    for paths in ([root], root.glob("*"), root.glob("*/*")):
        found |= {path for path in paths if found.isdisjoint(path.parents) and _looks_like_a_run(path)}
    return sorted(found, key=lambda path: (path.name, str(path)))


def _looks_like_a_run(path: Path) -> bool:
    """Whether anything in a folder says that it is a run; one that cannot be looked into may be."""
    try:
        names = set(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    if names & {METRICS, RESULT, CHECKPOINTS, *RUN_FILES}:
        return True
    # Of one whose training has not begun; a sweep has them too, above the folders of its runs.
    begun = {LOCK, JOB}
    return bool(names & begun) and not any((path / name).is_dir() for name in names - begun)


def _read(path: Path, steps: bool) -> Run:
    problems: list[str] = []
    try:
        unused = is_unused(path)  # such as the folder of a job that waits in its queue
    except OSError as error:
        return Run(path, "empty", problems=(f"cannot be read ({error.strerror})",))
    settings = _part(path / "recipe.yaml", _read_settings, Mapping, problems) or {}
    provenance = _part(path / "provenance.json", _read_json, Mapping, problems) or {}
    result = _part(path / RESULT, _read_json, Mapping, problems) if (path / RESULT).exists() else None
    lines = _part(path / METRICS, partial(metrics.read, steps=steps), list, problems) or []
    records = [{**line, "epoch": float(line.get("epoch", 0))} for line in lines if _is_record(line)]
    if len(records) < len(lines):
        problems.append(f"{METRICS} has {len(lines) - len(records)} lines that are no records")
    state: State = "stopped" if records or has_checkpoints(path) else "empty"
    state = "running" if is_held(path) else "finished" if result else state
    to_come = (*RUN_FILES, METRICS) if unused or state == "running" else (METRICS,) if state == "empty" else ()
    problems = [problem for problem in problems if problem not in [f"{name} is missing" for name in to_come]]
    return Run(path, state, settings, provenance, result or None, records, tuple(problems))


def _part(path: Path, read: Callable[[Path], Any], kind: type, problems: list[str]) -> Any:
    """What is in one of the run's files; None, with the reason among the problems, where it is not of that kind."""
    try:
        if isinstance(content := read(path), kind):
            return content
        problem = "is broken"
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (HarnessError, ValueError, RecursionError):
        problem = "is broken"
    problems.append(f"{path.name} {problem}")
    return None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _read_settings(path: Path) -> dict[str, Any] | None:
    from harness.recipe.document import parse  # heavy, and `--help` imports this module

    text = path.read_text("utf-8")
    return parse(text, str(path)).data if text.strip() else None


def _is_record(record: Any) -> bool:
    step = record.get("step") if isinstance(record, Mapping) else None
    return isinstance(step, int) and abs(step) < LARGEST and finite(record.get("epoch", 0)) is not None


def _as_json(value: Any) -> Any:
    """A value that JSON has; infinities and NaN become their names."""
    return json.loads(json.dumps(value, default=str, skipkeys=True), parse_constant=str)
