"""One rank of the scaling benchmark; `harness.benchmarks.scaling` starts as many as are asked for.

Variants of the same training step take turns round by round, so that other work on the machine falls on all alike.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.launching.trial import answer
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe, load
from harness.training.trial_step import trial_network, trial_step

LIMIT_SECONDS = 300
ROUND_SECONDS = 0.4  # of each variant
MAX_STEPS = 20
SMALL_BUCKETS = 4
ONE_BUCKET_MB = 1 << 20


@dataclass(frozen=True)
class Variant:
    """What of the ranks' talk is left out or changed.

    Attributes:
        exchange: gradients are averaged over ranks.
        sync_batch_norm: batch statistics are those of all ranks, where the recipe says so.
        buckets: "default" is DDP's own, "one" a single one, "small" about SMALL_BUCKETS.
    """

    exchange: bool = True
    sync_batch_norm: bool = True
    buckets: str = "default"


VARIANTS = {
    "full": Variant(),
    "one_bucket": Variant(buckets="one"),
    "small_buckets": Variant(buckets="small"),
    "no_exchange": Variant(exchange=False),
    "no_sync_batch_norm": Variant(sync_batch_norm=False),
    "independent": Variant(exchange=False, sync_batch_norm=False),
}


def main(arguments: Sequence[str]) -> int:
    """Arguments: the folder for the result, a JSON object with "rounds" and "threads", the recipe, its overrides."""
    folder, plan_text, recipe_path, *overrides = arguments
    plan = json.loads(plan_text)
    return answer(folder, lambda: measure(folder, load(recipe_path, overrides), plan["rounds"], plan["threads"]))


def measure(folder: str, recipe: Recipe, rounds: int, threads: int) -> dict[str, Any]:
    """Run all variants in turn, `rounds` rounds after one to warm up; one rank has only the variant "full".

    Returns:
        {"images_per_rank", "steps_per_round", "variants": {name: {"seconds" of a step in each round, of the slowest
        rank; "bucket_bytes" as DDP made them}}}.
    """
    torch.set_num_threads(threads)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    training = recipe.training
    images = training.global_batch_size // training.gradient_accumulation_steps // world
    model = trial_network(recipe).train()
    if world > 1:
        timeout = datetime.timedelta(seconds=LIMIT_SECONDS)
        rendezvous = f"file://{folder}/ranks"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timeout)
    try:
        runs = {name: _Run(model, recipe, variant, images) for name, variant in _wanted(recipe, world).items()}
        steps = _steps(runs["full"])
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(run.round(steps))
        return {
            "images_per_rank": images,
            "steps_per_round": steps,
            "variants": {n: {"seconds": seconds[n], "bucket_bytes": run.bucket_bytes()} for n, run in runs.items()},
        }
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _wanted(recipe: Recipe, world: int) -> dict[str, Variant]:
    """The variants that differ: one rank has nobody to talk to, and a recipe may be without SyncBatchNorm."""
    if world == 1:
        return {"full": VARIANTS["full"]}
    if recipe.training.sync_batch_norm:
        return VARIANTS
    return {name: variant for name, variant in VARIANTS.items() if variant.sync_batch_norm}


class _Run:
    """A variant with a network of its own."""

    def __init__(self, model: nn.Module, recipe: Recipe, variant: Variant, images: int) -> None:
        model = copy.deepcopy(model)
        self._wrapped: DistributedDataParallel | None = None
        if dist.is_initialized():
            if variant.sync_batch_norm and recipe.training.sync_batch_norm:
                model = convert_sync_batch_norm(model, "cpu")
            model = self._wrapped = DistributedDataParallel(model, bucket_cap_mb=_cap_mb(model, variant.buckets))
        self._exchange = variant.exchange
        self._step: Callable[[], None] = trial_step(model, recipe, images=images)
        self.round(2)  # DDP packs its buckets anew after the first step

    def round(self, steps: int) -> float:
        """Seconds of a step, the mean over `steps`, on the slowest rank."""
        if dist.is_initialized():
            dist.barrier()
        alone: AbstractContextManager[Any] = nullcontext()
        if self._wrapped is not None and not self._exchange:
            alone = self._wrapped.no_sync()
        start = time.perf_counter()
        with alone:
            for _ in range(steps):
                self._step()
        return _slowest((time.perf_counter() - start) / steps)

    def bucket_bytes(self) -> list[int]:
        """Of the gradient buckets, in the order of their exchange; none where nothing is exchanged."""
        if self._wrapped is None or not self._exchange:
            return []
        told = self._wrapped._get_ddp_logging_data()
        sizes = str(told.get("rebuilt_bucket_sizes") or told["bucket_sizes"])
        return [int(size) for size in sizes.replace(",", " ").split()]


def _cap_mb(model: nn.Module, buckets: str) -> float | None:
    """DDP's bucket_cap_mb, MiB; a cap that is given is that of the first bucket too."""
    if buckets == "small":
        total = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return total / SMALL_BUCKETS / 2**20
    return ONE_BUCKET_MB if buckets == "one" else None


def _steps(run: _Run) -> int:
    """Steps of a round, the same on all ranks."""
    return max(1, min(MAX_STEPS, round(ROUND_SECONDS / run.round(2))))


def _slowest(seconds: float) -> float:
    if not dist.is_initialized():
        return seconds
    shared = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
