"""Whole trainings with the real W&B client against a real server: what it holds afterwards is metrics.jsonl."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.tracking.rows import row_number, values_of
from harness.tracking.wandb_server import compare
from tests.conftest import RunRanks
from tests.faults.check import differences, reached, records
from tests.faults.runs import Stage
from tests.faults.wandb_server import WandbServer, environment
from tests.tracking.door import Door

pytestmark = pytest.mark.slow  # client and server take seconds to begin and to end

ONLINE = "tracking.wandb=online"
DIGITS = """
data: {source: digits, loader: device, image_size_px: 8}
model:
  name: dual_branch
  args: {widths: [[4, 8], [8]], transition_widths: [8], head_width: 8, dropout: 0.2}
training: {epochs: 2, global_batch_size: 256}
ema: {decay: 0.5}
checkpoint: {every_epochs: null}
tracking: {wandb: online, log_every_steps: 2}
"""
IMPATIENT = {"HARNESS_WANDB_TIMEOUT_SECONDS": "10"}
AT_ONCE = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.1"}  # the client waits 15 s for more rows else


@pytest.fixture
def door(wandb_server: WandbServer) -> Iterator[Door]:
    made = Door(wandb_server.port)
    yield made
    made.close()


def wandb_id(run: Path) -> str:
    return str(json.loads((run / "provenance.json").read_text())["wandb_run_id"])


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The history that the run's metrics.jsonl stands for, row by row."""
    return [{"_step": row_number(record), **values_of(record)} for record in records(run)]


def sync(stage: Stage, *words: str, env: dict[str, str]) -> tuple[int, str]:
    """The code of `harness track sync` and what it printed."""
    process = stage.harness("track", "sync", *words, env=env)
    code = process.wait()
    return code, process.text() + Path(f"{process._err}.out").read_text()


def test_two_ranks_are_one_run_and_its_history_is_metrics_jsonl(
    wandb_server: WandbServer, run_ranks: RunRanks, tmp_path: Path
) -> None:
    (tmp_path / "two.yaml").write_text(DIGITS)
    run, before = tmp_path / "run", set(wandb_server.runs())
    words = ("-m", "harness", "train", tmp_path / "two.yaml", "--run-dir", run)
    done = run_ranks(2, *words, env=environment(wandb_server.port))
    assert done.returncode == 0, done.stderr
    (run_id,) = set(wandb_server.runs()) - before
    assert run_id == wandb_id(run)
    assert len(records(run)) == 6 + 2 * 3  # log steps; of each epoch the training, raw and averaged weights
    assert wandb_server.history(run_id) == rows_of(run)
    there = wandb_server.runs()[run_id]
    assert there["state"] == "finished"
    assert there["name"] == "two-run"
    assert there["tags"] == ["model:dual_branch", "data:digits", "precision:no", "ranks:2"]
    assert there["config"]["training"]["value"]["global_batch_size"] == 256
    best = json.loads((run / "result.json").read_text())["best"]
    assert [there["summary"][f"best/{key}"] for key in ("accuracy", "epoch")] == [best["accuracy"], best["epoch"]]
    assert "Total params: " in wandb_server.files(run_id)["model_summary.txt"].read_text()


def test_a_server_that_dies_and_comes_back_gets_the_rest_by_sync(mortal_server: WandbServer, stage: Stage) -> None:
    env = environment(mortal_server.port) | IMPATIENT | AT_ONCE
    length = "training.epochs=8"
    undisturbed = stage.reference(length)
    process = stage.train(ONLINE, length, env=env, faults=[{"kind": "step", "step": 40, "action": "SIGSTOP"}])
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
        run_id = wandb_id(stage.run)
        assert len(mortal_server.history(run_id)) < len(records(stage.run))
        code, said = sync(stage, str(stage.run), env=env)
        assert code == 1
        assert "does not answer" in said
    finally:
        mortal_server.start()
    code, said = sync(stage, str(stage.run), env=env)
    assert code == 0, said
    assert mortal_server.history(run_id) == rows_of(stage.run)
    state, history = mortal_server.runs()[run_id], mortal_server.history(run_id)
    assert state["summary"]["result/accuracy"] == json.loads((stage.run / "result.json").read_text())["accuracy"]
    code, said = sync(stage, str(stage.run), env=env)  # once more changes nothing
    assert code == 0
    assert "nothing was sent" in said
    assert (mortal_server.runs()[run_id], mortal_server.history(run_id)) == (state, history)


