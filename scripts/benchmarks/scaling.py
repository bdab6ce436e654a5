"""Training on 1, 2, 4 … CPU ranks: images a second, and what gradient exchange, buckets and SyncBatchNorm cost.

Variants of the same training step take turns within a round, so that other work on the machine falls on all alike.
"""

from __future__ import annotations

import atexit
import copy
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.bench.contest import Contestant, Round, describe_machine, run_contest, spread
from harness.errors import HarnessError
from harness.machine import keep_freed_memory, usable_cores
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe, load
from harness.scaling import BACKWARD_SHARE, NETWORKS, exposed_seconds, workload_of
from harness.training.build import trial_network, trial_step

ROUND_SECONDS, MAX_STEPS = 0.4, 20  # of each variant
SMALL_BUCKETS, ONE_BUCKET_MB = 4, 1 << 20


@dataclass(frozen=True)
class Variant:
    """What of the ranks' talk is left out or changed; `buckets` is "default", "one" or "small"."""

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
# Each cost: the time of the whole step less that of the step without, or the other way round for a saving.
COSTS = {
    "gradient_exchange": ("full", "no_exchange"),
    "sync_batch_norm": ("full", "no_sync_batch_norm"),
    "all_communication": ("full", "independent"),
    "one_bucket_over_default": ("one_bucket", "full"),
    "one_bucket_over_small_buckets": ("one_bucket", "small_buckets"),
}


