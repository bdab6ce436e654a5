"""A sweep on a W&B server: its configuration, and the agent that asks the server for the next point.

The server samples; what it draws reaches every rank as `key=value` on the command line of the training that the agent
starts, and not through the memory of the rank that speaks with the server.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from harness.errors import HarnessError, ManyErrors
from harness.launching.training import Ranks, loader_override
from harness.recipe.document import parse_value
from harness.sweeps.plan import Plan
from harness.sweeps.points import override_text, whole_numbers
from harness.sweeps.run import Trainer
from harness.sweeps.spec import Metric, Parameter

VALUES_OF_POINT = "${args_no_hyphens}"  # the agent puts `key=value …` in its place


def configuration(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """The sweep in the words of W&B (docs.wandb.ai, "Define a sweep configuration").

    A grid is the same one; random points are drawn by the server, and seeds are one more parameter.

    Raises:
        HarnessError: the metric's or parameters' values cannot be given to the agent's command line as they are.
    """
    sweep = plan.file.sweep
    _refuse_what_changes_on_the_way(plan)
    parameters = {key: _parameter(key, parameter) for key, parameter in sweep.parameters.items()}
    if sweep.seeds is not None:
        parameters["seed"] = {"values": list(sweep.seeds)}
    words = ["train", str(plan.file.recipe_path.absolute())]
    words += [override_text(key, value) for key, value in sweep.overrides.items()]
    words += loader_override(plan.trials[0].recipe)
    variables = [f"{name}={value}" for name, value in ranks.variables().items()]
    found: dict[str, Any] = {
        "name": sweep.name,
        "method": sweep.method,
        "metric": _metric(sweep.metric),
        "parameters": parameters,
        "command": ["${env}", *variables, *ranks.command(words), VALUES_OF_POINT],
    }
    if sweep.points is not None:
        found["run_cap"] = len(plan.trials)
    return found


def create(plan: Plan, ranks: Ranks) -> str:
    """Create the sweep on the server; its id.

    Raises:
        HarnessError: the server cannot be reached, or does not take the sweep.
    """
    from harness.tracking.wandb_sweep import create_sweep

    tracking = plan.trials[0].recipe.tracking
    return create_sweep(configuration(plan, ranks), project=tracking.project, entity=tracking.entity)


def run_agent(plan: Plan, sweep_id: str) -> int:
    """W&B's agent: trains point after point until the server has none left; stop signals reach the training.

    Args:
        sweep_id: as `create` gave it, or `entity/project/id`.

    Returns:
        The agent's exit code.
    """
    tracking = plan.trials[0].recipe.tracking
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", "--project", tracking.project]
    command += ["--entity", tracking.entity] if tracking.entity else []
    with Trainer(quiet=False) as trainer:
        return trainer.train([*command, sweep_id], {})


def _metric(metric: Metric) -> dict[str, str]:
    """By the names under which the trainings log it."""
    key = f"epoch_{metric.key}" if metric.split == "train" else metric.key
    return {"name": f"{metric.split}/{key}", "goal": metric.goal}


def _parameter(key: str, parameter: Parameter) -> Mapping[str, Any]:
    if parameter.values is not None:
        return {"values": list(parameter.values)}
    whole = whole_numbers(key, parameter)
    if parameter.scale == "log":
        shape: dict[str, Any] = {"distribution": "log_uniform_values"}
        if whole:
            shape = {"distribution": "q_log_uniform_values", "q": 1}
        return {**shape, "min": parameter.min, "max": parameter.max}
    if whole:
        low, high = math.ceil(parameter.min or 0), math.floor(parameter.max or 0)
        return {"distribution": "int_uniform", "min": low, "max": high}
    return {"distribution": "uniform", "min": parameter.min, "max": parameter.max}


def _refuse_what_changes_on_the_way(plan: Plan) -> None:
    """The agent writes values as Python prints them; what a recipe would read otherwise cannot be swept there."""
    errors = []
    for key, parameter in plan.file.sweep.parameters.items():
        for value in parameter.values or ():
            try:
                arrives = parse_value(str(value), key) == value
            except HarnessError:
                arrives = False
            if not arrives:
                errors.append(
                    HarnessError(
                        f"{key}: {value!r} would not reach the training through W&B's agent as it is",
                        where=plan.file.place_of(("parameters", key)),
                        hint="Use --local or --slurm, or put the value into overrides.",
                    )
                )
    if errors:
        raise ManyErrors(str(plan.file.path), errors)
