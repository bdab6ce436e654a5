"""A W&B server that dies must not hold up the end of a training; needs openwandb, see tests/faults/wandb_server.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from harness.tracking import wandb_tracker
from harness.tracking.wandb_tracker import WandbTracker
from tests.faults.fault import NotHere
from tests.faults.wandb_server import WandbServer, environment


def test_the_end_does_not_wait_for_a_dead_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        server = WandbServer(tmp_path / "server", tmp_path / "log")
    except NotHere as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(wandb_tracker, "_FINISH_TIMEOUT_SECONDS", 4)
    for name, value in environment(server.port).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    try:
        tracker = WandbTracker(
            mode="online",
            directory=tmp_path,
            run_id="abc12345",
            name="n",
            project="p",
            entity=None,
            group=None,
            tags=(),
            config={},
            warn=said.append,
        )
    finally:
        server.kill()
    assert said == []
    tracker.log({"kind": "step", "split": "train", "step": 1, "epoch": 0.1, "loss": 1.0})
    begin = time.monotonic()
    tracker.finish({"accuracy": 1.0})
    assert time.monotonic() - begin < 60
    assert "TimeoutError" in said[0]
    sys.modules["wandb"].teardown()
