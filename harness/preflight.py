"""Before anything slow: all ranks come together, say what they are, and agree that they belong together.

Rank 0 keeps a small key-value store (torch's TCPStore) at `$MASTER_ADDR:$MASTER_PORT`, or the launcher does. Every
rank writes its facts there; rank 0 reads them all and writes one verdict. A rank that does not come is named within
`ARRIVAL_LIMIT_SECONDS`, ranks that differ are named with what differs, and only then is a process group made.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from harness.environment import whole_number
from harness.errors import EXIT_FAILED, HarnessError, ManyErrors
from harness.network import is_loopback_host

ARRIVAL_LIMIT_SECONDS = 60.0
FAREWELL_SECONDS = 5.0
CLOCKS_MAY_DIFFER_SECONDS = 30.0
LIBRARIES = ("torch", "torchvision", "accelerate", "timm", "wandb", "ffcv", "numpy", "safetensors")
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Place:
    """What the launcher set: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def of_environment(cls) -> Place:
        """The place of this process; that of a single one where no launcher set anything.

        Raises:
            HarnessError: the variables are incomplete or do not go together.
        """
        world_size = whole_number("WORLD_SIZE", 1, at_least=1)
        whole_number("LOCAL_WORLD_SIZE", 1, at_least=1)
        if world_size == 1:
            return cls(0, 1, 0, "", 0)
        absent = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if absent:
            raise HarnessError(
                f"WORLD_SIZE is {world_size}, but {', '.join(absent)} is not set",
                where="launcher",
                hint="Start ranks with ./launch.sh, accelerate launch, torchrun or harness submit.",
            )
        place = cls(
            whole_number("RANK", 0),
            world_size,
            whole_number("LOCAL_RANK", 0),
            os.environ["MASTER_ADDR"],
            whole_number("MASTER_PORT", 0, at_least=1),
        )
        if place.port > 65535:
            raise HarnessError(f"MASTER_PORT is {place.port}", where="launcher", hint="Ports end at 65535.")
        if place.rank >= world_size:
            raise HarnessError(
                f"RANK is {place.rank}, but WORLD_SIZE is {world_size}", where="launcher", hint="Ranks count from 0."
            )
        return place


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself."""

    host: str
    pid: int
    world_size: int
    device: str
    cores: tuple[int, ...]
    threads: int
    recipe_sha256: str
    versions: dict[str, str]


def facts(place: Place, *, use_cpu: bool, recipe_sha256: str) -> Facts:
    """The facts of this rank.

    Raises:
        HarnessError: its GPU is not there.
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Facts(
        host=socket.gethostname(),
        pid=os.getpid(),
        world_size=place.world_size,
        device="cpu" if use_cpu else _gpu(place.local_rank),
        cores=tuple(sorted(affinity)),
        threads=torch.get_num_threads(),
        recipe_sha256=recipe_sha256,
        versions={"python": platform.python_version(), **installed_versions()},
    )


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that a run stands on, as far as they are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def join(place: Place, own: Facts, *, note: Callable[[str], None]) -> dist.Store:
    """Meet the other ranks, compare facts, and return the store they share.

    Args:
        note: takes warnings, on rank 0.

    Raises:
        HarnessError: on every rank that came: a rank is missing (exit code 1: try again), or ranks differ (2).
    """
    store = _open_store(place)
    store.set(f"facts/{place.rank}", json.dumps(asdict(own)))
    if place.rank == 0:
        missing = _wait_for_all(store, place)
        verdict: dict[str, Any] = {"missing": missing, "differences": []}
        if not missing:
            everyone = [_facts_of(store, rank) for rank in range(place.world_size)]
            verdict["differences"] = differences(everyone)
            for warning in crowded(everyone):
                note(f"WARNING {warning}")
        store.set("verdict", json.dumps(verdict))
        _say_farewell(store, place, missing)
    else:
        verdict = _hear_verdict(store)
    _judge(verdict, place)
    _compare_clocks(store, place, note)
    return store


