"""What this machine has, and whether its kernels compute what they should."""

from __future__ import annotations

from typing import Any

from harness.data.loaders import ffcv_available
from harness.distributed.runtime import distributed_context, provenance
from harness.errors import HarnessError
from harness.files import cache_directory, data_directories
from harness.recipe import Recipe
from harness.tracking.wandb_run import resolve_mode
from harness.training.build import Network, build_network


def examine() -> dict[str, Any]:
    """Facts about code, libraries and machine, JSON-able."""
    try:
        data: list[str] | str = [str(p) for p in data_directories()]
    except HarnessError as error:
        data = error.render()
    facts = provenance(world_size=1)
    del facts["command"], facts["started"], facts["world_size"]
    return {
        **facts,
        "ffcv": "installed" if ffcv_available() else "missing: pip install '.[ffcv]', or data.loader=device",
        "data_folders": data,
        "cache_folder": str(cache_directory()),
        "wandb_mode": resolve_mode("auto"),
    }


def examine_network(recipe: Recipe) -> Network:
    """The recipe's network with every distinct layer shape checked on this machine, remembering nothing."""
    with distributed_context(precision=recipe.training.precision, seed=recipe.seed) as runtime:
        return build_network(recipe, recipe.data.num_classes or 10, device=runtime.device, remember=False)


def render(facts: dict[str, Any]) -> str:
    """The facts as lines, nested ones indented."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {k:<14}{v}" for k, v in value.items()]
        else:
            lines.append(f"{key:<16}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "\n".join(lines)
