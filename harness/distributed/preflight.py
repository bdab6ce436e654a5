"""Before anything slow: all ranks meet, say what they are, and agree that they belong together.

Rank 0 keeps a small key-value store (torch's TCPStore) at `$MASTER_ADDR:$MASTER_PORT`, or the launcher does. Every
rank writes its `RankInfo` there; rank 0 reads them all and writes one verdict. A rank that does not come is named
within `ARRIVAL_LIMIT_SECONDS`, ranks that differ are named with what differs, and only then is a process group made.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import socket
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from harness.distributed.heartbeat import is_loopback, warn
from harness.environment import whole_number
from harness.errors import EXIT_FAILED, HarnessError, ManyErrors

ARRIVAL_LIMIT_SECONDS = 60.0
FAREWELL_SECONDS = 5.0
CLOCKS_MAY_DIFFER_SECONDS = 30.0
LIBRARIES = ("torch", "torchvision", "accelerate", "timm", "wandb", "ffcv", "numpy", "safetensors")
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class RankEnv:
    """What the launcher set: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0

    @classmethod
    def of_this_process(cls) -> RankEnv:
        """A single process where no launcher set anything; HarnessError where the variables do not go together."""
        world_size = whole_number("WORLD_SIZE", 1, at_least=1)
        local_world_size = whole_number("LOCAL_WORLD_SIZE", world_size, at_least=1)
        if world_size == 1:
            return cls()
        absent = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if absent:
            what = f"WORLD_SIZE is {world_size}, but {', '.join(absent)} is not set"
            hint = "Start ranks with ./launch.sh, accelerate launch, torchrun or harness submit."
            raise HarnessError(what, where="launcher", hint=hint)
        rank, port = whole_number("RANK", 0), whole_number("MASTER_PORT", 0, at_least=1)
        if port > 65535:
            raise HarnessError(f"MASTER_PORT is {port}", where="launcher", hint="Ports end at 65535.")
        if rank >= world_size:
            what = f"RANK is {rank}, but WORLD_SIZE is {world_size}"
            raise HarnessError(what, where="launcher", hint="Ranks count from 0.")
        address = os.environ["MASTER_ADDR"]
        return cls(rank, world_size, whole_number("LOCAL_RANK", 0), local_world_size, address, port)


@dataclass(frozen=True)
class RankInfo:
    """What a rank says of itself."""

    host: str
    world_size: int
    device: str
    cores: list[int]
    threads: int
    recipe_sha256: str
    versions: dict[str, str]

    @classmethod
    def of_this_process(cls, env: RankEnv, *, use_cpu: bool, recipe_sha256: str) -> RankInfo:
        """Raises HarnessError where the rank's GPU is not there."""
        return cls(
            host=socket.gethostname(),
            world_size=env.world_size,
            device="cpu" if use_cpu else _gpu(env.local_rank),
            cores=sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)),
            threads=torch.get_num_threads(),
            recipe_sha256=recipe_sha256,
            versions={"python": platform.python_version(), **installed_versions()},
        )


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that a run stands on, as far as they are installed."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def meet(env: RankEnv, own: RankInfo) -> dist.Store:
    """Meet the other ranks, compare, and return the store they share.

    Raises HarnessError on every rank that came: a rank is missing (exit code 1: try again), or ranks differ (2).
    """
    store = _open_store(env)
    store.set(f"info/{env.rank}", json.dumps(asdict(own)))
    if env.rank == 0:
        missing = _wait_for_all(store, env.world_size)
        everyone = [] if missing else [RankInfo(**json.loads(store.get(f"info/{r}"))) for r in range(env.world_size)]
        verdict: dict[str, Any] = {"missing": missing, "differences": differences(everyone), "time": time.time()}
        for warning in crowded(everyone):
            warn(warning)
        store.set("verdict", json.dumps(verdict))
        # The store goes with rank 0: let the others hear the verdict before an error ends it.
        deadline = time.monotonic() + FAREWELL_SECONDS
        while store.add("heard", 0) < env.world_size - 1 - len(missing) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    else:
        verdict = _hear_verdict(store)
    if missing := verdict["missing"]:
        names = ", ".join(map(str, missing[:16])) + (", …" if len(missing) > 16 else "")
        raise _failure(
            f"rank{'s' * (len(missing) > 1)} {names} of {env.world_size} did not come within "
            f"{ARRIVAL_LIMIT_SECONDS:.0f} s",
            hint="See the logs of the missing ranks; nothing was trained.",
        )
    if verdict["differences"]:
        hint = "Start all ranks from one environment and one recipe, one rank a GPU."
        raise ManyErrors("preflight", [HarnessError(text, hint=hint) for text in verdict["differences"]])
    apart_seconds = abs(time.time() - verdict["time"])
    if apart_seconds > CLOCKS_MAY_DIFFER_SECONDS and env.local_rank == 0:  # logs and lock files are read by the clocks
        warn(f"the clocks of rank 0 and of rank {env.rank} on {own.host} are {apart_seconds:.0f} s apart")
    return store


