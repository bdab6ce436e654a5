"""A W&B workspace as a plain specification: a pure function of the resolved recipe, kept in version control.

`harness.tracking.workspace` writes it. A panel is {"kind": "line" | "scalar" | "table", "title": …} with what it shows:
metrics by the names that `harness.tracking.rows` gives them, tables by those of `harness.tracking.wandb_extras`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.tracking.rows import STEP_METRIC
from harness.tracking.wandb_extras import CONFUSION, WORST

Spec = dict[str, Any]


def specification(settings: Mapping[str, Any]) -> Spec:
    """The workspace of a recipe.

    Args:
        settings: the resolved recipe as nested mappings.

    Returns:
        project, entity, name, columns (pinned in the list of runs), order (of the runs, best first) and sections, each
        with a name and panels.
    """
    tracking = settings.get("tracking") or {}
    ema = bool((settings.get("ema") or {}).get("decay"))
    return {
        "project": tracking.get("project") or "dual-branch-harness",
        "entity": tracking.get("entity"),
        "name": f"{settings.get('name', 'all runs')}: curves, speed, mistakes",
        "columns": ["summary:best/accuracy", "summary:best/epoch", "summary:result/images_per_second", "run:group"],
        "order": "best/accuracy",
        "sections": [
            _curves(ema),
            _section("Optimisation", _lines("Learning rate", "lr/learning_rate"), _norms()),
            _speed(),
            _mistakes(),
        ],
    }


def of_project(name: str, overrides: Sequence[str]) -> Spec:
    """The workspace of a whole project.

    Args:
        name: `project` or `entity/project`.
        overrides: must be empty; a project has no settings.

    Raises:
        HarnessError: it is neither a project nor a recipe.
    """
    entity, _, project = name.rpartition("/")
    if overrides:
        raise HarnessError(
            f'"{overrides[0]}" changes a recipe, and "{name}" is a project', hint="Give a recipe: a file *.yaml."
        )
    if not project or "/" in entity or set(name) & set("\\#?%:"):
        raise HarnessError(f'"{name}" is no project', hint="Give project, entity/project, or a recipe: a file *.yaml.")
    return specification({"tracking": {"project": project, "entity": entity or None}, "ema": {"decay": 1}})


def _section(name: str, *panels: Spec) -> Spec:
    return {"name": name, "panels": list(panels)}


def _lines(title: str, *metrics: str, log_y: bool = False) -> Spec:
    return {"kind": "line", "title": title, "x": STEP_METRIC, "y": list(metrics), "log_y": log_y}


def _curves(ema: bool) -> Spec:
    def evaluated(key: str) -> list[str]:
        return [f"{split}/{key}" for split in (["test", "test_ema"] if ema else ["test"])]

    return _section(
        "Curves",
        _lines("Accuracy", *evaluated("accuracy"), "train/epoch_accuracy"),
        _lines("Loss", *evaluated("loss"), "train/epoch_loss"),
        _lines("Training loss, log steps", "train/loss", log_y=True),
        {"kind": "scalar", "title": "Best test accuracy", "metric": "best/accuracy", "aggregate": "max"},
    )


def _norms() -> Spec:
    return _lines("L2 norms of gradient and parameters", "train/grad_norm", "train/param_norm", log_y=True)


def _speed() -> Spec:
    return _section(
        "Throughput",
        _lines("Images a second", "perf/images_per_second"),
        _lines("Milliseconds a step", "perf/milliseconds_per_step"),
        _lines("Seconds waited for batches", "perf/loader_wait_seconds"),
    )


def _mistakes() -> Spec:
    """Filled where the recipe has tracking.predictions_table."""
    return _section(
        "Predictions",
        {"kind": "table", "title": "Confusion", "table": CONFUSION},
        {"kind": "table", "title": "Gallery of the worst", "table": WORST},
    )
