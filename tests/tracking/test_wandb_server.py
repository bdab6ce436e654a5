"""What a W&B server does at the end of a training, and what it says of files that it has not."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from harness.tracking.extras import Extras
from harness.tracking.identity import Identity
from harness.tracking.wandb_server import read_history
from harness.tracking.wandb_tracker import UPLOADED, WandbTracker
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


def test_extras_that_did_not_arrive_are_left_to_sync(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("no space left")

    for name, value in environment(wandb_server.port).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    tracker = WandbTracker(
        mode="online",
        directory=tmp_path,
        run_id="without-extras",
        identity=Identity(None, "p", "n", "g", "train", ()),
        config={},
        warn=said.append,
        extras=Extras(answers=fail),  # type: ignore[arg-type]
    )
    tracker.finish({"accuracy": 1.0})
    assert said == ["W&B goes without the predictions table: OSError: no space left"]
    assert tracker.delivered
    assert json.loads((tmp_path / "wandb" / UPLOADED).read_text())["finished"] is False


class _Refusing(BaseHTTPRequestHandler):
    """As storage behind W&B that is given a header it does not know."""

    def do_GET(self) -> None:
        self.send_response(400)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_history_that_is_not_given_as_a_file_is_no_dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    for name, value in environment(server.server_address[1]).items():
        monkeypatch.setenv(name, value)
    try:
        assert read_history("e", "p", "r") is None
    finally:
        sys.modules["wandb"].teardown()
        server.shutdown()
        server.server_close()
        thread.join()
