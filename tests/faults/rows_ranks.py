"""Several ranks: one that dies, throws or stalls, a launcher that dies, a taken port, other numbers of ranks."""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from harness.launch.rank_env import free_port
from tests.faults.check import reached, records, restarted, says_why, wait_for_step
from tests.faults.fault import fault
from tests.faults.runs import STEPS, WITHOUT_DRAWS, Stage
from tests.fork_server import Process

REQUEUE = 75
TIMEOUT_VARIABLE = "HARNESS_COLLECTIVE_TIMEOUT_SECONDS"
END_SECONDS = 90.0


def pair(stage: Stage, *overrides: str, port: int | None = None, env: dict[str, str] | None = None) -> list[Process]:
    """Two ranks without a launcher between: forked like all others, so that many can be tried."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **(env or {})}
    common["MASTER_PORT"] = str(port or free_port())
    places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [stage.train(*overrides, env=place) for place in places]


def both_restarted(stage: Stage, port: int | None = None) -> None:
    """The first rank's end is the run's."""
    ranks: list[Process] = []

    def start() -> Process:
        ranks.extend(pair(stage, port=port))
        return ranks[0]

    restarted(stage, start=start, ranks=2)
    assert ranks[1].wait() == 0, ranks[1].text()[-500:]


def ranks_of(launcher: Process) -> list[psutil.Process]:
    """The processes of a launcher that are ranks, in their order."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [p for p in below if "train" in p.cmdline() and "RANK" in p.environ()]
    return sorted(ranks, key=lambda process: process.environ()["RANK"])


@fault("rank-killed", trials=16, ordinary=True)
def rank_killed(stage: Stage, index: int) -> None:
    """SIGKILL of one rank of two: two forked ranks, one of them in turn killed from outside at a random step; the other
    must end by itself, then both are restarted."""
    ranks = pair(stage)
    wait_for_step(stage, ranks[0], stage.rng.randrange(1, STEPS - 2))
    time.sleep(stage.rng.uniform(0, 0.03))
    begin = time.monotonic()
    dead, other = ranks[index % 2], ranks[1 - index % 2]
    dead.send(signal.SIGKILL)
    codes = [stage.end(rank, since=begin, seconds=END_SECONDS) for rank in (dead, other)]
    stage.notes.append(f"rank {index % 2}, exit codes {codes}")
    assert codes != [-signal.SIGKILL, 0], "the other rank took it for the end"
    both_restarted(stage)


@fault("rank-killed-under-launcher", trials=4)
def rank_killed_under_launcher(stage: Stage, index: int) -> None:
    """SIGKILL of one rank of two, under the launcher: `accelerate launch` as launch.sh runs it, one of the ranks in
    turn killed from outside at a random step; the whole command must end, then it is run again."""
    launcher = stage.launch()
    wait_for_step(stage, launcher, stage.rng.randrange(1, STEPS - 4))
    ranks = ranks_of(launcher)
    begin = time.monotonic()
    ranks[index % len(ranks)].kill()
    code = stage.end(launcher, since=begin, seconds=END_SECONDS)
    stage.notes.append(f"rank {index % 2}, exit code {code}")
    assert code in (1, REQUEUE), launcher.text()[-500:]
    restarted(stage, start=stage.launch, ranks=2)


@fault("launcher-killed", most_steps_lost=0, trials=4)
def launcher_killed(stage: Stage, index: int) -> None:
    """SIGKILL of the launcher: `accelerate launch` killed from outside at a random step; its ranks must stop with a
    checkpoint within 90 s, then it is run again."""
    length = ("training.epochs=15",)
    launcher = stage.launch(*length)
    wait_for_step(stage, launcher, stage.rng.randrange(1, STEPS))
    orphans = ranks_of(launcher)
    begin = time.monotonic()
    launcher.send(signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(orphans, timeout=END_SECONDS)
    stage.detect = time.monotonic() - begin
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} ranks outlived their launcher by {END_SECONDS:g} s"
    restarted(stage, *length, start=lambda: stage.launch(*length), ranks=2)


