"""A small recipe that trains in about a second, and a way to run it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main

TINY = """
seed: 0
data:
  source: synthetic
  synthetic: {train_images: 100, test_images: 37, num_classes: 4}
  loader: device
  crop_padding_px: 2
  flip: random
model:
  name: dual_branch
  args: {widths: [[4, 8], [8]], transition_widths: [8], head_width: 8, dropout: 0.2}
training: {epochs: 2, global_batch_size: 16}
optimizer: {lr: 0.05}
checkpoint: {keep_last: 10}
tracking: {wandb: disabled, log_every_steps: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


Train = Callable[..., Path]


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Train:
    """`train("run", "training.epochs=1", resume=…)` trains the small recipe and returns the run directory."""

    def run(name: str, *overrides: str, resume: str = "never", expect: int = 0) -> Path:
        directory = tmp_path / name
        code = main(["train", str(tiny), *overrides, "--run-dir", str(directory), "--resume", resume])
        assert code == expect
        return directory

    return run


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def metrics(run: Path, kind: str = "step", split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["kind"] == kind and r["split"] == split]
