"""SIGKILL: at any moment, inside each phase of a save, in an evaluation, in the conversion of data."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from pathlib import Path

from tests.faults.check import reached, records, restarted, wait_for_step
from tests.faults.fault import NoMoreCases, Outcome, fault
from tests.faults.runs import STEPS, Stage

KILLED = -signal.SIGKILL
_COUNTING = threading.Lock()


@fault(
    "kill",
    "SIGKILL at a random moment",
    "from outside: half of them at a random time from the start of the process, half at a random step",
    trials=110,
    short=2,
)
def kill(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    process = stage.train()
    if index % 2:
        time.sleep(stage.rng.uniform(0, 1.2))
    else:
        wait_for_step(stage, process, stage.rng.randrange(1, STEPS))
        time.sleep(stage.rng.uniform(0, 0.05))
    return _killed(stage, process, reference)


def _killed(stage: Stage, process, reference: Path, note: str = "") -> Outcome:
    begin = time.monotonic()
    process.send(signal.SIGKILL)
    code = process.wait()
    detect = time.monotonic() - begin
    if code not in (KILLED, 0):
        return Outcome(False, note=f"exit code {code} before the fault: {process.text()[-500:]}")
    at = reached(stage.run)
    return restarted(stage, stage.train(), reference, lost_from=at, detect=detect, note=note)


def touches(stage: Stage, under: str, name: str, env: dict[str, str] | None = None) -> list[str]:
    """What an undisturbed training does to the files under a path: one line each, in order."""
    log = stage.work / f"touches-{name}.txt"
    with _COUNTING:
        if not log.exists():
            partial = stage.folder / "touches.txt"
            counted = {"kind": "files", "under": under, "log": str(partial)}
            process = stage.train(faults=[counted], env=env)
            assert process.wait() == 0, process.text()
            shutil.rmtree(stage.run)
            partial.rename(log)
    return log.read_text().splitlines()


def saves(lines: list[str], numbers: tuple[int, ...]) -> list[int]:
    """The touches (from 1) of the n-th saves: from the end of the save before to the touch behind the rename."""
    ends = [i for i, line in enumerate(lines, start=1) if re.fullmatch(r"rename step_\d+", line)]
    chosen = []
    for n in numbers:
        begin = ends[n - 2] + 1 if n > 1 else 1
        chosen += range(begin, ends[n - 1] + 3)
    return sorted(set(chosen))


@fault(
    "kill-in-save",
    "SIGKILL inside a save",
    "in the process itself, right before each open, fsync, rename, mkdir and remove under checkpoints/ in turn (the "
    "first save, and two that also drop an old one); then right before each fsync with the file cut at a random "
    "length, as a power cut would leave it",
    trials=200,
    short=2,
)
def kill_in_save(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    lines = touches(stage, "/checkpoints", "checkpoints")
    places = saves(lines, (1, 3, 4))
    cases = [(n, "kill") for n in places]
    cases += [(n, "tear") for n in places if lines[n - 1].startswith("fsync") and "." in lines[n - 1]]
    if index >= len(cases):
        raise NoMoreCases
    number, action = cases[index * 17 % len(cases)] if len(cases) % 17 else cases[index]
    place = {"kind": "files", "under": "/checkpoints", "do": [[number, action]], "seed": index}
    process = stage.train(faults=[place])
    code = process.wait()
    note = f"{action} before touch {number}, {lines[number - 1]}"
    if code != KILLED:
        return Outcome(False, note=f"{note}: exit code {code}: {process.text()[-500:]}")
    at = reached(stage.run)
    return restarted(stage, stage.train(), reference, lost_from=at, detect=0.0, note=note)


@fault(
    "kill-in-evaluation",
    "SIGKILL in an evaluation",
    "from outside, between the record of an epoch's training and that of its evaluation; trials that missed are not "
    "counted",
    trials=20,
)
def kill_in_evaluation(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    for attempt in range(20):
        stage.run = stage.folder / f"run{attempt}"
        epoch_end = 7 * stage.rng.randrange(1, 4)
        process = stage.train()
        wait_for_step(stage, process, epoch_end)
        while not _has(stage.run, epoch_end, "train") and process.poll() is None:
            time.sleep(0.001)
        time.sleep(stage.rng.uniform(0, 0.02))
        process.send(signal.SIGKILL)
        process.wait()
        if _has(stage.run, epoch_end, "train") and not _has(stage.run, epoch_end, "test_ema"):
            return _killed(stage, process, reference, note=f"epoch end at step {epoch_end}")
    return Outcome(False, note="no kill fell into an evaluation")


def _has(run: Path, step: int, split: str) -> bool:
    return any(r["kind"] == "epoch" and r["step"] == step and r["split"] == split for r in records(run))


@fault(
    "kill-in-conversion",
    "SIGKILL in the .beton conversion",
    "in the process itself, right before each open, fsync, rename, mkdir and remove under an empty cache's data/ in "
    "turn",
    trials=60,
)
def kill_in_conversion(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    cache = stage.folder / "cache"
    environment = {"HARNESS_CACHE": str(cache)}
    counting = {"HARNESS_CACHE": str(stage.folder / "counted-cache")}
    lines = touches(stage, "cache/data", "data", counting)
    if index >= len(lines):
        raise NoMoreCases
    number = index * 7 % len(lines) + 1 if len(lines) % 7 else index + 1
    place = {"kind": "files", "under": "cache/data", "do": [[number, "kill"]]}
    process = stage.train(faults=[place], env=environment)
    code = process.wait()
    note = f"before touch {number}, {lines[number - 1]}"
    if code != KILLED:
        return Outcome(False, note=f"{note}: exit code {code}: {process.text()[-500:]}")
    outcome = restarted(stage, stage.train(env=environment), reference, lost_from=0, detect=0.0, note=note)
    left = [p.name for p in (cache / "data").iterdir() if p.name.startswith(".")]
    verified = stage.harness("data", "verify", env=environment)
    if verified.wait() != 0 or left:
        return Outcome(False, note=f"{note}: {left} {verified.text()}")
    return outcome
