"""A W&B run: its rows, its name, and the real client with and without a server. None of its troubles stops a run."""

from __future__ import annotations

import http.server
import json
import math
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harness.recipe.schema import Recipe
from harness.tracking import wandb_run
from harness.tracking.wandb_run import UPLOADED, Summary, WandbTracker, identity_of, resolve_mode, row_number, values_of
from tests.faults.check import differences, reached
from tests.faults.runs import Stage
from tests.faults.wandb_server import WandbServer, environment
from tests.tracking.conftest import record, rows_of, wandb_id
from tests.tracking.door import Door

TEST = record("epoch", "test", 4, loss=0.5928, accuracy=0.8171)


def test_names_of_a_log_step() -> None:
    values = {"loss": 1.5, "lr": 0.1, "images_per_second": 9.5, "grad_norm": None, "name": "x", "flag": True}
    row = {"step": 2, "epoch": 0.5, "train/loss": 1.5, "lr/learning_rate": 0.1, "perf/images_per_second": 9.5}
    assert values_of(record("step", "train", 2, **values, time_unix_seconds=7.25)) == row | {"_timestamp": 7.25}


@pytest.mark.parametrize(("split", "prefix"), [("train", "epoch_"), ("test", ""), ("test_ema", "")])
def test_names_of_an_epoch(split: str, prefix: str) -> None:
    row = {"step": 4, "epoch": 1, f"{split}/{prefix}loss": 1, f"perf/{prefix or f'{split}_'}seconds": 2}
    assert values_of(record("epoch", split, 4, loss=1, seconds=2)) == row


def test_numbers_that_are_not_finite_are_the_same_made_and_read() -> None:
    for loss, grad_norm in ((math.nan, math.inf), ("nan", "inf")):
        row = values_of(record("step", "train", 1, loss=loss, grad_norm=grad_norm))
        assert math.isnan(row["train/loss"])
        assert row["train/grad_norm"] == math.inf


def test_every_record_has_a_place_and_they_go_up() -> None:
    order = [("step", "train"), ("epoch", "train"), ("epoch", "test"), ("epoch", "test_ema")]
    numbers = [row_number(record(*place, step)) for step in (1, 2) for place in order]
    assert numbers == sorted(set(numbers))


def test_the_summary_is_of_all_finite_values_and_the_first_of_the_best() -> None:
    found = Summary("test")
    assert found.values() == {}
    for step, accuracy, loss in ((4, 0.5, 0.5), (8, 0.9, math.nan), (18, 0.9, 0.2), (22, "nan", 0.4)):
        found.take(record("step", "train", step, accuracy=1.0, images_per_second=step))
        found.take(record("epoch", "test", step, accuracy=accuracy, loss=loss))
    found.take(record("epoch", "test_ema", 22, accuracy=0.95))
    found.take(record("epoch", "test", 22))  # another version's
    assert found.values() == {
        "best/accuracy": 0.9,
        "best/epoch": 2,
        "best/step": 8,
        "test/accuracy": {"max": 0.9},
        "test_ema/accuracy": {"max": 0.95},
        "test/loss": {"min": 0.2},
        "perf/images_per_second": {"mean": pytest.approx(13)},
    }


def identity(**changes: Any) -> dict[str, Any]:
    settings = Recipe(name="digits", **changes).model_dump(mode="json")
    return identity_of(settings, run_id="20260101-aaaa", world_size=2)


def test_a_run_is_named_after_its_recipe_unless_the_recipe_says_otherwise() -> None:
    found = identity()
    assert found.pop("group").startswith("digits-")
    assert found == {
        "entity": None,
        "project": "dual-branch-harness",
        "name": "digits-20260101-aaaa",
        "job_type": "train",
        "tags": ["model:dual_branch_seed", "data:cifar10", "precision:no", "ranks:2"],
    }
    given = {"entity": "e", "project": "p", "name": "n", "group": "g", "job_type": "j", "tags": ["t"]}
    assert identity(tracking={"run_name" if key == "name" else key: value for key, value in given.items()}) == given
    assert max(map(len, identity(model={"name": "m" * 90})["tags"])) == 64  # which the server takes


def test_seeds_are_one_group_and_other_settings_another() -> None:
    for same in ({"seed": 7}, {"tracking": {"wandb": "offline"}}, {"data": {"workers": 3}}, {"checkpoint": {}}):
        assert identity(**same)["group"] == identity()["group"]
    for other in ({"optimizer": {"lr": 0.2}}, {"data": {"flip": "random"}}, {"training": {"epochs": 3}}):
        assert identity(**other)["group"] != identity()["group"]


