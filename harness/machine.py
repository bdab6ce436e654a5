"""What this machine is, known without importing torch: the processor's name and how much of it is ours."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil

CPUINFO = Path("/proc/cpuinfo")
# Of glibc's malloc.h, and what they are set to: no tensor is mapped on its own, none that is freed goes back to the
# system, and the heap grows by 64 MiB.
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}


def cpu_name() -> str:
    """The processor's model name, or the architecture where the system does not name it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor() -> str:
    """Model name and a digest of the instruction sets: some virtual machines give several processors one name."""
    fields = _cpuinfo()
    if not fields:
        return f"{platform.machine()} {platform.processor()}"
    names = ("flags", "Features", "CPU implementer", "CPU part", "CPU variant")  # all but the first on ARM
    flags = " ".join(sorted(" ".join(fields.get(name, "") for name in names).split()))
    digest = hashlib.sha256(flags.encode()).hexdigest()[:12]
    return f"{fields.get('model name', platform.machine())} {fields.get('model', '')} {digest}"


def _cpuinfo() -> dict[str, str]:
    """The fields of a processor as the kernel lists them; empty where it does not."""
    pairs = (line.split(":", 1) for line in _text(CPUINFO).splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _text(path: Path) -> str:
    """What the kernel says in a file, which need not be UTF-8; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may keep busy, at least 1.

    Two threads of one core count once (arithmetic gains nothing from the second one), and no more than the CPU quota
    of the control group, as a container or a SLURM job has it. /proc and /sys are looked for below `root`.
    """
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    topology = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in mask)
    cores = len({_text(siblings) or str(siblings) for siblings in topology})
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def rank_has_its_own_cores() -> bool:
    """Whether SLURM has bound this rank, one rank per task, to cores that no other rank of the node may use.

    Elsewhere `usable_cores` counts what all ranks of the machine share.
    """
    names = ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE")
    try:
        tasks, ranks, ranks_here, cpus_here = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        return False
    return tasks == ranks and len(os.sched_getaffinity(0)) * ranks_here <= cpus_here


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups (version 1 or 2) above this process grant; None without a limit."""
    limits = []
    for group in _control_groups(root):
        found = _text(group / "cpu.max") or " ".join(_text(group / f"cpu.cfs_{k}_us") for k in ("quota", "period"))
        if limit := re.fullmatch(r"([1-9]\d*) ([1-9]\d*)", found):  # "max" and -1 are none
            limits.append(int(limit[1]) / int(limit[2]))
    return min(limits, default=None)


def _control_groups(root: Path) -> list[Path]:
    """Folders of the CPU controller: the group this process is in and its parents, as far as they are mounted."""
    mount = root / "sys/fs/cgroup"
    folders = [mount, mount / "cpu"]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            inner = Path(path.lstrip("/"))
            folders += [(mount / "cpu" if controllers else mount) / part for part in (inner, *inner.parents)]
    return folders


def available_memory_gib() -> float:
    """Memory that can be had without swapping, GiB."""
    return float(psutil.virtual_memory().available / 2**30)


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; says whether the system can.

    glibc gives tensors above 32 MiB back as they are freed, and the next step takes them again, page fault by page
    fault. Kept, the process holds on to the most it ever used.
    Does nothing without glibc, or where somebody has tuned malloc by its variables (MALLOC_*, GLIBC_TUNABLES).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all(mallopt(number, value) for number, value in _MALLOPT.values())


def seconds_of(work: Callable[[], object], *, device: str = "cpu") -> float:
    """How long `work` takes; on a GPU ("cuda"), until the GPU has done it."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start
