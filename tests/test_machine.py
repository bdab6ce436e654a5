"""How much of the machine is ours: affinity, hardware threads, quotas of control groups."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from harness import machine
from harness.machine import available_memory_gib, cpu_name, cpu_quota, keep_freed_memory, usable_cores

CGROUP, CPU = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({f"{CGROUP}/cpu.max": "max 100000\n"}, None),
        ({f"{CGROUP}/cpu.max": "150000 100000\n"}, 1.5),
        ({f"{CGROUP}/cpu.max": "what\n"}, None),
        (  # the limit of a parent holds for its children
            {
                "proc/self/cgroup": "0::/job/step\n",
                f"{CGROUP}/job/cpu.max": "200000 100000\n",
                f"{CGROUP}/job/step/cpu.max": "max 100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/box\n",
                f"{CPU}/cpu.cfs_quota_us": "-1\n",
                f"{CPU}/cpu.cfs_period_us": "100000\n",
                f"{CPU}/box/cpu.cfs_quota_us": "50000\n",
                f"{CPU}/box/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


def test_threads_of_a_core_count_once_and_a_small_quota_still_gives_one(tmp_path: Path) -> None:
    mask = os.sched_getaffinity(0)
    one_core = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": "0-7\n" for cpu in mask}
    assert usable_cores(tmp_path / "says nothing") == len(mask)
    assert usable_cores(write(tmp_path / "a", one_core)) == 1
    assert usable_cores(write(tmp_path / "b", {f"{CGROUP}/cpu.max": "20000 100000\n"})) == 1


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_name()
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    assert 0 < available_memory_gib() < 1e5
    (tmp_path / "cpuinfo").write_bytes(b"processor\t: 0\nmodel name\t: Caf\xe9 3000\nflags\t\t: b a\n\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_name() == "Caf\N{REPLACEMENT CHARACTER} 3000"  # some name themselves in Latin-1
    assert machine.processor().startswith("Caf")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert cpu_name()


def test_a_processor_whose_name_is_not_utf8_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_bytes(b"processor : 0\nmodel name : A\xa9 B\n")
    monkeypatch.setattr(machine, "CPUINFO", file)
    assert cpu_name() == "A\N{REPLACEMENT CHARACTER} B"


FAULTS_OF_64_MIB = """
import resource, sys
from harness.machine import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * (64 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("how", "least", "most"), [("given back", 1000, 1 << 20), ("kept", 0, 100)])
def test_the_memory_of_a_freed_tensor_is_there_for_the_next(how: str, least: int, most: int) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS_OF_64_MIB, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most


def test_malloc_tuned_by_somebody_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not keep_freed_memory()
