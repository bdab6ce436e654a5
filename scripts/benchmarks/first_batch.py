"""How long a training waits for its first batch.

Each figure is of a process of its own, which has imported what a training has before it makes its loaders (torch,
torchvision, timm): the seconds from then until the loader's first batch is there, the import of ffcv and all
compilation in them. The first process of each loader finds an empty cache, the later ones what it has left there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.bench.contest import describe_machine, spread
from harness.errors import HarnessError

LOADERS = ("harness_ffcv", "harness_device", "stock_ffcv")
IMAGES, BATCH_SIZE = 8192, 128
_HOW: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def bench_first_batch(*, rounds: int = 3, loaders: Sequence[str] = LOADERS) -> dict[str, Any]:
    """Measure each loader in `rounds` + 1 fresh processes, loaders in turn.

    Returns:
        A dict for JSON: for each of "contestants" its seconds in later processes (median, min, max),
        first_process_seconds, and functions_compiled by the first process and by the last; "settings" and "machine".

    Raises:
        HarnessError: `rounds` below 1, or a process failed.
    """
    if rounds < 1:
        raise HarnessError(f"rounds must be at least 1, it is {rounds}", hint="Use --rounds 1 or more.")
    from harness.bench.loader import PACKAGES, synthetic_split

    found: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        path = synthetic_split(Path(folder), IMAGES).path
        for _ in range(rounds + 1):
            for name in loaders:
                own = {"HARNESS_CACHE": str(Path(folder, name)), "PYTHONPATH": os.pathsep.join(sys.path)}
                command = [sys.executable, "-m", "scripts.benchmarks.first_batch", name, str(path)]
                done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
                if done.returncode:
                    last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
                    raise HarnessError(f"{name} cannot be measured: {last}", hint="See `harness doctor`.")
                found[name].append(json.loads(done.stdout))
    return {
        "contestants": {
            name: {
                **spread("seconds", [result["seconds"] for result in results[1:]]),
                "first_process_seconds": results[0]["seconds"],
                "functions_compiled": [int(results[n]["functions_compiled"]) for n in (0, -1)],
            }
            for name, results in found.items()
        },
        "settings": {"images": IMAGES, "batch_size": BATCH_SIZE, "later_processes": rounds},
        "machine": describe_machine(PACKAGES),
    }


def main(loader: str, path: Path) -> dict[str, float]:
    """In this process: seconds until the first batch, and how many functions numba compiled for it."""
    import numpy as np
    import timm  # noqa: F401
    import torch
    import torchvision.transforms.v2  # noqa: F401

    workers, compilations = len(os.sched_getaffinity(0)), []
    started_at = time.perf_counter()
    if loader.endswith("ffcv"):
        from numba.core import event

        recorder = event.RecordingListener()
        event.register("numba:compile", recorder)
        compilations = recorder.buffer
    if loader == "stock_ffcv":
        from harness.data.ffcv_loader import stock_epochs

        batches: Any = stock_epochs(path, batch_size=BATCH_SIZE, workers=workers, **_HOW)()
    else:
        from harness.data.augment import Augmentation
        from harness.data.loaders import build_loader
        from harness.data.prepare import open_beton

        how = {"augmentation": Augmentation(seed=0, crop_padding_px=4, flip="random"), "workers": workers, **_HOW}
        kind = loader.removeprefix("harness_")
        ours = build_loader(kind, open_beton(path), device=torch.device("cpu"), **how)
        batches = ours.batches([np.arange(BATCH_SIZE)] * 4, epoch=0)
    next(batches)
    seconds, functions = time.perf_counter() - started_at, len(compilations) // 2  # each has a start and an end
    for _ in batches:
        pass  # FFCV's threads come to their end
    return {"seconds": seconds, "functions_compiled": functions}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
