"""The command that trains a recipe on this machine with several ranks, as `launch.sh` starts it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.environment import flag
from harness.errors import HarnessError
from harness.launching.local import choose_split
from harness.machine import usable_cores
from harness.recipe import Recipe
from harness.recipe.document import RECIPES


@dataclass(frozen=True)
class Ranks:
    """Where a training runs.

    Attributes:
        count: processes.
        threads: of arithmetic in each; None leaves it to torch.
        gpu: one GPU a rank, else all on the CPU.
        note: how the numbers were come by, for people.
    """

    count: int
    threads: int | None
    gpu: bool
    note: str = ""

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs `harness WORDS` on all ranks; every rank has these very words."""
        if self.count == 1:
            return [sys.executable, "-m", "harness", *words]
        configuration = RECIPES / "launch" / ("multi_gpu.yaml" if self.gpu else "cpu.yaml")
        launcher = ["accelerate", "launch", "--config_file", str(configuration), "--num_processes", str(self.count)]
        return [sys.executable, "-m", "harness.launching.ranks", *launcher, "-m", "harness", *words]

    def variables(self) -> dict[str, str]:
        """What its environment needs beside ours."""
        found = {}
        if not self.gpu:
            found = {"ACCELERATE_USE_CPU": "true"}
        if self.threads is not None and "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(self.threads)
        return found


def choose_ranks(recipe_path: Path, overrides: Sequence[str], wanted: int | None, *, measure: bool = True) -> Ranks:
    """One process a GPU; on the CPU as many as asked for, or as measured fastest for the recipe.

    Args:
        measure: find the fastest where it is not known yet.

    Raises:
        HarnessError: more ranks than GPUs, or this process is itself one of several ranks.
    """
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        raise HarnessError(
            "was started with several ranks, and starts ranks itself",
            hint="Start it once, without accelerate launch, torchrun or srun: harness sweep SWEEP.yaml --ranks N.",
        )
    gpus = _usable_gpus()
    if gpus:
        if wanted is not None and wanted > gpus:
            raise HarnessError(
                f"--ranks {wanted}, but this machine has {gpus} GPU(s)",
                hint=f"--ranks {gpus}, or ACCELERATE_USE_CPU=true for the CPU.",
            )
        count = wanted or gpus
        return Ranks(count, None if count == 1 else max(1, usable_cores() // count), gpu=True)
    if wanted is not None:
        return Ranks(wanted, max(1, usable_cores() // wanted), gpu=False)
    choice = choose_split(recipe_path, overrides, remembered_only=not measure)
    return Ranks(choice.split.ranks, choice.split.threads, gpu=False, note=choice.explain())


def loader_override(recipe: Recipe) -> list[str]:
    """The override that takes the place of a loader whose package is missing, if any."""
    if recipe.data.loader == "ffcv" and not _has_ffcv():
        return ["data.loader=device"]
    return []


def _has_ffcv() -> bool:
    """Installed, and not found broken by scripts/setup.sh."""
    try:
        broken = "ffcv=no" in Path(sys.prefix, ".harness-setup").read_text().split()
    except OSError:
        broken = False
    return not broken and importlib.util.find_spec("ffcv") is not None


def _usable_gpus() -> int:
    """The GPUs that torch can use; torch is imported only where there may be any."""
    if flag("ACCELERATE_USE_CPU"):
        return 0
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return 0
    if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
