"""Trainings to be disturbed: the recipe, how one is started, and what an undisturbed one ends with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.faults.child import VARIABLE
from tests.faults.inject import Fault
from tests.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120.0
STEPS = 21
INTERVAL_STEPS = 3
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
TIMING = {
    *("time_unix_seconds", "images_per_second", "milliseconds_per_step", "seconds"),
    *("loader_wait_seconds", "startup_seconds"),
}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "disabled",
}


class Process:
    """A process under test: its id, what it printed, and its end."""

    def __init__(self, pid: int, err: Path, code: Callable[[], int | None]) -> None:
        self.pid, self._err, self._code = pid, err, code
        self.started_at = time.monotonic()

    def poll(self) -> int | None:
        return self._code()

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """The exit code (negative: the signal it died of). Raises Hang when the process does not end."""
        deadline = time.monotonic() + seconds
        while (code := self._code()) is None:
            if time.monotonic() > deadline:
                self.kill_all()
                raise Hang(f"no end within {seconds:g} s: {self.text()[-2000:]}")
            time.sleep(0.002)
        return code

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_all(self) -> None:
        """SIGKILL to it and to everything below it."""
        try:
            family = [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue

    def text(self) -> str:
        return self._err.read_text(errors="replace") if self._err.exists() else ""


class Hang(Exception):
    """Something did not end in its time."""


class Server:
    """Trainings by a fork server that shares a cache."""

    def __init__(self, cache: Path) -> None:
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith(("HARNESS_", "WANDB_"))}
        self._environment |= ONE_THREAD | {"HARNESS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        self._forks = ForkServer(self._environment)

    def start(
        self,
        argv: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        faults: Sequence[Fault] = (),
    ) -> Process:
        environment = {**self._environment, **(env or {})}
        out = log.with_name(f"{log.name}.out")
        pid = self._forks.fork(argv, cwd=log.parent, env=environment, out=out, err=log, faults=faults)
        return Process(pid, log, lambda: self._forks.code_of(pid))

    def close(self) -> None:
        self._forks.close()


class Stage:
    """What a trial works with: a folder of its own, the server, the shared cache and the undisturbed runs.

    Args:
        work: a folder that all stages of a session share.
        folder: of this trial alone.
    """

    def __init__(self, work: Path, folder: Path, server: Server, rng: random.Random) -> None:
        self.work, self.folder, self.server, self.rng = work, folder, server, rng
        self.cache = work / "cache"
        self.recipe = work / "faults.yaml"
        self.run = folder / "run"
        self.disks: list[Path] = []
        self._logs = 0
        self._processes: list[Process] = []
        folder.mkdir(parents=True)

    def close(self) -> None:
        """End what a trial that failed may have left: its processes, its small disks."""
        for process in self._processes:
            if process.poll() is None:
                process.kill_all()
                process.wait(30)
        for disk in self.disks:
            subprocess.run(["umount", "--lazy", str(disk)], check=False, capture_output=True)

    def command(self, *overrides: str, run: Path | None = None) -> list[str]:
        """The same for the first start and for every restart."""
        return ["train", str(self.recipe), *overrides, "--run-dir", str(run or self.run), "--resume", "auto"]

    def train(
        self,
        *overrides: str,
        run: Path | None = None,
        faults: Sequence[Fault] = (),
        env: Mapping[str, str] | None = None,
    ) -> Process:
        return self.harness(*self.command(*overrides, run=run), faults=faults, env=env)

    def harness(self, *argv: str, faults: Sequence[Fault] = (), env: Mapping[str, str] | None = None) -> Process:
        return self._keep(self.server.start(argv, self.log(), env=env, faults=faults))

    def launch(
        self,
        *overrides: str,
        ranks: int = 2,
        faults: Sequence[Fault] = (),
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Several ranks, as launch.sh starts them; faults are put into the ranks that they name."""
        log = self.log()
        module = "harness" if not faults else "tests.faults.child"
        command = [sys.executable, "-m", "harness.launch.torchrun", "accelerate", "launch"]
        command += ["--config_file", str(ROOT / "recipes/launch/cpu.yaml"), "--num_processes", str(ranks), *options]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HARNESS_", "WANDB_"))}
        environment |= ONE_THREAD | {"HARNESS_CACHE": str(self.cache), "PYTHONPATH": str(ROOT), **(env or {})}
        if faults:
            environment[VARIABLE] = json.dumps(list(faults))
        with log.open("w") as err:
            process = subprocess.Popen(
                [*command, "-m", module, *self.command(*overrides)],
                stdout=subprocess.DEVNULL,
                stderr=err,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        return self._keep(Process(process.pid, log, process.poll))

    def _keep(self, process: Process) -> Process:
        self._processes.append(process)
        return process

    def log(self) -> Path:
        self._logs += 1
        return self.folder / f"log{self._logs}.txt"

    def reference(self, *overrides: str, ranks: int = 1) -> Path:
        """The run directory of an undisturbed training, made once."""
        name = hashlib.sha256(json.dumps([overrides, ranks]).encode()).hexdigest()[:12]
        run = self.work / f"reference-{name}"
        with _REFERENCES:
            if not (run / "result.json").exists():
                shutil.rmtree(run, ignore_errors=True)
                here, self.run = self.run, run
                process = self.train(*overrides) if ranks == 1 else self.launch(*overrides, ranks=ranks)
                self.run = here
                code = process.wait()
                assert code == 0, process.text()
        return run

    def stopped_run(self, step: int) -> Path:
        """A run that a signal stopped after a step, made once; to be copied."""
        run = self.work / f"stopped-{step}"
        with _REFERENCES:
            if not run.exists():
                partial = self.folder / f"stopped-{step}"
                process = self.train(run=partial, faults=[{"kind": "step", "step": step, "action": "SIGTERM"}])
                assert process.wait() == 75, process.text()
                partial.rename(run)
        return run


_REFERENCES = threading.Lock()
