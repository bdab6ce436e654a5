"""`harness track sync`: what it refuses, what it sends, and what it does about a history that cannot be added to."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from harness.cli import main
from harness.files import LOCK
from harness.tracking.wandb_run import row_number, values_of
from harness.tracking.wandb_sync import first_difference
from tests.faults.check import differences, reached, records
from tests.faults.runs import Stage
from tests.faults.wandb_server import WandbServer, environment
from tests.tracking.conftest import record, rows_of, wandb_id
from tests.tracking.door import Door

RECORDS = [record("step", "train", s, loss=1 / s, images_per_second=s, time_unix_seconds=s) for s in (1, 2, 3)]
ROWS = [{"_step": row_number(r), "_runtime": 1.0, **values_of(r)} for r in RECORDS]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was stopped after three steps."""
    path = tmp_path / "runs" / "small" / "one"
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("name: small\n")
    (path / "provenance.json").write_text(json.dumps({"wandb_run_id": f"t{tmp_path.name}"[:20], "starts": []}))
    write(path, RECORDS)
    return path


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(capsys: pytest.CaptureFixture[str], run: Path, *options: str, code: int) -> str:
    assert main(["track", "sync", str(run), *options]) == code
    out, err = capsys.readouterr()
    assert code == 0 or "HINT:" in err
    return out + err


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        (ROWS, None),
        (ROWS[:1], None),
        ([{**row, "perf/images_per_second": 1.0, "_timestamp": 9.0} for row in ROWS], None),  # measured again
        ([{**row, "train/grad_norm": None} for row in ROWS], None),
        ([ROWS[0], ROWS[2]], 3),
        ([*ROWS, ROWS[2]], 3),
        ([{**ROWS[0], "_step": 5}, *ROWS], 1),
        ([ROWS[0], {**ROWS[1], "train/loss": 0.9}, ROWS[2]], 2),
        ([{**ROWS[0], "train/loss": "NaN"}, *ROWS[1:]], 1),
    ],
)
def test_a_history_that_can_be_added_to_is_the_beginning_of_the_records(
    rows: list[dict[str, Any]], step: int | None
) -> None:
    assert first_difference(RECORDS, rows) == step


def test_what_is_not_finite_is_equal_to_itself() -> None:
    made = record("step", "train", 1, loss="nan", grad_norm="inf")
    row = {"_step": 4, "step": 1, "epoch": 0.25, "train/loss": "NaN", "train/grad_norm": "Infinity"}
    assert first_difference([made], [row]) is None


def test_what_is_refused(
    run: Path, logged_out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "recipe.yaml").write_text("name: small\ntracking: {entity: team}\n")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    assert "there is no W&B API key" in said(capsys, run, code=2)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "the W&B server does not answer" in said(capsys, run, code=1)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:port")
    assert "does not answer (InvalidURL: nonnumeric port: 'port')" in said(capsys, run, code=1)
    with FileLock(run / LOCK):
        assert "the run is still going" in said(capsys, run, code=2)
    two = said(capsys, run.parent / "two", str(run), code=2)
    assert "there is no such run" in two
    assert "does not answer" in two  # one run's trouble stops no other
    write(run, [])
    assert "there is nothing to upload" in said(capsys, run, code=2)
    write(run, RECORDS)
    (run / "provenance.json").unlink()
    assert "provenance.json is missing" in said(capsys, run, code=2)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("recipe.yaml", "name: small\ntracking: 5\ndata: x\n", "recipe.yaml is broken: data, tracking must be"),
        ("provenance.json", '{"wandb_run_id": 5, "starts": []}', "provenance.json has no wandb_run_id"),
        ("provenance.json", '{"wandb_run_id": "x", "starts": ["y"]}', "there is no W&B API key"),
        ("provenance.json", '{"wandb_run_id": "x", "starts": {"world_size": 2}}', "there is no W&B API key"),
        ("metrics.jsonl", '{"step": 2, "kind": "epoch", "split": "dev"}\n', "no records that this version"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "kind": "epoch", "split": "test"}\n', "1 records are of another"),
        ("wandb", "a file where the folder should be", "wandb: cannot be used as the folder of W&B's files"),
    ],
)
def test_what_another_version_wrote_is_reported_without_a_traceback(
    run: Path, logged_out: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, expected: str
) -> None:
    (run / name).write_text(text)
    assert expected in said(capsys, run, code=2)


