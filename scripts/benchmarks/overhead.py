"""How much of a step is overhead: one tiny network in the loops of several libraries, on one process and on ranks."""

from __future__ import annotations

import statistics
from typing import Any

from harness.bench import Contestant, Times, describe_machine, run_contest, spread, step

PEERS = "scripts.benchmarks.peers"
# A network of a few hundred thousand operations: what is measured is what surrounds them.
ARGS: dict[str, Any] = {"widths": [[8, 16], [16, 32]], "transition_widths": [8], "head_width": 16, "dropout": 0.0}
TINY: dict[str, Any] = {"model": "dual_branch", "args": ARGS, "size_px": 8, "batch_size": 8}


def bench_step(*, rounds: int) -> dict[str, Any]:
    """`harness bench step` with the other libraries' loops among the contestants."""
    needs = {"accelerate": None, "lightning": "lightning", "timm": None}
    peers = {f"{name}_bf16_channels_last": Contestant(f"{PEERS}:{name}", needs=needs[name]) for name in needs}
    return step.bench_step(rounds=rounds, peers=peers)


def bench_overhead(*, rounds: int = 9, steps: int = 100) -> dict[str, Any]:
    """A bare PyTorch loop, the libraries' loops and ours, on one thread; a round is so many steps.

    `harness_plain` runs the same layers as all others, in the recipe's layout (channels_last): what it takes more than
    the bare loop in that layout is the loop's. `harness` has the compiled kernels that a user has.

    Returns:
        A dict for JSON: "contestants" with milliseconds_per_step as median, min and max, and "ratios" of each step to
        the bare loop's, and of `harness_plain` to the bare loop's in its own layout. Ratios are taken round by round,
        then their median: what slows the machine slows neighbours in a round alike.

    Raises:
        HarnessError: a contestant failed.
    """
    tiny = {**TINY, "steps": steps}
    contestants = {
        "pytorch": Contestant(step.PYTORCH, tiny),
        "pytorch_channels_last": Contestant(step.PYTORCH, {**tiny, "channels_last": True}),
        "accelerate": Contestant(f"{PEERS}:accelerate", tiny),
        "lightning": Contestant(f"{PEERS}:lightning", tiny, needs="lightning"),
        "timm": Contestant(f"{PEERS}:timm", tiny),
        "harness_plain": _harness(tiny, "training.kernels=plain"),
        "harness": _harness(tiny),
    }
    return _measured(contestants, rounds, tiny, against="pytorch")


def bench_ranks(*, rounds: int = 9, steps: int = 100) -> dict[str, Any]:
    """The same on two CPU ranks over gloo, one thread each: raw DDP, Accelerate and ours.

    All average gradients by DDP and keep each rank's own batch statistics. Returns and raises as `bench_overhead`.
    """
    tiny, own = {**TINY, "steps": steps}, "training.sync_batch_norm=false"
    contestants = {
        "pytorch_ddp": Contestant(f"{PEERS}:ddp", tiny, ranks=2),
        "pytorch_ddp_channels_last": Contestant(f"{PEERS}:ddp", {**tiny, "channels_last": True}, ranks=2),
        "accelerate": Contestant(f"{PEERS}:accelerate", tiny, ranks=2),
        "harness_plain": _harness(tiny, own, "training.kernels=plain", ranks=2),
        "harness": _harness(tiny, own, ranks=2),
    }
    return _measured(contestants, rounds, {**tiny, "ranks": 2}, against="pytorch_ddp")


def _harness(tiny: dict[str, Any], *overrides: str, ranks: int = 1) -> Contestant:
    network = ["model.name=dual_branch", *(f"model.args.{key}={value}" for key, value in ARGS.items())]
    every = ["tracking.log_every_steps=50", *network, *overrides]
    task = {**tiny, "recipe": "debug", "channels_last": True, "overrides": every}
    return Contestant(step.HARNESS, task, ranks=ranks)


def _measured(
    contestants: dict[str, Contestant], rounds: int, settings: dict[str, Any], *, against: str
) -> dict[str, Any]:
    times = run_contest(contestants, rounds=rounds, threads=1)
    measured = {name: each.seconds for name, each in times.items() if each is not None}
    pairs = [(name, against) for name in measured if name != against]
    pairs.append(("harness_plain", f"{against}_channels_last"))
    return {
        "contestants": {name: _milliseconds(each, settings["steps"]) for name, each in times.items()},
        "ratios": {
            f"{one}_over_{other}": statistics.median(a / b for a, b in zip(measured[one], measured[other], strict=True))
            for one, other in pairs
        },
        "settings": {"rounds": rounds, "threads_per_rank": 1, **settings},
        "machine": describe_machine(),
    }


def _milliseconds(times: Times | None, steps: int) -> dict[str, float] | None:
    if times is None:
        return None
    return spread("milliseconds_per_step", [1000 * seconds / steps for seconds in times.seconds])
