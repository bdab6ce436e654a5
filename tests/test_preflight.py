"""Ranks meet and are compared over a real store; the ranks here are threads, each with a connection of its own."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
import torch.distributed as dist

from harness import preflight
from harness.errors import HarnessError
from harness.preflight import Facts, Place, crowded, differences, facts, join

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def one(**changes: object) -> Facts:
    own = Facts("a", 1, 2, "cpu", (0, 1), 1, "f00", {"torch": "2.14.1"})
    return replace(own, **changes)  # type: ignore[arg-type]


def meet(
    everyone: list[Facts], port: int, ranks: list[int] | None = None
) -> tuple[list[HarnessError | None], list[str]]:
    """What each rank that comes is told, and the warnings."""
    notes: list[str] = []

    def come(rank: int) -> HarnessError | None:
        place = Place(rank, len(everyone), rank, "127.0.0.1", port)
        try:
            join(place, everyone[rank], note=notes.append)
        except HarnessError as error:
            return error
        return None

    ranks = list(range(len(everyone))) if ranks is None else ranks
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(come, ranks)), notes


def test_equal_ranks_come_together(free_port: int) -> None:
    everyone = [one(cores=tuple(range(8)))] * 3
    assert meet(everyone, free_port) == ([None, None, None], [])


def test_a_rank_with_another_recipe_is_named_on_every_rank(free_port: int) -> None:
    found, _ = meet([one(), one(recipe_sha256="bad", host="b"), one(versions={"torch": "2.9"})], free_port)
    for error in found:
        assert error is not None
        assert error.exit_code == 2
        assert "rank 1 on b has another recipe than rank 0 on a" in str(error)
        assert "rank 2 on a has torch 2.9, rank 0 on a has 2.14.1" in str(error)
        assert "HINT" in str(error)


@pytest.mark.parametrize(("come", "missing"), [([0, 2], "rank 1 of 3"), ([1, 2], "rank 0 did not come")])
def test_a_rank_that_does_not_come_is_named(
    come: list[int], missing: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "ARRIVAL_LIMIT_SECONDS", 1.5)
    found, _ = meet([one(), one(), one()], free_port, come)
    for error in found:
        assert error is not None
        assert missing in str(error)
        assert error.exit_code == 1  # not the user's mistake: worth another try


def test_a_taken_port_is_named(free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(HarnessError, match="already in use") as caught:
        join(Place(0, 2, 0, "127.0.0.1", free_port), one(), note=print)
    assert f"port {free_port}" in str(caught.value)
    assert caught.value.exit_code == 1


def test_ranks_of_one_machine_listen_on_loopback_alone(free_port: int) -> None:
    def come(rank: int) -> dist.Store:
        return join(Place(rank, 2, rank, "127.0.0.1", free_port), one(), note=print)

    with ThreadPoolExecutor(2) as threads:
        stores = list(threads.map(come, range(2)))
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert [c.laddr for c in listening if c.laddr.port == free_port] == [("127.0.0.1", free_port)]
    del stores


def test_two_ranks_on_one_gpu_and_a_mixed_world_are_refused() -> None:
    gpu, other = one(device="GPU 1234"), one(device="GPU 5678")
    assert differences([gpu, other, replace(gpu, host="b")]) == []
    assert differences([gpu, other, gpu]) == ["ranks 0 and 2 share GPU 1234 on a"]
    assert differences([gpu, one()]) == ["rank 1 computes on cpu, rank 0 on GPU 1234"]
    assert differences([one(), one(world_size=3)]) == ["rank 1 was told of 3 ranks, rank 0 of 2"]


def test_more_threads_than_cores_is_warned_of() -> None:
    assert crowded([one(), one()]) == []
    assert crowded([one(cores=(0, 1)), one(cores=(2, 3), host="b", threads=2)]) == []
    (warning,) = crowded([one(threads=2), one(threads=2)])
    assert "2 ranks have 4 threads on 2 cores" in warning
    assert "OMP_NUM_THREADS=1" in warning


def test_the_place_is_what_the_launcher_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.of_environment() == Place(0, 1, 0, "", 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(HarnessError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        Place.of_environment()
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert Place.of_environment() == Place(3, 4, 1, "10.0.0.1", 29500)
    for name, value, text in (
        ("RANK", "4", "RANK is 4, but WORLD_SIZE is 4"),
        ("RANK", "-1", "RANK must be a whole number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE must be a whole number"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(HarnessError, match=text):
                Place.of_environment()


def test_the_facts_are_those_of_this_process() -> None:
    own = facts(Place(0, 2, 0, "127.0.0.1", 1), use_cpu=True, recipe_sha256="f00")
    assert own.device == "cpu"
    assert own.host == socket.gethostname()
    assert own.versions["torch"]
    assert own.cores