def test_a_new_id_is_noted_by_one_upload_alone(run: Path, door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """Each asks what is missing and sends it; W&B would keep both, and no later upload could change that."""
    before = wandb_id(run)
    (run / "wandb").mkdir()
    with FileLock(run / "wandb" / LOCK):
        assert "another process uploads this run" in said(capsys, run, "--rebuild", code=1)
    assert wandb_id(run) == before  # the id that the other one uploads to


@pytest.mark.slow
def test_artifacts_that_did_not_arrive_are_reported_and_tried_again(
    run: Path, door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "team")
    (run / "recipe.yaml").write_text("name: small\ntraining: {epochs: 1}\ntracking: {artifacts: all}\n")
    (run / "result.json").write_text('{"accuracy": 0.5}')  # which does not say what the best checkpoint is
    for sent in (3, 0):
        text = said(capsys, run, code=0)
        assert "WARNING" in text
        assert "W&B goes without the checkpoints: KeyError" in text
        assert f": sent {sent} of 3 records; its history equals metrics.jsonl" in text
        assert "team/dual-branch-harness/" in text  # where W&B's client sends it by WANDB_ENTITY


@pytest.mark.slow
def test_a_growing_run_is_added_to_and_another_history_is_rebuilt(
    run: Path, wandb_server: WandbServer, door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    first = wandb_id(run)
    tested = [{"accuracy": a, "loss": 1 - a, "time_unix_seconds": 9} for a in (0.75, 0.5)]
    grown = [RECORDS[0], record("epoch", "test", 4, **tested[0]), record("epoch", "test", 8, **tested[1])]
    write(run, grown[:2])
    assert "sent 2 of 2 records; its history equals metrics.jsonl" in said(capsys, run, code=0)
    write(run, grown)
    assert "sent 1 of 3 records" in said(capsys, run, code=0)
    assert "is complete: 3 records; nothing was sent" in said(capsys, run, code=0)
    assert [row["_step"] for row in wandb_server.history(first)] == [row_number(r) for r in grown]
    last = door.summaries[-1]  # is of all records, and not of those sent last
    assert (last["test/accuracy"], last["test/loss"]) == ({"max": 0.75}, {"min": 0.25})
    assert (last["best/accuracy"], last["best/epoch"], last["step"]) == (0.75, 1, 8)

    write(run, [RECORDS[0], {**grown[1], "loss": 9.0}])  # resumed from step 1 with other settings, say
    text = said(capsys, run, code=2)
    assert "the server's history of this run is another one than metrics.jsonl from step 4 on" in text
    assert "--rebuild" in text
    assert "sent 2 of 2 records" in said(capsys, run, "--rebuild", code=0)
    assert json.loads((run / "provenance.json").read_text())["wandb_run_ids_before"] == [first]
    assert len(wandb_server.history(first)) == 3  # the old one stays as it was
    assert wandb_server.history(wandb_id(run)) == rows_of(run)
    assert "nothing was sent" in said(capsys, run, code=0)


@pytest.mark.slow
def test_a_rebuild_that_broke_off_is_resumed_and_another_one_begins_where_that_cannot_be(
    run: Path, wandb_server: WandbServer, door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    first = wandb_id(run)
    monkeypatch.setenv("HARNESS_WANDB_TIMEOUT_SECONDS", "15")
    door.refuses["/file_stream"] = 500
    assert "the upload broke off: W&B fails" in said(capsys, run, "--rebuild", code=1)
    second = wandb_id(run)
    door.refuses.clear()
    monkeypatch.delenv("HARNESS_WANDB_TIMEOUT_SECONDS")
    assert "sent 3 of 3 records" in said(capsys, run, "--rebuild", code=0)
    assert wandb_id(run) == second != first
    assert wandb_server.history(second) == rows_of(run)
    (run / "wandb" / "uploaded.json").unlink()  # as if it had broken off again, and the run had changed since
    write(run, [{**RECORDS[0], "loss": 9.0}])
    assert "sent 1 of 1 records" in said(capsys, run, "--rebuild", code=0)
    assert json.loads((run / "provenance.json").read_text())["wandb_run_ids_before"] == [first, second]


def sync(stage: Stage, *runs: Path, env: dict[str, str]) -> tuple[int, str]:
    """The code of `harness track sync` and what it printed."""
    process = stage.harness("track", "sync", *map(str, runs), env=env)
    code = process.wait()
    return code, process.text() + Path(f"{process._err}.out").read_text()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_gets_the_rest_by_sync(mortal_server: WandbServer, stage: Stage) -> None:
    fast = {"HARNESS_WANDB_TIMEOUT_SECONDS": "10", "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.1"}
    env, length = environment(mortal_server.port) | fast, "training.epochs=8"
    undisturbed = stage.reference(length)
    stop = [{"kind": "step", "step": 40, "action": "SIGSTOP"}]
    process = stage.train("tracking.wandb=online", length, env=env, faults=stop)
    while reached(stage.run) < 39:
        time.sleep(0.01)
    time.sleep(1)  # some of it has arrived by now
    mortal_server.kill()
    killed_at = time.monotonic()
    process.send(signal.SIGCONT)
    try:
        assert process.wait(60) == 0, process.text()
        assert time.monotonic() - killed_at < 30
        assert differences(stage.run, undisturbed) == []
        assert process.text().count("W&B") == 1  # one warning
        assert "TimeoutError" in process.text()
        run_id = wandb_id(stage.run)
        assert len(mortal_server.history(run_id)) < len(records(stage.run))
        code, text = sync(stage, stage.run, env=env)
        assert code == 1
        assert "does not answer" in text
    finally:
        mortal_server.start()
    code, text = sync(stage, stage.run, env=env)
    assert code == 0, text
    state, history = mortal_server.runs()[run_id], mortal_server.history(run_id)
    assert history == rows_of(stage.run)
    assert state["summary"]["result/accuracy"] == json.loads((stage.run / "result.json").read_text())["accuracy"]
    code, text = sync(stage, stage.run, env=env)  # once more changes nothing
    assert code == 0
    assert "nothing was sent" in text
    assert (mortal_server.runs()[run_id], mortal_server.history(run_id)) == (state, history)


@pytest.mark.slow
def test_offline_disabled_and_refused_runs_are_uploaded_afterwards(
    wandb_server: WandbServer, door: Door, stage: Stage
) -> None:
    offline, disabled, refused = runs = [stage.folder / name for name in ("offline", "disabled", "refused")]
    env = environment(door.port)
    for run in (offline, disabled):
        assert stage.train(f"tracking.wandb={run.name}", run=run, env=env).wait() == 0
    assert door.asked == []  # nobody was asked
    assert len(list(offline.glob("wandb/offline-run-*"))) == 1
    assert not (disabled / "wandb").exists()
    other_key = environment(door.port, key="f" * 40) | {"HARNESS_WANDB_TIMEOUT_SECONDS": "10"}
    process = stage.train("tracking.wandb=online", run=refused, env=other_key)
    assert process.wait() == 0
    assert time.monotonic() - process.started_at < 60
    assert "W&B stays offline" in process.text()
    assert "Traceback" not in process.text()
    assert differences(refused, stage.reference()) == []
    code, text = sync(stage, refused, env=other_key)
    assert code == 2
    assert "refuses the API key" in text
    assert "HINT: Set WANDB_API_KEY" in text
    code, text = sync(stage, *runs, env=env)
    assert code == 0, text
    assert text.count("its history equals metrics.jsonl") == 3
    for run in runs:
        assert wandb_server.history(wandb_id(run)) == rows_of(run)
    assert len(set(door.values("groupName"))) == 1  # the same settings
    assert set(door.values("jobType")) == {"train"}
