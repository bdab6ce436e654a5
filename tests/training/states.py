"""A state as a training writes it into a checkpoint, for tests that write checkpoints themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.training.state import Progress


def whole_state(step: int = 0) -> dict[str, Any]:
    return {
        "progress": replace(Progress(), step=step).to_json(),
        "scaler": None,
        "classes": ["cat", "dog"],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "data_sha256": {"train.beton": "0", "test.beton": "1"},
    }
