"""What sweeps do about SLURM without one; tests/cluster/test_sweeps.py has a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cli import main
from harness.sweeps.spec import load_sweep
from tests.sweeps.conftest import finish

SWEEP = "recipe: tiny.yaml\nmethod: grid\nparameters: {optimizer.lr: {values: [0.1, 0.2]}}\n"


def test_json_is_json_where_nothing_is_submitted(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "sweep.yaml", "--slurm", "--json"]
    runs = load_sweep("sweep.yaml").runs
    assert main([*words, "--dry-run"]) == 0
    tasks = [{"run_directory": str(run.directory.absolute())} for run in runs]
    assert json.loads(capsys.readouterr().out) == {"job": None, "runs": tasks}
    assert not Path("runs").exists()
    for run in runs:
        finish(run.directory)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"job": None, "runs": []}
    assert main(words[:-1]) == 0
    assert "no run is due" in capsys.readouterr().out


def test_a_list_of_jobs_that_cannot_be_read_is_an_error(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taken for none, its runs would be trained twice."""
    file = Path("runs", "sweep", "slurm", "submitted.json")
    file.parent.mkdir(parents=True)
    file.write_text('[{"job_id": "1", ')
    assert main(["sweep", "sweep.yaml", "--table"]) == 2
    assert f"ERROR {file}: is broken\n  HINT:" in capsys.readouterr().err


def test_more_runs_than_tasks_of_an_array(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.write_text(f"{SWEEP}seeds: [{', '.join(map(str, range(501)))}]\n")
    assert main(["sweep", "sweep.yaml", "--slurm", "--dry-run"]) == 2
    assert "1,002 runs are more than the 1,001 tasks of an array" in capsys.readouterr().err
