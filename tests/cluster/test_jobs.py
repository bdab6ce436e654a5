"""Trainings as jobs of a real SLURM: what ends them early, and that the result is as if nothing had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from harness.cli import main
from tests.cluster.conftest import DIGITS, JOB_LIMIT_SECONDS, STEPS, Submit, Task, own_cluster
from tests.cluster.sandbox import Sandbox
from tests.conftest import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TWO_NODES = ("submit", "digits.yaml", "--nodes", "2")
PREEMPTION = [
    "PreemptType=preempt/partition_prio",
    "PreemptMode=REQUEUE",
    "SlurmctldParameters=preempt_send_user_signal",
    "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=60",
    "PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF",
]
# What a rank sees of its place; for `python -c`.
PLACE = """
import os
from harness.launch.rank_env import set_from_srun
set_from_srun()
print("rank {RANK}/{WORLD_SIZE} local {LOCAL_RANK}/{LOCAL_WORLD_SIZE} {MASTER_ADDR}".format(**os.environ))
"""


def ranks_of(task: Task) -> list[psutil.Process]:
    """The job's ranks, in the order of their ranks."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "harness", "train"] and str(task.run) in words:
            found[int(process.environ()["SLURM_PROCID"])] = process
    return [found[rank] for rank in sorted(found)]


def signal_usr1(task: Task) -> None:
    task.cluster.run("scancel", "--signal=USR1", task.job_id)


def requeue(task: Task) -> None:
    task.cluster.run("scontrol", "requeue", task.job_id)


def assert_equal(task: Task, undisturbed: Task) -> None:
    """The run is as if nothing had happened: weights to the bit, every step once, in one run."""
    assert task.weights() == undisturbed.weights()
    assert task.steps() == list(range(1, STEPS + 1))
    assert list((task.run.parent).iterdir()) == [task.run]


# --- the short form, in every run of the suite


def test_a_job_on_two_nodes_trains_to_the_end(undisturbed: Task) -> None:
    assert undisturbed.result()["world_size"] == 2
    assert undisturbed.result()["step"] == STEPS
    assert undisturbed.steps() == list(range(1, STEPS + 1))
    assert "test accuracy" in undisturbed.output()
    files = [undisturbed.log.name, "job.sbatch", "recipe.yaml"]
    assert sorted(p.name for p in (undisturbed.run / "slurm").iterdir()) == sorted(files)


@pytest.mark.parametrize("disturb", [signal_usr1, pytest.param(requeue, marks=pytest.mark.long)])
def test_what_ends_a_job_early_changes_nothing(
    undisturbed: Task, submit: Submit, disturb: Callable[[Task], None]
) -> None:
    """It is queued again by itself, resumes in its run directory, and ends bit-equal to the job left alone."""
    (task,) = submit(*TWO_NODES, "tracking.wandb=offline")
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


def test_a_rank_that_dies_is_started_again_within_the_job(undisturbed: Task, submit: Submit) -> None:
    (task,) = submit(*TWO_NODES, "--max-restarts", "1")
    task.wait_for_step(12)
    ranks_of(task)[1].send_signal(signal.SIGKILL)
    assert task.finish()["Restarts"] == "0"
    assert "launch: restart 1 of 1, from the last checkpoint" in task.output()
    assert len(task.starts()) == 2
    assert task.starts()[1] >= 10
    assert_equal(task, undisturbed)


# --- the long form


@pytest.mark.long
def test_a_job_that_is_preempted_makes_room_and_resumes(undisturbed: Task, tmp_path: Path) -> None:
    """By a job of a better partition, as clusters have it: the signal of the job's own choice, then time to end."""
    with own_cluster(tmp_path, cpus=1, extra=PREEMPTION) as (cluster, submit):
        (task,) = submit(*TWO_NODES, "--partition", "low")
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
    (limited,) = submit("submit", "digits.yaml", "--time", "1", "--signal-seconds", "10", "training.steps=100000")
    limited.wait_for(lambda: limited.facts()["Restarts"] == "1", "queued again")
    assert "SIGUSR1: stopping after this step" in limited.output()
    stopped_at = max(limited.steps(), default=0)
    frozen = limited.run / "slurm" / "recipe.yaml"
    frozen.write_text(frozen.read_text().replace("steps: 100000", f"steps: {stopped_at + 5}"))
    limited.finish()
    assert limited.starts()[:2] == [0, stopped_at]
    (alone,) = submit("submit", "digits.yaml", f"training.steps={stopped_at + 5}")
    alone.finish()
    assert limited.weights(stopped_at + 5) == alone.weights(stopped_at + 5)
    assert limited.steps() == list(range(1, stopped_at + 6))


