"""Contestants of test_contest.py; each runs in a process of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path


def note(*, file: str, name: str) -> Callable[[], tuple[float, int]]:
    """Writes its name and its process at each round, and prints what is no answer."""
    print("a library that talks")
    os.system("echo a program that talks")

    def one_round() -> tuple[float, int]:
        print("more talk")
        with Path(file).open("a") as lines:
            lines.write(f"{name} {os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ.get('OWN', '')}\n")
        time.sleep(0.01)
        return 0.5, 4

    return one_round


def vanish() -> Callable[[], tuple[float, int]]:
    """Ends between its rounds, without a word."""

    def one_round() -> tuple[float, int]:
        threading.Timer(0.05, os._exit, [7]).start()
        return 1.0, 1

    return one_round


def fail(*, late: bool) -> Callable[[], tuple[float, int]]:
    """Fails while it warms up, or in its first round."""

    def one_round() -> tuple[float, int]:
        raise ValueError("the reason of the failure")

    return one_round if late else one_round()  # type: ignore[return-value]


def add_up_ranks() -> Callable[[], tuple[float, int]]:
    """Counts the ranks that it reaches over gloo."""
    import atexit

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)

    def one_round() -> tuple[float, int]:
        one = torch.ones(())
        dist.all_reduce(one)
        return 1.0, int(one)

    return one_round


def tell(*, file: str, name: str) -> Callable[[], tuple[float, int, dict[str, int]]]:
    """As `note`, and tells how often it had its turn."""
    one_round, turns = note(file=file, name=name), 0

    def telling_round() -> tuple[float, int, dict[str, int]]:
        nonlocal turns
        turns += 1
        return *one_round(), {"turns": turns}

    return telling_round
