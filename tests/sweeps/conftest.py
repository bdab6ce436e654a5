from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def sweep(tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sweep.yaml` with the module's SWEEP, next to `tiny.yaml` in the working directory."""
    path = tiny.with_name("sweep.yaml")
    path.write_text(request.module.SWEEP)
    monkeypatch.chdir(tiny.parent)
    return path


def finish(run: Path, accuracy: float = 0.5) -> None:
    """A finished run, as far as sweeps look; its accuracy was 0.1 higher an epoch before."""
    run.mkdir(parents=True)
    record = {"kind": "epoch", "split": "test", "step": 1, "epoch": 1, "accuracy": accuracy, "loss": 1 - accuracy}
    better = {**record, "accuracy": accuracy + 0.1, "step": 0, "epoch": 0}
    (run / "metrics.jsonl").write_text(f"{json.dumps(better)}\n{json.dumps(record)}\n")
    (run / "result.json").write_text(json.dumps({"accuracy": accuracy, "world_size": 2}))
