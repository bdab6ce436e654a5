"""Training steps of one network by several loops: images a second, and how much of a step is overhead.

The contestants are in `loops`, and take turns in processes of their own (`contest`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.benchmarks.contest import Contestant, Times, run_contest
from harness.benchmarks.machine import describe_machine
from harness.errors import HarnessError
from harness.machine import usable_cores

LOOPS, LIMITS = "harness.benchmarks.loops", "harness.benchmarks.limits"
SEED_RECIPE, OVERHEAD_RECIPE = Path("recipes", "seed.yaml"), Path("recipes", "debug.yaml")
CPU = torch.device("cpu")
PACKAGES = ("torch", "accelerate", "timm", "lightning", "numpy")
SEED = {"model": "dual_branch_seed", "args": {}, "size_px": 32}
# A network of a few hundred thousand operations: what is measured is what surrounds them.
TINY_STEPS = 100
TINY_ARGS: dict[str, Any] = {"widths": [[8, 16], [16, 32]], "transition_widths": [8], "head_width": 16, "dropout": 0.0}
TINY: dict[str, Any] = {"model": "dual_branch", "args": TINY_ARGS, "size_px": 8, "batch_size": 8, "steps": TINY_STEPS}


def bench_step(*, rounds: int = 5, batch_size: int = 128, threads: int | None = None) -> dict[str, Any]:
    """The seed's network: plain PyTorch and the libraries' loops against `harness train` of the seed's recipe.

    All have dropout, batch statistics and SGD with momentum. `harness_bf16` is the recipe with training.precision=bf16.
    Where torch's own bf16 kernels are wrong on this processor (`harness doctor --numerics`), the peers' bf16 figures
    are of wrong gradients; ours are checked.

    Args:
        rounds: of each contestant, in turn, after a warm-up.
        batch_size: images a step.
        threads: None is one for each core that this process may use.

    Returns:
        A dict for JSON: "contestants" (images_per_second as median, min and max over the rounds; None for one whose
        package is not installed), "ratios" of medians, "limits" of the processor in the same run, "settings" and
        "machine".

    Raises:
        HarnessError: numbers below 1, or a contestant that failed.
    """
    _needs(SEED_RECIPE)
    if batch_size < 2:
        raise HarnessError(
            f"batch_size must be at least 2, it is {batch_size}", hint="Batch statistics need two images."
        )
    task = {**SEED, "batch_size": batch_size}
    slow, fast = {**task, "steps": 1}, {**task, "steps": 3, "channels_last": True, "bf16": True}
    ours = {**task, "channels_last": True, "recipe": str(SEED_RECIPE)}
    bf16 = ["training.precision=bf16"]
    contestants = {
        "pytorch_fp32": Contestant(f"{LOOPS}:pytorch", slow),
        "pytorch_fp32_channels_last": Contestant(f"{LOOPS}:pytorch", {**slow, "channels_last": True}),
        "pytorch_bf16_channels_last": Contestant(f"{LOOPS}:pytorch", fast),
        "accelerate_bf16_channels_last": Contestant(f"{LOOPS}:accelerate", fast),
        "lightning_bf16_channels_last": Contestant(f"{LOOPS}:lightning", fast, needs="lightning"),
        "timm_bf16_channels_last": Contestant(f"{LOOPS}:timm", fast),
        "harness_fp32": Contestant(f"{LOOPS}:harness", {**ours, "steps": 3, "overrides": []}),
        "harness_bf16": Contestant(f"{LOOPS}:harness", {**ours, "steps": 8, "overrides": bf16}),
        "harness_bf16_plain": Contestant(
            f"{LOOPS}:harness", {**ours, "steps": 3, "overrides": [*bf16, "training.kernels=plain"]}
        ),
    }
    limits = {
        "gemm_fp32": Contestant(f"{LIMITS}:gemm", {"bf16": False}),
        "gemm_bf16": Contestant(f"{LIMITS}:gemm", {"bf16": True}),
        "copy": Contestant(f"{LIMITS}:copy"),
    }
    threads = usable_cores() if threads is None else threads
    times = run_contest({**contestants, **limits}, rounds=rounds, threads=threads)
    return {
        "contestants": {name: _rates(times[name], "images") for name in contestants},
        "ratios": _ratios(times, of=("harness_bf16", "harness_fp32"), over=contestants),
        "limits": {
            "gemm_fp32_gflop_per_second": _median(times["gemm_fp32"]) / 1e9,
            "gemm_bf16_gflop_per_second": _median(times["gemm_bf16"]) / 1e9,
            "copy_gb_per_second": _median(times["copy"]) / 1e9,
        },
        "settings": {"rounds": rounds, "batch_size": batch_size, "threads": threads, "model": SEED["model"]},
        "machine": describe_machine(CPU, PACKAGES),
    }


def bench_overhead(*, rounds: int = 9, threads: int = 1) -> dict[str, Any]:
    """A network so small that mostly overhead remains: a bare PyTorch loop, the libraries' loops and ours.

    `harness_plain` runs the same layers as all others, in the recipe's layout (channels_last): what it takes more than
    the bare loop in that layout is the loop's. `harness` has the compiled kernels that a user has.

    Args:
        rounds: of each contestant, in turn, after a warm-up; a round is 100 steps.
        threads: one, since operations so small gain nothing from more.

    Returns:
        As `bench_step`, with milliseconds_per_step, and "ratios" of each step to the bare loop's, and of
        `harness_plain` to the bare loop's in its own layout. Ratios are taken round by round, then their median: what
        slows the machine slows neighbours in a round alike.

    Raises:
        HarnessError: numbers below 1, or a contestant that failed.
    """
    contestants = {
        "pytorch": Contestant(f"{LOOPS}:pytorch", TINY),
        "pytorch_channels_last": Contestant(f"{LOOPS}:pytorch", {**TINY, "channels_last": True}),
        "accelerate": Contestant(f"{LOOPS}:accelerate", TINY),
        "lightning": Contestant(f"{LOOPS}:lightning", TINY, needs="lightning"),
        "timm": Contestant(f"{LOOPS}:timm", TINY),
        "harness_plain": _tiny_harness("training.kernels=plain"),
        "harness": _tiny_harness(),
    }
    times = run_contest(contestants, rounds=rounds, threads=threads)
    found = _against(times, "pytorch")
    found["ratios"]["harness_plain_over_pytorch_channels_last"] = _ratio(
        times, "harness_plain", "pytorch_channels_last"
    )
    settings = {"rounds": rounds, "threads": threads, **TINY}
    return {**found, "settings": settings, "machine": describe_machine(CPU, PACKAGES)}


def bench_ranks(*, rounds: int = 9, ranks: int = 2) -> dict[str, Any]:
    """The same small network on several CPU ranks over gloo: raw DDP, Accelerate and ours, one thread each.

    All average gradients by DDP and keep each rank's own batch statistics.

    Args:
        rounds: of each contestant, in turn, after a warm-up; a round is 100 steps.
        ranks: processes of each contestant.

    Returns:
        As `bench_overhead`, with ratios to raw DDP.

    Raises:
        HarnessError: numbers below 1, or a contestant that failed.
    """
    contestants = {
        "pytorch_ddp": Contestant(f"{LOOPS}:ddp", TINY, ranks=ranks),
        "pytorch_ddp_channels_last": Contestant(f"{LOOPS}:ddp", {**TINY, "channels_last": True}, ranks=ranks),
        "accelerate": Contestant(f"{LOOPS}:accelerate", TINY, ranks=ranks),
        "harness_plain": _tiny_harness("training.sync_batch_norm=false", "training.kernels=plain", ranks=ranks),
        "harness": _tiny_harness("training.sync_batch_norm=false", ranks=ranks),
    }
    times = run_contest(contestants, rounds=rounds, threads=1)
    found = _against(times, "pytorch_ddp")
    found["ratios"]["harness_plain_over_pytorch_ddp_channels_last"] = _ratio(
        times, "harness_plain", "pytorch_ddp_channels_last"
    )
    settings = {"rounds": rounds, "ranks": ranks, "threads_per_rank": 1, **TINY}
    return {**found, "settings": settings, "machine": describe_machine(CPU, PACKAGES)}


def _tiny_harness(*overrides: str, ranks: int = 1) -> Contestant:
    _needs(OVERHEAD_RECIPE)
    network = ["model.name=dual_branch", *(f"model.args.{key}={value}" for key, value in TINY_ARGS.items())]
    arguments = {**TINY, "recipe": str(OVERHEAD_RECIPE), "channels_last": True}
    arguments["overrides"] = [*network, "tracking.log_every_steps=50", *overrides]
    return Contestant(f"{LOOPS}:harness", arguments, ranks=ranks)


def _against(times: Mapping[str, Times | None], bare: str) -> dict[str, Any]:
    """Milliseconds a step of each contestant, and their ratios to the bare one's, round by round."""
    results: dict[str, dict[str, float] | None] = {}
    for name, each in times.items():
        if each is None:
            results[name] = None
            continue
        steps = [1000 * seconds / TINY_STEPS for seconds in each.seconds]
        results[name] = {
            "milliseconds_per_step_median": statistics.median(steps),
            "milliseconds_per_step_min": min(steps),
            "milliseconds_per_step_max": max(steps),
        }
    others = [name for name, each in times.items() if each is not None and name != bare]
    return {"contestants": results, "ratios": {f"{name}_over_{bare}": _ratio(times, name, bare) for name in others}}


def _ratio(times: Mapping[str, Times | None], one: str, other: str) -> float:
    """The median over the rounds of one's seconds over the other's."""
    a, b = times[one], times[other]
    assert a is not None
    assert b is not None
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def _rates(times: Times | None, unit: str) -> dict[str, float] | None:
    return None if times is None else times.per_second(unit)


def _median(times: Times | None) -> float:
    assert times is not None
    return statistics.median(times.rates())


def _ratios(times: Mapping[str, Times | None], *, of: tuple[str, ...], over: Mapping[str, object]) -> dict[str, float]:
    """Medians of ours over those of all others."""
    return {
        f"{ours}_over_{peer}": _median(times[ours]) / _median(times[peer])
        for ours in of
        for peer in over
        if peer not in of and times[peer] is not None
    }


def _needs(recipe: Path) -> None:
    if not recipe.exists():
        raise HarnessError(
            "the benchmark's recipe is not here", where=str(recipe), hint="Run it in a checkout of the project."
        )
