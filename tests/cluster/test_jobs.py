"""Trainings as jobs of a real SLURM: what ends them early, and that the result is as if nothing had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from harness.cli import main
from tests.cluster.conftest import DIGITS, JOB_LIMIT_SECONDS, STEPS, Submit, Task, in_cluster, tasks_in
from tests.cluster.sandbox import Sandbox

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]


def test_a_job_on_two_nodes_trains_to_the_end(undisturbed: Task) -> None:
    assert undisturbed.result()["world_size"] == 2
    assert undisturbed.result()["step"] == STEPS
    assert undisturbed.steps() == list(range(1, STEPS + 1))
    assert "test accuracy" in undisturbed.output()
    assert sorted(p.name for p in (undisturbed.run / "slurm").iterdir()) == sorted(
        [undisturbed.log.name, "job.sbatch", "recipe.yaml"]
    )


def signal_usr1(task: Task) -> None:
    task.cluster.run("scancel", "--signal=USR1", task.job_id)


def requeue(task: Task) -> None:
    task.cluster.run("scontrol", "requeue", task.job_id)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [signal_usr1, pytest.param(requeue, marks=pytest.mark.long)])
def test_what_ends_a_job_early_changes_nothing(
    undisturbed: Task, submit: Submit, disturb: Callable[[Task], None]
) -> None:
    """It is queued again by itself, goes on in its run directory, and ends bit-equal to the job left alone."""
    task = submit("digits.yaml", "--nodes", "2", "tracking.wandb=offline")
    task.wait_for_step(12)
    disturb(task)
    assert task.finish()["Restarts"] == "1"
    first, second = task.starts()
    assert first == 0
    assert second >= 12  # no step is lost
    assert ("SIGUSR1" in task.output()) is (disturb is signal_usr1)
    assert ("SLURM has queued the job again" in task.output()) is (disturb is requeue)
    assert "resume with" not in task.output()
    assert_equal(task, undisturbed)
    wandb_run_id = json.loads((task.run / "provenance.json").read_text())["wandb_run_id"]
    starts = [folder.name.rpartition("-")[2] for folder in (task.run / "wandb").glob("offline-run-*")]
    assert starts == [wandb_run_id] * 2  # one W&B run, written by both starts


def assert_equal(task: Task, undisturbed: Task) -> None:
    """The run is as if nothing had happened: weights to the bit, every step once, in one run."""
    assert task.weights() == undisturbed.weights()
    assert task.steps() == list(range(1, STEPS + 1))
    assert list((task.run.parent).iterdir()) == [task.run]


@pytest.mark.long
def test_a_job_that_is_preempted_makes_room_and_goes_on(
    undisturbed: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a job of a better partition, as clusters have it: the signal of the job's own choice, then time to end."""
    preemption = [
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=60",
        "PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF",
    ]
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        Sandbox(Path(folder), cpus=1, extra=preemption) as cluster,
    ):
        in_cluster(cluster, tmp_path, monkeypatch)
        assert main(["submit", "digits.yaml", "--nodes", "2", "--partition", "low"]) == 0
        (task,) = tasks_in(capsys.readouterr().out, cluster)
        task.wait_for_step(8)
        cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=other", "--wrap=sleep 1")
        assert task.finish()["Restarts"] == "1"
        assert "stopped by SIGUSR1" in task.output()
        first, second = task.starts()
        assert (first, second >= 8) == (0, True)
        assert_equal(task, undisturbed)


@pytest.mark.long
def test_the_time_limit_changes_nothing(submit: Submit) -> None:
    """SLURM looks at time limits every half minute: the warning comes 20 to 50 s after the job began.

    The training is too long to end before, on any machine; its end is set when it waits to be started again.
    """
    limited = submit("digits.yaml", "--time", "1", "--signal-seconds", "10", "training.steps=100000")
    limited.wait_for(lambda: limited.facts()["Restarts"] == "1", "queued again")
    assert "SIGUSR1: stopping after this step" in limited.output()
    stopped_at = max(limited.steps(), default=0)
    frozen = limited.run / "slurm" / "recipe.yaml"
    frozen.write_text(frozen.read_text().replace("steps: 100000", f"steps: {stopped_at + 5}"))
    limited.finish()
    assert limited.starts()[:2] == [0, stopped_at]
    alone = submit("digits.yaml", f"training.steps={stopped_at + 5}")
    alone.finish()
    assert limited.weights(stopped_at + 5) == alone.weights(stopped_at + 5)
    assert limited.steps() == list(range(1, stopped_at + 6))


