"""Contestants of test_bench.py; each runs in a process of its own."""

from __future__ import annotations

import atexit
import os
import threading
import time
from pathlib import Path
from typing import Any

from harness.bench import Round


def note(*, file: str, name: str, with_payload: bool = False) -> Round:
    """Writes its name and its process at each round, and prints what is no answer."""
    os.system("echo a program that talks")
    turns = 0

    def one_round() -> tuple[Any, ...]:
        nonlocal turns
        turns += 1
        print("more talk")
        with Path(file).open("a") as lines:
            lines.write(f"{name} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        time.sleep(0.01)
        return (0.5, 4, {"turns": turns}) if with_payload else (0.5, 4)

    return one_round


def vanish() -> Round:
    """Ends between its rounds, without a word."""

    def one_round() -> tuple[float, int]:
        threading.Timer(0.05, os._exit, [7]).start()
        return 1.0, 1

    return one_round


def fail(*, late: bool) -> Any:
    """Fails while it warms up, or in its first round."""

    def one_round() -> tuple[float, int]:
        raise ValueError("the reason of the failure")

    return one_round if late else one_round()


def add_up_ranks() -> Round:
    """Counts the ranks that it reaches over gloo."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)

    def one_round() -> tuple[float, int]:
        one = torch.ones(())
        dist.all_reduce(one)
        return 1.0, int(one)

    return one_round
