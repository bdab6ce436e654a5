"""A sweep on a W&B server: its configuration, and the agent that asks the server for the next point.

The server samples; what it draws reaches every rank as `key=value` on the command line of the training that the agent
starts, not through the memory of the rank that talks to the server.
"""

from __future__ import annotations

import sys
from typing import Any

from harness.errors import HarnessError, ManyErrors
from harness.launch.local import Ranks, loader_override
from harness.recipe.document import parse_value
from harness.sweeps.run import Trainer
from harness.sweeps.spec import Parameter, Sweep, ends, override_text

VALUES_OF_POINT = "${args_no_hyphens}"  # the agent puts `key=value …` in its place


def configuration(sweep: Sweep, ranks: Ranks) -> dict[str, Any]:
    """The sweep in W&B's words (docs.wandb.ai, "Define a sweep configuration").

    A grid is the same one; random points are drawn by the server, and seeds are one more parameter.

    Raises:
        HarnessError: values that the agent's command line would change.
    """
    spec = sweep.spec
    errors = [
        sweep.error(
            ("parameters", key),
            f"{key}: {value!r} would not reach the training through W&B's agent as it is",
            "Use --local or --slurm, or put the value into overrides.",
        )
        for key, parameter in spec.parameters.items()
        for value in parameter.values or ()
        if not _arrives(key, value)
    ]
    if errors:
        raise ManyErrors(str(sweep.path), errors)
    parameters = {key: _parameter(key, parameter) for key, parameter in spec.parameters.items()}
    if spec.seeds is not None:
        parameters["seed"] = {"values": list(spec.seeds)}
    words = ["train", str(sweep.recipe_path.absolute())]
    words += [override_text(key, value) for key, value in spec.overrides.items()]
    words += loader_override(sweep.runs[0].recipe)
    variables = [f"{name}={value}" for name, value in ranks.variables().items()]
    # By the names under which trainings log it: `train/loss` is that of a step.
    logged = f"epoch_{spec.metric.key}" if spec.metric.split == "train" else spec.metric.key
    return {
        "name": spec.name,
        "method": spec.method,
        "metric": {"name": f"{spec.metric.split}/{logged}", "goal": spec.metric.goal},
        "parameters": parameters,
        "command": ["${env}", *variables, *ranks.command(words), VALUES_OF_POINT],
        **({"run_cap": len(sweep.runs)} if spec.method == "random" else {}),
    }


def run_agent(sweep: Sweep, sweep_id: str) -> int:
    """Train with W&B's agent until the server has no point left; stop signals reach the training.

    Args:
        sweep_id: the server's, or `entity/project/id`.

    Returns:
        The agent's exit code.
    """
    tracking = sweep.runs[0].recipe.tracking
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", "--project", tracking.project]
    command += ["--entity", tracking.entity] if tracking.entity else []
    with Trainer(quiet=False) as trainer:
        return trainer.train([*command, sweep_id], {})


def _parameter(key: str, parameter: Parameter) -> dict[str, Any]:
    if parameter.values is not None:
        return {"values": list(parameter.values)}
    low, high = ends(key, parameter)
    names = {"linear": ("uniform", "int_uniform"), "log": ("log_uniform_values", "q_log_uniform_values")}
    name = names[parameter.scale][isinstance(low, int)]
    return {"distribution": name, **({"q": 1} if name.startswith("q_") else {}), "min": low, "max": high}


def _arrives(key: str, value: Any) -> bool:
    """Whether a recipe reads the value back from what the agent writes, which is as Python prints it."""
    try:
        return bool(parse_value(str(value), key) == value)
    except HarnessError:
        return False
