"""How far a sweep's runs are, what came of it and what it will train, for programs and for people."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, get_args

from harness.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_FAILED, HarnessError
from harness.runs import EXIT_CODE, Run, is_held, is_unused, open_run
from harness.sweeps.spec import Metric, Sweep, SweepRun, label

FAILURES = {EXIT_FAILED: "broke off", EXIT_BAD_INPUT: "bad input", EXIT_DIVERGED: "diverged"}
# Not begun, in a SLURM job, held by a process, with a checkpoint to resume from, failed with an exit code, finished.
State = Literal["finished", "running", "queued", "stopped", "failed", "new"]


class Status(NamedTuple):
    """How far a run is, as the disk shows it; `on_disk` is None before its first record."""

    run: SweepRun
    state: State
    on_disk: Run | None
    exit_code: int | None = None  # of a failed run

    @property
    def in_words(self) -> str:
        return in_words(self.state, self.exit_code)

    def is_due(self, *, retry_failed: bool) -> bool:
        """Whether it is to be trained now."""
        return self.state in ("new", "stopped") or (self.state == "failed" and retry_failed)


def status_of(run: SweepRun, queued: Collection[str] = ()) -> Status:
    """How far a run is; `queued` names those that SLURM has."""
    path, on_disk, exit_code = run.directory, None, None
    with suppress(HarnessError):  # it is no run yet
        on_disk = None if is_unused(path) else open_run(path)
    with suppress(OSError, ValueError):
        exit_code = int((path / EXIT_CODE).read_text())
    if is_held(path):
        return Status(run, "running", on_disk)
    if on_disk is not None and on_disk.state == "finished":
        return Status(run, "finished", on_disk)
    if run.name in queued:
        return Status(run, "queued", on_disk)
    if exit_code in FAILURES:
        return Status(run, "failed", on_disk, exit_code)
    return Status(run, "new" if on_disk is None else "stopped", on_disk)


def statuses(sweep: Sweep, queued: Collection[str] = ()) -> list[Status]:
    return [status_of(run, queued) for run in sweep.runs]


def in_words(state: str, exit_code: int | None) -> str:
    return f"failed: {FAILURES[exit_code]} (exit code {exit_code})" if exit_code is not None else state


def count_states(states: Iterable[str]) -> str:
    """Such as "2 finished, 1 failed"."""
    numbers = Counter(states)
    return ", ".join(f"{numbers[state]} {state}" for state in get_args(State) if numbers[state])


def table_json(sweep: Sweep, found: Sequence[Status]) -> dict[str, Any]:
    """The points, the best first: those with a figure for each seed before the others, equal ones in their order.

    `mean` and `std` are over the seeds that have a `value`, that of the sweep's metric once a run is finished; `std`
    divides by n - 1 and needs two. `best` is the first point unless a seed is missing.
    """
    metric = sweep.spec.metric
    points: list[dict[str, Any]] = []
    for (point, values), group in itertools.groupby(found, key=lambda status: (status.run.point, status.run.values)):
        runs = [_row(status, metric) for status in group]
        known = [run["value"] for run in runs if run["value"] is not None]
        mean, std = statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None
        points.append({"id": point, "parameters": values, "mean": mean, "std": std, "best": False, "runs": runs})
    sign = -1 if metric.goal == "maximize" else 1
    points.sort(key=lambda point: (bool(_missing(point)), point["mean"] is None, sign * (point["mean"] or 0.0)))
    points[0]["best"] = not _missing(points[0])
    return {"sweep": sweep.spec.name, "metric": metric.model_dump(), "points": points}


def _row(status: Status, metric: Metric) -> dict[str, Any]:
    run, on_disk, value = status.run, status.on_disk, None
    if on_disk is not None and status.state == "finished":
        best = max if metric.goal == "maximize" else min
        values = [point.value for point in on_disk.curve(metric.split, metric.key)]
        value = values[-1] if values and metric.at == "last" else best(values, default=None)
    return {
        "seed": run.recipe.seed,
        "state": status.state,
        "exit_code": status.exit_code,
        "value": value,
        "world_size": on_disk.result.get("world_size") if on_disk and on_disk.result else None,
        "run_directory": str(run.directory),
    }


def _missing(point: Mapping[str, Any]) -> list[Any]:
    """The runs of a point that have no figure."""
    return [run for run in point["runs"] if run["value"] is None]


def render_table(table: Mapping[str, Any]) -> str:
    """A line for each point."""
    metric, points = table["metric"], table["points"]
    labels = [label(point["parameters"]) for point in points]
    states = count_states(run["state"] for point in points for run in point["runs"])
    lines = [
        f"sweep {table['sweep']}: {metric['split']} {metric['key']} ({metric['at']} epoch, {metric['goal']}), "
        f"mean ± standard deviation over seeds; {states}"
    ]
    form = ".2%" if metric["key"] == "accuracy" else ".4f"
    for point, text in zip(points, labels, strict=True):
        figures = " ± ".join(format(figure, form) for figure in (point["mean"], point["std"]) if figure is not None)
        count, missing = len(point["runs"]), _missing(point)
        note = f"n = {count}"
        if missing:
            why = "; ".join(f"seed {run['seed']} {in_words(run['state'], run['exit_code'])}" for run in missing)
            note = f"{count - len(missing)} of {count} seeds; {why}"
        mark = "*" if point["best"] else " "
        lines.append(f"{mark} {point['id']}  {text:<{max(map(len, labels))}}  {figures or '–'}  ({note})")
    return "\n".join([*lines, "* the best"] if points[0]["best"] else lines)


def plan_json(found: Sequence[Status]) -> list[dict[str, Any]]:
    """The runs in the order in which they are trained, and how far each is."""
    return [
        {
            "point": status.run.point,
            "parameters": dict(status.run.values),
            "seed": status.run.recipe.seed,
            "overrides": list(status.run.overrides),
            "run_directory": str(status.run.directory),
            "state": status.state,
            "exit_code": status.exit_code,
        }
        for status in found
    ]


def render_plan(found: Sequence[Status]) -> str:
    """A line for each run."""
    return "\n".join(
        f"{number:>4}  {status.run.name}  {label(status.run.values)}  {status.in_words}"
        for number, status in enumerate(found, start=1)
    )
