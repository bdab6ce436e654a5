"""What a run stands on: Accelerator, ranks, seeds, and where the run came from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed

import harness
from harness import environment
from harness.data.order import hash64
from harness.distributed import preflight
from harness.distributed.heartbeat import GLOO_VARIABLE, Heartbeat, collective_limit_seconds, interface_towards, warn
from harness.errors import HarnessError
from harness.machine import cpu_name, keep_freed_memory, usable_cores


@dataclass(frozen=True)
class Runtime:
    """The process among the ranks; `ignored` variables asked Accelerate for something else than the recipe."""

    accelerator: Accelerator
    heartbeat: Heartbeat | None
    ignored: Mapping[str, str]

    @property
    def device(self) -> torch.device:
        found: torch.device = self.accelerator.device
        return found

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
def distributed_context(*, precision: str, seed: int, recipe_sha256: str = "") -> Iterator[Runtime]:
    """Join the ranks that the launcher set up, seed every generator, and leave the ranks when the block ends.

    A collective that breaks in the block becomes an error that names the rank. Ranks must have one recipe. Raises
    HarnessError: ranks are missing or differ, a GPU is missing, or fp16 without a GPU.
    """
    environment.refuse_arithmetic()
    with environment.accelerate_settings_hidden() as ignored:
        runtime = _start(precision=precision, seed=seed, recipe_sha256=recipe_sha256, ignored=ignored)
        failed = True
        try:
            with nullcontext() if runtime.heartbeat is None else runtime.heartbeat.diagnosing():
                yield runtime
            failed = False
        finally:
            _finish(runtime, failed=failed)


def _start(*, precision: str, seed: int, recipe_sha256: str, ignored: Mapping[str, str]) -> Runtime:
    use_cpu = environment.flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if precision == "fp16" and use_cpu:
        hint = "On a CPU use training.precision=bf16 or no."
        raise HarnessError("fp16 needs a GPU", where="training.precision", hint=hint)
    if use_cpu:
        keep_freed_memory()
    env = preflight.RankEnv.of_this_process()
    heartbeat = _join(env, use_cpu=use_cpu, recipe_sha256=recipe_sha256) if env.world_size > 1 else None
    with _without_ranks(alone=env.world_size == 1):
        accelerator = Accelerator(mixed_precision=precision, cpu=use_cpu)
    if accelerator.num_processes != env.world_size:
        raise HarnessError(
            f"WORLD_SIZE is {env.world_size}, but Accelerate sees {accelerator.num_processes} process(es)",
            hint="On a CPU start ranks with `accelerate launch --config_file recipes/launch/cpu.yaml` or torchrun.",
        )
    set_seed(seed)
    if ignored and env.rank == 0:
        warn("ignored, since the recipe decides: " + ", ".join(f"{name}={value}" for name, value in ignored.items()))
    return Runtime(accelerator, heartbeat, ignored)


@contextmanager
def _without_ranks(*, alone: bool) -> Iterator[None]:
    """Accelerate would make a process group where LOCAL_RANK is set, and fails on variables that are set to nothing."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if alone else ()
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:  # Accelerate sets some itself
            os.environ.pop(name, None)
        os.environ.update(before)


def _join(env: preflight.RankEnv, *, use_cpu: bool, recipe_sha256: str) -> Heartbeat:
    """Preflight, then the process group that Accelerate finds and uses, with time-outs of minutes."""
    if not os.environ.get(GLOO_VARIABLE):
        several = env.world_size > env.local_world_size
        if (interface := interface_towards(env.address, several_machines=several)) is not None:
            os.environ[GLOO_VARIABLE] = interface
    limit_seconds = collective_limit_seconds()
    own = preflight.RankInfo.of_this_process(env, use_cpu=use_cpu, recipe_sha256=recipe_sha256)
    store = preflight.meet(env, own)
    if not use_cpu:
        torch.cuda.set_device(env.local_rank)
    dist.init_process_group(
        backend="gloo" if use_cpu else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("group", store),
        rank=env.rank,
        world_size=env.world_size,
        timeout=datetime.timedelta(seconds=limit_seconds),
    )
    return Heartbeat(preflight.connect(env), rank=env.rank, world_size=env.world_size, limit_seconds=limit_seconds)


def _finish(runtime: Runtime, *, failed: bool) -> None:
    """Leave the process group, where there is one, so that the process may start another run."""
    if runtime.heartbeat is not None:
        runtime.heartbeat.end()
    # NCCL's farewell waits for all ranks, which may be waiting for this one: left out when an error ends the process.
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


def broadcast_text(text: str, runtime: Runtime) -> str:
    """Rank 0's text on every rank (sent as bytes, no pickle)."""
    if runtime.world_size == 1:
        return text
    payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(runtime.device)
    length = torch.tensor([len(payload)], device=runtime.device)
    dist.broadcast(length, src=0)
    if not runtime.is_main:
        payload = torch.empty(int(length), dtype=torch.uint8, device=runtime.device)
    dist.broadcast(payload, src=0)
    return bytes(payload.cpu().tolist()).decode()


def provenance(world_size: int, ignored: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Code, libraries, machine, and the variables that may change speed or rounding; others may hold secrets."""
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
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = done.stdout.strip()
    return {"commit": found.removesuffix("-dirty"), "changed": found.endswith("-dirty")}
