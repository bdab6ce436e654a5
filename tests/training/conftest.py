"""A small recipe that trains in about a second, and a way to run it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main

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
