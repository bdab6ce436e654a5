"""SLURM's numbers as ranks, where srun alone started them. On a real SLURM: tests/cluster/test_jobs.py."""

from __future__ import annotations

import os

import pytest

from harness.srun import first_host, take_place

STEP = {
    "SLURM_CLUSTER_NAME": "c",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
# Of a real SLURM: the shell of a batch script has a task's number, but is in no step of srun's.
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_tasks_of_a_step_are_ranks_that_meet() -> None:
    environment = dict(STEP)
    take_place(environment)
    taken = {name: environment[name] for name in environment.keys() - STEP.keys()}
    port = taken.pop("MASTER_PORT")
    assert taken == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    other, next_step = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, STEP | {"SLURM_STEP_ID": "1"}
    take_place(other)
    take_place(next_step)
    assert other["MASTER_PORT"] == port != next_step["MASTER_PORT"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH_SHELL,
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"RANK": "0", "WORLD_SIZE": "2"},
        STEP | {"WORLD_SIZE": "1"},
        STEP | {"SLURM_PTY_PORT": "4000"},  # steps started there inherit the variable, not the terminal
    ],
)
def test_what_is_no_task_of_srun_alone_stays_as_it_is(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    before = dict(environment)
    take_place(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[08-10,15]", "n08"), ("r[1-2]n[3,5],x", "r1n3"), ("n[7]-ib,m", "n7-ib")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
