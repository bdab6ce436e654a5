"""A W&B server that dies must not hold up the end of a training."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from harness.tracking.identity import Identity
from harness.tracking.wandb_tracker import WandbTracker
from tests.faults.wandb_server import WandbServer, environment


def test_the_end_does_not_wait_for_a_dead_server(
    mortal_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_WANDB_TIMEOUT_SECONDS", "10")
    for name, value in environment(mortal_server.port).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    tracker = WandbTracker(
        mode="online",
        directory=tmp_path,
        run_id="abc12345",
        identity=Identity(None, "p", "n", "g", "train", ()),
        config={},
        warn=said.append,
    )
    mortal_server.kill()
    assert said == []
    tracker.log({"kind": "step", "split": "train", "step": 1, "epoch": 0.1, "loss": 1.0})
    begin = time.monotonic()
    tracker.finish({"accuracy": 1.0})
    assert time.monotonic() - begin < 60
    assert "TimeoutError" in said[0]
    sys.modules["wandb"].teardown()
