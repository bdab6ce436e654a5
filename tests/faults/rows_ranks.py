"""Several ranks: one that dies, throws or stalls, a launcher that dies, a taken port, other numbers of ranks."""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from harness.launch.rank_env import free_port
from tests.faults.check import reached, records, restarted, said_well, wait_for_step
from tests.faults.fault import NotHere, Outcome, fault
from tests.faults.inject import Fault
from tests.faults.runs import ROOT, STEPS, WITHOUT_DRAWS, Process, Stage

REQUEUE = 75
TIMEOUT_VARIABLE = "HARNESS_COLLECTIVE_TIMEOUT_SECONDS"
END_SECONDS = 90.0


def pair(
    stage: Stage,
    *overrides: str,
    faults: Sequence[Fault] = (),
    port: int | None = None,
    env: dict[str, str] | None = None,
) -> list[Process]:
    """Two ranks without a launcher between: forked like all others, so that many can be tried."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **(env or {})}
    common["MASTER_PORT"] = str(port or free_port())
    places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [stage.train(*overrides, faults=faults, env=place) for place in places]


def again(stage: Stage, reference: Path, *overrides: str, lost_from: int, detect: float | None, note: str) -> Outcome:
    """Both ranks restarted; the first rank's end is the run's."""
    first, second = pair(stage, *overrides)
    outcome = restarted(stage, first, reference, lost_from=lost_from, detect=detect, note=note)
    code = second.wait()
    return outcome if code == 0 else Outcome(False, note=f"{note}: rank 1 ended with {code}")


@fault(
    "rank-killed",
    "SIGKILL of one rank of two",
    "two forked ranks, one of them in turn killed from outside at a random step; the other must end by itself, then "
    "both are restarted",
    trials=16,
)
def rank_killed(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(ranks=2)
    ranks = pair(stage)
    wait_for_step(stage, ranks[0], stage.rng.randrange(1, STEPS - 2))
    time.sleep(stage.rng.uniform(0, 0.03))
    begin = time.monotonic()
    ranks[index % 2].send(signal.SIGKILL)
    codes = [rank.wait(END_SECONDS) for rank in ranks]
    detect = time.monotonic() - begin
    note = f"rank {index % 2}, exit codes {codes}"
    if codes[index % 2] == -signal.SIGKILL and codes[1 - index % 2] == 0:
        return Outcome(False, note=f"{note}: the other rank took it for the end")
    return again(stage, reference, lost_from=reached(stage.run), detect=detect, note=note)


@fault(
    "rank-killed-under-launcher",
    "SIGKILL of one rank of two, under the launcher",
    "`accelerate launch` as launch.sh runs it, one of the ranks in turn killed from outside at a random step; the "
    "whole command must end, then it is run again",
    trials=4,
    short=0,
    load="heavy",
)
def rank_killed_under_launcher(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(ranks=2)
    launcher = stage.launch()
    wait_for_step(stage, launcher, stage.rng.randrange(1, STEPS - 4))
    workers = sorted(ranks_of(launcher), key=lambda p: p.environ().get("RANK", ""))
    begin = time.monotonic()
    workers[index % len(workers)].kill()
    code = launcher.wait(END_SECONDS)
    detect = time.monotonic() - begin
    note = f"rank {index % 2}, exit code {code}"
    if code not in (1, REQUEUE):
        return Outcome(False, note=f"{note}: {launcher.text()[-500:]}")
    return restarted(stage, stage.launch(), reference, lost_from=reached(stage.run), detect=detect, note=note)


def ranks_of(launcher: Process) -> list[psutil.Process]:
    """The processes of a launcher that are ranks."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [p for p in below if "train" in p.cmdline() and "RANK" in p.environ()]


