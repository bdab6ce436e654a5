"""What this machine is, told without importing torch: the processor's name and how much of it is ours."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

# Of glibc's malloc.h, and what they are set to: no tensor is mapped on its own, none that is freed goes back to the
# system, and the heap grows by 64 MiB.
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}
CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    try:
        for line in CPUINFO.read_text(errors="replace").splitlines():  # some firmware's names are not UTF-8
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def processor() -> str:
    """Model name and a digest of the instruction sets: some virtual machines give several processors one name."""
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text(errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        told = [fields.get(name, "") for name in ("flags", "Features", "CPU implementer", "CPU part", "CPU variant")]
        flags = " ".join(sorted(" ".join(told).split()))  # the latter ones on ARM
        digest = hashlib.sha256(flags.encode()).hexdigest()[:12]
        return f"{fields.get('model name', platform.machine())} {fields.get('model', '')} {digest}"
    return f"{platform.machine()} {platform.processor()}"


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may keep busy, at least 1.

    Counts the cores of the affinity mask, two threads of one core once (arithmetic gains nothing from the second
    one), and no more than the CPU quota of the control group, as a container or a SLURM job has it.

    Args:
        root: where /proc and /sys are looked for.
    """
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_siblings(root, cpu) for cpu in mask}
    quota = cpu_quota(root)
    return len(siblings) if quota is None else max(1, min(len(siblings), int(quota)))


def rank_has_its_own_cores() -> bool:
    """Whether SLURM has bound this rank, one task a rank, to cores that no other rank of the node may use.

    Then `usable_cores` counts this rank's cores. Elsewhere it counts what all ranks of the machine share.
    """
    names = ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE")
    try:
        tasks, ranks, ranks_here, cpus_here = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        return False
    return tasks == ranks and len(os.sched_getaffinity(0)) * ranks_here <= cpus_here


def _siblings(root: Path, cpu: int) -> str:
    """The hardware threads that share a core with this one; its own number where the system does not tell."""
    try:
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        return path.read_text().strip() or str(cpu)
    except OSError:
        return str(cpu)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups above this process grant, or None without a limit.

    Reads `cpu.max` (version 2) and `cpu.cfs_quota_us` (version 1), of the process's own group and all above it.
    """
    limits = []
    for group in _groups(root):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text()
                period = (group / "cpu.cfs_period_us").read_text()
            if quota != "max" and int(quota) > 0:
                limits.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue
    return min(limits, default=None)


def _groups(root: Path) -> list[Path]:
    """Folders of the CPU controller: the group this process is in and its parents, as far as they are mounted."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    folders = [mount, mount / "cpu"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mount / "cpu" if controllers else mount
        inner = Path(path.lstrip("/"))
        folders += [base / part for part in (inner, *inner.parents)]
    return list(dict.fromkeys(folders))


def available_memory_gib() -> float | None:
    """Memory that can be had without swapping, GiB, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except (OSError, ValueError):
        pass
    return None


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; says whether the system can.

    glibc gives tensors above 32 MiB back as they are freed, and the next step takes them anew, page fault by page
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
