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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.errors import HarnessError
from harness.files import write_json
from harness.launching.local import PROBE_LIMIT_SECONDS, Split
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe, load
from harness.training.network import MEMORY_FORMATS, open_network

MEASURE_SECONDS = 2.5  # of each split
STEP_SECONDS = 1.0  # a larger batch is cut, in all splits alike, until a step takes about this long
PILOT_IMAGES = 8
MAX_STEPS = 50


def main(arguments: Sequence[str]) -> int:
    """Arguments: the plan ("1x2,2x1"), the folder for the result, the recipe and its overrides."""
    plan, folder, recipe_path, *overrides = arguments
    splits = [Split(*map(int, entry.split("x"))) for entry in plan.split(",")]
    rank = int(os.environ["RANK"])
    try:
        recipe = load(recipe_path, overrides)
        model = _model(recipe)
        share, speeds = 1.0, []
        for index, split in enumerate(splits):
            if rank < split.ranks:
                rendezvous = f"file://{folder}/split{index}"
                speed, share = run_split(model, recipe, split, rank=rank, rendezvous=rendezvous, share=share)
                speeds.append(speed)
        result: dict[str, Any] = {"images_per_second": speeds}
    except HarnessError as error:
        wrong = {"what": error.what, "where": error.where, "hint": error.hint, "exit_code": error.exit_code}
        result = {"error": wrong}
    if rank == 0:
        write_json(Path(folder, "result.json"), result)
    return 0


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


def _model(recipe: Recipe) -> nn.Module:
    """The recipe's network as training has it on this processor."""
    torch.manual_seed(recipe.seed)
    classes = recipe.data.num_classes or 10
    return open_network(recipe, num_classes=classes, device=torch.device("cpu"), world_size=1).model


def _affordable_share(model: nn.Module, recipe: Recipe) -> float:
    """The part of the batch that one rank can do in STEP_SECONDS, judged by steps of few images."""
    micro = _micro_batch(recipe, ranks=1, share=1.0)
    pilot = min(PILOT_IMAGES, micro)
    step = _step(model, recipe, pilot)
    step()
    seconds = min(_timed(step), _timed(step))
    return min(1.0, STEP_SECONDS * pilot / seconds / micro)


def _measure(model: nn.Module, recipe: Recipe, split: Split, share: float) -> float:
    """images/s over all ranks of the split."""
    images = _micro_batch(recipe, ranks=split.ranks, share=share)
    step = _step(model, recipe, images)
    step()
    seconds = [_timed(step)]
    steps = round(_agree(min(MAX_STEPS, max(1.0, MEASURE_SECONDS // seconds[0]))))
    if dist.is_initialized():
        dist.barrier()
    seconds += [_timed(step) for _ in range(steps)]
    # The median: other programs on the machine slow a step now and then, not half of them.
    return images * split.ranks / statistics.median(seconds)


def _step(model: nn.Module, recipe: Recipe, images: int) -> Callable[[], None]:
    """A training step on fixed random images: forward, backward with gradient exchange, SGD with momentum."""
    size = recipe.data.image_size_px
    images_BCHW = torch.randn(images, 3, size, size).contiguous(
        memory_format=MEMORY_FORMATS[recipe.training.memory_format]
    )
    labels_B = torch.arange(images) % (recipe.data.num_classes or 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    autocast: Any = nullcontext()
    if recipe.training.precision == "bf16":
        autocast = torch.autocast("cpu", torch.bfloat16)

    def step() -> None:
        with autocast:
            logits_BK = model(images_BCHW)
        nn.functional.cross_entropy(logits_BK.float(), labels_B).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


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
