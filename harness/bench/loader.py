"""How many images a second the loaders give, beside a conventional pipeline and stock FFCV, in one run.

Every contestant crops (padding 4) and flips at random and gives normalised float32 batches; stock FFCV cuts out as
well, as its CIFAR-10 example does. Each function below warms up with an epoch and returns a round, see `contest`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from harness.bench.contest import Contestant, Round, describe_machine, ratios, run_contest
from harness.data.augment import Augmentation
from harness.data.loaders import build_loader
from harness.data.order import BatchPlan
from harness.data.prepare import Split, open_beton, prepare, write_beton
from harness.errors import HarnessError

HERE = "harness.bench.loader"
PACKAGES = ("torch", "torchvision", "ffcv", "numba", "numpy")
CROP_PADDING_PX = 4
SYNTHETIC_IMAGES = 50_000
OURS = ("harness_ffcv", "harness_device", "harness_torch")


@dataclass(frozen=True)
class Task:
    """What all contestants load.

    Attributes:
        path: a `.beton` file.
        mean, std: of each channel, on the scale [0, 1].
        workers: threads or processes.
        batch_size: images in a batch; the last one of an epoch may be smaller.
        images: of a round of the slow contestants, at most.
        device: where the batches are wanted.
    """

    path: str
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    workers: int = 1
    batch_size: int = 512
    images: int = 10_000
    device: str = "cpu"

    def round_of(self, epoch: Callable[[int], Iterable[Tensor]]) -> Round:
        """An epoch of this number a round; epoch 0, with what it compiles and starts, is not measured."""
        number = -1

        def one_round() -> tuple[float, int]:
            nonlocal number
            number += 1
            start = time.perf_counter()
            count = sum(len(images_BCHW) for images_BCHW in epoch(number))
            if self.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start, count

        one_round()
        return one_round


def bench_loader(
    *,
    rounds: int = 5,
    workers: int | None = None,
    batch_size: int = 512,
    synthetic_images: int | None = None,
    slow_images: int = 10_000,
) -> dict[str, Any]:
    """Measure all loaders in alternating rounds, on CIFAR-10 where it is at hand and on random images otherwise.

    Where there is a GPU, batches are wanted there, and "settings" says so; stock FFCV's stay on the CPU.

    Args:
        rounds: measured epochs of each contestant, after one that is not measured.
        workers: threads or processes; None is one for each CPU that this process may use.
        batch_size: images in a batch.
        synthetic_images: so many random images of 32×32 pixels instead of CIFAR-10.
        slow_images: images of a round of torchvision's pipeline and of ours like it.

    Returns:
        A dict for JSON: "contestants" (for each its images_per_second as median, min and max over the rounds and
        images_per_round; None for one that needs ffcv where that is not installed), "ratios" of medians, "settings"
        and "machine".

    Raises:
        HarnessError: numbers that are not positive, or a contestant that failed.
    """
    numbers = {"batch_size": batch_size, "synthetic_images": synthetic_images, "slow_images": slow_images}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise HarnessError(f"{name} must be at least 1, it is {value}", hint="Give 1 or more.")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how: dict[str, Any] = {"workers": workers, "images": slow_images, "device": device}
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        data, split, scale = _data(Path(folder), synthetic_images)
        count, height_px, width_px, _ = split.images_BHWC.shape
        how |= {"path": str(split.path), "batch_size": min(batch_size, count), **scale}
        contestants = {
            "harness_ffcv": Contestant(f"{HERE}:ours", {"kind": "ffcv", **how}, needs="ffcv"),
            "harness_device": Contestant(f"{HERE}:ours", {"kind": "device", **how}),
            "harness_torch": Contestant(f"{HERE}:ours", {"kind": "torch", **how}),
            "stock_ffcv": Contestant(f"{HERE}:stock_ffcv", how, needs="ffcv"),
            "torchvision": Contestant(f"{HERE}:torchvision", how),
        }
        times = run_contest(contestants, rounds=rounds, threads=max(1, workers))
    results = {
        name: None if each is None else {**each.per_second("images"), "images_per_round": each.counts[0]}
        for name, each in times.items()
    }
    settings = {"data": data, "images": count, "image_size_px": [height_px, width_px], "rounds": rounds}
    settings |= {"batch_size": how["batch_size"], "workers": workers, "crop_padding_px": CROP_PADDING_PX}
    settings["batches_on"] = "cuda (stock_ffcv: cpu)" if device == "cuda" else "cpu"
    return {
        "contestants": results,
        "ratios": ratios(results, ours=OURS),
        "settings": settings,
        "machine": describe_machine(PACKAGES),
    }


def _data(directory: Path, synthetic_images: int | None) -> tuple[str, Split, dict[str, Any]]:
    """What the images are, the images, and mean and standard deviation where they have their own."""
    if synthetic_images is not None:
        return "synthetic", synthetic_split(directory, synthetic_images), {}
    try:
        store = prepare("cifar10", download=False)
    except HarnessError:  # it is not here
        return "synthetic", synthetic_split(directory), {}
    return "cifar10", store.split("train"), {"mean": store.manifest.mean, "std": store.manifest.std}


def synthetic_split(directory: Path, count: int = SYNTHETIC_IMAGES) -> Split:
    """Random images of 32×32 pixels, as a `.beton` file in this directory."""
    path, generator = directory / "synthetic.beton", np.random.default_rng(0)
    images_BHWC = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    write_beton(path, images_BHWC, generator.integers(0, 10, count))
    return open_beton(path)


def ours(*, kind: str, **settings: Any) -> Round:
    """One of our loaders, with the order of its epochs, which is part of what is measured."""
    task = Task(**settings)
    split = open_beton(Path(task.path))
    images = min(split.count, task.images) if kind == "torch" else split.count
    plan = BatchPlan(images, min(task.batch_size, images))
    loader = build_loader(
        kind,
        split,
        mean=task.mean,
        std=task.std,
        augmentation=Augmentation(seed=0, crop_padding_px=CROP_PADDING_PX, flip="random"),
        device=torch.device(task.device),
        workers=task.workers,
    )

    def epoch(number: int) -> Iterable[Tensor]:
        ids_per_batch = [ids_B for step in plan.micro_batches(number) for ids_B in step]
        return (batch.images_BCHW for batch in loader.batches(ids_per_batch, epoch=number))

    return task.round_of(epoch)


def stock_ffcv(**settings: Any) -> Round:
    """FFCV's own operations; the batches stay on the CPU."""
    from harness.data.ffcv_loader import stock_epochs

    task = Task(**settings)
    how: dict[str, Any] = {"workers": task.workers, "batch_size": task.batch_size}
    batches = stock_epochs(Path(task.path), mean=task.mean, std=task.std, **how)
    return task.round_of(lambda number: batches())


class _PillowImages(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's own datasets give them: through Pillow, with a list of transforms."""

    def __init__(self, task: Task) -> None:
        split = open_beton(Path(task.path))
        # In memory, as torchvision's CIFAR10 holds them.
        self._images_BHWC, self._labels_B = np.array(split.images_BHWC[: task.images]), split.labels_B[: task.images]
        # These are quicker than their successors in transforms.v2 when they begin with a Pillow image.
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(self._images_BHWC.shape[1:3], padding=CROP_PADDING_PX),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(list(task.mean), list(task.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self._images_BHWC)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images_BHWC[index])), int(self._labels_B[index])


def torchvision(**settings: Any) -> Round:
    """The pipeline most people write; its processes stay alive between epochs."""
    task = Task(**settings)
    loader = DataLoader(
        _PillowImages(task),
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=task.workers,
        persistent_workers=task.workers > 0,
        pin_memory=task.device == "cuda",
        generator=torch.Generator(),
    )
    return task.round_of(lambda number: (images.to(task.device, non_blocking=True) for images, _ in loader))
