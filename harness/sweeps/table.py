"""What came of a sweep and what it will train, for programs and for people."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from harness.sweeps.run import Status, count_states, in_words
from harness.sweeps.spec import Metric, Sweep, label


def table_json(sweep: Sweep, found: Sequence[Status]) -> dict[str, Any]:
    """The points, the best first: those with a figure for each seed before the others, equal ones in their order.

    `mean` and `std` are over the seeds that have a `value`, that of the sweep's metric once a run is finished; `std`
    divides by n - 1 and needs two. `best` is the first point unless a seed is missing.
    """
    metric = sweep.spec.metric
    points: list[dict[str, Any]] = []
    for point, group in itertools.groupby(found, key=lambda status: status.run.point):
        statuses = list(group)
        runs = [_row(status, metric) for status in statuses]
        values = [run["value"] for run in runs if run["value"] is not None]
        points.append(
            {
                "id": point,
                "parameters": dict(statuses[0].run.values),
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "best": False,
                "runs": runs,
            }
        )
    sign = -1 if metric.goal == "maximize" else 1
    points.sort(key=lambda point: (bool(_missing(point)), point["mean"] is None, sign * (point["mean"] or 0.0)))
    points[0]["best"] = not _missing(points[0])
    return {"sweep": sweep.spec.name, "metric": metric.model_dump(), "points": points}


def render_table(table: Mapping[str, Any]) -> str:
    """A line for each point."""
    metric, points = table["metric"], table["points"]
    labels = [label(point["parameters"]) for point in points]
    width = max(map(len, labels))
    states = count_states(run["state"] for point in points for run in point["runs"])
    lines = [
        f"sweep {table['sweep']}: {metric['split']} {metric['key']} ({metric['at']} epoch, {metric['goal']}), "
        f"mean ± standard deviation over seeds; {states}"
    ]
    form = ".2%" if metric["key"] == "accuracy" else ".4f"
    for point, text in zip(points, labels, strict=True):
        figures = [format(figure, form) for figure in (point["mean"], point["std"]) if figure is not None]
        count, missing = len(point["runs"]), _missing(point)
        note = f"n = {count}"
        if missing:
            why = "; ".join(f"seed {run['seed']} {in_words(run['state'], run['exit_code'])}" for run in missing)
            note = f"{count - len(missing)} of {count} seeds; {why}"
        mark = "*" if point["best"] else " "
        lines.append(f"{mark} {point['id']}  {text:<{width}}  {' ± '.join(figures) or '–'}  ({note})")
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


def _row(status: Status, metric: Metric) -> dict[str, Any]:
    run, on_disk = status.run, status.on_disk
    values = []
    if on_disk is not None and status.state == "finished":
        values = [point.value for point in on_disk.curve(metric.split, metric.key)]
    value = None
    if values:
        best = max if metric.goal == "maximize" else min
        value = values[-1] if metric.at == "last" else best(values)
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