def differences(everyone: list[Facts]) -> list[str]:
    """What must be equal on all ranks and is not, and GPUs that two ranks share, in words."""
    found = []
    first = everyone[0]
    for rank, other in enumerate(everyone[1:], start=1):
        if other.world_size != first.world_size:
            found.append(f"rank {rank} was told of {other.world_size} ranks, rank 0 of {first.world_size}")
        if other.recipe_sha256 != first.recipe_sha256:
            found.append(f"rank {rank} on {other.host} has another recipe than rank 0 on {first.host}")
        for name in sorted(first.versions.keys() | other.versions.keys()):
            one, two = first.versions.get(name, "none"), other.versions.get(name, "none")
            if one != two:
                found.append(f"rank {rank} on {other.host} has {name} {two}, rank 0 on {first.host} has {one}")
        if (other.device == "cpu") != (first.device == "cpu"):
            found.append(f"rank {rank} computes on {other.device}, rank 0 on {first.device}")
    owners: dict[tuple[str, str], int] = {}
    for rank, one_rank in enumerate(everyone):
        if one_rank.device == "cpu":
            continue
        owner = owners.setdefault((one_rank.host, one_rank.device), rank)
        if owner != rank:
            found.append(f"ranks {owner} and {rank} share {one_rank.device} on {one_rank.host}")
    return found


def crowded(everyone: list[Facts]) -> list[str]:
    """Hosts whose ranks have more threads together than cores, in words."""
    found = []
    for host in sorted({f.host for f in everyone}):
        here = [f for f in everyone if f.host == host]
        threads, cores = sum(f.threads for f in here), len({core for f in here for core in f.cores})
        if threads > cores:
            found.append(
                f"{host}: {len(here)} ranks have {threads} threads on {cores} cores, which slows all of them; "
                f"HINT: OMP_NUM_THREADS={max(1, cores // len(here))}, or see the job's CPU binding"
            )
    return found


def _gpu(local_rank: int) -> str:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise HarnessError(
            f"this is local rank {local_rank}, but the process sees {count} GPU(s)",
            where="launcher",
            hint="Start one rank a GPU; under SLURM ask for --gpus-per-node, not --gpus-per-task.",
        )
    return f"GPU {torch.cuda.get_device_properties(local_rank).uuid}"


def _open_store(place: Place) -> dist.Store:
    """The store at the master's address: the launcher's where it keeps one, else rank 0's."""
    kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank == 0 and not kept_by_launcher:
        return connect(place, is_master=True, master_listen_fd=_listen(place))
    _wait_for_listener(place)
    return connect(place)