@pytest.mark.slow
def test_a_node_that_dies_costs_a_few_steps(
    undisturbed: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a cluster of its own: the node's daemon is started again in the test."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Sandbox(Path(folder)) as cluster:
        in_cluster(cluster, tmp_path, monkeypatch)
        assert main(["submit", "digits.yaml", "--nodes", "2"]) == 0
        (task,) = tasks_in(capsys.readouterr().out, cluster)
        task.wait_for_step(12)
        cluster.kill_node(1)  # where the batch script and the first rank are
        task.wait_for(lambda: task.facts()["JobState"] == "PENDING", "queued again")
        cluster.start_node(1)
        assert task.finish()["Restarts"] == "1"
        assert 10 <= task.starts()[1] <= 13  # a checkpoint every five steps
        assert_equal(task, undisturbed)


@pytest.mark.slow
def test_a_start_that_was_cut_off_leaves_the_run_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its node is down to SLURM, but its rank still holds the run directory."""
    monkeypatch.setenv("HARNESS_LOCK_SECONDS", "2")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Sandbox(Path(folder)) as cluster:
        in_cluster(cluster, tmp_path, monkeypatch)
        assert main(["submit", "digits.yaml"]) == 0
        (task,) = tasks_in(capsys.readouterr().out, cluster)
        task.wait_for_step(8)
        (orphan,) = ranks_of(task)
        orphan.suspend()
        cluster.cut_off_node(1)
        assert task.finish()["Restarts"] == "1"
        assert "taken over from an earlier start of this job" in task.output()
        assert task.steps() == list(range(1, STEPS + 1))
        before = contents(task.run)
        orphan.resume()
        psutil.wait_procs([orphan], timeout=JOB_LIMIT_SECONDS)
        assert not orphan.is_running()
        assert contents(task.run) == before


def contents(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".out"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def ranks_of(task: Task) -> list[psutil.Process]:
    """The job's ranks, in the order of their ranks."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "harness", "train"] and str(task.run) in words:
            found[int(process.environ()["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again_within_the_job(undisturbed: Task, submit: Submit) -> None:
    task = submit("digits.yaml", "--nodes", "2", "--max-restarts", "1")
    task.wait_for_step(12)
    ranks_of(task)[1].send_signal(signal.SIGKILL)
    assert task.finish()["Restarts"] == "0"
    assert "launch: restart 1 of 1, from the last checkpoint" in task.output()
    assert len(task.starts()) == 2
    assert task.starts()[1] >= 10
    assert_equal(task, undisturbed)


@pytest.mark.long
def test_a_rank_that_dies_too_often_fails_the_job(submit: Submit) -> None:
    task = submit("digits.yaml", "--max-restarts", "0", "training.steps=100000")
    task.wait_for_step(3)
    ranks_of(task)[0].send_signal(signal.SIGKILL)
    facts = task.finish("FAILED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("1:0", "0")
    assert "launch: a rank died" in task.output()


@pytest.mark.slow
@pytest.mark.parametrize(("override", "code"), [("data.num_classes=7", 2), ("optimizer.lr=1e30", 3)])
def test_what_would_fail_again_is_not_tried_again(submit: Submit, override: str, code: int) -> None:
    task = submit("digits.yaml", override)
    facts = task.finish("FAILED")
    assert (facts["ExitCode"], facts["Restarts"]) == (f"{code}:0", "0")
    assert "restart" not in task.output()


@pytest.mark.long
def test_a_cancelled_job_stays_cancelled_and_can_be_gone_on_with(submit: Submit, cluster: Sandbox) -> None:
    task = submit("digits.yaml", "--tasks-per-node", "2")
    task.wait_for_step(5)
    cluster.run("scancel", task.job_id)
    assert task.finish("CANCELLED")["Restarts"] == "0"
    assert "stopped by SIGTERM" in task.output()
    reached = task.steps()[-1]
    job = cluster.run("sbatch", "--parsable", str(task.run / "slurm" / "job.sbatch")).strip()
    again = Task(cluster, job, task.run, task.log.with_name(f"{job}.out"))
    again.finish()
    assert again.starts() == [0, reached]


@pytest.mark.long
def test_a_job_that_may_not_be_queued_again_says_how_to_go_on(submit: Submit, cluster: Sandbox) -> None:
    task = submit("digits.yaml")
    task.wait_for_step(3)
    cluster.run("scontrol", "update", f"JobId={task.job_id}", "Requeue=0")
    signal_usr1(task)
    assert task.finish("FAILED")["ExitCode"] == "75:0"
    assert f"resume with: sbatch {task.run}/slurm/job.sbatch" in task.output()


@pytest.mark.slow
def test_one_task_of_an_array_is_queued_again_alone(submit: Submit) -> None:
    first, second = submit("digits.yaml", "--array", "0,3")  # the second one's own id is that of the array
    first.wait_for_step(3)
    second.wait_for_step(8)
    signal_usr1(second)
    assert second.finish()["Restarts"] == "1"
    assert first.finish()["Restarts"] == "0"
    for task, seed in ((first, 0), (second, 3)):
        assert task.run.name.endswith(f"-seed_{seed}")
        assert task.result()["seed"] == seed
        assert task.result()["step"] == STEPS
        assert yaml.safe_load((task.run / "slurm" / "recipe.yaml").read_text())["seed"] == seed
    assert len(second.starts()) == 2
    assert len(first.starts()) == 1


@pytest.mark.slow
def test_a_recipes_name_is_only_a_name(submit: Submit, work: Path) -> None:
    name = "a \"b\" 'c' $(touch x) `touch y` 100%j #d"
    (work / f"{name}.yaml").write_text(DIGITS)
    task = submit(f"{name}.yaml", "training.steps=2")
    task.finish()
    assert task.run.parent == work / "runs" / name
    assert task.log.exists()
    assert {p.name for p in work.iterdir()} == {"digits.yaml", f"{name}.yaml", "runs"}


@pytest.mark.slow
def test_the_text_of_a_dry_run_runs_unchanged(
    work: Path, cluster: Sandbox, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    run = work / "a run"
    assert main(["submit", "digits.yaml", "training.steps=2", "--run-dir", str(run), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not run.exists()
    script = work / "script"
    script.write_text(text)
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    for check in (["bash", "-n"], [shellcheck]):
        subprocess.run([*check, str(script)], check=True, timeout=60)
    (run / "slurm").mkdir(parents=True)
    job = cluster.run("sbatch", "--parsable", str(script)).strip()
    task = Task(cluster, job, run, run / "slurm" / f"{job}.out")
    task.finish()
    assert task.result()["step"] == 2


@pytest.mark.slow
def test_train_sbatch_is_for_those_who_write_their_own(
    work: Path, cluster: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_PYTHON", sys.executable)
    words = [
        "--nodes=2",
        "--ntasks-per-node=1",
        str(ROOT / "scripts" / "train.sbatch"),
        "digits.yaml",
        "training.steps=2",
    ]
    environment = cluster.environment | dict(os.environ)
    done = subprocess.run(
        ["sbatch", "--parsable", *words], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    job = done.stdout.strip()
    task = Task(cluster, job, work / "runs" / "digits" / job, work / f"slurm-{job}.out")
    task.finish()
    assert task.result()["world_size"] == 2
    assert yaml.safe_load((task.run / "slurm" / "recipe.yaml").read_text())["training"]["steps"] == 2


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--gpus-per-node", "3"], "Requested node configuration is not available", "--nodes"),
        (["--nodes", "3"], "Node count specification invalid", "--nodes"),
        (["--array", "0-1", "--partition", "nowhere"], "invalid partition specified: nowhere", "--partition"),
        (["--array", "0-1", "--time", "soon"], "Invalid --time specification", "4:00:00"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    work: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    assert main(["submit", "digits.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert hint in error.partition("HINT:")[2]
    assert [p.name for p in work.iterdir()] == ["digits.yaml"]


def test_ranks_on_gpus_see_all_of_their_node(work: Path, cluster: Sandbox, submit: Submit) -> None:
    """The places of four ranks on two nodes; a stand-in for Python tells them, since the GPUs are fake."""
    from harness.launching.slurm import Job, sbatch_text

    python = work / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1" in -c) echo 20000; exit ;; esac\n'
        'echo "rank $RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE gpus $CUDA_VISIBLE_DEVICES '
        'cpu ${ACCELERATE_USE_CPU:-no} threads $OMP_NUM_THREADS $MASTER_ADDR:$MASTER_PORT"\n'
    )
    python.chmod(0o755)
    (work / "slurm").mkdir()
    (work / "slurm" / "recipe.yaml").touch()
    job = Job("x", "x.yaml", str(work), str(python), nodes=2, tasks_per_node=2, gpus_per_node=2, cpus_per_task=1)
    (work / "script").write_text(sbatch_text(job))
    number = cluster.run("sbatch", "--parsable", str(work / "script")).strip()
    task = Task(cluster, number, work, work / "slurm" / f"{number}.out")
    task.finish()
    assert sorted(line for line in task.output().splitlines() if line.startswith("rank")) == [
        f"rank {rank}/4 local {rank % 2}/2 gpus 0,1 cpu no threads 1 127.0.0.1:20000" for rank in range(4)
    ]


@pytest.mark.slow
def test_srun_by_hand_starts_ranks_of_one_training(work: Path, cluster: Sandbox) -> None:
    words = ["-m", "harness", "train", "digits.yaml", "training.steps=2"]
    environment = cluster.environment | {n: os.environ[n] for n in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
    command = ["srun", "-N2", "-n2", sys.executable, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = (work / "runs" / "digits").iterdir()
    assert json.loads((run / "result.json").read_text())["world_size"] == 2
    done = subprocess.run(
        ["srun", "-N1", "-n2", sys.executable, "-m", "harness", "eval", str(run), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2  # told by one rank alone
