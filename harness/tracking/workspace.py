"""Write a dashboard's specification to W&B, with the package wandb-workspaces."""

from __future__ import annotations

import warnings
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError
from harness.tracking import wandb_server


def write_workspace(spec: dict[str, Any]) -> str:
    """Save the specification as a new view of its project.

    Returns:
        The view's address.

    Raises:
        HarnessError: the extra or a key is missing, or the server does not take workspaces.
    """
    workspace = build_workspace(spec, entity=lambda: wandb_server.entity_for(spec["entity"]))
    try:
        workspace.save()
        return str(workspace.url)
    except Exception as error:  # the package lets through whatever its client raises
        raise HarnessError(
            f"the server does not take the workspace: {type(error).__name__}: {error}",
            where=wandb_server.base_url(),
            hint="wandb.ai and W&B's own servers do, openwandb does not; --print shows what would be written.",
            exit_code=EXIT_FAILED,
        ) from None


def build_workspace(spec: dict[str, Any], *, entity: Any) -> Any:
    """The package's own object for a specification; nothing is sent.

    Args:
        entity: its name, or a function that finds it.

    Raises:
        HarnessError: the extra is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wandb_workspaces.expr as expressions
            import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise HarnessError(
            "writing dashboards needs the package wandb-workspaces",
            hint="pip install '.[dashboard]'; --print shows the specification without it.",
        ) from None
    return workspaces.Workspace(
        entity=entity() if callable(entity) else entity,
        project=spec["project"],
        name=spec["name"],
        sections=[
            workspaces.Section(name=s["name"], panels=[_panel(p) for p in s["panels"]], is_open=True)
            for s in spec["sections"]
        ],
        settings=workspaces.WorkspaceSettings(x_axis="Step", group_by_prefix="first"),
        runset_settings=workspaces.RunsetSettings(
            order=[expressions.Ordering(expressions.Summary(spec["order"]), ascending=False)],
            pinned_columns=spec["columns"],
        ),
    )


def _panel(panel: dict[str, Any]) -> Any:
    import wandb_workspaces.reports.v2 as reports

    if panel["kind"] == "line":
        return reports.LinePlot(title=panel["title"], x=panel["x"], y=panel["y"], log_y=panel["log_y"])
    if panel["kind"] == "scalar":
        metric = reports.SummaryMetric(panel["metric"])
        return reports.ScalarChart(title=panel["title"], metric=metric, groupby_aggfunc=panel["aggregate"])
    return reports.WeavePanelSummaryTable(table_name=panel["table"])
