"""How much of a step is overhead: one tiny network in the loops of several libraries, on one process and on ranks."""

from __future__ import annotations

import statistics
from typing import Any

from harness.bench import step
from harness.bench.contest import Contestant, Times, describe_machine, run_contest, spread

PLAIN, HARNESS, PEERS = "harness.bench.step:pytorch", "harness.bench.step:harness", "scripts.benchmarks.peers"
# A network of a few hundred thousand operations: what is measured is what surrounds them.
ARGS: dict[str, Any] = {"widths": [[8, 16], [16, 32]], "transition_widths": [8], "head_width": 16, "dropout": 0.0}
TINY: dict[str, Any] = {"model": "dual_branch", "args": ARGS, "size_px": 8, "batch_size": 8, "steps": 100}


def bench_step(*, rounds: int) -> dict[str, Any]:
    """`harness bench step` with the other libraries' loops among the contestants."""
    needs = {"accelerate": None, "lightning": "lightning", "timm": None}
    peers = {f"{name}_bf16_channels_last": (f"{PEERS}:{name}", package) for name, package in needs.items()}
    return step.bench_step(rounds=rounds, peers=peers)


def bench_overhead(*, rounds: int = 9, steps: int = 100) -> dict[str, Any]:
    """A bare PyTorch loop, the libraries' loops and ours, on one thread.

    `harness_plain` runs the same layers as all others, in the recipe's layout (channels_last): what it takes more than
    the bare loop in that layout is the loop's. `harness` has the compiled kernels that a user has.

    Args:
        rounds: of each contestant, in turn, after a warm-up.
        steps: of a round.

    Returns:
        A dict for JSON: "contestants" with milliseconds_per_step as median, min and max, and "ratios" of each step to
        the bare loop's, and of `harness_plain` to the bare loop's in its own layout. Ratios are taken round by round,
        then their median: what slows the machine slows neighbours in a round alike.

    Raises:
        HarnessError: numbers below 1, or a contestant that failed.
    """
    tiny = {**TINY, "steps": steps}
    contestants = {
        "pytorch": Contestant(PLAIN, tiny),
        "pytorch_channels_last": Contestant(PLAIN, {**tiny, "channels_last": True}),
        "accelerate": Contestant(f"{PEERS}:accelerate", tiny),
        "lightning": Contestant(f"{PEERS}:lightning", tiny, needs="lightning"),
        "timm": Contestant(f"{PEERS}:timm", tiny),
        "harness_plain": _harness(tiny, "training.kernels=plain"),
        "harness": _harness(tiny),
    }
    return _measured(contestants, rounds, tiny, against="pytorch")


def bench_ranks(*, rounds: int = 9, steps: int = 100, ranks: int = 2) -> dict[str, Any]:
    """The same on several CPU ranks over gloo, one thread each: raw DDP, Accelerate and ours.

    All average gradients by DDP and keep each rank's own batch statistics. Returns and raises as `bench_overhead`.
    """
    tiny, own = {**TINY, "steps": steps}, "training.sync_batch_norm=false"
    contestants = {
        "pytorch_ddp": Contestant(f"{PEERS}:ddp", tiny, ranks=ranks),
        "pytorch_ddp_channels_last": Contestant(f"{PEERS}:ddp", {**tiny, "channels_last": True}, ranks=ranks),
        "accelerate": Contestant(f"{PEERS}:accelerate", tiny, ranks=ranks),
        "harness_plain": _harness(tiny, own, "training.kernels=plain", ranks=ranks),
        "harness": _harness(tiny, own, ranks=ranks),
    }
    return _measured(contestants, rounds, {**tiny, "ranks": ranks}, against="pytorch_ddp")


def _harness(tiny: dict[str, Any], *overrides: str, ranks: int = 1) -> Contestant:
    network = ["model.name=dual_branch", *(f"model.args.{key}={value}" for key, value in ARGS.items())]
    every = ["tracking.log_every_steps=50", *network, *overrides]
    return Contestant(HARNESS, {**tiny, "recipe": "debug", "channels_last": True, "overrides": every}, ranks=ranks)


def _measured(
    contestants: dict[str, Contestant], rounds: int, settings: dict[str, Any], *, against: str
) -> dict[str, Any]:
    times = run_contest(contestants, rounds=rounds, threads=1)
    pairs = [(name, against) for name, each in times.items() if each is not None and name != against]
    pairs.append(("harness_plain", f"{against}_channels_last"))
    return {
        "contestants": {name: _spread(each, settings["steps"]) for name, each in times.items()},
        "ratios": {f"{one}_over_{other}": _ratio(times[one], times[other]) for one, other in pairs},
        "settings": {"rounds": rounds, "threads_per_rank": 1, **settings},
        "machine": describe_machine(step.PACKAGES),
    }


def _spread(times: Times | None, steps: int) -> dict[str, float] | None:
    return None if times is None else spread("milliseconds_per_step", [1000 * s / steps for s in times.seconds])


def _ratio(one: Times | None, other: Times | None) -> float:
    """The median over the rounds of one's seconds over the other's."""
    assert one is not None
    assert other is not None
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))
