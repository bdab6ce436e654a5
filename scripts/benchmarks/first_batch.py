"""How long a training waits for its first batch.

Each figure is of a process of its own, which has imported what a training has before it makes its loaders (torch,
torchvision, timm): the seconds from then until the loader's first batch is there, the import of ffcv and all
compilation in them. The first process of each loader finds an empty cache, the later ones what it has left there.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.bench import Contestant, Round, describe_machine, run_contest, spread

HERE = "scripts.benchmarks.first_batch:first_batch"
LOADERS = ("harness_ffcv", "harness_device", "stock_ffcv")
IMAGES, BATCH_SIZE = 8192, 128
SCALE: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def bench_first_batch(*, rounds: int = 3, loaders: Sequence[str] = LOADERS) -> dict[str, Any]:
    """Measure each loader in `rounds` + 1 fresh processes, loaders in turn.

    Returns:
        A dict for JSON: for each of "contestants" its seconds in later processes (median, min, max),
        first_process_seconds, and functions_compiled by the first process and by the last; "settings" and "machine".

    Raises:
        HarnessError: a process failed.
    """
    from harness.data.prepare import prepare

    path = prepare("synthetic", synthetic={"train_images": IMAGES}).split("train").path
    how = {"path": str(path), "workers": len(os.sched_getaffinity(0))}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in loaders}
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        contestants = {
            name: Contestant(HERE, {"loader": name, "cache": str(Path(folder, name)), **how}) for name in loaders
        }
        for _ in range(rounds + 1):
            for name, times in run_contest(contestants, rounds=1, threads=len(os.sched_getaffinity(0))).items():
                assert times is not None
                found[name].append((times.seconds[0], times.counts[0]))
    results = {
        name: {
            **spread("seconds", [seconds for seconds, _ in each[1:]]),
            "first_process_seconds": each[0][0],
            "functions_compiled": [each[0][1], each[-1][1]],
        }
        for name, each in found.items()
    }
    settings = {"images": IMAGES, "batch_size": BATCH_SIZE, "later_processes": rounds}
    return {"contestants": results, "settings": settings, "machine": describe_machine()}


def first_batch(*, loader: str, path: str, workers: int, cache: str) -> Round:
    """A round gives the seconds until the first batch, and how many functions numba compiled for it."""
    os.environ["HARNESS_CACHE"] = cache
    import timm  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    def one_round() -> tuple[float, int]:
        start = time.perf_counter()
        compilations: list[Any] = []
        if loader.endswith("ffcv"):
            from numba.core import event

            recorder = event.RecordingListener()
            event.register("numba:compile", recorder)
            compilations = recorder.buffer
        batches = _batches(loader, Path(path), workers)
        next(batches)
        seconds, functions = time.perf_counter() - start, len(compilations) // 2  # each has a start and an end
        for _ in batches:
            pass  # FFCV's threads come to their end
        return seconds, functions

    return one_round


def _batches(loader: str, path: Path, workers: int) -> Any:
    if loader == "stock_ffcv":
        from harness.data.ffcv_loader import stock_epochs

        return stock_epochs(path, batch_size=BATCH_SIZE, workers=workers, **SCALE)()
    import numpy as np
    import torch

    from harness.data.augment import Augmentation
    from harness.data.loaders import build_loader
    from harness.data.prepare import open_beton

    how = {"augmentation": Augmentation(seed=0, crop_padding_px=4, flip="random"), "workers": workers, **SCALE}
    ours = build_loader(loader.removeprefix("harness_"), open_beton(path), device=torch.device("cpu"), **how)
    return ours.batches([np.arange(BATCH_SIZE)] * 4, epoch=0)
