"""Small disks for tests: a tmpfs of a given size, which only root can mount."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

from tests.faults.fault import NotHere
from tests.faults.runs import Stage


def small_disk(stage: Stage, name: str, kilobytes: int) -> Path:
    """A mounted tmpfs in the trial's folder, unmounted with it. Raises NotHere."""
    reason = no_disks()
    if reason:
        raise NotHere(reason)
    path = stage.folder / name
    path.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path))
    stage.disks.append(path)
    return path


def remount(path: Path, options: str) -> None:
    """Give a small disk another size ("size=16m"), or make it read-only ("ro")."""
    _mount("-o", f"remount,{options}", str(path))


@lru_cache
def no_disks() -> str | None:
    """Why this machine mounts none."""
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return None if done.returncode == 0 else f"this root may not mount: {done.stderr.decode().strip()}"


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)
