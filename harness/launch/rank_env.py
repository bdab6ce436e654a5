"""The environment of a rank: `RANK`, `WORLD_SIZE`, … where srun alone started it, and the port where ranks meet.

`python -m harness.launch.rank_env SEED` prints a free port for job.sbatch. Imports nothing heavy.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

PORTS_OF_STEPS = range(20_000, 32_000)  # below those that outgoing connections take theirs from
DEFAULT_EPHEMERAL_START = 32768


def set_from_srun(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `RANK`, `WORLD_SIZE`, … to SLURM's numbers in a step of several tasks, one rank per task.

    Nothing is changed where a launcher has set them, outside steps (the shells of sbatch and salloc start no ranks by
    themselves), and in the shell of `srun --pty`, whose other tasks have ended.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    launched = {"RANK", "WORLD_SIZE"} & environment.keys() or ("SLURM_PTY_PORT" in environment and os.isatty(0))
    if tasks == "1" or launched or "SLURM_PROCID" not in environment:
        return
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    here = int(environment["SLURM_NODEID"])
    environment["LOCAL_WORLD_SIZE"] = str(_tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[here])
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = _head_address(environment)
    # No rank can tell the others which port is free: all derive the same one, and other steps another.
    step = " ".join(environment.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID", "STEP_ID"))
    environment.setdefault("MASTER_PORT", str(random.Random(step).choice(PORTS_OF_STEPS)))


def _tasks_of_nodes(text: str) -> list[int]:
    """SLURM's short form, such as `2(x3),1`, written out."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def _head_address(environment: MutableMapping[str, str]) -> str:
    """The address of the step's first node, where rank 0 runs."""
    if environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    # The first name of a list such as rack[1-2]n[08-10,15],login: rack1n08.
    node = re.sub(r"\[(\w+)[^\]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    command = ["scontrol", "show", "node", "-o", node]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return node
    address = re.search(r" NodeAddr=(\S+)", shown)
    return address[1] if address else node


def free_port(seed: str | None = None) -> int:
    """A free TCP port below the range that outgoing connections take theirs from.

    A port of that range can be lost to something else before rank 0 listens, and the ranks would wait in vain.

    Args:
        seed: where the search begins; jobs with seeds of their own begin apart, and so do not race for one port. None
            begins anywhere and asks for a port of the loopback interface alone.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        end = DEFAULT_EPHEMERAL_START
    ports = range(max(1024, end // 2), end) or [0]
    for port in random.Random(seed).sample(ports, min(len(ports), 200)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1" if seed is None else "", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    return 0


if __name__ == "__main__":
    print(free_port(sys.argv[1]))
