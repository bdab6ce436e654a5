"""Run directories written by hand: what a training of any state, or of another version, may have left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def records_of(
    accuracies: Sequence[float], *, steps_per_epoch: int = 10, ema: bool = False, start_unix_seconds: float = 1e9
) -> list[dict[str, Any]]:
    """The records of a training with one test accuracy an epoch."""
    records: list[dict[str, Any]] = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        at = {"step": epoch * steps_per_epoch, "epoch": epoch, "time_unix_seconds": start_unix_seconds + 60 * epoch}
        middle = {"step": at["step"] - 5, "epoch": epoch - 0.5, "time_unix_seconds": at["time_unix_seconds"] - 30}
        training = {"loss": 2 - accuracy, "accuracy": accuracy, "images_per_second": 1000.0, "seconds": 50.0}
        records.append({"kind": "step", "split": "train", **middle, **training, "lr": 0.1 / epoch})
        records.append({"kind": "epoch", "split": "train", **at, **training})
        records.append({"kind": "epoch", "split": "test", **at, "loss": 2 - accuracy, "accuracy": accuracy})
        if ema:
            records.append({"kind": "epoch", "split": "test_ema", **at, "loss": 1.0, "accuracy": accuracy + 0.01})
    return records


def write_run(
    path: Path,
    accuracies: Sequence[float] = (0.5, 0.6),
    *,
    settings: dict[str, Any] | None = None,
    finished: bool = True,
    ema: bool = False,
    start_unix_seconds: float = 1e9,
) -> Path:
    """A run directory without checkpoints; returns its path."""
    path.mkdir(parents=True)
    recipe = {"name": path.parent.name, "seed": 0, "training": {"epochs": 2}, **(settings or {})}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / "provenance.json").write_text(json.dumps({"starts": []}))
    records = records_of(accuracies, ema=ema, start_unix_seconds=start_unix_seconds)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        result = {"accuracy": accuracies[-1], "seconds": 100.0, "images_per_second": 900.0, "parameters": 1234}
        (path / "result.json").write_text(json.dumps(result))
    return path