def differences(everyone: list[RankInfo]) -> list[str]:
    """What must be equal on all ranks and is not, and GPUs that two ranks share, in words."""
    found = []
    owners: dict[tuple[str, str], int] = {}
    for rank, other in enumerate(everyone):
        first = everyone[0]
        if other.world_size != first.world_size:
            found.append(f"rank {rank} has WORLD_SIZE {other.world_size}, rank 0 has {first.world_size}")
        if other.recipe_sha256 != first.recipe_sha256:
            found.append(f"rank {rank} on {other.host} has another recipe than rank 0 on {first.host}")
        for name in sorted(first.versions.keys() | other.versions.keys()):
            one, two = first.versions.get(name, "none"), other.versions.get(name, "none")
            if one != two:
                found.append(f"rank {rank} on {other.host} has {name} {two}, rank 0 on {first.host} has {one}")
        if (other.device == "cpu") != (first.device == "cpu"):
            found.append(f"rank {rank} computes on {other.device}, rank 0 on {first.device}")
        owner = owners.setdefault((other.host, other.device), rank)
        if owner != rank and other.device != "cpu":
            found.append(f"ranks {owner} and {rank} share {other.device} on {other.host}")
    return found


def crowded(everyone: list[RankInfo]) -> list[str]:
    """Hosts whose ranks have more threads together than cores, in words."""
    found = []
    for host in sorted({each.host for each in everyone}):
        here = [each for each in everyone if each.host == host]
        threads, cores = sum(each.threads for each in here), len({core for each in here for core in each.cores})
        if threads > cores:
            found.append(
                f"{host}: {len(here)} ranks have {threads} threads on {cores} cores, which slows all of them; "
                f"HINT: OMP_NUM_THREADS={max(1, cores // len(here))}, or see the job's CPU binding"
            )
    return found


def connect(env: RankEnv, **keeper: Any) -> dist.Store:
    """A connection to the ranks' store; `keeper` has the options of torch's TCPStore for the rank that keeps it."""
    options = {"timeout": datetime.timedelta(seconds=ARRIVAL_LIMIT_SECONDS), "wait_for_workers": False, **keeper}
    # A launcher that starts its ranks again may keep the store of their predecessors.
    prefix = f"harness/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(prefix, dist.TCPStore(env.address, env.port, **options))


def _gpu(local_rank: int) -> str:
    count = torch.cuda.device_count()
    if local_rank >= count:
        what = f"this is local rank {local_rank}, but the process sees {count} GPU(s)"
        hint = "Start one rank a GPU; under SLURM ask for --gpus-per-node, not --gpus-per-task."
        raise HarnessError(what, where="launcher", hint=hint)
    return f"GPU {torch.cuda.get_device_properties(local_rank).uuid}"


def _open_store(env: RankEnv) -> dist.Store:
    """The store at the master's address: the launcher's where it keeps one, else rank 0's."""
    if env.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        host = env.address if is_loopback(env.address) else ""  # else on all addresses
        try:
            server = socket.create_server((host, env.port), backlog=max(128, env.world_size))
        except OSError as error:
            raise _failure(
                f"the ranks cannot meet at port {env.port}: {error.strerror}",
                where=f"MASTER_ADDR={env.address}",
                hint="Another program has the port: give another MASTER_PORT (--main_process_port).",
            ) from None
        return connect(env, is_master=True, master_listen_fd=server.detach())
    # torch's own waiting prints stacks and knows no names.
    deadline = time.monotonic() + ARRIVAL_LIMIT_SECONDS
    while True:
        try:
            socket.create_connection((env.address, env.port), timeout=ARRIVAL_LIMIT_SECONDS).close()
            return connect(env)
        except OSError as error:
            if time.monotonic() > deadline:
                raise _failure(
                    f"rank 0 did not come within {ARRIVAL_LIMIT_SECONDS:.0f} s: nothing answers at "
                    f"{env.address}:{env.port} ({error.strerror or error})",
                    where=f"rank {env.rank}",
                    hint="See rank 0's log; check MASTER_ADDR, MASTER_PORT and the network between the nodes.",
                ) from None
            time.sleep(0.1)


def _wait_for_all(store: dist.Store, world_size: int) -> list[int]:
    """Ranks that did not come in time."""
    deadline = time.monotonic() + ARRIVAL_LIMIT_SECONDS
    waiting = list(range(world_size))
    while waiting and time.monotonic() < deadline:
        waiting = [rank for rank in waiting if not store.check([f"info/{rank}"])]
        time.sleep(_POLL_SECONDS if waiting else 0)
    return waiting


def _hear_verdict(store: dist.Store) -> dict[str, Any]:
    limit = datetime.timedelta(seconds=ARRIVAL_LIMIT_SECONDS + FAREWELL_SECONDS)
    try:
        try:
            store.wait(["verdict"], limit)
        except dist.DistError:
            if not store.check(["info/0"]):
                raise
            store.wait(["verdict"], limit)  # rank 0 came late, and waits for others now
        verdict: dict[str, Any] = json.loads(store.get("verdict"))
    except dist.DistError:
        return {"missing": [0], "differences": []}
    with contextlib.suppress(dist.DistError):
        store.add("heard", 1)
    return verdict


def _failure(what: str, *, hint: str, where: str = "preflight") -> HarnessError:
    """An error of a network or another rank, which may pass."""
    return HarnessError(what, where=where, hint=hint, exit_code=EXIT_FAILED)