def connect(place: Place, **options: Any) -> dist.Store:
    """A connection to the ranks' store; `options` are those of torch's TCPStore for the one that keeps it."""
    limit = datetime.timedelta(seconds=ARRIVAL_LIMIT_SECONDS)
    store = dist.TCPStore(
        place.address, place.port, timeout=limit, wait_for_workers=False, **{"is_master": False, **options}
    )
    # A launcher that starts its ranks anew may keep the store of their predecessors.
    return dist.PrefixStore(f"harness/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listen(place: Place) -> int:
    """A listening socket: on loopback alone where that is the master's address, else on all addresses."""
    loopback = is_loopback_host(place.address)
    try:
        if loopback:
            server = socket.create_server((place.address, place.port), backlog=max(128, place.world_size))
        else:
            server = socket.create_server(("", place.port), backlog=max(128, place.world_size))
    except OSError as error:
        raise HarnessError(
            f"the ranks cannot meet at port {place.port}: {error.strerror}",
            where=f"MASTER_ADDR={place.address}",
            hint="Another program has the port: give another MASTER_PORT (--main_process_port).",
            exit_code=EXIT_FAILED,
        ) from None
    return server.detach()


def _wait_for_listener(place: Place) -> None:
    """Until something listens at the master's address; torch's own waiting prints stacks and knows no names."""
    deadline = time.monotonic() + ARRIVAL_LIMIT_SECONDS
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=ARRIVAL_LIMIT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HarnessError(
                    f"rank 0 did not come within {ARRIVAL_LIMIT_SECONDS:.0f} s: nothing answers at "
                    f"{place.address}:{place.port} ({error.strerror or error})",
                    where=f"rank {place.rank}",
                    hint="See rank 0's log; check MASTER_ADDR, MASTER_PORT and the network between the nodes.",
                    exit_code=EXIT_FAILED,
                ) from None
            time.sleep(0.1)


def _wait_for_all(store: dist.Store, place: Place) -> list[int]:
    """Ranks that did not come in time."""
    deadline = time.monotonic() + ARRIVAL_LIMIT_SECONDS
    waiting = list(range(place.world_size))
    while waiting and time.monotonic() < deadline:
        waiting = [rank for rank in waiting if not store.check([f"facts/{rank}"])]
        time.sleep(_POLL_SECONDS if waiting else 0)
    return waiting


def _facts_of(store: dist.Store, rank: int) -> Facts:
    data = json.loads(store.get(f"facts/{rank}"))
    return Facts(**{**data, "cores": tuple(data["cores"])})


def _hear_verdict(store: dist.Store) -> dict[str, Any]:
    limit = datetime.timedelta(seconds=ARRIVAL_LIMIT_SECONDS + FAREWELL_SECONDS)
    try:
        try:
            store.wait(["verdict"], limit)
        except dist.DistError:
            if not store.check(["facts/0"]):
                raise
            store.wait(["verdict"], limit)  # rank 0 came late, and waits for others now
        verdict: dict[str, Any] = json.loads(store.get("verdict"))
    except dist.DistError:
        return {"missing": [0], "differences": []}
    with contextlib.suppress(dist.DistError):
        store.add("heard", 1)
    return verdict


def _say_farewell(store: dist.Store, place: Place, missing: list[int]) -> None:
    """The store goes with rank 0: let the others hear the verdict before an error ends it."""
    deadline = time.monotonic() + FAREWELL_SECONDS
    while store.add("heard", 0) < place.world_size - 1 - len(missing) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _judge(verdict: Mapping[str, Any], place: Place) -> None:
    missing = verdict["missing"]
    if missing:
        names = ", ".join(map(str, missing[:16])) + (", …" if len(missing) > 16 else "")
        word = "rank" if len(missing) == 1 else "ranks"
        raise HarnessError(
            f"{word} {names} of {place.world_size} did not come within {ARRIVAL_LIMIT_SECONDS:.0f} s",
            where="preflight",
            hint="See the logs of the missing ranks; nothing was trained.",
            exit_code=EXIT_FAILED,
        )
    if verdict["differences"]:
        hint = "Start all ranks from one environment and one recipe, one rank a GPU."
        raise ManyErrors("preflight", [HarnessError(text, hint=hint) for text in verdict["differences"]])


def _compare_clocks(store: dist.Store, place: Place, note: Callable[[str], None]) -> None:
    """Warn of clocks that differ: logs and lock files of several hosts are read by them."""
    clocks: list[float] = []
    try:
        store.set(f"clock/{place.rank}", str(time.time()))
        if place.rank == 0:
            clocks = [float(store.get(f"clock/{rank}")) for rank in range(place.world_size)]
    except dist.DistError:
        raise HarnessError(
            "a rank went away right after all had come",
            where="preflight",
            hint="See the logs of the other ranks; nothing was trained.",
            exit_code=EXIT_FAILED,
        ) from None
    if clocks:
        apart = max(clocks) - min(clocks)
        if apart > CLOCKS_MAY_DIFFER_SECONDS:
            late, early = clocks.index(max(clocks)), clocks.index(min(clocks))
            note(f"WARNING the clocks of ranks {early} and {late} are {apart:.0f} s apart")
