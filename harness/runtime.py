"""What a run stands on: Accelerator, seeds, the run directory and where the run came from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed

import harness
from harness import environment, network, preflight
from harness.data.order import hash64
from harness.errors import HarnessError
from harness.heartbeat import Heartbeat, collective_limit_seconds, to_stderr
from harness.machine import cpu_name, keep_freed_memory, usable_cores


@dataclass(frozen=True)
class Runtime:
    """The process's place among the ranks.

    Attributes:
        accelerator: wraps model and optimizer; owns the device and the precision.
        device: of this rank.
        heartbeat: tells the other ranks how far this one is; None where there are none.
        ignored: environment variables that asked Accelerate for something else than the recipe.
    """

    accelerator: Accelerator
    device: torch.device
    heartbeat: Heartbeat | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def tick(self) -> None:
        """Something was done on this rank; costs nothing."""
        if self.heartbeat is not None:
            self.heartbeat.tick()


@contextmanager
def joined(*, precision: str, seed: int, recipe_sha256: str = "") -> Iterator[Runtime]:
    """`start` and `finish` around a block; a collective that breaks in it becomes an error that names the rank."""
    environment.refuse_arithmetic()
    with environment.accelerate_settings_hidden() as ignored:
        runtime = _start(precision=precision, seed=seed, recipe_sha256=recipe_sha256, ignored=ignored)
        try:
            with nullcontext() if runtime.heartbeat is None else runtime.heartbeat.explained():
                yield runtime
        except BaseException:
            finish(runtime, failed=True)
            raise
        finish(runtime)


def _start(*, precision: str, seed: int, recipe_sha256: str, ignored: Mapping[str, str]) -> Runtime:
    """Join the ranks that the launcher set up, seed every generator, and check the launcher was heard.

    Args:
        precision: "no", "bf16" or "fp16".
        seed: of weights and everything else random; the same on every rank.
        recipe_sha256: of the resolved recipe; the same on every rank.
        ignored: as `Runtime` has it.

    Raises:
        HarnessError: ranks are missing or differ, a GPU is missing, or fp16 without a GPU.
    """
    use_cpu = environment.flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if precision == "fp16" and use_cpu:
        raise HarnessError(
            "fp16 needs a GPU", where="training.precision", hint="On a CPU use training.precision=bf16 or no."
        )
    if use_cpu:
        keep_freed_memory()
    place = preflight.Place.of_environment()
    network.choose_interface()
    heartbeat = _meet(place, use_cpu=use_cpu, recipe_sha256=recipe_sha256) if place.world_size > 1 else None
    with _without_ranks(alone=place.world_size == 1):
        accelerator = Accelerator(mixed_precision=precision, cpu=use_cpu)
    if accelerator.num_processes != place.world_size:
        raise HarnessError(
            f"WORLD_SIZE is {place.world_size}, but Accelerate sees {accelerator.num_processes} process(es)",
            hint="On a CPU start ranks with `accelerate launch --config_file recipes/launch/cpu.yaml` or torchrun.",
        )
    set_seed(seed)
    if ignored and place.rank == 0:
        listed = ", ".join(f"{name}={value}" for name, value in ignored.items())
        print(f"WARNING ignored, since the recipe decides: {listed}", file=sys.stderr)
    return Runtime(accelerator, accelerator.device, heartbeat, ignored)


@contextmanager
def _without_ranks(*, alone: bool) -> Iterator[None]:
    """A process that is alone needs no process group; Accelerate would make one where LOCAL_RANK is set, and fails on
    variables that are set to nothing."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if alone else ()
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:  # Accelerate sets some itself
            os.environ.pop(name, None)
        os.environ.update(before)


def _meet(place: preflight.Place, *, use_cpu: bool, recipe_sha256: str) -> Heartbeat:
    """Preflight, then the process group that Accelerate finds and uses, with time-outs of minutes."""
    limit_seconds = collective_limit_seconds()
    own = preflight.facts(place, use_cpu=use_cpu, recipe_sha256=recipe_sha256)
    store = preflight.join(place, own, note=to_stderr)
    if not use_cpu:
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        backend="gloo" if use_cpu else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=limit_seconds),
    )
    return Heartbeat(
        preflight.connect(place),
        rank=place.rank,
        world_size=place.world_size,
        limit_seconds=limit_seconds,
        warn=to_stderr,
    )


def finish(runtime: Runtime, *, failed: bool = False) -> None:
    """Leave the process group, where there is one, so that the process may start another run.

    Args:
        failed: an error is on its way out. NCCL's farewell waits for all ranks, which may be waiting for this one: on
            GPUs it is left out then, and the process ends with the error.
    """
    if runtime.heartbeat is not None:
        runtime.heartbeat.end()
    if dist.is_available() and dist.is_initialized() and not (failed and runtime.device.type == "cuda"):
        dist.destroy_process_group()
    # Accelerate keeps its state for the life of the process; a later run may want another precision.
    runtime.accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def seed_step(seed: int, step: int, rank: int, micro: int, device: torch.device) -> None:
    """Key the generators in use by (seed, step, rank): dropout and mixing then need no saved state to resume."""
    key = int(hash64(seed, 0x57E9, step, rank, micro)) & 0xFFFF_FFFF
    # torch.manual_seed would also note a stack trace for each kind of device that is not there: 0.1 ms.
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
    np.random.seed(key)  # timm's mixing draws from numpy's global generator


def broadcast_text(text: str | None, runtime: Runtime) -> str:
    """Rank 0's text on every rank (sent as bytes, no pickle)."""
    if runtime.world_size == 1:
        assert text is not None
        return text
    payload = (text or "").encode()
    length = torch.tensor([len(payload)], dtype=torch.int64, device=runtime.device)
    dist.broadcast(length, src=0)
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=runtime.device)
    if runtime.is_main and payload:
        buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(buffer, src=0)
    return bytes(buffer.cpu().tolist()).decode()


def provenance(world_size: int, ignored: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Where a run came from: code, libraries, machine, and the environment variables that may change speed or rounding.

    All others are left out on purpose: they may hold secrets.
    """
    return {
        "harness": harness.__version__,
        "git": git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": preflight.installed_versions(),
        "cpu": cpu_name(),
        "cpu_cores": usable_cores(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world_size,
        "environment": environment.noted(),
        "environment_ignored": dict(ignored or {}),
        "command": sys.argv[1:],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files were changed, or None outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": changed}


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