@fault("rank-throws", trials=4)
def rank_throws(stage: Stage, index: int) -> None:
    """A rank that throws: `accelerate launch`, a RuntimeError in rank 1 at a random step; the command must end with
    code 1 and show that error, then it is run again."""
    step = stage.rng.randrange(2, STEPS)
    stage.notes.append(f"step {step}")
    launcher = stage.launch(faults=[{"kind": "step", "step": step, "action": "throw", "rank": 1}])
    wait_for_step(stage, launcher, step - 1)
    code = stage.end(launcher, since=time.monotonic(), seconds=END_SECONDS)
    assert code == 1, f"exit code {code}: {launcher.text()[-800:]}"
    assert "a fault of this test" in launcher.text()
    restarted(stage, start=stage.launch, ranks=2)


@fault("rank-stalls", trials=10)
def rank_stalls(stage: Stage, index: int) -> None:
    """A rank that stalls: two forked ranks, one of them in turn sent SIGSTOP at a random step,
    HARNESS_COLLECTIVE_TIMEOUT_SECONDS=8; the other must end and name the rank that is late, then both are restarted."""
    ranks = pair(stage, env={TIMEOUT_VARIABLE: "8"})
    wait_for_step(stage, ranks[0], stage.rng.randrange(1, STEPS - 4))
    late, other = ranks[index % 2], ranks[1 - index % 2]
    begin = time.monotonic()
    late.send(signal.SIGSTOP)
    code = stage.end(other, since=begin, seconds=END_SECONDS)
    late.send(signal.SIGKILL)
    late.wait()
    stage.notes.append(f"rank {index % 2}, exit code {code}")
    assert code != 0
    assert f"rank {index % 2}" in other.text(), other.text()[-500:]
    both_restarted(stage)


@contextmanager
def taken_port() -> Iterator[int]:
    """A port that is taken on every address of this machine."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        yield int(listener.getsockname()[1])


@fault("taken-port", trials=6)
def port_taken(stage: Stage, index: int) -> None:
    """A taken port: two forked ranks whose MASTER_PORT another process listens on: rank 0 must end with an error that
    names the port, nothing written; with the port free they train as undisturbed."""
    with taken_port() as port:
        first, second = pair(stage, port=port)
        code = stage.end(first, seconds=END_SECONDS)
        second.send(signal.SIGKILL)  # a launcher would: it asks a stranger where the ranks meet
        second.wait()
    assert code != 0
    says_why(first)
    assert str(port) in first.text(), first.text()[-300:]
    assert not stage.run.exists()
    both_restarted(stage, port)


@fault("taken-port-under-launcher", trials=2)
def port_taken_under_launcher(stage: Stage, index: int) -> None:
    """A taken port, under the launcher: `accelerate launch --main_process_port` with a port that another process
    listens on: it trains as undisturbed, on another port."""
    with taken_port() as port:
        options = ["--main_process_port", str(port)]
        restarted(stage, start=lambda: stage.launch(options=options), ranks=2)


@fault("world-size-changes", trials=10, most_steps_lost=0)
def world_size_changes(stage: Stage, index: int) -> None:
    """World size 2 → 1 → 2: SIGTERM to one rank at a random step, resumed on one rank, SIGTERM again, resumed on two:
    the same images a step and learning rates as on one rank, each step once, losses within 0.5 %."""
    reference = stage.reference(*WITHOUT_DRAWS)
    ranks = pair(stage, *WITHOUT_DRAWS)
    wait_for_step(stage, ranks[0], stage.rng.randrange(1, 7))
    ranks[index % 2].send(signal.SIGTERM)
    codes = [rank.wait() for rank in ranks]
    alone = stage.train(*WITHOUT_DRAWS)
    wait_for_step(stage, alone, reached(stage.run) + stage.rng.randrange(1, 4))
    alone.send(signal.SIGUSR1)
    codes += [alone.wait(), *(rank.wait() for rank in pair(stage, *WITHOUT_DRAWS))]
    assert codes == [REQUEUE, REQUEUE, REQUEUE, 0, 0], alone.text()[-500:]
    mine, wanted = ([r for r in records(run) if r["kind"] == "step"] for run in (stage.run, reference))
    same = [[(r["step"], r["total"], r["lr"]) for r in steps] for steps in (mine, wanted)]
    assert same[0] == same[1]
    losses = [(a["loss"], b["loss"]) for a, b in zip(mine, wanted, strict=True)]
    assert all(math.isclose(*each, rel_tol=5e-3) for each in losses), losses[-3:]
