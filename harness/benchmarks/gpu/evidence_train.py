"""Whole trainings in calls of some minutes: stopped with a checkpoint when the time is over, resumed by the next."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.benchmarks.gpu.evidence import ROOT, Call, Figures, Save
from harness.errors import EXIT_DONE, EXIT_REQUEUE

# From the signal to the end of the process: the step under way, an evaluation that has begun, the checkpoint.
STOP_SECONDS = 40.0
KILL_SECONDS = 10.0
# Less is not worth a start: libraries, data and the numerics check come before the first step.
WORTH_STARTING_SECONDS = 60.0
# The device loader is the quickest on a GPU and gives the same pixels; nothing can be sent to W&B.
OVERRIDES = ("data.loader=device", "tracking.wandb=disabled")
DRY_OVERRIDES = (
    "data.source=synthetic",
    "data.synthetic.train_images=64",
    "data.synthetic.test_images=32",
    "model.name=dual_branch",
    "model.args={widths: [[4, 8], [8]], transition_widths: [8], head_width: 8}",
    "training.epochs=2",
    "training.global_batch_size=16",
    "checkpoint.keep_last=2",
)


def train_part(call: Call, figures: Figures, save: Save) -> bool:
    """Every recipe of the call to its end, as far as the time goes."""
    figures["failed"] = False
    for recipe in call.recipes:
        known = figures.get(recipe.stem, {})
        if known.get("complete"):
            continue
        if call.left_seconds() < STOP_SECONDS + KILL_SECONDS + (0 if call.dry_run else WORTH_STARTING_SECONDS):
            return False
        run = call.work / recipe.stem
        command = train_command(recipe, run, dry_run=call.dry_run)
        begun = time.monotonic()
        code = run_until(
            command, seconds=call.left_seconds() - STOP_SECONDS - KILL_SECONDS, log=call.work / f"{recipe.stem}.log"
        )
        figures[recipe.stem] = {
            "complete": code == EXIT_DONE,
            "command": shlex.join(["python", *("RUN" if word == str(run) else word for word in command[1:])]),
            "calls": [*known.get("calls", []), {"exit_code": code, "seconds": time.monotonic() - begun}],
            **outcome(run),
        }
        figures["failed"] |= code not in (EXIT_DONE, EXIT_REQUEUE)
        save(figures)
        print(f"  {recipe.stem}: code {code}, {figures[recipe.stem]['epochs_done']:g} epochs", flush=True)
        if code != EXIT_DONE:
            return False
    return True


def train_command(recipe: Path, run: Path, *, dry_run: bool) -> list[str]:
    """`harness train` of this recipe in this run directory, anew or from its last checkpoint."""
    overrides = [*OVERRIDES, *(DRY_OVERRIDES if dry_run else ())]
    name = recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe
    return [sys.executable, "-m", "harness", "train", str(name), *overrides, "--run-dir", str(run), "--resume", "auto"]


def run_until(command: Sequence[str], *, seconds: float, log: Path) -> int:
    """Run a training, and ask it to stop after so many seconds; returns its exit code, 75 where it stopped.

    Args:
        seconds: until SIGTERM; SIGKILL follows `STOP_SECONDS` later.
        log: what it prints is added there.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("a") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            return process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                return process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                return -signal.SIGKILL
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def outcome(run: Path) -> dict[str, Any]:
    """What a run directory tells: of each epoch its test accuracy and speed, and `result.json` where there is one."""
    epochs: dict[float, dict[str, float]] = {}
    metrics = run / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        record = json.loads(line)
        if record["kind"] != "epoch" or record["split"] not in ("train", "test"):
            continue
        of_epoch = epochs.setdefault(record["epoch"], {"epoch": record["epoch"]})
        if record["split"] == "test":
            of_epoch["test_accuracy"] = record["accuracy"]
        else:
            of_epoch |= {key: record[key] for key in ("loss", "accuracy", "images_per_second")}
    result = run / "result.json"
    return {
        "epochs": list(epochs.values()),
        "epochs_done": max(epochs, default=0.0),
        "result": json.loads(result.read_text()) if result.exists() else None,
    }
