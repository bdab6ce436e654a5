"""Training on 1, 2, 4 … CPU ranks: images a second, and what gradient exchange, buckets and SyncBatchNorm cost.

Variants of the same training step take turns within a round, so that other work on the machine falls on all alike.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.bench import Contestant, Round, describe_machine, run_contest, spread
from harness.errors import HarnessError
from harness.machine import keep_freed_memory, seconds_of, usable_cores
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe, load
from harness.scaling import BACKWARD_SHARE, NETWORKS, exposed_seconds, workload_of
from harness.training.build import trial_network, trial_step

ROUND_SECONDS, MAX_STEPS = 0.4, 20  # of each variant
SMALL_BUCKETS, ONE_BUCKET_MB = 4, 1 << 20
# What of the ranks' talk is left out or changed: whether gradients are exchanged, SyncBatchNorm, and the buckets.
VARIANTS = {
    "full": (True, True, "default"),
    "one_bucket": (True, True, "one"),
    "small_buckets": (True, True, "small"),
    "no_exchange": (False, True, "default"),
    "no_sync_batch_norm": (True, False, "default"),
    "independent": (False, False, "default"),
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

    Returns:
        A dict for JSON: "ranks" (a list; of each its "variants", "costs" as the rounds' differences, and
        "predicted_step_ms": by `harness scale` from the step without communication, None for one rank or too few
        cores), "speedup_over_one_rank" where one rank was measured, "settings" and "machine".

    Raises:
        HarnessError: the recipe is wrong, or numbers are out of range; code 1 where a process died.
    """
    recipe, cores = load(recipe_path, overrides), usable_cores()
    _check(recipe, ranks)
    results: list[dict[str, Any]] = []
    for count in sorted(set(ranks)):
        threads = max(1, cores // count)
        arguments = {"recipe_path": recipe_path, "overrides": list(overrides), "threads": threads}
        contestant = Contestant("scripts.benchmarks.scaling:variants", arguments, ranks=count)
        (times,) = run_contest({f"{count} ranks": contestant}, rounds=rounds, threads=threads).values()
        assert times is not None
        figures: dict[str, Any] = {"ranks": count, "threads_per_rank": threads, "oversubscribed": count > cores}
        figures |= _figures(times.payloads, count, recipe)
        results.append(figures | {"predicted_step_ms": _predicted(recipe, figures, cores)})
    speeds = {each["ranks"]: each["variants"]["full"]["images_per_second_median"] for each in results}
    speedup = {str(count): speed / speeds[1] for count, speed in speeds.items()} if 1 in speeds else {}
    names = ("precision", "global_batch_size", "gradient_accumulation_steps", "sync_batch_norm")
    settings: dict[str, Any] = {"recipe": recipe.name, "rounds": rounds, "cores": cores, "backend": "gloo"}
    settings |= {name: getattr(recipe.training, name) for name in names}
    return {
        "ranks": results, "speedup_over_one_rank": speedup, "settings": settings, "machine": describe_machine()
    }  # fmt: skip


def _micro_batch(recipe: Recipe) -> int:
    return recipe.training.global_batch_size // recipe.training.gradient_accumulation_steps


def _check(recipe: Recipe, ranks: Sequence[int]) -> None:
    if recipe.training.precision == "fp16":
        raise HarnessError("fp16 needs a GPU", where="training.precision", hint="On a CPU use bf16 or no.")
    micro = _micro_batch(recipe)
    for count in ranks:
        if micro % count or micro // count < 2:
            what = f"a micro-batch of {micro} images does not divide among {count} ranks with 2 images each or more"
            fits = max(2, -(-micro // count)) * count * recipe.training.gradient_accumulation_steps
            hint = f"Choose other ranks, or training.global_batch_size={fits}."
            raise HarnessError(what, where="--ranks", hint=hint)


def variants(*, recipe_path: str, overrides: Sequence[str], threads: int) -> Round:
    """A rank: a round is a turn of each variant, with their seconds a step, of the slowest rank, and their buckets."""
    keep_freed_memory()  # as a training does
    torch.set_num_threads(threads)
    recipe, world = load(recipe_path, overrides), int(os.environ.get("WORLD_SIZE", "1"))
    model = trial_network(recipe).train()
    if world > 1:
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    synced = recipe.training.sync_batch_norm
    names = [name for name, (_, sync, _) in VARIANTS.items() if sync or synced] if world > 1 else ["full"]
    runs = {name: _Run(model, recipe, *VARIANTS[name], images=_micro_batch(recipe) // world) for name in names}
    steps = max(1, min(MAX_STEPS, round(ROUND_SECONDS / runs["full"].seconds(2))))  # alike on all ranks

    def one_round() -> tuple[float, int, dict[str, Any]]:
        seconds = {name: run.seconds(steps) for name, run in runs.items()}
        found = {name: {"seconds": seconds[name], "bucket_bytes": run.bucket_bytes()} for name, run in runs.items()}
        return sum(seconds.values()), 1, found

    return one_round


class _Run:
    """A variant with a network of its own."""

    def __init__(self, model: nn.Module, recipe: Recipe, exchange: bool, sync: bool, buckets: str, images: int) -> None:
        model = copy.deepcopy(model)
        self._wrapped: DistributedDataParallel | None = None
        if dist.is_initialized():
            if sync and recipe.training.sync_batch_norm:
                model = convert_sync_batch_norm(model, "cpu")
            total_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
            cap_mb = {"default": None, "one": ONE_BUCKET_MB, "small": total_mb / SMALL_BUCKETS}[buckets]
            model = self._wrapped = DistributedDataParallel(model, bucket_cap_mb=cap_mb)
        self._exchange, self._step = exchange, trial_step(model, recipe, images=images)
        self.seconds(2)  # DDP packs its buckets again after the first step

    def seconds(self, steps: int) -> float:
        """Of a step, the mean over `steps`, on the slowest rank."""

        def mean() -> float:
            return seconds_of(lambda: [self._step() for _ in range(steps)]) / steps

        if self._wrapped is None:
            return mean()
        dist.barrier()
        with nullcontext() if self._exchange else self._wrapped.no_sync():
            slowest = torch.tensor([mean()], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    def bucket_bytes(self) -> list[int]:
        """Of the gradient buckets, in the order of their exchange; none where nothing is exchanged."""
        if self._wrapped is None or not self._exchange:
            return []
        data = self._wrapped._get_ddp_logging_data()
        sizes = str(data.get("rebuilt_bucket_sizes") or data["bucket_sizes"])
        return [int(size) for size in sizes.replace(",", " ").split()]


def _figures(rounds: Sequence[dict[str, Any]], ranks: int, recipe: Recipe) -> dict[str, Any]:
    images = _micro_batch(recipe)
    ms = {name: [1e3 * each[name]["seconds"] for each in rounds] for name in rounds[0]}
    found: dict[str, Any] = {"images_per_rank": images // ranks, "variants": {}, "costs": {}}
    for name, times in ms.items():
        speeds = spread("images_per_second", [1e3 * images / each for each in times])
        buckets = {"bucket_bytes": rounds[-1][name]["bucket_bytes"]}
        found["variants"][name] = speeds | spread("step_ms", times) | buckets
    for name, (one, other) in COSTS.items():
        if one in ms and other in ms:
            found["costs"][name] = spread("ms", [a - b for a, b in zip(ms[one], ms[other], strict=True)])
    return found


def _predicted(recipe: Recipe, figures: dict[str, Any], cores: int) -> float | None:
    """Milliseconds of the whole step, from the one without communication and the model's network loopback-gloo."""
    ranks, measured = figures["ranks"], figures["variants"]
    if not 1 < ranks <= cores:
        return None
    alone_ms = measured.get("independent", measured["no_exchange"])["step_ms_median"]
    work, all_reduce = workload_of(recipe), partial(NETWORKS["loopback-gloo"].all_reduce_seconds, ranks)
    exchange = exposed_seconds(work.bucket_bytes, BACKWARD_SHARE * alone_ms / 1e3, all_reduce)
    return float(alone_ms + 1e3 * (exchange + sum(map(all_reduce, work.sync_batch_norm_bytes))))


def render_scaling(result: dict[str, Any]) -> str:
    """A table for each number of ranks, with the costs in milliseconds a step."""
    lines = []
    for each in result["ranks"]:
        crowded = ", oversubscribed" if each["oversubscribed"] else ""
        threads = f"{each['ranks']} × {each['threads_per_rank']} threads"
        lines.append(f"{threads}, {each['images_per_rank']} images a rank{crowded}")
        lines.append(f"  {'variant':<22}{'images/s':>10}{'lowest':>10}{'highest':>10}{'step ms':>10}")
        for name, figures in each["variants"].items():
            speeds = "".join(f"{figures[f'images_per_second_{x}']:>10,.1f}" for x in ("median", "min", "max"))
            lines.append(f"  {name:<22}{speeds}{figures['step_ms_median']:>10.2f}")
        for name, cost in each["costs"].items():
            low, median, high = (f"{cost[f'ms_{x}']:+.2f}" for x in ("min", "median", "max"))
            lines.append(f"  {name}: {median} ms a step ({low} to {high})")
        if each["predicted_step_ms"] is not None:
            lines.append(f"  predicted by harness scale: {each['predicted_step_ms']:.2f} ms a step")
    lines += [f"speedup of {count} over one rank: {x:.2f}" for count, x in result["speedup_over_one_rank"].items()]
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in {**result["settings"], **result["machine"]}.items())])
