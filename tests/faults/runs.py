"""Trainings to be disturbed: the recipe, how one is started, and what an undisturbed one ends with."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from tests.faults.inject import VARIABLE, Fault
from tests.fork_server import LIMIT_SECONDS, ONE_THREAD, ROOT, ForkServer, Process, kill_tree

STEPS = 21
INTERVAL_STEPS = 3
STOP_AT = 11  # the checkpoints then are steps 7 (the best), 9 and 11
# Everything that a resumption could get wrong is on: shuffling, augmentation, dropout, mixing, accumulation, EMA,
# warm-up, clipping. 816 parameters, 3 epochs of 7 steps, a checkpoint every 3 steps and at each epoch's end.
RECIPE = """
seed: 3
data:
  source: synthetic
  synthetic: {train_images: 100, test_images: 37, num_classes: 4}
  loader: device
  crop_padding_px: 2
  cutout_size_px: 6
  flip: random
model:
  name: dual_branch
  args: {widths: [[4, 8], [8]], transition_widths: [8], head_width: 8, dropout: 0.2}
training: {epochs: 3, global_batch_size: 16, gradient_accumulation_steps: 2, clip_grad_norm: 1.0}
optimizer: {lr: 0.05, weight_decay: 0.001}
schedule: {name: cosine, warmup_steps: 2}
mix: {mixup_alpha: 0.2, cutmix_alpha: 1.0}
ema: {decay: 0.9}
evaluation: {per_device_batch_size: 5, recalibrate_batch_norm_batches: 2}
checkpoint: {every_steps: 3, keep_last: 2}
tracking: {wandb: disabled, log_every_steps: 1}
"""
# Draws of dropout and mixing belong to a rank, so curves on other numbers of ranks agree only without them.
WITHOUT_DRAWS = ("model.args.dropout=0.0", "mix.mixup_alpha=0.0", "mix.cutmix_alpha=0.0")


class NotHere(Exception):
    """This machine lacks what the fault needs; says what."""


class Stage:
    """What a trial works with: a folder of its own, the shared cache and undisturbed runs, and what it has found out.

    Args:
        work: a folder that all stages of a session share.
        folder: of this trial alone.
    """

    def __init__(self, work: Path, folder: Path, forks: ForkServer, rng: random.Random) -> None:
        self.work, self.folder, self.forks, self.rng = work, folder, forks, rng
        self.cache, self.recipe, self.run = work / "cache", work / "faults.yaml", folder / "run"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("HARNESS_", "WANDB_"))}
        self.environment |= ONE_THREAD | {"HARNESS_CACHE": str(self.cache)}
        self.environment |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.notes: list[str] = []
        self.lost = 0
        self.detect: float | None = None
        self.recover: float | None = None
        self._disks: list[Path] = []
        self._processes: list[Process] = []
        folder.mkdir(parents=True)
        if not self.recipe.exists():
            self.recipe.write_text(RECIPE)

    def close(self) -> None:
        """End what a trial that failed may have left: its processes, its small disks."""
        for process in self._processes:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait(30)
        for disk in self._disks:
            subprocess.run(["umount", "--lazy", str(disk)], check=False, capture_output=True)

    def train(
        self,
        *overrides: str,
        run: Path | None = None,
        faults: Sequence[Fault] = (),
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """The same command for the first start and for every restart."""
        return self.harness(*self._command(overrides, run), faults=faults, env=env)

    def harness(self, *words: str, faults: Sequence[Fault] = (), env: Mapping[str, str] | None = None) -> Process:
        log, env = self._log(), {**self.environment, **(env or {})}
        out = log.with_name(f"{log.name}.out")
        return self._keep(self.forks.fork(words, cwd=self.folder, env=env, out=out, err=log, faults=faults))

    def launch(
        self, *overrides: str, run: Path | None = None, faults: Sequence[Fault] = (), options: Sequence[str] = ()
    ) -> Process:
        """Two ranks, as launch.sh starts them; faults are put into the ranks that they name."""
        command = [sys.executable, "-m", "harness.launch.torchrun", "accelerate", "launch"]
        command += ["--config_file", str(ROOT / "recipes/launch/cpu.yaml"), "--num_processes", "2", *options]
        command += ["-m", "tests.faults.inject" if faults else "harness", *self._command(overrides, run)]
        environment = self.environment | {VARIABLE: json.dumps(list(faults))}
        log = self._log()
        with log.open("w") as err:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=err,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        return self._keep(Process(process.pid, log, process.poll))

    def end(self, process: Process, *, since: float | None = None, seconds: float = LIMIT_SECONDS) -> int:
        """The exit code; the fault is detected by then, after `since` or the process's start."""
        code = process.wait(seconds)
        self.detect = time.monotonic() - (since or process.started_at)
        return code

    def reference(self, *overrides: str, ranks: int = 1) -> Path:
        """The run directory of an undisturbed training, made once."""
        run = self.work / f"reference-{hashlib.sha256(json.dumps([overrides, ranks]).encode()).hexdigest()[:12]}"
        if not (run / "result.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            process = (self.train if ranks == 1 else self.launch)(*overrides, run=run)
            assert process.wait() == 0, process.text()
        return run

    def stopped(self) -> None:
        """A copy, at `run`, of a run that a signal stopped after step 11, made once."""
        original = self.work / "stopped"
        if not original.exists():
            partial = self.folder / "stopped"
            process = self.train(run=partial, faults=[{"kind": "step", "step": STOP_AT, "action": "SIGTERM"}])
            assert process.wait() == 75, process.text()
            partial.rename(original)
        shutil.copytree(original, self.run, symlinks=True)

    def touches(self, under: str, name: str, env: dict[str, str] | None = None) -> list[str]:
        """What an undisturbed training does to the files under a path: one line each, in order; counted once."""
        log = self.work / f"touches-{name}.txt"
        if not log.exists():
            partial = self.folder / "touches.txt"
            process = self.train(faults=[{"kind": "files", "under": under, "log": str(partial)}], env=env)
            assert process.wait() == 0, process.text()
            shutil.rmtree(self.run)
            partial.rename(log)
        return log.read_text().splitlines()

    def small_disk(self, name: str, kilobytes: int) -> Path:
        """A mounted tmpfs in the trial's folder, unmounted with it. Raises NotHere."""
        if reason := _no_disks():
            raise NotHere(reason)
        path = self.folder / name
        path.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path))
        self._disks.append(path)
        return path

    def _command(self, overrides: Sequence[str], run: Path | None) -> list[str]:
        return ["train", str(self.recipe), *overrides, "--run-dir", str(run or self.run), "--resume", "auto"]

    def _log(self) -> Path:
        return self.folder / f"log{len(self._processes)}.txt"

    def _keep(self, process: Process) -> Process:
        self._processes.append(process)
        return process


def remount(path: Path, options: str) -> None:
    """Give a small disk another size ("size=16m"), or make it read-only ("ro")."""
    _mount("-o", f"remount,{options}", str(path))


@lru_cache
def _no_disks() -> str | None:
    """Why this machine mounts none."""
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return None if done.returncode == 0 else f"this root may not mount: {done.stderr.decode().strip()}"


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)
