"""Sweeps as arrays of a real SLURM: each task its own point, and only what is due is submitted again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from harness.cli import main
from harness.runs import EXIT_CODE
from tests.cluster.conftest import STEPS, Task
from tests.cluster.sandbox import Sandbox

pytestmark = pytest.mark.slurm

SWEEP = """recipe: digits.yaml
method: grid
overrides: {training.steps: 2}
parameters:
  optimizer.lr: {values: [0.1, 0.05, 1.0e+30]}
"""


def submit(words: list[str], cluster: Sandbox, capsys: pytest.CaptureFixture[str]) -> list[Task]:
    """The tasks of `harness sweep --slurm`; none where nothing was due."""
    assert main(["sweep", "sweep.yaml", "--slurm", *words]) == 0
    printed = capsys.readouterr().out
    runs = re.findall(r"^run directory (.*)$", printed, re.MULTILINE)
    logs = re.findall(r"^log (.*)$", printed, re.MULTILINE)
    return [Task(cluster, Path(log).stem, Path(run), Path(log)) for run, log in zip(runs, logs, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_a_point_and_only_what_is_due_again(
    work: Path, cluster: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "sweep.yaml").write_text(SWEEP)
    words = ["--tasks-per-node", "2", "--time", "10"]
    good, other, bad = tasks = submit(words, cluster, capsys)
    try:
        assert submit(words, cluster, capsys) == []  # all are queued or running
        assert main(["sweep", "sweep.yaml", "--table"]) == 0
        assert re.search("3 queued|running", capsys.readouterr().out)
        good.finish()
        other.finish()
        assert bad.finish("FAILED")["ExitCode"] == "3:0"
    finally:
        for task in tasks:
            cluster.run("scancel", "--quiet", task.job_id, check=False)
    for task, lr in ((good, 0.1), (other, 0.05)):
        assert task.result()["world_size"] == 2
        assert task.result()["step"] == 2
        assert yaml.safe_load((task.run / "recipe.yaml").read_text())["optimizer"]["lr"] == lr
        assert task.log.parent == work / "runs" / "sweep" / "slurm"
    assert [(task.run / EXIT_CODE).read_text() for task in tasks] == ["0\n", "0\n", "3\n"]
    assert submit(words, cluster, capsys) == []
    assert main(["sweep", "sweep.yaml", "--table", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["runs"][0]["state"] for point in points] == ["finished", "finished", "failed"]
    assert points[2]["runs"][0]["exit_code"] == 3
    assert main(["sweep", "sweep.yaml", "--slurm", "--retry-failed", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-0\n" in script
    assert f"runs=({bad.run})\n" in script


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_point_that_slurm_stops_goes_on_in_its_own_run(
    work: Path, cluster: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = {"recipe": "digits.yaml", "method": "grid", "parameters": {"optimizer.lr": {"values": [0.05, 0.1]}}}
    (work / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    tasks = submit(["--time", "10"], cluster, capsys)
    try:
        alone, stopped = tasks
        stopped.wait_for_step(8)
        cluster.run("scancel", "--signal=USR1", stopped.job_id)
        assert stopped.finish()["Restarts"] == "1"
        assert alone.finish()["Restarts"] == "0"
    finally:
        for task in tasks:
            cluster.run("scancel", "--quiet", task.job_id, check=False)
    assert alone.starts() == [0]
    first, second = stopped.starts()
    assert first == 0
    assert second >= 8
    assert stopped.steps() == list(range(1, STEPS + 1))
    assert main(["sweep", "sweep.yaml", "--table", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["runs"][0]["state"] for point in points] == ["finished", "finished"]
    assert submit(["--time", "10"], cluster, capsys) == []


def test_what_slurm_refuses_leaves_nothing(work: Path, cluster: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "sweep.yaml").write_text(SWEEP)
    assert main(["sweep", "sweep.yaml", "--slurm", "--partition", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "invalid partition specified: nowhere" in error
    assert "HINT:" in error
    assert [path.name for path in (work / "runs" / "sweep").iterdir()] in ([], [".lock"])