@pytest.mark.parametrize(
    ("setting", "key", "mode", "expected"),
    [
        ("auto", "", "", "offline"),
        ("auto", "x", "", "online"),
        ("auto", "", "disabled", "disabled"),
        ("auto", "x", "dryrun", "offline"),
        ("auto", "x", "disable", "offline"),  # sends nothing that was not to be sent
        ("offline", "x", "", "offline"),
        ("disabled", "", "online", "disabled"),
    ],
)
def test_mode(setting: Any, key: str, mode: str, expected: str, logged_out: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert resolve_mode(setting) == expected


def test_the_server_and_key_of_wandb_login_are_found(logged_out: Path) -> None:
    """The files are as `wandb login --host http://127.0.0.1:8080` writes them."""
    (logged_out / ".netrc").write_text("machine 127.0.0.1:8080\n  login user\n  password secret\n")
    (logged_out / ".netrc").chmod(0o600)
    assert resolve_mode("auto") == "offline"  # the key is of another server
    settings = logged_out / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = http://127.0.0.1:8080\n\n")
    assert (wandb_run.base_url(), resolve_mode("auto")) == ("http://127.0.0.1:8080", "online")
    settings.write_text("no settings")
    assert wandb_run.base_url() == "https://api.wandb.ai"


def test_a_server_that_says_anything_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose certificate, or TLS, Python does not take: the client may."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for scheme in ("http", "https"):
            monkeypatch.setenv("WANDB_BASE_URL", f"{scheme}://127.0.0.1:{server.server_port}")
            assert wandb_run.answers(within_seconds=20), scheme
        server.shutdown()
        thread.join()
    assert not wandb_run.answers(within_seconds=20)


def test_a_history_that_is_not_given_as_a_file_is_no_dead_server(door: Door) -> None:
    """As storage behind W&B that is given a header it does not know."""
    door.refuses["/files/"] = 400
    assert wandb_run.read_history("e", "p", "r") is None
    __import__("wandb").teardown()


def tracker(folder: Path, warnings: list[str], **changes: Any) -> WandbTracker:
    settings = {"mode": "offline", "directory": folder, "run_id": "run-1", "identity": identity(), "config": {}}
    return WandbTracker(**{**settings, "warn": warnings.append, **changes})


def fail(run: Any) -> None:
    raise OSError("no space left")


def offline_data(folder: Path) -> bytes:
    (run,) = (folder / "wandb").glob("offline-run-*-run-1")
    return next(run.glob("*.wandb")).read_bytes()


def test_an_offline_run_is_written_whatever_is_wrong_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")  # the client would refuse its settings
    warnings: list[str] = []
    artifacts = {"at_start": {"the summary": fail}, "at_finish": {"the table": fail, "the checkpoints": fail}}
    made = tracker(tmp_path, warnings, mode=resolve_mode("auto"), **artifacts)
    made.log(record("step", "train", 1, loss=1.5, milliseconds_per_step=12.0))
    made.log(TEST)
    made.finish({"accuracy": 0.5, "ema": None, "best": {"epoch": 2}})
    assert warnings == [
        f"W&B goes without the {what}: OSError: no space left" for what in ("summary", "table", "checkpoints")
    ]
    data = offline_data(tmp_path)
    for name in (b"test/accuracy", b"train/loss", b"perf/milliseconds_per_step", b"result/best/epoch"):
        assert name in data


def test_no_network_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    warnings: list[str] = []
    made = tracker(tmp_path, warnings, mode="online")
    made.log(TEST)
    made.finish({"accuracy": 0.5})
    assert warnings == [
        "W&B: http://127.0.0.1:9 does not answer (HARNESS_WANDB_TIMEOUT_SECONDS=SECONDS waits longer)",
        "W&B stays offline; `harness track sync` uploads the run later",
    ]
    assert b"test/accuracy" in offline_data(tmp_path)
    assert not made.delivered


def test_trouble_is_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    made = tracker(tmp_path, warnings, run_id="no/id")
    made.log(TEST)
    made.finish(None)
    (warning,) = warnings
    assert "W&B fails and is left out" in warning


@pytest.mark.parametrize(("text", "mode"), [("soon", "offline"), ("60000", "online")])
def test_a_time_limit_that_is_none_is_one_warning(text: str, mode: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HARNESS_WANDB_TIMEOUT_SECONDS", text)
    warnings: list[str] = []
    tracker(tmp_path, warnings, mode=mode).finish(None)
    (warning,) = warnings
    assert "HARNESS_WANDB_TIMEOUT_SECONDS: must be a number of seconds above 0 and up to 3600, not" in warning


@pytest.mark.parametrize("artifacts", [{}, {"the table": fail}])
def test_the_note_of_what_was_uploaded_says_whether_all_was(artifacts: Any, door: Door, tmp_path: Path) -> None:
    """What is not finished is left to `harness track sync`."""
    warnings: list[str] = []
    made = tracker(tmp_path, warnings, mode="online", run_id=tmp_path.name, at_finish=artifacts)
    made.log(TEST)
    made.finish({"accuracy": 1.0})
    assert made.delivered
    assert len(warnings) == len(artifacts)
    noted = json.loads((tmp_path / UPLOADED).read_text())
    assert (noted["last_row"], noted["finished"]) == (row_number(TEST), not artifacts)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False], ids=["server-ahead-of-checkpoint", "server-behind-checkpoint"])
def test_a_killed_run_resumes_without_a_lost_or_doubled_row(
    ahead: bool, wandb_server: WandbServer, stage: Stage
) -> None:
    def last_step() -> int:
        return max((row["step"] for row in wandb_server.history(wandb_id(stage.run))), default=0)

    at_once = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.1"}  # else the client waits 15 s for more rows
    env, online = environment(wandb_server.port), "tracking.wandb=online"
    stop = [{"kind": "step", "step": 12, "action": "SIGSTOP"}]
    process = stage.train(online, env=env | (at_once if ahead else {}), faults=stop)
    deadline = time.monotonic() + 120
    while reached(stage.run) < 11 or (ahead and last_step() < 11):
        time.sleep(0.05)
        assert time.monotonic() < deadline, process.text()
    process.send(signal.SIGKILL)
    process.wait()
    shutil.rmtree(stage.run / "checkpoints" / "step_9", ignore_errors=True)  # so that more is done again
    held = last_step()
    process = stage.train(online, env=env | at_once)
    assert process.wait() == 0, process.text()
    from_step = json.loads((stage.run / "provenance.json").read_text())["starts"][-1]["from_step"]
    assert 0 < from_step < 11
    assert held >= 11 if ahead else held < from_step
    there, wanted = wandb_server.history(wandb_id(stage.run)), rows_of(stage.run)
    times = ("_timestamp", "perf/")  # which the second start measured again
    for row in there + wanted:
        for key in [key for key in row if key.startswith(times)]:
            del row[key]
    assert there == wanted
    assert differences(stage.run, stage.reference()) == []
