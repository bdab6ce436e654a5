"""The list of runs: states, figures, order, widths, and that no broken run can stop it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings

from harness.cli import main
from harness.errors import HarnessError
from harness.recipe import load
from harness.recipe.loading import resolved_yaml
from harness.reporting.listing import Entry, age, list_runs, render
from harness.run_directory import JOB, LOCK
from tests.handmade import ANY_CONTENT, write_contents, write_run

NAMES = [f"20260101-00000{i}-aaaa" for i in range(10)]


def by_name(root: Path) -> dict[str, Entry]:
    return {Path(entry.run).name: entry for entry in list_runs(root)}


def test_states_and_figures(tmp_path: Path) -> None:
    write_run(tmp_path / "small" / "finished", (0.5, 0.7, 0.6), ema=True)
    write_run(tmp_path / "small" / "stopped", (0.5,), finished=False)
    write_run(tmp_path / "small" / "empty", (), finished=False)
    write_run(tmp_path / "small" / "running", (0.4,), finished=False)
    with FileLock(tmp_path / "small" / "running" / LOCK):
        found = by_name(tmp_path)
    assert {name: entry.state for name, entry in found.items()} == {name: name for name in found}
    assert len(found) == 4
    finished = found["finished"]
    assert (finished.best_accuracy, finished.best_ema_accuracy) == (0.7, pytest.approx(0.71))
    assert (finished.epoch, finished.epochs, finished.recipe) == (3, 2, "small")
    assert found["empty"].best_accuracy is None
    assert all(not entry.problems for entry in found.values())


def test_a_training_that_has_just_begun_is_not_broken(tmp_path: Path) -> None:
    run = tmp_path / "small" / "new"
    run.mkdir(parents=True)
    with FileLock(run / LOCK):
        (entry,) = list_runs(tmp_path)
        assert (entry.state, entry.problems) == ("running", ())
    (entry,) = list_runs(tmp_path)  # a job in its queue, or one that ended before it began
    assert (entry.state, entry.problems) == ("empty", ())
    for name in ("recipe.yaml", "provenance.json"):
        (run / name).write_text("{}")
    with FileLock(run / LOCK):
        (entry,) = list_runs(tmp_path)
    assert (entry.state, entry.problems) == ("running", ())


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
        while_it_runs = by_name(tmp_path)
    for found in (while_it_runs, by_name(tmp_path), by_name(sweep)):
        assert {name: entry.state for name, entry in found.items()} == {
            "0f21-seed_0": "finished",
            "0f21-seed_1": "empty",
        }
        assert not any(entry.problems for entry in found.values())


@pytest.mark.parametrize(
    ("epoch", "epochs", "text"),
    [
        (0.1279, 2, "0.1/2"),
        (22.25, 3000, "22.2/3000"),
        (2, 2.5, "2/2.5"),
        (12345, None, "12345/?"),
        (0, 1e14, "0/1e+14"),
    ],
)
def test_epochs_have_no_more_digits_than_they_mean(epoch: float, epochs: float | None, text: str) -> None:
    entry = Entry("runs/a/b", "a", "running", epoch, epochs, None, None, 0, ())
    assert f" {text} " in render([entry], Path("runs"), width=None, now_unix_seconds=0)


def test_broken_runs_are_listed_with_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "small"
    (write_run(runs / "no-recipe") / "recipe.yaml").unlink()
    (write_run(runs / "bad-recipe") / "recipe.yaml").write_text("name: [")
    (write_run(runs / "bad-result") / "result.json").write_text("{")
    (write_run(runs / "bytes") / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (runs / "only-checkpoints" / "checkpoints" / "step_5").mkdir(parents=True)
    found = by_name(tmp_path)
    assert {entry.state for entry in found.values()} == {"broken"}
    problems = {name: entry.problems for name, entry in found.items()}
    assert problems["no-recipe"] == ("recipe.yaml is missing",)
    assert problems["bad-recipe"] == ("recipe.yaml is broken",)
    assert problems["bad-result"] == ("result.json is broken",)
    assert problems["only-checkpoints"] == ("recipe.yaml and provenance.json are missing",)
    assert "metrics.jsonl cannot be read" in problems["bytes"][0]
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in found)
    assert "\n    recipe.yaml and provenance.json are missing\n" in out
    assert "5 runs (5 broken), newest last" in out


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
            (entry,) = list_runs(root)
        finally:
            os.seteuid(user)
            run.chmod(0o755)
    assert entry.state == "broken"
    assert entry.problems == ("cannot be read (Permission denied)",)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=ANY_CONTENT, provenance=ANY_CONTENT, result=ANY_CONTENT, metrics=ANY_CONTENT)
def test_no_run_makes_the_list_fail(
    tmp_path: Path, recipe: bytes, provenance: bytes, result: bytes, metrics: bytes
) -> None:
    write_contents(tmp_path / "any" / "run", recipe, provenance, result, metrics)
    entries = list_runs(tmp_path)
    assert len(entries) == 1
    assert render(entries, tmp_path, width=80)
    json.dumps(entries[0].to_json(), allow_nan=False)


def test_the_newest_is_last_and_ages_are_of_the_latest_record(tmp_path: Path) -> None:
    for i, start in enumerate((3e5, 1e5, 2e5)):
        write_run(tmp_path / "small" / NAMES[i], (0.5,), start_unix_seconds=start)
    entries = list_runs(tmp_path)
    assert [Path(entry.run).name for entry in entries] == [NAMES[1], NAMES[2], NAMES[0]]
    lines = render(entries, tmp_path, width=None, now_unix_seconds=3e5 + 60 + 300).splitlines()
    assert "5 min" in lines[3]
    assert "27 h" in lines[2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (99, "99 s"), (100, "1 min"), (5999, "99 min"), (6000, "1 h"), (172_799, "47 h"), (172_800, "2 d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_lines_fit_a_terminal_and_run_ids_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs", "quickstart", NAMES[0]), ema=True)
    write_run(Path("runs", "a" * 60, NAMES[1]), ema=True)
    write_run(Path("runs", "other", NAMES[2]), settings={"name": "b" * 90})
    entries = list_runs()
    text = render(entries, Path("runs"), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in NAMES[:3])
    assert "a" * 60 in render(entries, Path("runs"), width=None)
    plain = render([entry for entry in entries if entry.recipe == "quickstart"], Path("runs"), width=80)
    assert f"runs/quickstart/{NAMES[0]}" in plain
    assert "RECIPE" not in plain


def test_only_runs_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "small" / "a")
    write_run(tmp_path / "large" / "b")
    assert main(["runs", str(tmp_path), "--recipe", "large", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["order"] == "newest last"
    assert [run["recipe"] for run in found["runs"]] == ["large"]
    assert main(["runs", str(tmp_path), "--recipe", "lrge"]) == 2
    assert 'Did you mean "large"?' in capsys.readouterr().err


def test_where_there_are_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs below runs\n"
    with pytest.raises(HarnessError, match="there is no such folder"):
        list_runs(Path("nowhere"))


def test_hundreds_of_runs_in_under_two_seconds_without_torch(tmp_path: Path) -> None:
    accuracies = [i / 60 for i in range(50)]
    first = write_run(tmp_path / "small" / "run-0", accuracies, ema=True)
    recipe = resolved_yaml(load(Path(__file__).parents[2] / "recipes" / "seed.yaml"))
    steps = (first / "metrics.jsonl").read_text() + 500 * (first / "metrics.jsonl").read_text().splitlines(True)[0]
    for i in range(300):
        run = tmp_path / "small" / f"run-{i}"
        run.mkdir(exist_ok=True)
        (run / "recipe.yaml").write_text(recipe)
        (run / "provenance.json").write_text("{}")
        (run / "metrics.jsonl").write_text(steps)
    code = (
        "import sys\nfrom harness.cli import main\n"
        f"code = main(['runs', {str(tmp_path)!r}])\n"
        "sys.exit('torch is imported' if 'torch' in sys.modules else code)"
    )
    before = time.perf_counter()
    usage = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    spent = os.times()
    assert done.returncode == 0, done.stderr
    assert "300 runs" in done.stdout
    assert time.perf_counter() - before < 60
    processor_seconds = spent.children_user + spent.children_system - usage.children_user - usage.children_system
    assert processor_seconds < 2  # other processes may keep it waiting, so the clock would tell of them