@fault(
    "launcher-killed",
    "SIGKILL of the launcher",
    "`accelerate launch` killed from outside at a random step; its ranks must stop with a checkpoint within 90 s, "
    "then it is run again",
    most_steps_lost=0,
    trials=4,
    short=0,
    load="heavy",
)
def launcher_killed(stage: Stage, index: int) -> Outcome:
    length = ("training.epochs=30",)
    reference = stage.reference(*length, ranks=2)
    launcher = stage.launch(*length)
    wait_for_step(stage, launcher, stage.rng.randrange(1, STEPS))
    orphans = ranks_of(launcher)
    begin = time.monotonic()
    launcher.send(signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(orphans, timeout=END_SECONDS)
    detect = time.monotonic() - begin
    for process in alive:
        process.kill()
    if alive:
        return Outcome(False, note=f"{len(alive)} ranks outlived their launcher by {END_SECONDS:g} s")
    return restarted(stage, stage.launch(*length), reference, lost_from=reached(stage.run), detect=detect)


@fault(
    "rank-throws",
    "A rank that throws",
    "`accelerate launch`, a RuntimeError in rank 1 at a random step; the command must end with code 1 and show that "
    "error, then it is run again",
    trials=4,
    short=0,
    load="heavy",
)
def rank_throws(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(ranks=2)
    step = stage.rng.randrange(2, STEPS)
    launcher = stage.launch(faults=[{"kind": "step", "step": step, "action": "throw", "rank": 1}])
    wait_for_step(stage, launcher, step - 1)
    begin = time.monotonic()
    code = launcher.wait(END_SECONDS)
    detect = time.monotonic() - begin
    if code != 1 or "a fault of this test" not in launcher.text():
        return Outcome(False, note=f"step {step}: exit code {code}: {launcher.text()[-800:]}")
    note = f"step {step}"
    return restarted(stage, stage.launch(), reference, lost_from=reached(stage.run), detect=detect, note=note)


@fault(
    "rank-stalls",
    "A rank that stalls",
    f"two forked ranks, one of them in turn sent SIGSTOP at a random step, {TIMEOUT_VARIABLE}=8; the other must end "
    "and name the rank that is late, then both are restarted",
    trials=10,
    short=0,
)
def rank_stalls(stage: Stage, index: int) -> Outcome:
    if not any(TIMEOUT_VARIABLE in path.read_text() for path in (ROOT / "harness").rglob("*.py")):
        raise NotHere(f"the time-out of collectives cannot be set ({TIMEOUT_VARIABLE})")
    reference = stage.reference(ranks=2)
    ranks = pair(stage, env={TIMEOUT_VARIABLE: "8"})
    wait_for_step(stage, ranks[0], stage.rng.randrange(1, STEPS - 4))
    late, other = ranks[index % 2], ranks[1 - index % 2]
    begin = time.monotonic()
    late.send(signal.SIGSTOP)
    code = other.wait(END_SECONDS)
    detect = time.monotonic() - begin
    late.send(signal.SIGKILL)
    late.wait()
    note = f"rank {index % 2}"
    if code == 0 or f"rank {index % 2}" not in other.text():
        return Outcome(False, note=f"{note}: exit code {code}, or the rank is not named: {other.text()[-500:]}")
    return again(stage, reference, lost_from=reached(stage.run), detect=detect, note=note)


@contextmanager
def taken_port() -> Iterator[int]:
    """A port that is taken on every address of this machine."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        yield int(listener.getsockname()[1])


@fault(
    "taken-port",
    "A taken port",
    "two forked ranks whose MASTER_PORT another process listens on: rank 0 must end with an error that names the port, "
    "nothing written; with the port free they train as undisturbed",
    trials=6,
)
def port_taken(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(ranks=2)
    with taken_port() as port:
        first, second = pair(stage, port=port)
        code = first.wait(END_SECONDS)
        detect = time.monotonic() - first.started_at
        second.send(signal.SIGKILL)  # a launcher would: it asks a stranger where the ranks meet
        second.wait()
    wrong = said_well(first.text())
    if code == 0 or stage.run.exists() or str(port) not in first.text():
        wrong.append(f"exit code {code}: {first.text()[-300:]}")
    ranks = pair(stage, port=port)
    outcome = restarted(stage, ranks[0], reference, lost_from=0, detect=detect)
    ranks[1].wait()
    return Outcome(False, 0, detect, note="; ".join([*wrong, outcome.note])) if wrong else outcome


@fault(
    "taken-port-under-launcher",
    "A taken port, under the launcher",
    "`accelerate launch --main_process_port` with a port that another process listens on: it trains as undisturbed, on "
    "another port",
    trials=2,
    short=0,
    load="heavy",
)
def port_taken_under_launcher(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(ranks=2)
    with taken_port() as port:
        launcher = stage.launch(options=["--main_process_port", str(port)])
        return restarted(stage, launcher, reference, lost_from=0)


@fault(
    "world-size-changes",
    "World size 2 → 1 → 2",
    "SIGTERM to one rank at a random step, resumed on one rank, SIGTERM again, resumed on two: the same images a step "
    "and learning rates as on one rank, each step once, losses within 0.5 %",
    trials=10,
    most_steps_lost=0,
)
def world_size_changes(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*WITHOUT_DRAWS)
    ranks = pair(stage, *WITHOUT_DRAWS)
    first = wait_for_step(stage, ranks[0], stage.rng.randrange(1, 7))
    ranks[index % 2].send(signal.SIGTERM)
    codes = [rank.wait() for rank in ranks]
    alone = stage.train(*WITHOUT_DRAWS)
    second = wait_for_step(stage, alone, reached(stage.run) + stage.rng.randrange(1, 4))
    alone.send(signal.SIGUSR1)
    codes.append(alone.wait())
    if codes != [REQUEUE] * 3:
        return Outcome(False, note=f"exit codes {codes}: {alone.text()[-500:]}")
    ranks = pair(stage, *WITHOUT_DRAWS)
    codes = [rank.wait() for rank in ranks]
    mine, wanted = ([r for r in records(run) if r["kind"] == "step"] for run in (stage.run, reference))
    wrong = [f"exit codes {codes}"] if codes != [0, 0] else []
    if [(r["step"], r["total"], r["lr"]) for r in mine] != [(r["step"], r["total"], r["lr"]) for r in wanted]:
        wrong.append("other steps, images or learning rates")
    elif not all(math.isclose(a["loss"], b["loss"], rel_tol=5e-3) for a, b in zip(mine, wanted, strict=True)):
        wrong.append(f"other losses: {[(a['loss'], b['loss']) for a, b in zip(mine, wanted, strict=True)][-3:]}")
    return Outcome(not wrong, 0, None, None, "; ".join([f"stopped near steps {first} and {second}", *wrong]))