def bench_scaling(
    recipe_path: str, overrides: Sequence[str] = (), *, ranks: Sequence[int] = (1, 2, 4), rounds: int = 5
) -> dict[str, Any]:
    """Measure the recipe's training step on several numbers of real gloo processes on loopback.

    The micro-batch of the recipe is shared among the ranks; the machine's cores are, too, and ranks beyond them are
    oversubscribed: a rank has max(1, cores // ranks) threads.

    Args:
        recipe_path, overrides: as `harness.recipe.load` takes them.
        ranks: numbers of processes, each at least 1.
        rounds: of all variants in turn; at least 1.

    Returns:
        A dict for JSON: "ranks" (a list; each with ranks, threads_per_rank, oversubscribed, images_per_rank,
        "variants" with images_per_second and step_ms as median, min and max and bucket_bytes, "costs" in ms a step
        as median, min and max over the rounds' differences, "predicted_step_ms": by `harness scale` from the step
        without communication, None for one rank or too few cores), "speedup_over_one_rank" where one rank was
        measured, "settings" and "machine".

    Raises:
        HarnessError: the recipe is wrong, or numbers are out of range; code 1 where a process died.
    """
    recipe, cores = load(recipe_path, overrides), usable_cores()
    _check(recipe, ranks)
    results = []
    for count in sorted(set(ranks)):
        threads = max(1, cores // count)
        arguments = {"recipe_path": recipe_path, "overrides": list(overrides), "threads": threads}
        contestant = Contestant("scripts.benchmarks.scaling:variants", arguments, ranks=count)
        times = run_contest({f"{count} ranks": contestant}, rounds=rounds, threads=threads)[f"{count} ranks"]
        assert times is not None
        figures = _figures(times.payloads, count, recipe)
        crowded = {"ranks": count, "threads_per_rank": threads, "oversubscribed": count > cores}
        results.append(crowded | figures | {"predicted_step_ms": _predicted(recipe, figures, count, cores)})
    training = recipe.training
    speeds = {each["ranks"]: each["variants"]["full"]["images_per_second_median"] for each in results}
    return {
        "ranks": results,
        "speedup_over_one_rank": {str(n): speed / speeds[1] for n, speed in speeds.items()} if 1 in speeds else {},
        "settings": {
            "recipe": recipe.name, "rounds": rounds, "cores": cores, "backend": "gloo", "precision": training.precision,
            "global_batch_size": training.global_batch_size, "sync_batch_norm": training.sync_batch_norm,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
        },
        "machine": describe_machine(("torch", "timm", "numpy")),
    }  # fmt: skip


def _check(recipe: Recipe, ranks: Sequence[int]) -> None:
    if recipe.training.precision == "fp16":
        raise HarnessError("fp16 needs a GPU", where="training.precision", hint="On a CPU use bf16 or no.")
    micro = recipe.training.global_batch_size // recipe.training.gradient_accumulation_steps
    wrong = [count for count in ranks if micro % count or micro // count < 2]
    if wrong:
        part = wrong[0] * recipe.training.gradient_accumulation_steps
        raise HarnessError(
            f"a micro-batch of {micro} images does not divide among {wrong[0]} ranks with 2 images each or more",
            where="--ranks",
            hint=f"Choose other ranks, or training.global_batch_size={max(2, -(-micro // wrong[0])) * part}.",
        )


def variants(*, recipe_path: str, overrides: Sequence[str], threads: int) -> Round:
    """A rank: a round is a turn of each variant, and tells their seconds a step, of the slowest rank, and buckets."""
    keep_freed_memory()  # as a training does
    torch.set_num_threads(threads)
    recipe, world = load(recipe_path, overrides), int(os.environ.get("WORLD_SIZE", "1"))
    images = recipe.training.global_batch_size // recipe.training.gradient_accumulation_steps // world
    model = trial_network(recipe).train()
    if world > 1:
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    synced = recipe.training.sync_batch_norm
    names = [n for n, each in VARIANTS.items() if each.sync_batch_norm or synced] if world > 1 else ["full"]
    runs = {name: _Run(model, recipe, VARIANTS[name], images) for name in names}
    steps = max(1, min(MAX_STEPS, round(ROUND_SECONDS / runs["full"].seconds(2))))  # alike on all ranks

    def one_round() -> tuple[float, int, dict[str, Any]]:
        seconds = {name: run.seconds(steps) for name, run in runs.items()}
        told = {name: {"seconds": seconds[name], "bucket_bytes": run.bucket_bytes()} for name, run in runs.items()}
        return sum(seconds.values()), 1, told

    return one_round


class _Run:
    """A variant with a network of its own."""

    def __init__(self, model: nn.Module, recipe: Recipe, variant: Variant, images: int) -> None:
        model = copy.deepcopy(model)
        self._wrapped: DistributedDataParallel | None = None
        if dist.is_initialized():
            if variant.sync_batch_norm and recipe.training.sync_batch_norm:
                model = convert_sync_batch_norm(model, "cpu")
            total_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
            cap_mb = {"default": None, "one": ONE_BUCKET_MB, "small": total_mb / SMALL_BUCKETS}[variant.buckets]
            model = self._wrapped = DistributedDataParallel(model, bucket_cap_mb=cap_mb)
        self._exchange, self._step = variant.exchange, trial_step(model, recipe, images=images)
        self.seconds(2)  # DDP packs its buckets anew after the first step

    def seconds(self, steps: int) -> float:
        """Of a step, the mean over `steps`, on the slowest rank."""
        if self._wrapped is None:
            return self._mean(steps)
        dist.barrier()
        with nullcontext() if self._exchange else self._wrapped.no_sync():
            slowest = torch.tensor([self._mean(steps)], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    def _mean(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        return (time.perf_counter() - start) / steps

    def bucket_bytes(self) -> list[int]:
        """Of the gradient buckets, in the order of their exchange; none where nothing is exchanged."""
        if self._wrapped is None or not self._exchange:
            return []
        told = self._wrapped._get_ddp_logging_data()
        sizes = str(told.get("rebuilt_bucket_sizes") or told["bucket_sizes"])
        return [int(size) for size in sizes.replace(",", " ").split()]


def _figures(rounds: Sequence[dict[str, Any]], ranks: int, recipe: Recipe) -> dict[str, Any]:
    """Seconds of steps as figures with units."""
    images = recipe.training.global_batch_size // recipe.training.gradient_accumulation_steps
    ms = {name: [1e3 * each[name]["seconds"] for each in rounds] for name in rounds[0]}
    return {
        "images_per_rank": images // ranks,
        "variants": {
            name: {
                **spread("images_per_second", [1e3 * images / each for each in times]),
                **spread("step_ms", times),
                "bucket_bytes": rounds[-1][name]["bucket_bytes"],
            }
            for name, times in ms.items()
        },
        "costs": {
            name: spread("ms", [a - b for a, b in zip(ms[one], ms[other], strict=True)])
            for name, (one, other) in COSTS.items()
            if one in ms and other in ms
        },
    }


def _predicted(recipe: Recipe, figures: dict[str, Any], ranks: int, cores: int) -> float | None:
    """Milliseconds of the whole step, from the one without communication and the model's network loopback-gloo."""
    if not 1 < ranks <= cores:
        return None
    measured = figures["variants"]
    alone_ms = measured.get("independent", measured["no_exchange"])["step_ms_median"]
    work = workload_of(recipe, fixed_seconds=0.0, seconds_per_image=0.0)

    def all_reduce(size_bytes: float) -> float:
        return NETWORKS["loopback-gloo"].all_reduce_seconds(ranks, size_bytes)

    exchange = exposed_seconds(work.bucket_bytes, BACKWARD_SHARE * alone_ms / 1e3, all_reduce)
    return float(alone_ms + 1e3 * (exchange + sum(map(all_reduce, work.sync_batch_norm_bytes))))


def render_scaling(result: dict[str, Any]) -> str:
    """A table for each number of ranks, with the costs in milliseconds a step."""
    lines = []
    for each in result["ranks"]:
        crowded = ", oversubscribed" if each["oversubscribed"] else ""
        lines += [
            f"{each['ranks']} × {each['threads_per_rank']} threads, {each['images_per_rank']} images a rank{crowded}",
            f"  {'variant':<22}{'images/s':>10}{'lowest':>10}{'highest':>10}{'step ms':>10}",
        ]
        for name, figures in each["variants"].items():
            speeds = "".join(f"{figures[f'images_per_second_{x}']:>10,.1f}" for x in ("median", "min", "max"))
            lines.append(f"  {name:<22}{speeds}{figures['step_ms_median']:>10.2f}")
        for name, cost in each["costs"].items():
            told = f"{cost['ms_median']:+.2f} ms a step ({cost['ms_min']:+.2f} to {cost['ms_max']:+.2f})"
            lines.append(f"  {name}: {told}")
        if each["predicted_step_ms"] is not None:
            lines.append(f"  predicted by harness scale: {each['predicted_step_ms']:.2f} ms a step")
    lines += [f"speedup of {count} over one rank: {x:.2f}" for count, x in result["speedup_over_one_rank"].items()]
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in {**result["settings"], **result["machine"]}.items())])
