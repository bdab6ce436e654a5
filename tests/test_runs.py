"""Runs read from their directories, in whatever state they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from harness.errors import HarnessError
from harness.run_directory import LOCK
from harness.runs import find_run_directories, is_held, open_run

RECORDS = [
    {"kind": "step", "split": "train", "step": 5, "epoch": 0.5, "loss": 2.0, "accuracy": 0.2, "time_unix_seconds": 10},
    {"kind": "epoch", "split": "train", "step": 10, "epoch": 1, "loss": 1.5, "accuracy": 0.4, "time_unix_seconds": 20},
    {"kind": "epoch", "split": "test", "step": 10, "epoch": 1, "loss": 1.4, "accuracy": 0.5, "time_unix_seconds": 21},
    {"kind": "epoch", "split": "test", "step": 20, "epoch": 2, "loss": "nan", "accuracy": 0.5, "time_unix_seconds": 31},
    {"kind": "epoch", "split": "test_ema", "step": 20, "epoch": 2, "loss": 1.0, "accuracy": 0.7},
]


def make_run(path: Path, *, best_by: str = "raw", result: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(f"name: small\ncheckpoint: {{best_by: {best_by}}}\n")
    (path / "provenance.json").write_text(json.dumps({"wandb_run_id": "abc", "starts": []}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    if result:
        (path / "result.json").write_text(json.dumps({"accuracy": 0.5}))
    return path


def test_a_finished_run(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "small" / "20260101-000000-aaaa"))
    assert (run.state, run.label, run.problems) == ("finished", "small/20260101-000000-aaaa", ())
    assert run.setting("checkpoint.best_by") == "raw"
    assert run.setting("checkpoint.nothing", 7) == 7
    assert [p.value for p in run.curve("test", "accuracy")] == [0.5, 0.5]
    assert [p.value for p in run.curve("test", "loss")] == [1.4]  # what is not a number is no point
    assert [p.step for p in run.curve("train", "loss", kind="step")] == [5]
    assert run.best is not None
    assert (run.best.step, run.best.value) == (10, 0.5)  # the first of equals
    assert run.epoch == 2


def test_the_recipe_says_which_split_is_judged(tmp_path: Path) -> None:
    best = open_run(make_run(tmp_path / "run", best_by="ema")).best
    assert best is not None
    assert best.value == 0.7


def test_a_run_that_a_process_holds_is_running(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", result=False)
    assert open_run(path).state == "stopped"
    with FileLock(path / LOCK):
        assert is_held(path)
        assert open_run(path).state == "running"
    assert open_run(path).state == "stopped"


def test_what_is_broken_is_told_and_the_rest_is_there(tmp_path: Path) -> None:
    path = make_run(tmp_path / "small" / "run", result=False)
    (path / "recipe.yaml").write_text("name: [")
    (path / "provenance.json").unlink()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('17\n{"kind": "epoch", "spl')
    run = open_run(path)
    assert run.problems == (
        "recipe.yaml is broken",
        "provenance.json is missing",
        "metrics.jsonl has 1 lines that are no records",
    )
    assert run.recipe_name == "small"
    assert len(run.records) == len(RECORDS)


def test_a_checkpoint_names_its_run(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "checkpoints" / "step_10").mkdir(parents=True)
    assert open_run(path / "checkpoints" / "step_10").path == path.resolve()


def test_where_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("20260101-000000-aaaa", "20260102-000000-bbbb"):
        make_run(tmp_path / "runs" / "small" / name)
    assert [p.name for p in find_run_directories(Path("runs"))] == ["20260101-000000-aaaa", "20260102-000000-bbbb"]
    with pytest.raises(HarnessError, match="there is no such run") as gone:
        open_run("runs/small/20260101-000000-aaab")
    assert "20260101-000000-aaaa" in str(gone.value)
    with pytest.raises(HarnessError, match="is not a run directory") as above:
        open_run("runs/small")
    assert "HINT" in str(above.value)


def test_without_the_records_of_steps(tmp_path: Path) -> None:
    """For whoever reads hundreds of runs: the latest records are there all the same, for ages and progress."""
    path = make_run(tmp_path / "run", result=False)
    step = {"kind": "step", "split": "train", "step": 25, "epoch": 2.5, "loss": 1.0, "time_unix_seconds": 40}
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({**step, "step": 21 + i, "epoch": 2.1 + i / 10}) + "\n" for i in range(5))
    run, whole = open_run(path, steps=False), open_run(path)
    assert len(run.records) == 4 + 3
    assert run.curve("test", "accuracy") == whole.curve("test", "accuracy")
    assert (run.epoch, run.updated_unix_seconds, run.problems) == (whole.epoch, whole.updated_unix_seconds, ())


def test_settings_are_read_by_the_rules_of_recipes(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "recipe.yaml").write_text("training: {precision: no}\noptimizer: {lr: 1e-3}\n")
    run = open_run(path)
    assert (run.setting("training.precision"), run.setting("optimizer.lr")) == ("no", 0.001)
