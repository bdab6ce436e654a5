"""How long a training waits for its first batch: `python -m harness.benchmarks.first_batch [--later N]`.

Each figure is of a process of its own, which has imported what a training has before it makes its loaders (torch,
torchvision, timm): the seconds from then until the loader's first batch is there, the import of ffcv and all
compilation in them. The first process of each loader finds an empty cache, the later ones what it has left there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.data.paths import CACHE_VARIABLE
from harness.errors import HarnessError, print_error

CONTESTANTS = ("harness_ffcv", "harness_device", "stock_ffcv")
BATCH_SIZE = 128
IMAGES = 8192
_HOW: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def first_batch(contestant: str, path: Path, *, workers: int) -> dict[str, float | int]:
    """In this process: seconds until the first batch, and how many functions numba compiled for it.

    Args:
        contestant: one of CONTESTANTS; two of them need ffcv.
        path: a `.beton` file of at least 128 images.
        workers: threads.
    """
    import timm  # noqa: F401
    import torch
    import torchvision.transforms.v2  # noqa: F401

    started_at, compilations = time.perf_counter(), []
    if contestant.endswith("ffcv"):
        from numba.core import event

        recorder = event.RecordingListener()
        event.register("numba:compile", recorder)
        compilations = recorder.buffer
    if contestant == "stock_ffcv":
        from harness.data.ffcv_loader import stock_epochs

        batches: Any = stock_epochs(path, batch_size=BATCH_SIZE, workers=workers, **_HOW)()
    else:
        batches = _our_batches(contestant.removeprefix("harness_"), path, torch.device("cpu"), workers)
    next(batches)
    seconds, functions = time.perf_counter() - started_at, len(compilations) // 2  # each has a start and an end
    for _ in batches:
        pass  # FFCV's threads come to their end
    return {"seconds": seconds, "functions_compiled": functions}


def _our_batches(kind: str, path: Path, device: Any, workers: int) -> Any:
    import numpy as np

    from harness.data.augment import Augmentation
    from harness.data.loaders import build_loader
    from harness.data.store import Split

    augmentation = Augmentation(seed=0, crop_padding_px=4, flip="random")
    split = Split.open(path)
    loader = build_loader(kind, split, augmentation=augmentation, device=device, workers=workers, **_HOW)
    return loader.batches([np.arange(BATCH_SIZE)] * 4, epoch=0)


def bench_first_batch(*, later: int, contestants: Sequence[str] = CONTESTANTS) -> dict[str, Any]:
    """Measure each loader in `later` + 1 fresh processes, loaders in turn.

    Returns:
        A dict for JSON: for each loader "first_process_seconds", "later_process_seconds" (median, min, max) and
        "functions_compiled" by the first process and by the last; and "settings".

    Raises:
        HarnessError: a process failed.
    """
    from harness.benchmarks.loader import synthetic_split

    workers = len(os.sched_getaffinity(0))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory(prefix="harness-first-batch-") as folder:
        path = synthetic_split(Path(folder), IMAGES).path
        for _ in range(later + 1):
            for name in contestants:
                found[name].append(_in_a_process(name, path, workers, Path(folder, name)))
    return {
        "contestants": {name: _figures(results) for name, results in found.items()},
        "settings": {"images": IMAGES, "batch_size": BATCH_SIZE, "workers": workers, "later_processes": later},
    }


def _figures(results: Sequence[dict[str, float]]) -> dict[str, Any]:
    later = [result["seconds"] for result in results[1:]]
    return {
        "first_process_seconds": results[0]["seconds"],
        "later_process_seconds_median": statistics.median(later),
        "later_process_seconds_min": min(later),
        "later_process_seconds_max": max(later),
        "functions_compiled": [int(results[0]["functions_compiled"]), int(results[-1]["functions_compiled"])],
    }


def _in_a_process(contestant: str, path: Path, workers: int, cache: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "harness.benchmarks.first_batch", "--measure", contestant, str(path), str(workers)]
    done = subprocess.run(
        command, env=os.environ | {CACHE_VARIABLE: str(cache)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise HarnessError(f"{contestant} cannot be measured: {last}", hint="See `harness doctor`.")
    return json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m harness.benchmarks.first_batch", description=__doc__)
    parser.add_argument("--later", type=int, default=3, metavar="N", help="processes after the first (default 3)")
    parser.add_argument("--measure", nargs=3, metavar=("LOADER", "BETON", "WORKERS"), help="in this very process")
    options = parser.parse_args(arguments)
    if options.measure:
        contestant, path, workers = options.measure
        print(json.dumps(first_batch(contestant, Path(path), workers=int(workers))))
        return 0
    try:
        if options.later < 1:
            raise HarnessError(f"--later must be at least 1, it is {options.later}", hint="Use --later 1 or more.")
        print(json.dumps(bench_first_batch(later=options.later), indent=2))
    except HarnessError as error:
        print_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
