"""One process of a trial run: real training steps on random images, with the gradient exchange of real training.

`harness.launching.local.measure` starts as many of these as the largest split has ranks. Each takes part in the
splits that have room for its rank; joining a split's process group is what makes the ranks start together.
"""

from __future__ import annotations

import copy
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.launching.local import PROBE_LIMIT_SECONDS, Split
from harness.launching.trial import answer
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe, load
from harness.training.build import trial_network, trial_step

MEASURE_SECONDS = 2.5  # of each split
STEP_SECONDS = 1.0  # a larger batch is cut, in all splits alike, until a step takes about this long
PILOT_IMAGES = 8
MAX_STEPS = 50


def main(arguments: Sequence[str]) -> int:
    """Arguments: the folder for the result, the plan ("1x2,2x1"), the recipe and its overrides."""
    folder, plan, recipe_path, *overrides = arguments
    splits = [Split(*map(int, entry.split("x"))) for entry in plan.split(",")]
    return answer(folder, lambda: _speeds(folder, splits, recipe_path, overrides))


def _speeds(folder: str, splits: Sequence[Split], recipe_path: str, overrides: Sequence[str]) -> list[float]:
    """images/s of each split that has room for this rank."""
    rank = int(os.environ["RANK"])
    recipe = load(recipe_path, overrides)
    model = trial_network(recipe)
    share, speeds = 1.0, []
    for index, split in enumerate(splits):
        if rank < split.ranks:
            rendezvous = f"file://{folder}/split{index}"
            speed, share = run_split(model, recipe, split, rank=rank, rendezvous=rendezvous, share=share)
            speeds.append(speed)
    return speeds


def run_split(
    model: nn.Module, recipe: Recipe, split: Split, *, rank: int, rendezvous: str, share: float
) -> tuple[float, float]:
    """Train for about MEASURE_SECONDS in one split.

    Args:
        rendezvous: a file:// address where the ranks of the split meet.
        share: the part of the recipe's batch to take, found by rank 0 in the first split.

    Returns:
        images/s over all ranks, and the share.
    """
    torch.set_num_threads(split.threads)
    model = copy.deepcopy(model).train()
    if split.ranks == 1:
        share = _affordable_share(model, recipe)
        return _measure(model, recipe, split, share), share
    timeout = datetime.timedelta(seconds=PROBE_LIMIT_SECONDS)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=split.ranks, timeout=timeout)
    try:
        share = _agree(share)
        if recipe.training.sync_batch_norm:
            model = convert_sync_batch_norm(model, "cpu")
        return _measure(DistributedDataParallel(model), recipe, split, share), share
    finally:
        dist.destroy_process_group()


def _affordable_share(model: nn.Module, recipe: Recipe) -> float:
    """The part of the batch that one rank can do in STEP_SECONDS, judged by steps of few images."""
    micro = _micro_batch(recipe, ranks=1, share=1.0)
    pilot = min(PILOT_IMAGES, micro)
    step = trial_step(model, recipe, images=pilot)
    step()
    seconds = min(_timed(step), _timed(step))
    return min(1.0, STEP_SECONDS * pilot / seconds / micro)


def _measure(model: nn.Module, recipe: Recipe, split: Split, share: float) -> float:
    """images/s over all ranks of the split."""
    images = _micro_batch(recipe, ranks=split.ranks, share=share)
    step = trial_step(model, recipe, images=images)
    step()
    seconds = [_timed(step)]
    steps = round(_agree(min(MAX_STEPS, max(1.0, MEASURE_SECONDS // seconds[0]))))
    if dist.is_initialized():
        dist.barrier()
    seconds += [_timed(step) for _ in range(steps)]
    # The median: other programs on the machine slow a step now and then, not half of them.
    return images * split.ranks / statistics.median(seconds)


def _micro_batch(recipe: Recipe, *, ranks: int, share: float) -> int:
    """Images a rank has in one forward pass, at least 2 (batch statistics of one image are refused)."""
    training = recipe.training
    whole = training.global_batch_size / (ranks * training.gradient_accumulation_steps)
    return max(2, round(whole * share))


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _agree(number: float) -> float:
    """Rank 0's number on every rank."""
    if not dist.is_initialized():
        return number
    shared = torch.tensor([number], dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return float(shared)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
