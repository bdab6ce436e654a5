"""Processes that are killed at any moment, or sent signals: a stop with a checkpoint, and no step lost."""

from __future__ import annotations

import re
import signal
import time

from tests.faults.check import reached, records, restarted, wait_for_step
from tests.faults.fault import NoMoreCases, fault
from tests.faults.runs import STEPS, Stage
from tests.fork_server import Process

KILLED = -signal.SIGKILL
REQUEUE, INTERRUPTED = 75, 130
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A checkpoint by signal alone, so that every touch under checkpoints/ belongs to the stop's own save.
NO_REGULAR_SAVES = ("checkpoint.every_steps=null", "checkpoint.every_epochs=null", "checkpoint.keep_best=false")


def signalled(stage: Stage, process: Process, number: int, codes: tuple[int, ...]) -> int:
    """Send a signal and see that the process ends with one of these codes."""
    begin = time.monotonic()
    process.send(number)
    code = stage.end(process, since=begin)
    stage.notes.append(f"{signal.Signals(number).name}, exit code {code}")
    assert code in codes, process.text()[-500:]
    return code


def killed(stage: Stage, process: Process) -> None:
    signalled(stage, process, signal.SIGKILL, (KILLED, 0))
    restarted(stage)


@fault("kill", trials=110, short=2, ordinary=True)
def kill(stage: Stage, index: int) -> None:
    """SIGKILL at a random moment: from outside: half of them at a random time from the start of the process, half at a
    random step."""
    process = stage.train()
    if index % 2:
        time.sleep(stage.rng.uniform(0, 1.2))
    else:
        wait_for_step(stage, process, stage.rng.randrange(1, STEPS))
        time.sleep(stage.rng.uniform(0, 0.05))
    killed(stage, process)


def saves(lines: list[str], numbers: tuple[int, ...]) -> list[int]:
    """The touches (from 1) of the n-th saves: from the end of the save before to the touch after the rename."""
    ends = [i for i, line in enumerate(lines, start=1) if re.fullmatch(r"rename step_\d+", line)]
    begins = [1, *(end + 1 for end in ends)]
    return sorted({touch for n in numbers for touch in range(begins[n - 1], ends[n - 1] + 3)})


@fault("kill-in-save", trials=200, short=2, ordinary=True)
def kill_in_save(stage: Stage, index: int) -> None:
    """SIGKILL inside a save: in the process itself, right before each open, fsync, rename, mkdir and remove under
    checkpoints/ in turn (the first save, and two that also drop an old one); then right before each fsync with the file
    cut at a random length, as a power cut would leave it."""
    lines = stage.touches("/checkpoints", "checkpoints")
    places = saves(lines, (1, 3, 4))
    cases = [(n, "kill") for n in places]
    cases += [(n, "tear") for n in places if lines[n - 1].startswith("fsync") and "." in lines[n - 1]]
    if index >= len(cases):
        raise NoMoreCases
    number, action = cases[index * 17 % len(cases)] if len(cases) % 17 else cases[index]
    stage.notes.append(f"{action} before touch {number}, {lines[number - 1]}")
    place = {"kind": "files", "under": "/checkpoints", "do": [[number, action]], "seed": index}
    process = stage.train(faults=[place])
    assert process.wait() == KILLED, process.text()[-500:]
    stage.detect = 0.0
    restarted(stage)


@fault("kill-in-evaluation", trials=20)
def kill_in_evaluation(stage: Stage, index: int) -> None:
    """SIGKILL in an evaluation: from outside, between the record of an epoch's training and that of its evaluation;
    trials that missed are not counted."""

    def has(split: str) -> bool:
        wanted = ("epoch", epoch_end, split)
        return any((r["kind"], r["step"], r["split"]) == wanted for r in records(stage.run))

    for attempt in range(20):
        stage.run = stage.folder / f"run{attempt}"
        epoch_end = 7 * stage.rng.randrange(1, 4)
        process = stage.train()
        wait_for_step(stage, process, epoch_end)
        while not has("train") and process.poll() is None:
            time.sleep(0.001)
        time.sleep(stage.rng.uniform(0, 0.02))
        process.send(signal.SIGKILL)
        process.wait()
        if has("train") and not has("test_ema"):
            stage.notes.append(f"epoch end at step {epoch_end}")
            return killed(stage, process)
    raise AssertionError("no kill fell into an evaluation")


