"""A W&B workspace as a plain specification, a pure function of the resolved recipe; wandb-workspaces writes it.

A panel is {"kind": "line" | "scalar" | "table", "title": …} with what it shows: metrics and tables by the names that
`harness.tracking.wandb_run` gives them.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError
from harness.tracking.wandb_run import CONFUSION_TABLE, DEFAULT_PROJECT, STEP_METRIC, WORST_TABLE, base_url

Spec = dict[str, Any]


def specification(settings: Mapping[str, Any]) -> Spec:
    """The workspace of a resolved recipe."""
    tracking = settings.get("tracking") or {}
    splits = ["test", "test_ema"] if (settings.get("ema") or {}).get("decay") else ["test"]
    accuracies, losses = ([f"{split}/{key}" for split in splits] for key in ("accuracy", "loss"))
    norms = ("train/grad_norm", "train/param_norm")
    panels = {
        "Curves": [
            _lines("Accuracy", *accuracies, "train/epoch_accuracy"),
            _lines("Loss", *losses, "train/epoch_loss"),
            _lines("Training loss, log steps", "train/loss", log_y=True),
            {"kind": "scalar", "title": "Best test accuracy", "metric": "best/accuracy", "aggregate": "max"},
        ],
        "Optimisation": [
            _lines("Learning rate", "lr/learning_rate"),
            _lines("L2 norms of gradient and parameters", *norms, log_y=True),
        ],
        "Throughput": [
            _lines("Images a second", "perf/images_per_second"),
            _lines("Milliseconds a step", "perf/milliseconds_per_step"),
            _lines("Seconds waited for batches", "perf/loader_wait_seconds"),
        ],
        "Predictions": [  # filled where the recipe has tracking.predictions_table
            {"kind": "table", "title": "Confusion", "table": CONFUSION_TABLE},
            {"kind": "table", "title": "Gallery of the worst", "table": WORST_TABLE},
        ],
    }
    return {
        "project": tracking.get("project") or DEFAULT_PROJECT,
        "entity": tracking.get("entity"),
        "name": f"{settings.get('name', 'all runs')}: curves, speed, mistakes",
        "columns": ["summary:best/accuracy", "summary:best/epoch", "summary:result/images_per_second", "run:group"],
        "order": "best/accuracy",
        "sections": [{"name": name, "panels": shown} for name, shown in panels.items()],
    }


def of_project(name: str, overrides: Sequence[str]) -> Spec:
    """The workspace of a whole project, by `project` or `entity/project`.

    Raises:
        HarnessError: it is no project, or overrides are given, of which a project has none.
    """
    entity, _, project = name.rpartition("/")
    if overrides:
        what = f'"{overrides[0]}" changes a recipe, and "{name}" is a project'
        raise HarnessError(what, hint="Give a recipe: a file *.yaml.")
    if not project or "/" in entity or set(name) & set("\\#?%:"):
        raise HarnessError(f'"{name}" is no project', hint="Give project, entity/project, or a recipe: a file *.yaml.")
    return specification({"tracking": {"project": project, "entity": entity or None}, "ema": {"decay": 1}})


def write_workspace(spec: Spec) -> str:
    """Save the specification as a new view of its project, and return the view's address.

    Raises:
        HarnessError: the extra or a key is missing, or the server does not take workspaces.
    """
    from harness.tracking.wandb_sync import entity_for

    if importlib.util.find_spec("wandb_workspaces") is None:
        hint = "pip install '.[dashboard]'; --print shows the specification without it."
        raise HarnessError("writing dashboards needs the package wandb-workspaces", hint=hint)
    workspace = build_workspace({**spec, "entity": entity_for(spec["entity"])})
    try:
        workspace.save()
        return str(workspace.url)
    except Exception as error:  # the package lets through whatever its client raises
        what = f"the server does not take the workspace: {type(error).__name__}: {error}"
        hint = "wandb.ai and W&B's own servers do, openwandb does not; --print shows what would be written."
        raise HarnessError(what, where=base_url(), hint=hint, exit_code=EXIT_FAILED) from None


def build_workspace(spec: Spec) -> Any:
    """The package's own object for a specification; nothing is sent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wandb_workspaces.expr as expressions
        import wandb_workspaces.workspaces as workspaces
    best_first = expressions.Ordering(expressions.Summary(spec["order"]), ascending=False)
    return workspaces.Workspace(
        entity=spec["entity"],
        project=spec["project"],
        name=spec["name"],
        sections=[
            workspaces.Section(name=section["name"], panels=list(map(_panel, section["panels"])), is_open=True)
            for section in spec["sections"]
        ],
        settings=workspaces.WorkspaceSettings(x_axis="Step", group_by_prefix="first"),
        runset_settings=workspaces.RunsetSettings(order=[best_first], pinned_columns=spec["columns"]),
    )


def _lines(title: str, *metrics: str, log_y: bool = False) -> Spec:
    return {"kind": "line", "title": title, "x": STEP_METRIC, "y": list(metrics), "log_y": log_y}


def _panel(panel: Spec) -> Any:
    import wandb_workspaces.reports.v2 as reports

    if panel["kind"] == "line":
        return reports.LinePlot(title=panel["title"], x=panel["x"], y=panel["y"], log_y=panel["log_y"])
    if panel["kind"] == "scalar":
        metric = reports.SummaryMetric(panel["metric"])
        return reports.ScalarChart(title=panel["title"], metric=metric, groupby_aggfunc=panel["aggregate"])
    return reports.WeavePanelSummaryTable(table_name=panel["table"])
