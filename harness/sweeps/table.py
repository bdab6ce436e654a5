"""What came of a sweep: mean and standard deviation over the seeds of each point, the best first."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.runs import Run
from harness.sweeps.plan import Plan
from harness.sweeps.points import Point
from harness.sweeps.progress import Status, count_states
from harness.sweeps.spec import Metric


@dataclass(frozen=True)
class Row:
    """A point and the metric of its runs.

    Attributes:
        values: of the runs that are finished, by seed.
        mean: of them; None where there are none.
        std: their standard deviation with n - 1 below the line; None below two runs.
        is_best: the best mean of the points whose runs are all finished.
    """

    point: Point
    statuses: tuple[Status, ...]
    values: dict[int, float]
    is_best: bool = False

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def is_whole(self) -> bool:
        return len(self.values) == len(self.statuses)


def rows_of(plan: Plan, found: Sequence[Status]) -> list[Row]:
    """A row for each point, the best first; points that are not whole come behind those that are, and among equals the
    order of the plan stays."""
    metric = plan.file.sweep.metric
    rows = []
    for point in plan.points:
        of_point = tuple(status for status in found if status.trial.point.id == point.id)
        rows.append(Row(point, of_point, _values(of_point, metric)))
    sign = -1 if metric.goal == "maximize" else 1
    rows.sort(key=lambda row: (not row.is_whole, row.mean is None, sign * (row.mean or 0.0)))
    if rows and rows[0].is_whole:
        rows[0] = Row(rows[0].point, rows[0].statuses, rows[0].values, is_best=True)
    return rows


def metric_of(run: Run, metric: Metric) -> float | None:
    """The figure of a run that the sweep compares; None where it has none."""
    values = [point.value for point in run.curve(metric.split, metric.key)]
    if not values:
        return None
    if metric.at == "last":
        return values[-1]
    return max(values) if metric.goal == "maximize" else min(values)


def render_table(plan: Plan, found: Sequence[Status]) -> str:
    """The table for people."""
    metric = plan.file.sweep.metric
    rows = rows_of(plan, found)
    width = max((len(row.point.label()) for row in rows), default=0)
    lines = [
        f"sweep {plan.name}: {metric.split} {metric.key} ({metric.at} epoch, {metric.goal}), "
        f"mean ± standard deviation over seeds; {count_states(found)}"
    ]
    for row in rows:
        mark = "*" if row.is_best else " "
        lines.append(f"{mark} {row.point.id}  {row.point.label():<{width}}  {_figure(row, metric)}{_note(row)}")
    if any(row.is_best for row in rows):
        lines.append("* the best")
    return "\n".join(lines)


def table_json(plan: Plan, found: Sequence[Status]) -> dict[str, Any]:
    """The table for programs; points in the same order."""
    return {
        "sweep": plan.name,
        "metric": plan.file.sweep.metric.model_dump(),
        "points": [
            {
                "id": row.point.id,
                "parameters": dict(row.point.values),
                "mean": row.mean,
                "std": row.std,
                "best": row.is_best,
                "runs": [
                    {
                        "seed": status.trial.seed,
                        "state": status.state,
                        "exit_code": status.exit_code,
                        "value": row.values.get(status.trial.seed),
                        "world_size": status.run.result.get("world_size") if status.run and status.run.result else None,
                        "run_directory": str(status.trial.directory),
                    }
                    for status in row.statuses
                ],
            }
            for row in rows_of(plan, found)
        ],
    }


def render_plan(found: Sequence[Status]) -> str:
    """The runs in the order in which they are trained, and how far each is."""
    return "\n".join(f"{n:>4}  {s.trial.name}  {s.trial.point.label()}  {s.words()}" for n, s in enumerate(found, 1))


def plan_json(found: Sequence[Status]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "point": status.trial.point.id,
            "parameters": dict(status.trial.point.values),
            "seed": status.trial.seed,
            "overrides": list(status.trial.overrides),
            "run_directory": str(status.trial.directory),
            "state": status.state,
            "exit_code": status.exit_code,
        }
        for status in found
    ]


def _values(found: Sequence[Status], metric: Metric) -> dict[int, float]:
    values = {}
    for status in found:
        value = metric_of(status.run, metric) if status.state == "finished" and status.run else None
        if value is not None:
            values[status.trial.seed] = value
    return values


def _figure(row: Row, metric: Metric) -> str:
    if row.mean is None:
        return "–"
    if metric.key == "accuracy":
        spread = f" ± {row.std:.2%}" if row.std is not None else ""
        return f"{row.mean:.2%}{spread}"
    return f"{row.mean:.4f}" + (f" ± {row.std:.4f}" if row.std is not None else "")


def _note(row: Row) -> str:
    """What is missing of a point."""
    missing = [status for status in row.statuses if status.trial.seed not in row.values]
    if not missing:
        return f"  (n = {len(row.values)})"
    return f"  ({len(row.values)} of {len(row.statuses)} seeds; {'; '.join(_each(missing))})"


def _each(missing: Sequence[Status]) -> list[str]:
    return [f"seed {status.trial.seed} {status.words()}" for status in missing]
