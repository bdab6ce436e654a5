"""What came of a sweep, from the files of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.runs import EXIT_CODE
from harness.sweeps.spec import load_sweep
from tests.sweeps.conftest import finish

SWEEP = """recipe: tiny.yaml
method: grid
seeds: [0, 1, 2]
parameters:
  optimizer.lr: {values: [0.1, 0.05, 0.025, 0.0125]}
"""


def table(sweep: Path, capsys: pytest.CaptureFixture[str], metric: str = "{}") -> list[dict[str, Any]]:
    sweep.write_text(f"{SWEEP}metric: {metric}\n")
    assert main(["sweep", "sweep.yaml", "--table", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sweep"] == "sweep"
    return list(found["points"])


def test_the_table_has_mean_and_deviation_over_seeds_the_best_first(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = load_sweep("sweep.yaml").runs
    low, high, part, none = (run.point for run in runs[::3])
    for run, accuracy in zip(runs, (0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.9), strict=False):
        finish(run.directory, accuracy)
    runs[8].directory.mkdir()
    (runs[8].directory / EXIT_CODE).write_text("2\n")
    points = table(sweep, capsys)
    assert [point["id"] for point in points] == [high, low, part, none]
    assert [point["best"] for point in points] == [True, False, False, False]
    assert points[0]["mean"] == pytest.approx(0.7)
    assert points[0]["std"] == pytest.approx(0.1)  # n - 1 below the line
    assert (points[3]["mean"], points[3]["std"]) == (None, None)
    assert [run["seed"] for run in points[0]["runs"]] == [0, 1, 2]
    assert points[0]["runs"][0] == {
        "seed": 0,
        "state": "finished",
        "exit_code": None,
        "value": 0.6,
        "world_size": 2,
        "run_directory": str(runs[3].directory),
    }
    assert main(["sweep", "sweep.yaml", "--table"]) == 0
    text = capsys.readouterr().out
    assert "8 finished, 1 failed, 3 new" in text
    assert f"* {high}  optimizer.lr=0.05    70.00% ± 10.00%  (n = 3)" in text
    assert "90.00% ± 0.00%  (2 of 3 seeds; seed 2 failed: bad input (exit code 2))" in text
    assert "–  (0 of 3 seeds; seed 0 new; seed 1 new; seed 2 new)" in text

    (first, second, *_) = table(sweep, capsys, "{key: loss, goal: minimize}")
    assert (first["id"], first["mean"], second["id"]) == (high, pytest.approx(0.3), low)
    assert table(sweep, capsys, "{at: best}")[0]["mean"] == pytest.approx(0.8)
    (runs[5].directory / "result.json").unlink()  # now no point has a figure for each seed but the first
    (runs[2].directory / "result.json").unlink()
    assert not any(point["best"] for point in table(sweep, capsys))
