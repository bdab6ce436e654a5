"""Run directories written by hand: what a training of any state, or of another version, may have left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st


def records_of(
    accuracies: Sequence[float], *, steps_per_epoch: int = 10, ema: bool = False, start_unix_seconds: float = 1e9
) -> list[dict[str, Any]]:
    """The records of a training with one test accuracy an epoch."""
    records: list[dict[str, Any]] = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        step, seconds = epoch * steps_per_epoch, start_unix_seconds + 60 * epoch
        at = {"kind": "epoch", "step": step, "epoch": epoch, "time_unix_seconds": seconds}
        middle = {"kind": "step", "step": step - 5, "epoch": epoch - 0.5, "time_unix_seconds": seconds - 30}
        quality = {"loss": 2 - accuracy, "accuracy": accuracy}
        training = {"split": "train", **quality, "images_per_second": 1000.0, "seconds": 50.0}
        records += [{**middle, **training, "lr": 0.1 / epoch}, {**at, **training}, {**at, "split": "test", **quality}]
        if ema:
            records.append({**at, "split": "test_ema", "loss": 1.0, "accuracy": accuracy + 0.01})
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
        last = accuracies[-1] if accuracies else None
        result = {"accuracy": last, "seconds": 100.0, "images_per_second": 900.0, "parameters": 1234}
        (path / "result.json").write_text(json.dumps(result))
    return path


# What may stand in a run's files: nothing that makes sense, or almost something.
ANY_CONTENT = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"{}",
            b"[]",
            b"null",
            b"training: {epochs: .nan}",
            b"training: 3",
            b"seed: .nan",
            b"seed: [1]",
            b"seed: {a: b}",
            b"optimizer: {lr: .inf, args: {? [1, 2] : .nan}}",
            b'{"accuracy": NaN, "seconds": Infinity, "images_per_second": -1, "parameters": "x"}',
            b'{"kind": "epoch", "split": "test", "step": 1, "epoch": 1, "accuracy": -1e308, "loss": 1e308}\n' * 2,
            b'{"kind": "epoch", "split": "train", "step": 1, "epoch": 1e14, "loss": 5e-324}\n',
            b"training: {steps: 1" + b"0" * 400 + b"}",
            b"name: {a: b}",
            b"checkpoint: {best_by: [1]}",
            b'{"kind": "epoch", "split": "test", "step": 1, "epoch": "x", "accuracy": 1}\n',
            b'{"kind": "epoch", "split": "test", "step": 1, "epoch": NaN, "accuracy": 1}\n',
            b'{"kind": "epoch", "split": "test", "step": 1, "epoch": 1, "accuracy": [1]}\n',
            b'{"kind": "epoch", "split": "test", "step": 1, "accuracy": 1' + b"0" * 400 + b"}\n",
            b'{"kind": "epoch", "split": "test", "step": 0, "epoch": 1e400, "time_unix_seconds": "x"}\n',
            b'{"step": true, "epoch": null, "time_unix_seconds": NaN}\n',
            b'{"step": 1, "epoch": 1, "time_unix_seconds": Infinity}\n',
            b"[" * 100_000,
            b"{" * 3_000,
            b"a: &a [*a]",
            b"!!python/object/apply:os.system ['true']",
            b"!!set {a}",
            b"name: 2026-01-01",
        ]
    ),
)


def write_contents(path: Path, recipe: bytes, provenance: bytes, result: bytes, metrics: bytes) -> Path:
    """A run directory whose files hold these bytes; an earlier one is written over."""
    path.mkdir(parents=True, exist_ok=True)
    names = ("recipe.yaml", "provenance.json", "result.json", "metrics.jsonl")
    for name, content in zip(names, (recipe, provenance, result, metrics), strict=True):
        (path / name).write_bytes(content)
    return path
