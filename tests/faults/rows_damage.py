"""Files that were cut, changed or put where they do not belong, and a second process in the same run directory."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import psutil

from tests.faults.check import contents, differences, restarted, said_well, wait_for_step
from tests.faults.fault import Outcome, fault
from tests.faults.runs import STEPS, Stage

STOP_AT = 11  # the checkpoints then are steps 7 (the best), 9 and 11


def stopped(stage: Stage) -> None:
    """A copy, at `stage.run`, of a run that a signal stopped at step 11."""
    original = stage.stopped_run(STOP_AT)
    shutil.copytree(original, stage.run, symlinks=True)


def damage(path: Path, rng: random.Random) -> str:
    """Cut a file at a random offset or flip one of its bits; says which."""
    whole = path.read_bytes()
    at = rng.randrange(len(whole))
    if rng.random() < 0.5:
        path.write_bytes(whole[:at])
        return f"{path.name} cut at {at} of {len(whole)}"
    bit = rng.randrange(8)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    return f"{path.name} bit {bit} of byte {at} flipped"


@fault(
    "damaged-checkpoint",
    "Checkpoint file cut or a bit flipped",
    "one file of the newest checkpoint, at a random offset; it must be named and set aside, and the one before used",
    trials=60,
)
def damaged_checkpoint(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    stopped(stage)
    newest = stage.run / "checkpoints" / f"step_{STOP_AT}"
    file = stage.rng.choice(sorted(newest.iterdir()))
    note = damage(file, stage.rng)
    process = stage.train()
    detect = _said(process, "broken checkpoint")
    outcome = restarted(stage, process, reference, lost_from=STOP_AT, detect=detect, note=note)
    named = "broken checkpoint" in process.text() and any((stage.run / "checkpoints").glob("broken_*"))
    if not named and file.name != "manifest.json":  # its spacing and its copy of the step are no one's loss
        return Outcome(False, outcome.steps_lost, note=f"{note}: not named")
    return outcome


def _said(process, text: str) -> float | None:
    while text not in process.text():
        if process.poll() is not None:
            return None
        time.sleep(0.005)
    return time.monotonic() - process.started_at


@fault(
    "no-checkpoint-left",
    "Every checkpoint damaged",
    "one file of each checkpoint cut or a bit flipped: refused with code 2, the files keep their content",
    trials=12,
)
def no_checkpoint_left(stage: Stage, index: int) -> Outcome:
    stopped(stage)
    notes = []
    for path in sorted((stage.run / "checkpoints").iterdir()):
        notes.append(damage(stage.rng.choice(sorted(path.glob("*.safetensors"))), stage.rng))
    before = sorted(contents(stage.run).values())
    process = stage.train()
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = said_well(process.text())
    if code != 2 or sorted(contents(stage.run).values()) != before:
        wrong.append(f"exit code {code}, or content was changed")
    return Outcome(not wrong, 0, detect, None, "; ".join([*notes, *wrong]))


@fault(
    "damaged-run-file",
    "recipe.yaml, provenance.json or metrics.jsonl cut or a bit flipped",
    "at a random offset of one of them in a stopped run: either refused without a traceback, with nothing changed, or "
    "gone on with to the same weights",
    trials=30,
)
def damaged_run_file(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    stopped(stage)
    name = ("recipe.yaml", "provenance.json", "metrics.jsonl")[index % 3]
    note = damage(stage.run / name, stage.rng)
    before = contents(stage.run)
    process = stage.train()
    code = process.wait()
    detect = time.monotonic() - process.started_at
    if code != 0:
        wrong = said_well(process.text())
        if code != 2 or contents(stage.run) != before:
            wrong.append(f"exit code {code}, or something was changed: {process.text()[-300:]}")
        return Outcome(not wrong, 0, detect, None, "; ".join([note, *wrong]))
    last = f"checkpoints/step_{STEPS}"
    same = all(
        (stage.run / last / f).read_bytes() == (reference / last / f).read_bytes()
        for f in ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    )
    return Outcome(same, 0, None, detect, note if same else f"{note}: other weights")


@fault(
    "damaged-beton",
    ".beton file or its manifest cut or a bit flipped",
    "at a random offset, before the first start: refused with code 2 and nothing changed; after `harness data prepare "
    "--force` the training ends as undisturbed",
    trials=20,
)
def damaged_beton(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    cache = stage.folder / "cache"
    shutil.copytree(stage.cache, cache)
    environment = {"HARNESS_CACHE": str(cache)}
    (store,) = (p for p in (cache / "data").iterdir() if p.is_dir())
    note = damage(stage.rng.choice(sorted(store.iterdir())), stage.rng)
    before = contents(cache)
    process = stage.train(env=environment)
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = said_well(process.text())
    if code != 2 or contents(cache) != before or stage.run.exists():
        wrong.append(f"exit code {code}, or something was changed: {process.text()[-300:]}")
    prepare = stage.harness("data", "prepare", str(stage.recipe), "--force", env=environment)
    if prepare.wait() != 0:
        wrong.append(prepare.text()[-300:])
    if wrong:
        return Outcome(False, note="; ".join([note, *wrong]))
    again = stage.train(env=environment)
    return restarted(stage, again, reference, lost_from=0, detect=detect, note=note)


def _dangling(folder: Path) -> None:
    (folder / "latest").symlink_to(folder / "step_gone")
    (folder / "step_999").symlink_to("/nonexistent/step_999")


def _stale(folder: Path) -> None:
    (folder / "latest").symlink_to("step_7")
    (folder / "step_998").symlink_to("step_7")


def _files(folder: Path) -> None:
    (folder / "step_997").write_text("a file")
    (folder / "notes.txt").write_text("mine")
    (folder / "step_x").mkdir()
    (folder / "step_").mkdir()


def _odd_numbers(folder: Path) -> None:
    (folder / "step_²").mkdir()
    (folder / "step_٣").mkdir()
    (folder / "step_00099").mkdir()


def _empty(folder: Path) -> None:
    (folder / "step_996").mkdir()
    (folder / f"step_{'9' * 30}").mkdir()


def _half(folder: Path) -> None:
    (folder / ".step_12.999.tmp").mkdir()
    (folder / ".step_12.999.tmp" / "model.safetensors").write_bytes(b"\0" * 100)
    (folder / ".step_9.998.old.tmp").mkdir()


def _loop(folder: Path) -> None:
    (folder / "step_995").symlink_to("step_995")
    (folder / "step_994").symlink_to(folder)


STRAYS = (_dangling, _stale, _files, _odd_numbers, _empty, _half, _loop)


@fault(
    "stray-entries",
    "Dangling or stale links and stray files in checkpoints/",
    "put into a stopped run: links to nothing, to themselves, to another checkpoint, files and folders with a "
    "checkpoint's name, odd numbers, half-written saves",
    trials=len(STRAYS) * 2,
    short=2,
)
def stray_entries(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    stopped(stage)
    put = STRAYS[index % len(STRAYS)]
    put(stage.run / "checkpoints")
    return restarted(stage, stage.train(), reference, lost_from=STOP_AT, note=put.__name__.strip("_"))


@fault(
    "two-writers",
    "A second process in the same run directory",
    "the first stands still at a random step (it sends itself SIGSTOP), the same command once more is refused with "
    "code 2, and the first, sent SIGCONT, ends as undisturbed",
    trials=10,
    most_steps_lost=0,
)
def two_writers(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    step = stage.rng.randrange(2, STEPS + 1)
    first = stage.train(faults=[{"kind": "step", "step": step, "action": "SIGSTOP"}])
    wait_for_step(stage, first, step - 1)
    second = stage.train()
    code = second.wait()
    detect = time.monotonic() - second.started_at
    wrong = said_well(second.text())
    if code != 2 or "another process is training" not in second.text():
        wrong.append(f"exit code {code}: {second.text()[-300:]}")
    while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:  # SIGCONT before SIGSTOP would be lost
        time.sleep(0.01)
    first.send(signal.SIGCONT)
    if first.wait() != 0:
        wrong.append(f"the first: {first.text()[-300:]}")
    else:
        wrong += differences(stage.run, reference)
    return Outcome(not wrong, 0, detect, None, "; ".join(wrong))
