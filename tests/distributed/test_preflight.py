"""Ranks meet and are compared over a real store; the ranks here are threads, each with a connection of its own."""

from __future__ import annotations

import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
import torch.distributed as dist

from harness.distributed import preflight
from harness.distributed.preflight import RankEnv, RankInfo, crowded, differences, meet
from harness.errors import HarnessError

LAUNCHER = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
LAUNCHER |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
ONE = RankInfo("a", 2, "cpu", [0, 1], 1, "f00", {"torch": "2.14.1"})
GPU = replace(ONE, device="GPU 1234")
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


def gather(everyone: list[RankInfo], port: int, ranks: list[int] | None = None) -> list[HarnessError | dist.Store]:
    """What each rank that comes gets."""

    def come(rank: int) -> HarnessError | dist.Store:
        try:
            return meet(RankEnv(rank, len(everyone), rank, len(everyone), "127.0.0.1", port), everyone[rank])
        except HarnessError as error:
            return error

    ranks = list(range(len(everyone))) if ranks is None else ranks
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(come, ranks))


def test_equal_ranks_come_together_on_loopback_alone(free_port: int, capsys: Capsys) -> None:
    stores = gather([replace(ONE, cores=list(range(8)))] * 3, free_port)
    assert all(isinstance(store, dist.Store) for store in stores)
    assert capsys.readouterr().err == ""
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert [c.laddr for c in listening if c.laddr.port == free_port] == [("127.0.0.1", free_port)]


def test_a_rank_with_another_recipe_is_named_on_every_rank(free_port: int) -> None:
    others = [replace(ONE, recipe_sha256="bad", host="b"), replace(ONE, versions={"torch": "2.9"})]
    for error in gather([ONE, *others], free_port):
        assert isinstance(error, HarnessError)
        assert error.exit_code == 2
        assert "rank 1 on b has another recipe than rank 0 on a" in str(error)
        assert "rank 2 on a has torch 2.9, rank 0 on a has 2.14.1" in str(error)
        assert "HINT" in str(error)


@pytest.mark.parametrize(("come", "missing"), [([0, 2], "rank 1 of 3"), ([1, 2], "rank 0 did not come")])
def test_a_rank_that_does_not_come_is_named(
    come: list[int], missing: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "ARRIVAL_LIMIT_SECONDS", 1.5)
    for error in gather([ONE] * 3, free_port, come):
        assert missing in str(error)
        assert isinstance(error, HarnessError)
        assert error.exit_code == 1  # not the user's mistake: worth another try


def test_a_taken_port_is_named(free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        (error,) = gather([ONE] * 2, free_port, [0])
    assert f"port {free_port}" in str(error)
    assert "already in use" in str(error)
    assert isinstance(error, HarnessError)
    assert error.exit_code == 1


def test_clocks_that_differ_are_warned_of(free_port: int, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = itertools.chain([1000.0], itertools.repeat(1040.0))  # the first look is rank 0's, for the verdict
    monkeypatch.setattr(time, "time", lambda: next(clocks))
    gather([ONE], free_port)
    assert "WARNING the clocks of rank 0" in (warning := capsys.readouterr().err)
    assert "40 s apart" in warning


def test_two_ranks_on_one_gpu_and_a_mixed_world_are_refused() -> None:
    other = replace(ONE, device="GPU 5678")
    assert differences([GPU, other, replace(GPU, host="b")]) == []
    assert differences([GPU, other, GPU]) == ["ranks 0 and 2 share GPU 1234 on a"]
    assert differences([GPU, ONE]) == ["rank 1 computes on cpu, rank 0 on GPU 1234"]
    assert differences([ONE, replace(ONE, world_size=3)]) == ["rank 1 has WORLD_SIZE 3, rank 0 has 2"]


def test_more_threads_than_cores_is_warned_of() -> None:
    assert crowded([ONE, ONE]) == []
    assert crowded([ONE, replace(ONE, cores=[2, 3], host="b", threads=2)]) == []
    (warning,) = crowded([replace(ONE, threads=2)] * 2)
    assert "2 ranks have 4 threads on 2 cores" in warning
    assert "OMP_NUM_THREADS=1" in warning


def test_the_environment_is_what_the_launcher_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RankEnv.of_this_process() == RankEnv(0, 1, 0, 1, "", 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(HarnessError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        RankEnv.of_this_process()
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    assert RankEnv.of_this_process() == RankEnv(3, 4, 1, 2, "10.0.0.1", 29500)
    for name, value, text in (
        ("RANK", "4", "RANK is 4, but WORLD_SIZE is 4"),
        ("RANK", "-1", "RANK must be a whole number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE must be a whole number"),
        ("LOCAL_WORLD_SIZE", "two", "LOCAL_WORLD_SIZE must be a whole number"),
        ("MASTER_PORT", "70000", "MASTER_PORT is 70000"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(HarnessError, match=text):
                RankEnv.of_this_process()


def test_a_rank_says_what_this_process_is() -> None:
    own = RankInfo.of_this_process(RankEnv(world_size=2), use_cpu=True, recipe_sha256="f00")
    assert (own.device, own.host) == ("cpu", socket.gethostname())
    assert own.versions["torch"]
    assert own.cores
