"""The list of runs as text and JSON: figures, order, widths, and that it stays quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.cli import main
from harness.recipe import load
from harness.recipe.loading import resolved_yaml
from harness.report.axes import epoch_text
from harness.report.listing import age, as_json, render
from harness.runs import list_runs
from tests.handmade import write_run

NAMES = [f"20260101-00000{i}-aaaa" for i in range(3)]


def test_figures_and_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "small" / "whole", (0.5, 0.7, 0.6), ema=True)
    (write_run(tmp_path / "small" / "broken", settings={"training": {}}) / "result.json").write_text("{")
    whole, broken = (as_json(run) for run in sorted(list_runs(tmp_path), key=lambda run: run.is_broken))
    assert (whole["best_accuracy"], whole["best_ema_accuracy"]) == (0.7, pytest.approx(0.71))
    assert (whole["epoch"], whole["epochs"], whole["recipe"], whole["state"]) == (3, 2, "small", "finished")
    assert (broken["state"], broken["problems"]) == ("broken", ["result.json is broken"])
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "finished    3/2  70.00%  71.00%" in out
    assert "broken      2/?  60.00%       -" in out
    assert "\n    result.json is broken\n" in out
    assert "2 runs (1 finished, 1 broken), newest last" in out


@pytest.mark.parametrize(
    ("epoch", "text"), [(0.1279, "0.1"), (22.25, "22.2"), (2, "2"), (12345, "12345"), (1e14, "1e+14")]
)
def test_epochs_have_no_more_digits_than_they_mean(epoch: float, text: str) -> None:
    assert epoch_text(epoch) == text


def test_the_newest_is_last_and_ages_are_of_the_latest_record(tmp_path: Path) -> None:
    for name, start in zip(NAMES, (3e5, 1e5, 2e5), strict=True):
        write_run(tmp_path / "small" / name, (0.5,), start_unix_seconds=start)
    runs = list_runs(tmp_path)
    assert [run.path.name for run in runs] == [NAMES[1], NAMES[2], NAMES[0]]
    lines = render(runs, tmp_path, width=None, now_unix_seconds=3e5 + 60 + 300).splitlines()
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
    runs = list_runs()
    text = render(runs, Path("runs"), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in NAMES)
    assert "a" * 60 in render(runs, Path("runs"), width=None)
    plain = render([run for run in runs if run.recipe_name == "quickstart"], Path("runs"), width=80)
    assert f"runs/quickstart/{NAMES[0]}" in plain
    assert "RECIPE" not in plain


def test_only_runs_of_a_recipe_and_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "small" / "a")
    write_run(tmp_path / "large" / "b")
    assert main(["runs", str(tmp_path), "--recipe", "large", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["order"] == "newest last"
    assert [run["recipe"] for run in found["runs"]] == ["large"]
    assert main(["runs", str(tmp_path), "--recipe", "lrge"]) == 2
    assert 'Did you mean "large"?' in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs below runs\n"


def test_hundreds_of_runs_in_under_two_seconds_without_torch(tmp_path: Path) -> None:
    first = write_run(tmp_path / "small" / "run-0", [i / 60 for i in range(50)], ema=True)
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
    before, usage = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    spent = os.times()
    assert done.returncode == 0, done.stderr
    assert "300 runs" in done.stdout
    assert time.perf_counter() - before < 60
    processor_seconds = spent.children_user + spent.children_system - usage.children_user - usage.children_system
    assert processor_seconds < 2  # other processes may keep it waiting, so the clock would tell of them
