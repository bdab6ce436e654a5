"""Signals: a stop with a checkpoint and no step lost, however often and whenever they come."""

from __future__ import annotations

import signal
import time

from tests.faults.check import reached, restarted, wait_for_step
from tests.faults.fault import SINCE_LAST_CHECKPOINT, Outcome, fault
from tests.faults.runs import STEPS, Stage

REQUEUE = 75
INTERRUPTED = 130
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A checkpoint by signal alone, so that every touch under checkpoints/ belongs to the stop's own save.
NO_REGULAR_SAVES = ("checkpoint.every_steps=null", "checkpoint.every_epochs=null", "checkpoint.keep_best=false")


@fault(
    "signal",
    "SIGTERM, SIGINT, SIGUSR1, SIGUSR2",
    "from outside, one of them in turn, at a random step; the exit code must be 75",
    trials=40,
    most_steps_lost=0,
)
def one_signal(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    number = STOPPING[index % 4]
    process = stage.train()
    wait_for_step(stage, process, stage.rng.randrange(1, STEPS - 4))
    time.sleep(stage.rng.uniform(0, 0.03))
    begin = time.monotonic()
    process.send(number)
    code = process.wait()
    detect = time.monotonic() - begin
    if code != REQUEUE:
        return Outcome(False, note=f"{number.name}: exit code {code}: {process.text()[-500:]}")
    note = number.name
    return restarted(stage, stage.train(), reference, lost_from=reached(stage.run), detect=detect, note=note)


@fault(
    "early-signal",
    "A signal before the first step",
    "from outside, one of the four in turn, in the first 0.6 s of the process; code 75, or died of it before it had "
    "written anything",
    trials=20,
    most_steps_lost=0,
)
def early_signal(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    number = STOPPING[index % 4]
    process = stage.train()
    time.sleep(stage.rng.uniform(0, 0.6))
    begin = time.monotonic()
    process.send(number)
    code = process.wait()
    detect = time.monotonic() - begin
    note = f"{number.name}, exit code {code}"
    before_it_listened = code in (-number, INTERRUPTED) and not stage.run.exists()
    if code != REQUEUE and not before_it_listened:
        return Outcome(False, note=f"{note}: {process.text()[-500:]}")
    return restarted(stage, stage.train(), reference, lost_from=reached(stage.run), detect=detect, note=note)


@fault(
    "second-signal-in-save",
    "A second signal while the checkpoint is written",
    "in the process itself: SIGTERM at a random step, then SIGTERM, SIGUSR1 or SIGUSR2 right before a random open, "
    "fsync or rename of the save that follows",
    trials=24,
    most_steps_lost=0,
)
def second_signal(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*NO_REGULAR_SAVES)
    step, touch = stage.rng.randrange(1, STEPS), stage.rng.randrange(1, 15)
    second = ("SIGTERM", "SIGUSR1", "SIGUSR2")[index % 3]
    faults = [
        {"kind": "step", "step": step, "action": "SIGTERM"},
        {"kind": "files", "under": "/checkpoints", "do": [[touch, second]]},
    ]
    process = stage.train(*NO_REGULAR_SAVES, faults=faults)
    code = process.wait()
    note = f"{second} before touch {touch} of the save at step {step}"
    if code != REQUEUE:
        return Outcome(False, note=f"{note}: exit code {code}: {process.text()[-500:]}")
    at = reached(stage.run)
    if at != step:
        return Outcome(False, note=f"{note}: stopped after step {at}")
    return restarted(stage, stage.train(*NO_REGULAR_SAVES), reference, lost_from=at, note=note)


@fault(
    "second-interrupt",
    "A second Ctrl-C",
    "from outside: SIGINT at a random step and again up to 10 ms later, which ends the process at once; code 130 or 75",
    trials=16,
    most_steps_lost=SINCE_LAST_CHECKPOINT,
)
def second_interrupt(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    process = stage.train()
    wait_for_step(stage, process, stage.rng.randrange(1, STEPS - 4))
    begin = time.monotonic()
    process.send(signal.SIGINT)
    time.sleep(stage.rng.uniform(0, 0.01))
    process.send(signal.SIGINT)
    code = process.wait()
    detect = time.monotonic() - begin
    if code not in (INTERRUPTED, REQUEUE) or "Traceback" in process.text():
        return Outcome(False, note=f"exit code {code}: {process.text()[-500:]}")
    note = f"exit code {code}"
    return restarted(stage, stage.train(), reference, lost_from=reached(stage.run), detect=detect, note=note)


@fault(
    "requeued-ten-times",
    "Stopped and resumed ten times in one run",
    "SIGTERM, SIGUSR1 or SIGUSR2 from outside after one new step of each start, eleven starts in all",
    trials=4,
    most_steps_lost=0,
)
def requeued(stage: Stage, index: int) -> Outcome:
    length = ("training.epochs=8",)  # 56 steps: room for ten stops
    reference = stage.reference(*length)
    slowest = 0.0
    for _ in range(10):
        process = stage.train(*length)
        before = reached(stage.run)
        wait_for_step(stage, process, before + 1)
        begin = time.monotonic()
        process.send(stage.rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)))
        code = process.wait()
        slowest = max(slowest, time.monotonic() - begin)
        if code != REQUEUE:
            return Outcome(False, note=f"exit code {code} after step {reached(stage.run)}: {process.text()[-500:]}")
    at = reached(stage.run)
    return restarted(stage, stage.train(*length), reference, lost_from=at, detect=slowest, note=f"last at step {at}")
