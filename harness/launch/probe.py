"""What measures a layout of ranks and threads: training steps on random images, gradients exchanged as in training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from harness.bench import Round
from harness.machine import keep_freed_memory, seconds_of
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe
from harness.training.build import trial_network, trial_step

ROUND_SECONDS = 0.8
STEP_SECONDS = 1.0  # a larger batch is cut, in all layouts alike, until a step takes about this long
PILOT_IMAGES = 8
MAX_STEPS = 20


def training_steps(*, recipe: Mapping[str, Any], share: float | None = None, steps: int | None = None) -> Round:
    """A contestant of `harness.bench`; it counts the images of all its ranks.

    The layout of one rank finds which share of the recipe's batch to take and how many steps a round has, and returns
    both with each round; the others are given them.
    """
    keep_freed_memory()  # as a training does
    settings = Recipe.model_validate(recipe)
    model = trial_network(settings).train()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
        if settings.training.sync_batch_norm:
            model = convert_sync_batch_norm(model, "cpu")
        model = DistributedDataParallel(model)
    training = settings.training
    micro_batch = training.global_batch_size / (ranks * training.gradient_accumulation_steps)
    if share is None:
        pilot = trial_step(model, settings, images=PILOT_IMAGES)
        pilot()
        seconds = min(seconds_of(pilot) for _ in range(2))
        share = min(1.0, STEP_SECONDS * PILOT_IMAGES / seconds / micro_batch)
    images = max(2, round(micro_batch * share))  # batch statistics of one image are refused
    step = trial_step(model, settings, images=images)
    step()
    if steps is None:
        steps = max(1, min(MAX_STEPS, int(ROUND_SECONDS / seconds_of(step))))

    def one_round() -> tuple[float, int, dict[str, Any]]:
        seconds = sum(seconds_of(step) for _ in range(steps))
        return seconds, steps * images * ranks, {"share": share, "steps": steps}

    return one_round
