"""metrics.jsonl, the console and the real W&B client (offline): what they write; none of them stops a run."""

from __future__ import annotations

import http.server
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harness.tracking import NullTracker, Trackers, wandb_server
from harness.tracking.console import ConsoleTracker
from harness.tracking.extras import Extras
from harness.tracking.identity import Identity
from harness.tracking.jsonl import JsonlTracker, read
from harness.tracking.wandb_server import base_url
from harness.tracking.wandb_tracker import WandbTracker, resolve_mode


def step_record(step: int, loss: float = 1.5) -> dict[str, Any]:
    return {
        "kind": "step",
        "split": "train",
        "step": step,
        "epoch": step / 4,
        "loss": loss,
        "accuracy": 0.5,
        "images_per_second": 1234.5,
        "milliseconds_per_step": 12.0,
    }


TRAIN = {
    "kind": "epoch",
    "split": "train",
    "step": 4,
    "epoch": 1.0,
    "steps": 391,
    "seconds": 38.0,
    "loss": 0.4089,
    "accuracy": 0.90238,
}
TEST = {
    "kind": "epoch",
    "split": "test",
    "step": 4,
    "epoch": 1.0,
    "loss": 0.5928,
    "accuracy": 0.8171,
    "correct": 8171,
    "total": 10000,
}


def test_jsonl_drops_what_a_resumed_run_makes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path)
    for step in (1, 2, 3):
        first.log(step_record(step))
    first.finish(None)
    path.write_text(path.read_text() + '{"step": 4, "loss')  # a crash in the middle of a line
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    second = JsonlTracker(path, from_step=2)
    second.log(step_record(3, loss=float("nan")))
    second.finish(None)
    records = read(path)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert records[-1]["loss"] == "nan"


def console(live: bool, **settings: Any) -> tuple[ConsoleTracker, io.StringIO]:
    stream = io.StringIO()
    tracker = ConsoleTracker(epochs=2, steps_per_epoch=4, total_steps=8, stream=stream, live=live, **settings)
    return tracker, stream


def test_plain_lines_after_each_epoch_are_the_seeds() -> None:
    tracker, stream = console(live=False)
    for step in range(1, 5):
        tracker.tick(step)
        tracker.log(step_record(step))
    tracker.log(TRAIN)
    tracker.log(TEST)
    assert stream.getvalue().splitlines() == [
        "Epoch 1/2  391 steps - 38s 97ms/step - loss: 0.4089 - accuracy: 90.2380%",
        "  test: loss 0.5928, accuracy 8171/10000 (81.71%)",
    ]


def test_plain_step_lines_come_at_a_sane_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("harness.tracking.console.time.monotonic", lambda: now[0])  # ten seconds without waiting
    tracker, stream = console(live=False)
    for step in range(1, 9):
        now[0] += 4.0
        tracker.log(step_record(step))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/8", "6/8"]
    assert "1,234 img/s" in lines[0]
    assert "ETA 00:20" in lines[0]


def test_a_terminal_gets_a_live_line() -> None:
    tracker, stream = console(live=True)
    for step in range(1, 5):
        tracker.tick(step)
        tracker.log(step_record(step))
    tracker.note("a note")
    tracker.log(TEST)
    tracker.finish(None)
    text = stream.getvalue()
    assert "Epoch 1/2" in text
    assert "\r" in text
    assert "a note\n" in text