@fault("kill-in-conversion", trials=60, ordinary=True)
def kill_in_conversion(stage: Stage, index: int) -> None:
    """SIGKILL in the .beton conversion: in the process itself, right before each open, fsync, rename, mkdir and remove
    under an empty cache's data/ in turn."""
    cache = stage.folder / "cache"
    environment = {"HARNESS_CACHE": str(cache)}
    lines = stage.touches("cache/data", "data", {"HARNESS_CACHE": str(stage.folder / "counted-cache")})
    if index >= len(lines):
        raise NoMoreCases
    number = index * 7 % len(lines) + 1 if len(lines) % 7 else index + 1
    stage.notes.append(f"before touch {number}, {lines[number - 1]}")
    place = {"kind": "files", "under": "cache/data", "do": [[number, "kill"]]}
    process = stage.train(faults=[place], env=environment)
    assert process.wait() == KILLED, process.text()[-500:]
    stage.detect = 0.0
    restarted(stage, env=environment)
    assert [p.name for p in (cache / "data").iterdir() if p.name.startswith(".")] == []
    verified = stage.harness("data", "verify", env=environment)
    assert verified.wait() == 0, verified.text()


@fault("signal", trials=40, ordinary=True, most_steps_lost=0)
def one_signal(stage: Stage, index: int) -> None:
    """SIGTERM, SIGINT, SIGUSR1, SIGUSR2: from outside, one of them in turn, at a random step; the exit code must be
    75."""
    process = stage.train()
    wait_for_step(stage, process, stage.rng.randrange(1, STEPS - 4))
    time.sleep(stage.rng.uniform(0, 0.03))
    signalled(stage, process, STOPPING[index % 4], (REQUEUE,))
    restarted(stage)


@fault("early-signal", trials=20, most_steps_lost=0)
def early_signal(stage: Stage, index: int) -> None:
    """A signal before the first step: from outside, one of the four in turn, in the first 0.6 s of the process; code
    75, or died of it before it had written anything."""
    number = STOPPING[index % 4]
    process = stage.train()
    time.sleep(stage.rng.uniform(0, 0.6))
    code = signalled(stage, process, number, (REQUEUE, -number, INTERRUPTED))
    assert code == REQUEUE or not stage.run.exists()  # it did not listen yet
    restarted(stage)


@fault("second-signal-in-save", trials=24, ordinary=True, most_steps_lost=0)
def second_signal(stage: Stage, index: int) -> None:
    """A second signal while the checkpoint is written: in the process itself: SIGTERM at a random step, then SIGTERM,
    SIGUSR1 or SIGUSR2 right before a random open, fsync or rename of the save that follows."""
    step, touch = stage.rng.randrange(1, STEPS), stage.rng.randrange(1, 15)
    second = ("SIGTERM", "SIGUSR1", "SIGUSR2")[index % 3]
    stage.notes.append(f"{second} before touch {touch} of the save at step {step}")
    faults = [
        {"kind": "step", "step": step, "action": "SIGTERM"},
        {"kind": "files", "under": "/checkpoints", "do": [[touch, second]]},
    ]
    process = stage.train(*NO_REGULAR_SAVES, faults=faults)
    assert process.wait() == REQUEUE, process.text()[-500:]
    assert reached(stage.run) == step
    restarted(stage, *NO_REGULAR_SAVES, lost_from=step)


@fault("second-interrupt", trials=16)
def second_interrupt(stage: Stage, index: int) -> None:
    """A second Ctrl-C: from outside: SIGINT at a random step and again up to 10 ms later, which ends the process at
    once; code 130 or 75."""
    process = stage.train()
    wait_for_step(stage, process, stage.rng.randrange(1, STEPS - 4))
    process.send(signal.SIGINT)
    time.sleep(stage.rng.uniform(0, 0.01))
    signalled(stage, process, signal.SIGINT, (INTERRUPTED, REQUEUE))
    assert "Traceback" not in process.text(), process.text()[-500:]
    restarted(stage)


@fault("requeued-ten-times", trials=4, most_steps_lost=0)
def requeued(stage: Stage, index: int) -> None:
    """Stopped and resumed ten times in one run: SIGTERM, SIGUSR1 or SIGUSR2 from outside after one new step of each
    start, eleven starts in all."""
    length = ("training.epochs=8",)  # 56 steps: room for ten stops
    for _ in range(10):
        process = stage.train(*length)
        wait_for_step(stage, process, reached(stage.run) + 1)
        signalled(stage, process, stage.rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)), (REQUEUE,))
    restarted(stage, *length)
