"""Benchmarks as commands: which run, on what data, and their results as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness.benchmarks.loader import bench_loader
from harness.benchmarks.startup import bench_startup
from harness.benchmarks.step import bench_overhead, bench_ranks, bench_step
from harness.data.prepare import prepare
from harness.errors import HarnessError

ALL: dict[str, Callable[[int], dict[str, Any]]] = {
    "loader": lambda rounds: bench_loader_here(rounds=rounds, workers=None),
    "step": lambda rounds: bench_step(rounds=rounds),
    "overhead": lambda rounds: bench_overhead(rounds=2 * rounds - 1),  # its rounds are short
    "ranks": lambda rounds: bench_ranks(rounds=2 * rounds - 1),
    "startup": lambda rounds: bench_startup(rounds=rounds),
}


def bench_all(*, rounds: int) -> dict[str, Any]:
    """The benchmarks against peers one after another, each under its name."""
    return {name: bench(rounds) for name, bench in ALL.items()}


def bench_loader_here(*, rounds: int, workers: int | None) -> dict[str, Any]:
    """`bench_loader` on CIFAR-10 if it lies under $HARNESS_DATA or in the cache, on random images otherwise.

    Where there is a GPU, batches are wanted there, and "settings" says so; stock FFCV's stay on the CPU.
    """
    how: dict[str, Any] = {"rounds": rounds, "workers": workers}
    if torch.cuda.is_available():
        how["device"] = torch.device("cuda")
    try:
        store = prepare("cifar10", download=False)
    except HarnessError:
        result = bench_loader(**how)
    else:
        result = bench_loader(
            store.split("train"), data="cifar10", mean=store.manifest.mean, std=store.manifest.std, **how
        )
    result["settings"]["batches_on"] = "cuda (stock_ffcv: cpu)" if "device" in how else "cpu"
    return result


def table(result: dict[str, Any]) -> tuple[str, list[tuple[str, list[float] | None]]]:
    """What was measured, with its unit, and for each contestant its median, lowest and highest round."""
    if "seconds" in result:
        rows = {name: [each["median"], each["min"], each["max"]] for name, each in result["seconds"].items()}
        return "seconds", list(rows.items())
    found = next(each for each in result["contestants"].values() if each is not None)
    unit = next(key for key in found if key.endswith("_median")).removesuffix("_median")
    return unit, [
        (name, None if each is None else [each[f"{unit}_{x}"] for x in ("median", "min", "max")])
        for name, each in result["contestants"].items()
    ]


def render(result: dict[str, Any]) -> str:
    """The result of a benchmark as lines: a table, the ratios, and all else that it says."""
    unit, rows = table(result)
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{unit:<{width}}{'median':>12}{'lowest':>12}{'highest':>12}"]
    for name, figures in rows:
        text = f"{'not installed':>24}" if figures is None else "".join(f"{_figure(x):>12}" for x in figures)
        lines.append(f"{name:<{width}}{text}")
    for key, value in result.items():
        if key not in ("contestants", "seconds"):
            lines.append(f"{key}:")
            lines += [f"  {name}: {_figure(v) if isinstance(v, float) else v}" for name, v in value.items()]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
