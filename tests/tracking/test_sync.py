"""`harness track sync`: what it refuses, and what it does about a history that cannot be added to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from harness.cli import main
from harness.files import LOCK
from harness.tracking.rows import row_number
from tests.conftest import ROOT
from tests.faults.check import records
from tests.faults.wandb_server import WandbServer, environment
from tests.tracking.door import Door
from tests.tracking.test_rows import record

RECORDS = [record("step", "train", step, loss=1 / step, time_unix_seconds=step) for step in (1, 2, 3)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after three steps, and no key."""
    path = tmp_path / "runs" / "small" / "one"
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("name: small\n")
    (path / "provenance.json").write_text(json.dumps({"wandb_run_id": f"t{tmp_path.name}"[:20], "starts": []}))
    write(path, RECORDS)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return path


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(capsys: pytest.CaptureFixture[str], run: Path, *options: str, code: int) -> str:
    assert main(["track", "sync", str(run), *options]) == code
    out, err = capsys.readouterr()
    assert code == 0 or "HINT:" in err
    return out + err


def test_what_is_refused(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no W&B API key" in said(capsys, run, code=2)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    assert "the W&B server does not answer" in said(capsys, run, code=1)
    with FileLock(run / LOCK):
        assert "the run is still going" in said(capsys, run, code=2)
    assert "there is no such run" in said(capsys, run.parent / "two", code=2)
    write(run, [])
    assert "there is nothing to upload" in said(capsys, run, code=2)
    write(run, RECORDS)
    (run / "provenance.json").unlink()
    assert "provenance.json is missing" in said(capsys, run, code=2)


def test_the_key_is_asked_for_first_where_the_recipe_names_an_entity(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "recipe.yaml").write_text("name: small\ntracking: {entity: team}\n")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "there is no W&B API key" in said(capsys, run, code=2)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("recipe.yaml", "name: small\ntracking: 5\ndata: x\n", "recipe.yaml is broken: data, tracking must be"),
        ("provenance.json", '{"wandb_run_id": 5, "starts": []}', "provenance.json has no wandb_run_id"),
        ("provenance.json", '{"wandb_run_id": "x", "starts": ["y"]}', "there is no W&B API key"),
        ("provenance.json", '{"wandb_run_id": "x", "starts": {"world_size": 2}}', "there is no W&B API key"),
        (
            "metrics.jsonl",
            '{"step": 1}\n{"step": 2, "kind": "epoch", "split": "dev"}\n',
            "no records that this version",
        ),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "kind": "epoch", "split": "test"}\n', "1 records are of another"),
    ],
)
def test_what_another_version_wrote_is_told_without_a_traceback(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, expected: str
) -> None:
    (run / name).write_text(text)
    assert expected in said(capsys, run, code=2)


@pytest.mark.slow
def test_what_is_beside_the_curves_and_did_not_arrive_is_told_and_tried_again(
    run: Path, wandb_server: WandbServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (environment(wandb_server.port) | {"WANDB_ENTITY": "team"}).items():
        monkeypatch.setenv(name, value)
    (run / "recipe.yaml").write_text("name: small\ntraining: {epochs: 1}\ntracking: {artifacts: all}\n")
    (run / "result.json").write_text('{"accuracy": 0.5}')  # which does not say what the best checkpoint is
    for sent in (3, 0):
        text = said(capsys, run, code=0)
        assert "WARNING" in text
        assert "W&B goes without the checkpoints: KeyError" in text
        assert f": sent {sent} of 3 records; its history equals metrics.jsonl" in text
        assert "team/dual-branch-harness/" in text  # where W&B's client sends it by WANDB_ENTITY


def test_one_runs_trouble_stops_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", "sync", str(run.parent / "two"), str(run)]) == 2
    err = capsys.readouterr().err
    assert "there is no such run" in err
    assert "there is no W&B API key" in err


def test_a_new_id_is_noted_by_one_upload_alone(
    run: Path, wandb_server: WandbServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(wandb_server.port).items():
        monkeypatch.setenv(name, value)
    before = (run / "provenance.json").read_text()
    (run / "wandb").mkdir()
    with FileLock(run / "wandb" / LOCK):
        assert "another process uploads this run" in said(capsys, run, "--rebuild", code=1)
    assert (run / "provenance.json").read_text() == before  # the id that the other one uploads to


def test_where_nothing_can_be_noted_nothing_is_sent(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "wandb").write_text("a file where the folder should be")
    assert "wandb: cannot be used as the folder of W&B's files" in said(capsys, run, code=2)


@pytest.mark.slow
def test_two_uploads_at_once_send_each_row_once(run: Path, wandb_server: WandbServer) -> None:
    """Each asks what is missing and sends it; W&B would keep both, and no later upload could mend that."""
    env = os.environ | environment(wandb_server.port) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "harness", "track", "sync", str(run)]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], texts
    assert any("another process uploads this run" in text for text in texts)
    run_id = json.loads((run / "provenance.json").read_text())["wandb_run_id"]
    assert [row["_step"] for row in wandb_server.history(run_id)] == [row_number(r) for r in RECORDS]


def test_an_address_that_is_no_web_server_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:port")
    assert "does not answer (InvalidURL: nonnumeric port: 'port')" in said(capsys, run, code=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        other = threading.Thread(target=greet)
        other.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert "does not answer (BadStatusLine: SSH-2.0-OpenSSH_9.2" in said(capsys, run, code=1)
        other.join(10)


@pytest.mark.slow
def test_a_growing_run_is_added_to_and_another_history_is_rebuilt(
    run: Path, wandb_server: WandbServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(wandb_server.port).items():
        monkeypatch.setenv(name, value)
    run_id = json.loads((run / "provenance.json").read_text())["wandb_run_id"]
    write(run, RECORDS[:2])
    assert "sent 2 of 2 records; its history equals metrics.jsonl" in said(capsys, run, code=0)
    write(run, RECORDS)
    assert "sent 1 of 3 records" in said(capsys, run, code=0)
    assert "is complete: 3 records; nothing was sent" in said(capsys, run, code=0)
    assert [row["_step"] for row in wandb_server.history(run_id)] == [row_number(r) for r in RECORDS]
    write(run, [RECORDS[0], {**RECORDS[1], "loss": 9.0}])  # resumed from step 1 with other settings, say
    text = said(capsys, run, code=2)
    assert "it has 1 rows that metrics.jsonl has not; it has other values in 1 rows" in text
    assert "--rebuild" in text
    assert "sent 2 of 2 records" in said(capsys, run, "--rebuild", code=0)
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["wandb_run_ids_before"] == [run_id]
    assert len(wandb_server.history(run_id)) == 3  # the old one stays as it was
    rows = wandb_server.history(provenance["wandb_run_id"])
    assert [row["train/loss"] for row in rows] == [r["loss"] for r in records(run)]
    assert "nothing was sent" in said(capsys, run, code=0)


@pytest.fixture
def door(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    made = Door(wandb_server.port)
    for name, value in environment(made.port).items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@pytest.mark.slow
def test_the_summary_is_of_all_records_and_not_of_those_sent_last(
    run: Path, door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [record("epoch", "test", step, accuracy=a, loss=1 - a) for step, a in ((4, 0.75), (8, 0.5))]
    for count in (1, 2):
        write(run, found[:count])
        assert f"sent 1 of {count} records" in said(capsys, run, code=0)
    last = door.summaries[-1]
    assert (last["test/accuracy"], last["test/loss"]) == ({"max": 0.75}, {"min": 0.25})
    assert (last["best/accuracy"], last["best/epoch"], last["step"]) == (0.75, 1, 8)
