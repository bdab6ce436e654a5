"""SLURM's numbers as ranks, where srun alone started them (on a real SLURM: tests/cluster), and free ports."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harness.launch.rank_env import free_port, set_from_srun

STEP = {
    "SLURM_CLUSTER_NAME": "c",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
# Of a real SLURM: the shell of a batch script has a task's number, but is in no step of srun's.
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_tasks_of_a_step_are_ranks_that_meet() -> None:
    environment, other, next_step = dict(STEP), STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, dict(STEP)
    next_step["SLURM_STEP_ID"] = "1"
    for each in (environment, other, next_step):
        set_from_srun(each)
    added = {name: environment[name] for name in environment.keys() - STEP.keys()}
    port = added.pop("MASTER_PORT")
    assert added == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert other["MASTER_PORT"] == port != next_step["MASTER_PORT"]


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "here"),
    [("2,1", "1", "1"), ("2,1", "0", "2"), ("4(x3),2,1", "2", "4"), ("4(x3),2,1", "3", "2"), ("4(x3),2,1", "4", "1")],
)
def test_nodes_may_have_different_numbers_of_ranks(tasks_per_node: str, node: str, here: str) -> None:
    environment = STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": node}
    set_from_srun(environment)
    assert environment["LOCAL_WORLD_SIZE"] == here


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
    set_from_srun(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[08-10,15]", "n08"), ("r[1-2]n[3,5],x", "r1n3"), ("n[7]-ib,m", "n7-ib")],
)
def test_ranks_meet_on_the_first_node(nodes: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol to ask for its address
    environment = STEP | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": nodes}
    set_from_srun(environment)
    assert environment["MASTER_ADDR"] == first


def test_a_free_port_is_free_and_is_not_given_to_outgoing_connections() -> None:
    port = free_port()
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 1024 <= port < lowest
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_ports_of_jobs_begin_apart_and_taken_ones_are_passed() -> None:
    first = free_port("1 0 0")
    assert free_port("1 0 0") == first
    assert len({free_port(f"{job} 0 0") for job in range(20)}) > 15
    with socket.socket() as server:
        server.bind(("", first))
        assert free_port("1 0 0") != first
