"""Runs read from their directories, in whatever state they are, and the list of them."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given

from harness.errors import HarnessError
from harness.files import LOCK
from harness.report.terminal import as_json, render
from harness.runs import JOB, Run, is_held, list_runs, open_run
from tests.handmade import ANY_CONTENT, write_contents, write_run


def append(run: Path, *lines: object) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


def listed(root: Path) -> dict[str, Run]:
    return {run.path.name: run for run in list_runs(root)}


def test_a_finished_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "small" / "20260101-000000-aaaa", (0.5, 0.7, 0.7, 0.6), ema=True)
    append(path, {"kind": "epoch", "split": "test", "step": 50, "epoch": 5, "loss": "nan", "accuracy": 0.65})
    run = open_run(path)
    assert (run.state, run.label, run.problems) == ("finished", "small/20260101-000000-aaaa", ())
    assert (run.setting("training.epochs"), run.setting("training.nothing", 7), run.seed) == (2, 7, 0)
    assert [p.value for p in run.curve("test", "accuracy")] == [0.5, 0.7, 0.7, 0.6, 0.65]
    assert [p.step for p in run.curve("test", "loss")] == [10, 20, 30, 40]  # what is not a number is no point
    assert [p.step for p in run.curve("train", "loss", kind="step")] == [5, 15, 25, 35]
    assert run.best is not None
    assert (run.best.step, run.best.value) == (20, 0.7)  # the first of equals
    assert (run.epoch, run.step) == (5, 50)
    assert run.recorded_accuracy("last", "raw") == 0.65
    assert run.recorded_accuracy("best", "raw") == 0.7
    assert run.recorded_accuracy("best", "ema") == pytest.approx(0.71)
    assert open_run(write_run(tmp_path / "small" / "none", (), finished=False)).recorded_accuracy("last", "raw") is None


def test_the_recipe_says_which_split_is_judged(tmp_path: Path) -> None:
    by_ema = {"checkpoint": {"best_by": "ema"}}
    run = open_run(write_run(tmp_path / "run", (0.5, 0.7, 0.6), settings=by_ema, ema=True))
    assert run.best is not None
    assert run.best.value == pytest.approx(0.71)
    assert run.recorded_accuracy("best", "raw") == 0.7


@pytest.mark.parametrize(
    ("training", "length"),
    [
        ({"epochs": 6}, (6, 60)),
        ({"epochs": None, "steps": 45}, (4.5, 45)),
        ({"epochs": float("nan")}, (None, None)),
        ({"epochs": "x", "steps": True}, (None, None)),
    ],
)
def test_how_long_it_is_to_be(tmp_path: Path, training: dict[str, object], length: tuple[object, object]) -> None:
    assert open_run(write_run(tmp_path / "run", settings={"training": training})).length == length


def test_runs_of_one_experiment_may_differ_in_seed_name_tracking_and_machine(tmp_path: Path) -> None:
    def experiment(folder: str, **settings: object) -> dict[str, object]:
        return open_run(write_run(tmp_path / folder, settings={"training": {"precision": "no"}, **settings})).experiment

    first = experiment("a", seed=0, optimizer={"lr": 0.1}, data={"source": "parquet", "path": "/x", "workers": 2})
    assert first == {"training.precision": "no", "optimizer.lr": 0.1, "data.source": "parquet"}
    elsewhere = {"source": "parquet", "path": "/y", "loader": "torch"}
    assert first == experiment("b", seed=1, optimizer={"lr": 0.1}, data=elsewhere, tracking={"tags": ["x"]}, name="o")
    assert first != experiment("c", seed=0, optimizer={"lr": 0.2}, data=elsewhere)
    assert experiment("d", optimizer={"lr": float("inf")})["optimizer.lr"] == "Infinity"


def test_states(tmp_path: Path) -> None:
    write_run(tmp_path / "small" / "finished", (0.5, 0.7, 0.6), ema=True)
    write_run(tmp_path / "small" / "stopped", (0.5,), finished=False)
    write_run(tmp_path / "small" / "empty", (), finished=False)
    running = write_run(tmp_path / "small" / "running", (0.4,), finished=False)
    with FileLock(running / LOCK):
        found = listed(tmp_path)
        assert is_held(running)
    assert {name: run.state for name, run in found.items()} == {name: name for name in found}
    assert len(found) == 4
    assert all(not run.problems for run in found.values())
    assert open_run(running).state == "stopped"


def test_a_training_that_has_just_begun_is_not_broken(tmp_path: Path) -> None:
    run = tmp_path / "small" / "new"
    run.mkdir(parents=True)
    for files, state in (((), "running"), ((), "empty"), (("recipe.yaml", "provenance.json"), "running")):
        for name in files:
            (run / name).write_text("{}")
        with (
            FileLock(run / LOCK) if state == "running" else nullcontext()
        ):  # else a job in its queue, or one that ended
            (found,) = list_runs(tmp_path)
        assert (found.state, found.problems) == (state, ())


@pytest.mark.parametrize("on_a_cluster", [False, True])
def test_a_sweeps_folder_is_no_run_and_its_runs_are_listed(tmp_path: Path, on_a_cluster: bool) -> None:
    sweep = tmp_path / "lr-and-wd"
    write_run(sweep / "0f21-seed_0", (0.5,))
    (sweep / "0f21-seed_1").mkdir()
    (sweep / "0f21-seed_1" / LOCK).touch()  # a point whose training has not begun
    if on_a_cluster:
        for folder, file in ((sweep, "job.sh"), (sweep / "0f21-seed_1", "recipe.yaml")):
            (folder / JOB).mkdir()
            (folder / JOB / file).touch()
    with FileLock(sweep / LOCK):
        while_it_runs = listed(tmp_path)
    for found in (while_it_runs, listed(tmp_path), listed(sweep)):
        states = {name: (run.state, run.problems) for name, run in found.items()}
        assert states == {"0f21-seed_0": ("finished", ()), "0f21-seed_1": ("empty", ())}


def test_what_is_broken_is_named_and_the_rest_is_there(tmp_path: Path) -> None:
    runs = tmp_path / "small"
    (write_run(runs / "no-recipe") / "recipe.yaml").unlink()
    (write_run(runs / "bad-recipe") / "recipe.yaml").write_text("name: [")
    (write_run(runs / "empty-recipe") / "recipe.yaml").write_text("")
    (write_run(runs / "bad-result") / "result.json").write_text("{")
    (write_run(runs / "bytes") / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (write_run(runs / "no-metrics") / "metrics.jsonl").unlink()
    append(write_run(runs / "cut"), "17", '{"kind": "epoch", "spl')
    (runs / "only-checkpoints" / "checkpoints" / "step_5").mkdir(parents=True)
    found = listed(tmp_path)
    assert all(run.is_broken for run in found.values())
    assert {name: run.problems for name, run in found.items()} == {
        "no-recipe": ("recipe.yaml is missing",),
        "bad-recipe": ("recipe.yaml is broken",),
        "empty-recipe": ("recipe.yaml is broken",),
        "bad-result": ("result.json is broken",),
        "bytes": ("metrics.jsonl is broken",),
        "no-metrics": ("metrics.jsonl is missing",),
        "cut": ("metrics.jsonl has 1 lines that are no records",),
        "only-checkpoints": ("recipe.yaml is missing", "provenance.json is missing", "metrics.jsonl is missing"),
    }
    assert found["bad-recipe"].recipe_name == "small"
    assert len(found["cut"].curve("test", "accuracy")) == 2


def test_a_folder_that_cannot_be_looked_into() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        run = write_run(root / "small" / "run")
        run.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            (found,) = list_runs(root)
        finally:
            os.seteuid(user)
            run.chmod(0o755)
    assert (found.is_broken, found.problems) == (True, ("cannot be read (Permission denied)",))


@given(recipe=ANY_CONTENT, provenance=ANY_CONTENT, result=ANY_CONTENT, metrics=ANY_CONTENT)
def test_no_run_makes_the_list_fail(
    tmp_path: Path, recipe: bytes, provenance: bytes, result: bytes, metrics: bytes
) -> None:
    write_contents(tmp_path / "any" / "run", recipe, provenance, result, metrics)
    (run,) = list_runs(tmp_path)
    assert render([run], tmp_path, width=80)
    json.dumps(as_json(run), allow_nan=False)


def test_a_checkpoint_names_its_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "checkpoints" / "step_10").mkdir(parents=True)
    assert open_run(path / "checkpoints" / "step_10").path == path.resolve()
    with pytest.raises(HarnessError, match="there is no such run"):
        open_run(path / "checkpoints" / "step_11")


def test_where_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list_runs() == []
    for name in ("20260101-000000-aaaa", "20260102-000000-bbbb"):
        write_run(tmp_path / "runs" / "small" / name)
    with pytest.raises(HarnessError, match="there is no such run") as gone:
        open_run("runs/small/20260101-000000-aaab")
    assert "20260101-000000-aaaa" in str(gone.value)
    with pytest.raises(HarnessError, match="is not a run directory") as above:
        open_run("runs/small")
    assert "HINT" in str(above.value)
    with pytest.raises(HarnessError, match="there is no such folder"):
        list_runs(Path("nowhere"))


def test_without_the_records_of_steps(tmp_path: Path) -> None:
    """For whoever reads hundreds of runs: the latest records are there all the same, for ages and progress."""
    path = write_run(tmp_path / "run", finished=False)
    step = {"kind": "step", "split": "train", "loss": 1.0, "time_unix_seconds": 40}
    append(path, *({**step, "step": 21 + i, "epoch": 2.1 + i / 10} for i in range(5)))
    run, whole = open_run(path, steps=False), open_run(path)
    assert len(run.records) == 4 + 3
    assert run.curve("test", "accuracy") == whole.curve("test", "accuracy")
    assert (run.epoch, run.updated_unix_seconds, run.problems) == (whole.epoch, whole.updated_unix_seconds, ())


def test_settings_are_read_by_the_rules_of_recipes(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "recipe.yaml").write_text("training: {precision: no}\noptimizer: {lr: 1e-3}\n")
    run = open_run(path)
    assert (run.setting("training.precision"), run.setting("optimizer.lr")) == ("no", 0.001)
