"""Training on 1, 2, 4 … CPU ranks: images a second, and what gradient exchange, buckets and SyncBatchNorm cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness.benchmarks.machine import describe_machine, measured_by_ranks
from harness.errors import HarnessError
from harness.machine import usable_cores
from harness.recipe import Recipe, load
from harness.scaling.fitting import LoopbackModel
from harness.scaling.networks import LOOPBACK_BUSY_SHARE, LOOPBACK_LINK, LOOPBACK_WAIT_SECONDS
from harness.scaling.prediction import BACKWARD_SHARE, exposed_seconds
from harness.scaling.workload import given_timing, workload_of

# Each cost: the time of the whole step less that of the step without, or the other way round for a saving.
COSTS = {
    "gradient_exchange": ("full", "no_exchange"),
    "sync_batch_norm": ("full", "no_sync_batch_norm"),
    "all_communication": ("full", "independent"),
    "one_bucket_over_default": ("one_bucket", "full"),
    "one_bucket_over_small_buckets": ("one_bucket", "small_buckets"),
}


def bench_scaling(
    recipe_path: str | Path, overrides: Sequence[str] = (), *, ranks: Sequence[int] = (1, 2, 4), rounds: int = 5
) -> dict[str, Any]:
    """Measure the recipe's training step on several numbers of real gloo processes on loopback.

    The micro-batch of the recipe is shared among the ranks; the machine's cores are, too, and ranks beyond them are
    oversubscribed: a rank has max(1, cores // ranks) threads.

    Args:
        recipe_path, overrides: as `harness.recipe.load` takes them.
        ranks: numbers of processes, each at least 1.
        rounds: of each variant, in turn; at least 1.

    Returns:
        A dict for JSON: "ranks" (a list; each with ranks, threads_per_rank, oversubscribed, images_per_rank,
        "variants" with images_per_second and step_ms as median, min and max, bucket_bytes, and "costs" in ms a step
        as median, min and max over the rounds' differences, "predicted": the whole step by the model of
        `harness scale` from the one without communication, with its error), "speedup_over_one_rank" where one rank
        was measured, "settings" and "machine".

    Raises:
        HarnessError: the recipe is wrong, or numbers are out of range; code 1 where a process died.
    """
    recipe = load(recipe_path, overrides)
    _check(recipe, ranks, rounds)
    cores = usable_cores()
    results = []
    for count in sorted(set(ranks)):
        threads = max(1, cores // count)
        plan = json.dumps({"rounds": rounds, "threads": threads})
        arguments = [plan, str(recipe_path), *overrides]
        found = measured_by_ranks(f"{count} ranks", "harness.benchmarks.scaling_rank", arguments, ranks=count)
        figures = _figures(found, count, threads, cores)
        results.append(figures | {"predicted": _predicted(recipe, figures, cores)})
    settings = {
        "recipe": recipe.name, "rounds": rounds, "cores": cores, "backend": "gloo", "interface": "loopback",
        "global_batch_size": recipe.training.global_batch_size,
        "gradient_accumulation_steps": recipe.training.gradient_accumulation_steps,
        "precision": recipe.training.precision, "sync_batch_norm": recipe.training.sync_batch_norm,
    }  # fmt: skip
    machine = describe_machine(torch.device("cpu"), ("torch", "timm", "numpy"))
    return {"ranks": results, **_against_one(results), "settings": settings, "machine": machine}


def _check(recipe: Recipe, ranks: Sequence[int], rounds: int) -> None:
    if rounds < 1:
        raise HarnessError(f"rounds must be at least 1, it is {rounds}", where="--rounds", hint="For example 5.")
    if not ranks or min(ranks) < 1:
        raise HarnessError("a number of ranks must be at least 1", where="--ranks", hint="For example --ranks 1,2,4.")
    training = recipe.training
    if training.precision == "fp16":
        raise HarnessError(
            "fp16 needs a GPU", where="training.precision", hint="On a CPU use training.precision=bf16 or no."
        )
    micro = training.global_batch_size // training.gradient_accumulation_steps
    wrong = [count for count in ranks if micro % count or micro // count < 2]
    if wrong:
        part = wrong[0] * training.gradient_accumulation_steps
        raise HarnessError(
            f"a micro-batch of {micro} images does not divide among {wrong[0]} ranks with 2 images each or more",
            where="--ranks",
            hint=f"Choose other ranks, or training.global_batch_size={max(2, -(-micro // wrong[0])) * part}.",
        )


def _figures(found: dict[str, Any], ranks: int, threads: int, cores: int) -> dict[str, Any]:
    """Seconds of steps as figures with units."""
    seconds = {name: variant["seconds"] for name, variant in found["variants"].items()}
    images = found["images_per_rank"] * ranks
    variants = {}
    for name, times in seconds.items():
        variants[name] = {
            **_spread("images_per_second", [images / each for each in times]),
            **_spread("step_ms", [1e3 * each for each in times]),
            "bucket_bytes": found["variants"][name]["bucket_bytes"],
        }
    costs = {
        name: _spread("ms", [1e3 * (a - b) for a, b in zip(seconds[one], seconds[other], strict=True)])
        for name, (one, other) in COSTS.items()
        if one in seconds and other in seconds
    }
    return {
        "ranks": ranks,
        "threads_per_rank": threads,
        "oversubscribed": ranks > cores,
        "images_per_rank": found["images_per_rank"],
        "steps_per_round": found["steps_per_round"],
        "variants": variants,
        "costs": costs,
    }


def _predicted(recipe: Recipe, figures: dict[str, Any], cores: int) -> dict[str, float] | None:
    """The whole step from the one without communication and the model of `harness scale`; None for one rank.

    The constants are those of `loopback-gloo`: on another machine `harness bench allreduce` gives its own.
    """
    variants = figures["variants"]
    without = variants.get("independent", variants.get("no_exchange"))
    if without is None:
        return None
    work = workload_of(recipe, given_timing(recipe, without["step_ms_median"]))
    model = LoopbackModel(LOOPBACK_LINK, cores, LOOPBACK_WAIT_SECONDS, LOOPBACK_BUSY_SHARE)

    def all_reduce(size_bytes: float) -> float:
        return model.seconds(figures["ranks"], size_bytes)

    norms_ms = 1e3 * sum(map(all_reduce, work.sync_batch_norm_bytes))
    backward_seconds = BACKWARD_SHARE * without["step_ms_median"] * 1e-3
    exchange_ms = 1e3 * exposed_seconds(work.bucket_bytes, backward_seconds, all_reduce)
    step_ms = without["step_ms_median"] + norms_ms + exchange_ms
    return {
        "step_ms": step_ms,
        "sync_batch_norm_ms": norms_ms,
        "gradient_exchange_ms": exchange_ms,
        "error_percent": 100 * (step_ms / variants["full"]["step_ms_median"] - 1),
    }


def _spread(unit: str, values: list[float]) -> dict[str, float]:
    return {f"{unit}_median": statistics.median(values), f"{unit}_min": min(values), f"{unit}_max": max(values)}


def _against_one(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Speed over that of one rank; empty where one rank was not measured."""
    speeds = {each["ranks"]: each["variants"]["full"]["images_per_second_median"] for each in results}
    if 1 not in speeds:
        return {}
    return {"speedup_over_one_rank": {str(count): speed / speeds[1] for count, speed in speeds.items()}}


def render_scaling(result: dict[str, Any]) -> str:
    """A table for each number of ranks, with the costs in milliseconds a step."""
    lines = []
    for each in result["ranks"]:
        crowded = ", oversubscribed" if each["oversubscribed"] else ""
        lines += [
            f"{each['ranks']} × {each['threads_per_rank']} threads, {each['images_per_rank']} images a rank{crowded}",
            f"  {'variant':<22}{'images/s':>10}{'lowest':>10}{'highest':>10}{'step ms':>10}{'buckets':>9}",
        ]
        for name, figures in each["variants"].items():
            speeds = "".join(f"{figures[f'images_per_second_{x}']:>10,.1f}" for x in ("median", "min", "max"))
            buckets = len(figures["bucket_bytes"]) or "–"
            lines.append(f"  {name:<22}{speeds}{figures['step_ms_median']:>10.2f}{buckets:>9}")
        for name, cost in each["costs"].items():
            lines.append(
                f"  {name}: {cost['ms_median']:+.2f} ms a step ({cost['ms_min']:+.2f} to {cost['ms_max']:+.2f})"
            )
        if each["predicted"]:
            told = each["predicted"]
            lines.append(
                f"  predicted: {told['step_ms']:.2f} ms a step, {told['error_percent']:+.0f} % (SyncBN "
                f"{told['sync_batch_norm_ms']:.2f} ms, exchange {told['gradient_exchange_ms']:.2f} ms)"
            )
    for count, speedup in result.get("speedup_over_one_rank", {}).items():
        lines.append(f"speedup of {count} over one rank: {speedup:.2f}")
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in {**result["settings"], **result["machine"]}.items())])
