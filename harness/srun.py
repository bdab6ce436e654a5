"""Ranks that srun starts without a launcher: `srun -N2 -n2 python -m harness train RECIPE`."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import MutableMapping

PORTS = range(20_000, 32_000)  # below those that outgoing connections take theirs from


def take_place(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `RANK`, `WORLD_SIZE`, … to SLURM's numbers in a step of several tasks, one task per rank.

    Nothing is changed where a launcher has set them, outside steps (the shells of sbatch and salloc start no ranks by
    themselves), and in the shell of `srun --pty`, whose other tasks have ended.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    launched = {"RANK", "WORLD_SIZE"} & environment.keys() or ("SLURM_PTY_PORT" in environment and os.isatty(0))
    if tasks == "1" or launched or "SLURM_PROCID" not in environment:
        return
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = re.split(r"\D", environment["SLURM_STEP_TASKS_PER_NODE"])[0]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _head(environment)
    # No rank can tell the others which port is free: all derive the same one, and other steps another.
    step = " ".join(environment.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID", "STEP_ID"))
    environment.setdefault("MASTER_PORT", str(random.Random(step).choice(PORTS)))


def _head(environment: MutableMapping[str, str]) -> str:
    """The address of the step's first node, where rank 0 runs."""
    if environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    node = first_host(environment["SLURM_STEP_NODELIST"])
    try:
        command = ["scontrol", "show", "node", "-o", node]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    found = re.search(r" NodeAddr=(\S+)", told)
    return found[1] if found else node


def first_host(nodes: str) -> str:
    """The first of the names in SLURM's short form.

    >>> first_host("rack[1-2]n[08-10,15],login")
    'rack1n08'
    """
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
