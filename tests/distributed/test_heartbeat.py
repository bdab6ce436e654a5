"""Who is diagnosed: ranks here are heartbeats on one real store, alive or not, late or not. And gloo's interface.

Interfaces between hosts with addresses of their own: tests/cluster/test_hosts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from harness.distributed.heartbeat import Heartbeat, RankLost, collective_limit_seconds, interface_towards
from harness.errors import HarnessError
from harness.launch.rank_env import free_port
from tests.conftest import ROOT, RunRanks

Beats = Callable[..., list[Heartbeat]]


@pytest.fixture
def beats() -> Iterator[Beats]:
    """`beats(4)`: so many ranks, each with its own connection; `limit_seconds` of collectives."""
    port, running = free_port(), []
    keeper = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def start(count: int, *, limit_seconds: float = 300) -> list[Heartbeat]:
        for rank in range(count):
            store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=10))
            running.append(Heartbeat(store, rank=rank, world_size=count, limit_seconds=limit_seconds))
        return list(running)

    yield start
    for beat in running:
        beat.end()
    del keeper


def test_the_late_and_the_gone_are_named_and_nobody_else(beats: Beats) -> None:
    """All ranks look at the same time, as those do that wait for the same collective."""
    ranks = beats(4)
    for rank in [*ranks, *ranks[:2]]:  # rank 2 is one step behind, and alive
        rank.tick()
    ranks[3].end()
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(Heartbeat.diagnose, ranks[:3]))
    said = "rank 3 is gone or stopped (no sign of life for 2 s); rank 2 is late"
    assert found == [said, said, f"{said} (this one)"]


def test_a_rank_that_stands_still_is_warned_of_before_the_time_is_up(
    beats: Beats, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = beats(3, limit_seconds=2)
    for rank in [*ranks, *ranks[:2]]:
        rank.tick()
    ranks[2]._ended.wait(5.5)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert all("stood still for" in text and "rank 2 is late" in text and "gone" not in text for text in warnings)


def test_an_error_is_quoted_and_a_broken_collective_is_explained(beats: Beats) -> None:
    first, second = beats(2)
    broken = RuntimeError("[gloo/transport/tcp/pair.cc] Read error\nand more")
    alive = r"all ranks are alive: \[gloo/transport/tcp/pair.cc\] Read error\n"
    with pytest.raises(RankLost, match=alive), first.diagnosing():
        raise broken
    with pytest.raises(ValueError, match="on fire"), second.diagnosing():
        raise ValueError("the disk is on fire")
    with pytest.raises(RankLost, match="rank 1 failed: ValueError: the disk is on fire"), first.diagnosing():
        raise broken


SILENT = """
import datetime, sys, time
import torch
import torch.distributed as dist
from harness.distributed.heartbeat import is_broken_collective

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
numbers = torch.zeros(8)
dist.all_reduce(numbers)
if dist.get_rank() == 1:
    time.sleep(6)  # takes no further part
else:
    works = [dist.all_reduce(torch.zeros(8), async_op=True) for _ in range(int(sys.argv[1]))]
    for wait in [*(work.wait for work in works), lambda: dist.all_reduce(numbers), lambda: dist.broadcast(numbers, 0)]:
        try:
            wait()
        except RuntimeError as error:
            print("known" if is_broken_collective(error) else "unknown", str(error)[-200:], flush=True)
        else:
            print("no error", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("on_the_way", [0, 3])
def test_errors_of_collectives_are_known_however_many_are_on_the_way(
    on_the_way: int, tmp_path: Path, run_ranks: RunRanks
) -> None:
    """The first one has gloo's name in it; the others on the same connection get its bare words."""
    script = tmp_path / "silent.py"
    script.write_text(SILENT)
    done = run_ranks(2, script, str(on_the_way), env={"PYTHONPATH": str(ROOT)})
    lines = done.stdout.splitlines()
    assert len(lines) == on_the_way + 2, done.stderr
    assert all(line.startswith("known ") for line in lines), lines


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", ""])
def test_a_wrong_time_limit_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_COLLECTIVE_TIMEOUT_SECONDS", text)
    with pytest.raises(HarnessError, match="must be a number of seconds above 0"):
        collective_limit_seconds()


@pytest.mark.parametrize(
    ("head", "several_machines", "name"),
    [
        ("127.0.0.1", False, "lo"),
        ("localhost", False, "lo"),
        ("127.0.1.1", False, "lo"),
        ("127.0.0.1", True, "lo"),  # taken at its word, as in a cluster whose nodes are all on one machine
        ("no.such.host.invalid", False, None),
    ],
)
def test_the_interface_of_one_machine(head: str, several_machines: bool, name: str | None) -> None:
    assert interface_towards(head, several_machines=several_machines) == name
