"""What a run is called on W&B, derived from its resolved recipe; a pure function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_TAG_CHARACTERS = 64  # W&B's limit
# Settings that make no other experiment of it: runs that differ in these alone are one group.
_OF_THE_RUN = ("name", "seed", "tracking", "checkpoint")
_OF_THE_MACHINE = ("path", "loader", "workers")  # of data


@dataclass(frozen=True)
class Identity:
    """Where a run belongs on W&B.

    Attributes:
        entity: user or team; None leaves it to `$WANDB_ENTITY` and the key.
        group: runs that are compared as one, such as seeds.
    """

    entity: str | None
    project: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]


def identity_of(settings: Mapping[str, Any], *, run_id: str, world_size: int) -> Identity:
    """A run's identity; what the recipe's `tracking` section gives wins over what is derived.

    Args:
        settings: the resolved recipe as nested mappings.
        run_id: name of the run directory.
        world_size: ranks of the training.
    """
    tracking = settings.get("tracking") or {}
    recipe = str(settings.get("name") or "run")
    return Identity(
        entity=tracking.get("entity"),
        project=tracking.get("project") or "dual-branch-harness",
        name=tracking.get("run_name") or f"{recipe}-{run_id}",
        group=tracking.get("group") or f"{recipe}-{settings_digest(settings)}",
        job_type=tracking.get("job_type") or "train",
        tags=tuple(tracking.get("tags") or _tags(settings, world_size)),
    )


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of SHA-256 over the settings that make the experiment: seeds have the same."""
    kept = {key: value for key, value in settings.items() if key not in _OF_THE_RUN}
    kept["data"] = {k: v for k, v in (settings.get("data") or {}).items() if k not in _OF_THE_MACHINE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _tags(settings: Mapping[str, Any], world_size: int) -> list[str]:
    def setting(section: str, key: str) -> str:
        return str((settings.get(section) or {}).get(key, "unknown"))

    tags = [
        f"model:{setting('model', 'name')}",
        f"data:{setting('data', 'source')}",
        f"precision:{setting('training', 'precision')}",
        f"ranks:{world_size}",
    ]
    return [tag[:MAX_TAG_CHARACTERS] for tag in tags]
