"""One rank of the all-reduce measurement; `harness.benchmarks.allreduce` starts as many as the largest group has.

The groups of 2, 3, … ranks take turns round by round, and the message sizes within a round, so that other work on the
machine falls on all of them alike. Ranks outside the group at work wait in a barrier.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from harness.launching.trial import answer

LIMIT_SECONDS = 300
ROUND_SECONDS = 0.05  # of each group and size: long enough for several all-reduces
MIN_REPEATS, MAX_REPEATS = 3, 40


def main(arguments: Sequence[str]) -> int:
    """Arguments: the folder for the result, and a JSON object with "ranks", "sizes_bytes" and "rounds"."""
    folder, plan_text = arguments
    plan = json.loads(plan_text)
    return answer(folder, lambda: measure(folder, plan["ranks"], plan["sizes_bytes"], plan["rounds"]))


def measure(
    folder: str, rank_counts: Sequence[int], sizes_bytes: Sequence[int], rounds: int
) -> list[dict[str, int | list[float]]]:
    """Time all-reduces of float32 sums in every group and size, `rounds` times after one warm-up round.

    Returns:
        For each pair {"ranks", "message_bytes", "seconds"}: the seconds are of each round the median over its
        all-reduces, of the rank that waited longest.
    """
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=LIMIT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world, timeout=timeout)
    try:
        groups = {count: dist.new_group(list(range(count))) for count in rank_counts}  # all ranks take part in each
        buffers = {size: torch.zeros(size // 4) for size in sizes_bytes}
        seconds: dict[tuple[int, int], list[float]] = {(n, size): [] for n in rank_counts for size in sizes_bytes}
        for number in range(rounds + 1):
            for n, group in groups.items():
                dist.barrier()
                if not isinstance(group, dist.ProcessGroup):  # this rank is none of its members
                    continue
                for size in sizes_bytes:
                    earlier = seconds[n, size]
                    repeats = _repeats(min(earlier)) if earlier else MIN_REPEATS
                    found = _one_round(buffers[size], group, repeats)
                    if number:
                        earlier.append(found)
        return [{"ranks": n, "message_bytes": size, "seconds": each} for (n, size), each in seconds.items()]
    finally:
        dist.destroy_process_group()


def _one_round(buffer: torch.Tensor, group: dist.ProcessGroup, repeats: int) -> float:
    """Median seconds of an all-reduce, the same on all ranks of the group: of the slowest rank."""
    dist.barrier(group)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        times.append(time.perf_counter() - start)
    slowest = torch.tensor([statistics.median(times)], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return float(slowest)


def _repeats(seconds: float) -> int:
    return min(MAX_REPEATS, max(MIN_REPEATS, round(ROUND_SECONDS / seconds)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