def test_trackers_hand_everything_on() -> None:
    class Remembering(NullTracker):
        def __init__(self) -> None:
            self.seen: list[object] = []

        def tick(self, step: int) -> None:
            self.seen.append(step)

        def finish(self, result: object) -> None:
            self.seen.append(result)

    one, two = Remembering(), Remembering()
    both = Trackers([one, two])
    both.tick(1)
    both.log(TEST)
    both.note("x")
    both.finish({"a": 1})
    assert one.seen == two.seen == [1, {"a": 1}]


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "disable"}, "offline"),  # sends nothing that was not to be sent
        ("offline", {"WANDB_API_KEY": "x"}, "offline"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_mode(
    setting: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(setting) == expected


def test_netrc_is_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"


def test_the_server_and_key_of_wandb_login_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files are as `wandb login --host http://127.0.0.1:8080` writes them."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1:8080\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_mode("auto") == "offline"
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.write_text("[default]\nbase_url = http://127.0.0.1:8080\n\n")
    assert (base_url(), resolve_mode("auto")) == ("http://127.0.0.1:8080", "online")
    settings.write_text("no settings")
    assert base_url() == "https://api.wandb.ai"


def wandb_tracker(folder: Path, warnings: list[str], **changes: Any) -> WandbTracker:
    settings = {
        "mode": "offline",
        "directory": folder,
        "run_id": "run-1",
        "identity": Identity(None, "project", "name", "group", "train", ("a",)),
        "config": {"seed": 0},
        "warn": warnings.append,
    }
    return WandbTracker(**{**settings, **changes})


def test_an_offline_run_is_written(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = wandb_tracker(tmp_path, warnings)
    tracker.log(step_record(1))
    tracker.log(TEST)
    tracker.finish({"accuracy": 0.5, "ema": None})
    assert warnings == []
    runs = list((tmp_path / "wandb").glob("offline-run-*-run-1"))
    assert len(runs) == 1
    data = next(runs[0].glob("*.wandb")).read_bytes()
    assert b"test/accuracy" in data
    assert b"train/loss" in data
    assert b"perf/milliseconds_per_step" in data


def test_a_mode_that_the_client_does_not_know_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    warnings: list[str] = []
    wandb_tracker(tmp_path, warnings, mode=resolve_mode("auto")).finish({"accuracy": 0.5})
    assert warnings == []
    assert list((tmp_path / "wandb").glob("offline-run-*-run-1"))


def test_no_network_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    warnings: list[str] = []
    tracker = wandb_tracker(tmp_path, warnings, mode="online")
    tracker.log(TEST)
    tracker.finish({"accuracy": 0.5})
    assert warnings == [
        "W&B: http://127.0.0.1:9 does not answer (HARNESS_WANDB_TIMEOUT_SECONDS=SECONDS waits longer)",
        "W&B stays offline; `harness track sync` uploads the run later",
    ]
    (run,) = (tmp_path / "wandb").glob("offline-run-*-run-1")
    assert b"test/accuracy" in next(run.glob("*.wandb")).read_bytes()


def test_a_server_that_says_anything_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose certificate, or TLS, Python does not take: the client may."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for scheme in ("http", "https"):
            monkeypatch.setenv("WANDB_BASE_URL", f"{scheme}://127.0.0.1:{server.server_port}")
            assert wandb_server.answers(within_seconds=20), scheme
        server.shutdown()
        thread.join()
    assert not wandb_server.answers(within_seconds=20)


def test_trouble_is_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracker = wandb_tracker(tmp_path, warnings, mode="sideways")
    tracker.log(step_record(1))
    tracker.finish(None)
    assert len(warnings) == 1
    assert "W&B fails and is left out" in warnings[0]


@pytest.mark.parametrize("text", ["soon", "60000"])
def test_a_time_limit_that_is_none_is_one_warning(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_WANDB_TIMEOUT_SECONDS", text)
    warnings: list[str] = []
    wandb_tracker(tmp_path, warnings).finish(None)
    assert len(warnings) == 1
    assert "HARNESS_WANDB_TIMEOUT_SECONDS: must be a number of seconds above 0 and up to 3600, not" in warnings[0]


def test_what_goes_wrong_beside_the_curves_is_one_warning_each(tmp_path: Path) -> None:
    def fail() -> Any:
        raise OSError("no space left")

    warnings: list[str] = []
    tracker = wandb_tracker(tmp_path, warnings, extras=Extras(model_summary=fail, checkpoints=fail, answers=fail))
    tracker.log(TEST)
    tracker.finish({"accuracy": 0.5})
    assert [text.split(":")[0] for text in warnings] == [
        "W&B goes without the network's summary",
        "W&B goes without the predictions table",
        "W&B goes without the checkpoints",
    ]
    (run,) = (tmp_path / "wandb").glob("offline-run-*-run-1")
    assert b"test/accuracy" in next(run.glob("*.wandb")).read_bytes()  # the curves are there all the same


def test_all_trackers_are_told_of_the_same_record_in_json_lines(tmp_path: Path) -> None:
    tracker = Trackers([JsonlTracker(tmp_path / "m.jsonl")])
    tracker.log(TEST)
    record = json.loads((tmp_path / "m.jsonl").read_text())  # written as it happens, before the end
    assert abs(record.pop("time_unix_seconds") - time.time()) < 60
    assert record == TEST
    tracker.finish(None)
