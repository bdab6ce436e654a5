"""The loader benchmark as a command: on the real CIFAR-10 where it is at hand, and as a table."""

from __future__ import annotations

from typing import Any

import torch

from harness.benchmarks.loader import bench_loader
from harness.data.prepare import prepare
from harness.errors import HarnessError


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


def render(result: dict[str, Any]) -> str:
    """A table of images a second (median, lowest, highest round) and of the ratios."""
    lines = [f"{'loader':<18}{'images/s':>12}{'lowest':>12}{'highest':>12}"]
    for name, figures in result["contestants"].items():
        if figures is None:
            lines.append(f"{name:<18}{'not installed':>24}")
            continue
        median, lowest, highest = (figures[f"images_per_second_{x}"] for x in ("median", "min", "max"))
        lines.append(f"{name:<18}{median:>12,.0f}{lowest:>12,.0f}{highest:>12,.0f}")
    lines += [f"{name}: {ratio:.1f}" for name, ratio in result["ratios"].items()]
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in {**result["settings"], **result["machine"]}.items())])
