"""gloo's all-reduce on this machine against the alpha–beta model: fitted on some measurements, tried on the others."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from harness.benchmarks.machine import describe_machine, measured_by_ranks
from harness.errors import HarnessError
from harness.machine import usable_cores
from harness.scaling.fitting import LoopbackModel, Measured, error_summary, fit_loopback

SIZES_BYTES = tuple(4096 << doubling for doubling in range(13))  # 4 KiB to 16 MiB
RANKS = (2, 3, 4)
ROUNDS = 25  # fewer, and the fastest ones of crowded ranks swing by more than the model errs


def bench_allreduce(
    *, ranks: Sequence[int] = RANKS, sizes_bytes: Sequence[int] = SIZES_BYTES, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Measure all-reduces of real gloo processes on loopback, fit the model on some, and predict the others.

    Held out are every second message size and, where enough remain, the largest number of ranks. The model is of the
    fastest of the rounds: what other work on the machine adds to the others is none of its constants.

    Args:
        ranks: sizes of the groups, each at least 2.
        sizes_bytes: messages, multiples of 4 bytes (float32).
        rounds: at least 1.

    Returns:
        A dict for JSON: "model" (alpha_us, gbps, wait_ms, busy_share, cores); "held_out", its parts "held_out_sizes"
        (of numbers of ranks that were fitted) and "held_out_ranks" (of the one that was not), and "fitted", each with
        points, error_percent_median and _max, None where there are no points; "measurements" (each with ranks,
        message_bytes, seconds as median, min and max over the rounds, predicted_seconds, error_percent of the
        fastest round, held_out); "settings" and "machine".

    Raises:
        HarnessError: numbers out of range, or too few sizes or ranks; code 1 where a process died.
    """
    _check(ranks, sizes_bytes, rounds)
    cores = usable_cores()
    plan = json.dumps({"ranks": sorted(set(ranks)), "sizes_bytes": sorted(set(sizes_bytes)), "rounds": rounds})
    rows: list[dict[str, Any]] = measured_by_ranks(
        "the all-reduce", "harness.benchmarks.allreduce_rank", [plan], ranks=max(ranks)
    )
    points = [Measured(row["ranks"], row["message_bytes"], min(row["seconds"])) for row in rows]
    held_out = choose_held_out(points, cores=cores)
    model = fit_loopback([point for point in points if point not in held_out], cores=cores)
    fitted_ranks = {point.ranks for point in points if point not in held_out}
    fitted = error_summary(model, [point for point in points if point not in held_out])
    return {
        "model": {
            "alpha_us": model.link.alpha_us, "gbps": model.link.gbps,
            "wait_ms": model.wait_seconds * 1e3, "busy_share": model.busy_share, "cores": cores,
        },
        "held_out": error_summary(model, held_out),
        "held_out_sizes": _summary(model, [point for point in held_out if point.ranks in fitted_ranks]),
        "held_out_ranks": _summary(model, [point for point in held_out if point.ranks not in fitted_ranks]),
        "fitted": fitted,
        "measurements": [
            _measurement(row["seconds"], point, model, held_out=point in held_out)
            for row, point in zip(rows, points, strict=True)
        ],
        "settings": {"backend": "gloo", "interface": "loopback", "dtype": "float32", "rounds": rounds,
                     "threads_per_rank": 1},
        "machine": describe_machine(torch.device("cpu"), ("torch", "numpy")),
    }  # fmt: skip


def choose_held_out(points: Sequence[Measured], *, cores: int) -> list[Measured]:
    """Every second message size, and the largest number of ranks where the fit can do without it.

    It can where another number of ranks of its kind remains: one with a core each to give alpha and beta, and, if the
    largest has more ranks than cores, another such to give the wait for a core.
    """
    counts = sorted({point.ranks for point in points})
    largest, others = counts[-1], counts[:-1]
    alike = [count for count in others if (count > cores) == (largest > cores)]
    sizes = sorted({point.message_bytes for point in points})[1::2]
    return [p for p in points if p.message_bytes in sizes or (alike and p.ranks == largest)]


def _summary(model: LoopbackModel, points: Sequence[Measured]) -> dict[str, float] | None:
    return error_summary(model, points) if points else None


def _measurement(seconds: list[float], point: Measured, model: LoopbackModel, *, held_out: bool) -> dict[str, Any]:
    return {
        "ranks": point.ranks,
        "message_bytes": point.message_bytes,
        "seconds_median": statistics.median(seconds),
        "seconds_min": point.seconds,
        "seconds_max": max(seconds),
        "predicted_seconds": model.seconds(point.ranks, point.message_bytes),
        "error_percent": 100 * model.relative_error(point),
        "held_out": held_out,
    }


def _check(ranks: Sequence[int], sizes_bytes: Sequence[int], rounds: int) -> None:
    if rounds < 1:
        raise HarnessError(f"rounds must be at least 1, it is {rounds}", where="--rounds", hint="For example 25.")
    if not ranks or min(ranks) < 2:
        raise HarnessError("an all-reduce needs 2 ranks or more", where="--ranks", hint="For example --ranks 2,3,4.")
    if len(set(sizes_bytes)) < 3 or min(sizes_bytes) < 4 or any(size % 4 for size in sizes_bytes):
        raise HarnessError(
            "three message sizes or more are needed, each a multiple of 4 bytes", hint="One in two is held out."
        )


def render_allreduce(result: dict[str, Any]) -> str:
    """A table of measured and predicted times, the model's constants and the errors."""
    lines = [f"{'ranks':>5}{'bytes':>12}{'median ms':>12}{'min':>10}{'max':>10}{'predicted':>12}{'error':>9}"]
    for row in result["measurements"]:
        times = "".join(
            f"{row[key] * 1e3:>{width}.3f}"
            for key, width in (
                ("seconds_median", 12), ("seconds_min", 10), ("seconds_max", 10), ("predicted_seconds", 12)
            )
        )  # fmt: skip
        mark = "  held out" if row["held_out"] else ""
        lines.append(f"{row['ranks']:>5}{row['message_bytes']:>12,}{times}{row['error_percent']:>+8.0f}%{mark}")
    model = result["model"]
    lines.append(
        f"fitted: alpha {model['alpha_us']:.0f} us a message, {model['gbps']:.2f} Gbit/s, "
        f"{model['wait_ms']:.2f} ms wait for a core, busy for {model['busy_share']:.0%} of a message "
        f"({model['cores']} cores)"
    )
    parts = {
        "fitted": "fitted points",
        "held_out_sizes": "points of held-out sizes",
        "held_out_ranks": "points of the held-out number of ranks",
        "held_out": "held-out points in all",
    }
    for name, what in parts.items():
        part = result[name]
        if part is None:
            continue
        lines.append(
            f"{part['points']} {what}: error {part['error_percent_median']:.1f} % in the median, "
            f"{part['error_percent_max']:.1f} % at most"
        )
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in {**result["settings"], **result["machine"]}.items())])