@pytest.mark.long
def test_a_node_that_dies_costs_a_few_steps(undisturbed: Task, tmp_path: Path) -> None:
    with own_cluster(tmp_path) as (cluster, submit):
        (task,) = submit(*TWO_NODES)
        task.wait_for_step(12)
        cluster.kill_node(1)  # where the batch script and the first rank are
        task.wait_for(lambda: task.facts()["JobState"] == "PENDING", "queued again")
        cluster.start_node(1)
        assert task.finish()["Restarts"] == "1"
        assert 10 <= task.starts()[1] <= 13  # a checkpoint every five steps
        assert_equal(task, undisturbed)


@pytest.mark.long
def test_a_start_that_was_cut_off_leaves_the_run_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node is down to SLURM, but its rank still holds the run directory."""

    def contents(run: Path) -> dict[str, bytes]:
        files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".out"]
        return {str(path.relative_to(run)): path.read_bytes() for path in files}

    monkeypatch.setenv("HARNESS_LOCK_SECONDS", "2")
    with own_cluster(tmp_path) as (cluster, submit):
        (task,) = submit("submit", "digits.yaml")
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "code"), [(["data.num_classes=7"], 2), (["optimizer.lr=1e30"], 3), (["--max-restarts", "0"], 1)]
)
def test_what_would_fail_again_is_not_tried_again(submit: Submit, words: list[str], code: int) -> None:
    (task,) = submit("submit", "digits.yaml", *words)
    if code == 1:
        task.wait_for_step(3)
        ranks_of(task)[0].send_signal(signal.SIGKILL)
    facts = task.finish("FAILED")
    assert (facts["ExitCode"], facts["Restarts"]) == (f"{code}:0", "0")
    assert ("launch: a rank died" in task.output()) is (code == 1)
    assert "restart 1" not in task.output()


@pytest.mark.long
def test_a_cancelled_job_stays_cancelled_and_can_be_resumed(submit: Submit, cluster: Sandbox) -> None:
    (task,) = submit("submit", "digits.yaml", "--tasks-per-node", "2")
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
def test_a_job_that_may_not_be_queued_again_says_how_to_resume_it(submit: Submit, cluster: Sandbox) -> None:
    (task,) = submit("submit", "digits.yaml")
    task.wait_for_step(3)
    cluster.run("scontrol", "update", f"JobId={task.job_id}", "Requeue=0")
    signal_usr1(task)
    assert task.finish("FAILED")["ExitCode"] == "75:0"
    assert f"resume with: sbatch {task.run}/slurm/job.sbatch" in task.output()


@pytest.mark.long
def test_one_task_of_an_array_is_queued_again_alone(submit: Submit, tmp_path: Path) -> None:
    first, second = submit("submit", "digits.yaml", "--array", "0,3")  # the second one's own id is that of the array
    (tmp_path / "digits.yaml").write_text("broken since")
    first.wait_for_step(3)
    second.wait_for_step(8)
    signal_usr1(second)
    assert second.finish()["Restarts"] == "1"
    assert first.finish()["Restarts"] == "0"
    for task, seed in ((first, 0), (second, 3)):
        assert task.run.name.endswith(f"-seed_{seed}")
        assert (task.result()["seed"], task.result()["step"]) == (seed, STEPS)
        assert yaml.safe_load((task.run / "slurm" / "recipe.yaml").read_text())["seed"] == seed
    assert (len(first.starts()), len(second.starts())) == (1, 2)


@pytest.mark.long
def test_a_recipes_name_is_only_a_name(submit: Submit, tmp_path: Path) -> None:
    name = "a \"b\" 'c' $(touch x) `touch y` 100%j #d"
    (tmp_path / f"{name}.yaml").write_text(DIGITS)
    (task,) = submit("submit", f"{name}.yaml", "training.steps=2")
    task.finish()
    assert task.run.parent == tmp_path / "runs" / name
    assert task.log.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"digits.yaml", f"{name}.yaml", "runs"}


@pytest.mark.long
def test_the_text_of_a_dry_run_runs_unchanged(
    submit: Submit, tmp_path: Path, cluster: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    assert main(["submit", "digits.yaml", "training.steps=2", "--run-dir", str(run), "--dry-run"]) == 0
    assert not run.exists()
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (run / "slurm").mkdir(parents=True)
    job = cluster.run("sbatch", "--parsable", str(script)).strip()
    task = Task(cluster, job, run, run / "slurm" / f"{job}.out")
    task.finish()
    assert task.result()["step"] == 2


@pytest.mark.long
def test_train_sbatch_is_for_those_who_write_their_own(submit: Submit, tmp_path: Path, cluster: Sandbox) -> None:
    script = str(ROOT / "scripts" / "train.sbatch")
    os.environ["HARNESS_PYTHON"] = sys.executable
    try:
        words = ["--nodes=2", "--ntasks-per-node=1", script, "digits.yaml", "training.steps=2"]
        job = cluster.run("sbatch", "--parsable", *words).strip()
    finally:
        del os.environ["HARNESS_PYTHON"]
    task = Task(cluster, job, tmp_path / "runs" / "digits" / job, tmp_path / f"slurm-{job}.out")
    task.finish()
    assert task.result()["world_size"] == 2
    assert yaml.safe_load((task.run / "slurm" / "recipe.yaml").read_text())["training"]["steps"] == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--gpus-per-node", "3"], "Requested node configuration is not available", "--nodes"),
        (["--nodes", "0"], "Node count specification invalid", "--nodes"),
        (["--array", "3-1"], "Invalid job array specification", "--array"),
        (["--array", "0-1", "--partition", "nowhere"], "invalid partition specified: nowhere", "--partition"),
        (["--array", "0-1", "--time", "soon"], "Invalid --time specification", "4:00:00"),
        (["--ndoes=2"], "unrecognized option '--ndoes=2'", "--help"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    submit: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    assert main(["submit", "digits.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert hint in error.partition("HINT:")[2]
    assert [p.name for p in tmp_path.iterdir()] == ["digits.yaml"]


@pytest.mark.long
def test_ranks_on_gpus_see_all_of_their_node(submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on two nodes; a stand-in for Python shows their places, since the GPUs are fake."""
    python = tmp_path / "python"
    more = "gpus $CUDA_VISIBLE_DEVICES cpu ${ACCELERATE_USE_CPU:-no} threads $OMP_NUM_THREADS"
    python.write_text(
        f'#!/bin/sh\n[ "$3" = train ] || exec {sys.executable} "$@"\necho "$({sys.executable} -c \'{PLACE}\') {more}"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    words = ["--tasks-per-node", "2", "--gpus-per-node", "2", "--cpus-per-task", "1"]
    (task,) = submit(*TWO_NODES, *words)
    task.finish()
    assert sorted(line for line in task.output().splitlines() if line.startswith("rank")) == [
        f"rank {rank}/4 local {rank % 2}/2 127.0.0.1 gpus 0,1 cpu no threads 1" for rank in range(4)
    ]


@pytest.mark.long
def test_srun_by_hand_starts_ranks_of_one_training(submit: Submit, tmp_path: Path, cluster: Sandbox) -> None:
    printed = cluster.run("srun", "-N2", "-n3", sys.executable, "-c", PLACE)  # two on the first node
    assert sorted(printed.splitlines()) == [
        "rank 0/3 local 0/2 127.0.0.1",
        "rank 1/3 local 1/2 127.0.0.1",
        "rank 2/3 local 0/1 127.0.0.1",
    ]
    harness = [sys.executable, "-m", "harness"]
    env = cluster.environment
    train = ["srun", "-N2", "-n2", *harness, "train", "digits.yaml", "training.steps=2"]
    done = subprocess.run(train, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "digits").iterdir()
    assert json.loads((run / "result.json").read_text())["world_size"] == 2
    evaluate = ["srun", "-N1", "-n2", *harness, "eval", str(run), "--json"]
    done = subprocess.run(evaluate, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2  # printed by one rank alone
