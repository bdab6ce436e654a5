"""Sweeps as arrays of a real SLURM: each task its own point, and only what is due is submitted again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from harness.cli import main
from harness.runs import EXIT_CODE
from tests.cluster.conftest import STEPS, Submit
from tests.cluster.sandbox import Sandbox

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(600)]
ON_CLUSTER = ("sweep", "sweep.yaml", "--slurm")


def write_sweep(folder: Path, rates: list[float], **more: object) -> None:
    sweep = {"recipe": "digits.yaml", "method": "grid", "parameters": {"optimizer.lr": {"values": rates}}, **more}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))


def points(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    capsys.readouterr()
    assert main(["sweep", "sweep.yaml", "--table", "--json"]) == 0
    return [point["runs"][0] for point in json.loads(capsys.readouterr().out)["points"]]


def test_a_task_a_point_and_only_what_is_due_again(
    submit: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path, [0.1, 0.05, 1e30], overrides={"training.steps": 2})
    words = [*ON_CLUSTER, "--tasks-per-node", "2", "--time", "10", "--at-once", "2"]
    good, other, bad = tasks = submit(*words)
    assert submit(*words) == []  # all are queued or running
    assert {point["state"] for point in points(capsys)} <= {"queued", "running"}
    good.finish()
    other.finish()
    assert bad.finish("FAILED")["ExitCode"] == "3:0"
    for task, lr in ((good, 0.1), (other, 0.05)):
        assert (task.result()["world_size"], task.result()["step"]) == (2, 2)
        assert yaml.safe_load((task.run / "recipe.yaml").read_text())["optimizer"]["lr"] == lr
        assert task.log.parent == tmp_path / "runs" / "sweep" / "slurm"
    assert [(task.run / EXIT_CODE).read_text() for task in tasks] == ["0\n", "0\n", "3\n"]
    assert submit(*words) == []
    assert [(p["state"], p.get("exit_code")) for p in points(capsys)][2] == ("failed", 3)
    assert main([*words, "--retry-failed", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-0%2\n" in script
    assert f"sweep_runs=({bad.run})\n" in script


def test_a_point_that_slurm_stops_resumes_in_its_own_run(
    submit: Submit, tmp_path: Path, cluster: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path, [0.05, 0.1])
    alone, stopped = submit(*ON_CLUSTER)
    stopped.wait_for_step(8)
    cluster.run("scancel", "--signal=USR1", stopped.job_id)
    assert stopped.finish()["Restarts"] == "1"
    assert alone.finish()["Restarts"] == "0"
    assert alone.starts() == [0]
    first, second = stopped.starts()
    assert first == 0
    assert second >= 8
    assert stopped.steps() == list(range(1, STEPS + 1))
    assert [point["state"] for point in points(capsys)] == ["finished", "finished"]
    assert submit(*ON_CLUSTER) == []


def test_what_slurm_refuses_leaves_nothing(submit: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, [0.1])
    assert main([*ON_CLUSTER, "--partition", "nowhere"]) == 2
    assert re.search(r"invalid partition specified: nowhere[^$]*HINT:", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "runs" / "sweep").iterdir()] in ([], [".lock"])