@pytest.mark.parametrize("ahead", [True, False], ids=["server-ahead-of-checkpoint", "server-behind-checkpoint"])
def test_a_killed_run_goes_on_without_a_lost_or_doubled_row(
    ahead: bool, wandb_server: WandbServer, stage: Stage
) -> None:
    env = environment(wandb_server.port)
    now = AT_ONCE if ahead else {}
    process = stage.train(ONLINE, env=env | now, faults=[{"kind": "step", "step": 12, "action": "SIGSTOP"}])
    deadline = time.monotonic() + 120
    while reached(stage.run) < 11 or (ahead and last_step(wandb_server, stage.run) < 11):
        time.sleep(0.05)
        assert time.monotonic() < deadline, process.text()
    process.send(signal.SIGKILL)
    process.wait()
    shutil.rmtree(stage.run / "checkpoints" / "step_9", ignore_errors=True)  # so that more is done again
    held = last_step(wandb_server, stage.run)
    process = stage.train(ONLINE, env=env | AT_ONCE)
    assert process.wait() == 0, process.text()
    from_step = json.loads((stage.run / "provenance.json").read_text())["starts"][-1]["from_step"]
    assert 0 < from_step < 11
    assert held >= 11 if ahead else held < from_step
    rows = wandb_server.history(wandb_id(stage.run))
    assert [row["_step"] for row in rows] == [row["_step"] for row in rows_of(stage.run)]
    found = compare(records(stage.run), rows)  # all but times, which the second start has anew
    assert (found.missing, found.wrong) == ((), ())
    assert differences(stage.run, stage.reference()) == []


def last_step(server: WandbServer, run: Path) -> int:
    """The last optimizer step that the server has of a run."""
    return max((row["step"] for row in server.history(wandb_id(run))), default=0)


def test_a_refused_key_is_a_warning_and_sync_says_so(door: Door, stage: Stage) -> None:
    env = environment(door.port, key="f" * 40) | IMPATIENT
    process = stage.train(ONLINE, env=env)
    assert process.wait() == 0
    assert time.monotonic() - process.started_at < 60
    assert "W&B stays offline" in process.text()
    assert "Traceback" not in process.text()
    assert differences(stage.run, stage.reference()) == []
    code, said = sync(stage, str(stage.run), env=env)
    assert code == 2
    assert "refuses the API key" in said
    assert "HINT: Set WANDB_API_KEY" in said


def test_offline_and_disabled_runs_are_uploaded_afterwards(wandb_server: WandbServer, door: Door, stage: Stage) -> None:
    offline, disabled = stage.folder / "offline", stage.folder / "disabled"
    env = environment(door.port)
    for run, mode in ((offline, "offline"), (disabled, "disabled")):
        assert stage.train(f"tracking.wandb={mode}", run=run, env=env).wait() == 0
    assert door.asked == []  # nobody was asked
    assert len(list(offline.glob("wandb/offline-run-*"))) == 1
    assert not (disabled / "wandb").exists()
    code, said = sync(stage, str(offline), str(disabled), env=env)
    assert code == 0, said
    assert said.count("its history equals metrics.jsonl") == 2
    for run in (offline, disabled):
        assert wandb_server.history(wandb_id(run)) == rows_of(run)
    assert len(set(door.values("groupName"))) == 1  # the same settings
    assert set(door.values("jobType")) == {"train"}


def test_artifacts_with_aliases_and_the_predictions_table_arrive(
    wandb_server: WandbServer, door: Door, stage: Stage
) -> None:
    wanted = ("tracking.artifacts=all", "tracking.predictions_table=true")
    process = stage.train(ONLINE, *wanted, env=environment(door.port))
    assert process.wait() == 0, process.text()
    assert "W&B goes without" not in process.text()
    assert differences(stage.run, stage.reference()) == []
    best = json.loads((stage.run / "result.json").read_text())["best"]
    models = [facts for _, kind, facts in wandb_server.artifacts(wandb_id(stage.run)) if kind == "model"]
    kept = sorted(int(p.name[5:]) for p in (stage.run / "checkpoints").glob("step_*"))
    assert [facts["step"] for facts in models] == kept
    assert [f["test_accuracy"] for f in models if f["step"] == best["step"]] == [best["accuracy"]]
    sent = [[a["alias"] for a in aliases] for aliases in door.values("aliases")]
    by_step = {next(alias for alias in aliases if alias.startswith("step_")): aliases for aliases in sent[-len(kept) :]}
    assert list(by_step) == [f"step_{step}" for step in kept]
    assert [name for name, aliases in by_step.items() if "last" in aliases] == [f"step_{kept[-1]}"]
    assert [name for name, aliases in by_step.items() if "best" in aliases] == [f"step_{best['step']}"]
    files = wandb_server.files(wandb_id(stage.run))
    (worst,) = (p for name, p in files.items() if name.startswith("media/table/predictions/worst"))
    table = json.loads(worst.read_text())
    total, correct = best["total"], best["correct"]
    assert len(table["data"]) == total - correct > 0
    probabilities = [row[table["columns"].index("label probability")] for row in table["data"]]
    assert probabilities == sorted(probabilities)
    (confusion,) = (p for name, p in files.items() if name.startswith("media/table/predictions/confusion"))
    pairs = json.loads(confusion.read_text())["data"]
    assert sum(n for *_, n in pairs) == total
    assert sum(n for label, taken, n in pairs if label == taken) == correct
    assert wandb_server.history(wandb_id(stage.run)) == rows_of(stage.run)
