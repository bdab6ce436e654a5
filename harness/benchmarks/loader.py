"""How many images a second the loaders give, beside a conventional pipeline and stock FFCV, in one run.

Every contestant crops (padding 4) and flips at random and gives normalised float32 batches; stock FFCV cuts out as
well, as its CIFAR-10 example does. The contestants take turns round by round, so that other work on the machine
falls on all of them alike. The first epoch of each, with its compilation and start of processes, is told apart.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from harness.benchmarks.machine import describe_machine
from harness.data.augment import Augmentation
from harness.data.beton import write_beton
from harness.data.loaders import build_loader, ffcv_available
from harness.data.order import BatchPlan
from harness.data.store import Split
from harness.errors import HarnessError

CROP_PADDING_PX = 4
SYNTHETIC_IMAGES = 50_000

Epoch = Callable[[int], int]  # runs the epoch of this number, gives the number of images seen


def bench_loader(
    split: Split | None = None,
    *,
    data: str = "given",
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.2470, 0.2435, 0.2616),
    rounds: int = 5,
    workers: int | None = None,
    batch_size: int = 512,
    device: torch.device | None = None,
    torchvision_images: int = 10_000,
) -> dict[str, Any]:
    """Measure all loaders in alternating rounds.

    Args:
        split: the data; None makes 50,000 random images of 32×32 pixels.
        data: what the images are, for the report.
        mean: of each channel, on the scale [0, 1].
        std: of each channel, on the scale [0, 1].
        rounds: measured epochs of each contestant, after one that is not measured.
        workers: threads or processes; None is one for each CPU that this process may use.
        batch_size: images in a batch; the last one of an epoch may be smaller.
        device: where the batches are wanted; None is the CPU.
        torchvision_images: images of a round of the torchvision pipeline, which is slow.

    Returns:
        A dict for JSON: "contestants" (for each its images_per_second as median, min and max over the rounds,
        images_per_round, first_epoch_seconds; None for one that needs ffcv where that is not installed), "ratios"
        of medians, "settings" and "machine".

    Raises:
        HarnessError: numbers that are not positive, or ffcv that cannot be loaded.
    """
    numbers = {"rounds": rounds, "batch_size": batch_size, "torchvision_images": torchvision_images}
    for name, value in numbers.items():
        if value < 1:
            raise HarnessError(f"{name} must be at least 1, it is {value}", hint="Give 1 or more, such as --rounds 5.")
    device = device or torch.device("cpu")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    with ExitStack() as stack:
        if split is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-bench-"))
            split, data = synthetic_split(Path(directory)), "synthetic"
        count, height_px, width_px, _ = split.images_BHWC.shape
        how: dict[str, Any] = {"mean": mean, "std": std, "workers": workers, "batch_size": min(batch_size, count)}
        with_ffcv = ffcv_available()
        contestants = {
            "harness_ffcv": _ours("ffcv", split, device, stack, **how) if with_ffcv else None,
            "harness_device": _ours("device", split, device, stack, **how),
            "stock_ffcv": _stock_ffcv(split, **how) if with_ffcv else None,
            "torchvision": _torchvision(split, torchvision_images, device, **how),
        }
        results = _measure(contestants, rounds, device)
    settings = {"data": data, "images": count, "image_size_px": [height_px, width_px], "rounds": rounds}
    settings |= {"batch_size": how["batch_size"], "workers": workers, "crop_padding_px": CROP_PADDING_PX}
    machine = describe_machine(device, ("torch", "torchvision", "ffcv", "numba", "numpy"))
    return {"contestants": results, "ratios": _ratios(results), "settings": settings, "machine": machine}


def synthetic_split(directory: Path, count: int = SYNTHETIC_IMAGES) -> Split:
    """Random images of 32×32 pixels, as a `.beton` file in this directory."""
    path, generator = directory / "synthetic.beton", np.random.default_rng(0)
    images_BHWC = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    write_beton(path, images_BHWC, generator.integers(0, 10, count))
    return Split.open(path)


def _ours(
    kind: str,
    split: Split,
    device: torch.device,
    stack: ExitStack,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int,
    batch_size: int,
) -> Epoch:
    """One of our loaders, with the order of its epochs, which is part of what is measured."""
    augmentation = Augmentation(seed=0, crop_padding_px=CROP_PADDING_PX, flip="random")
    plan = BatchPlan(len(split.images_BHWC), batch_size)
    loader = build_loader(kind, split, mean=mean, std=std, augmentation=augmentation, device=device, workers=workers)
    stack.callback(loader.close)

    def epoch(number: int) -> int:
        ids_per_batch = [ids_B for step in plan.micro_batches(number) for ids_B in step]
        return sum(len(batch.images_BCHW) for batch in loader.batches(ids_per_batch, epoch=number))

    return epoch


def _stock_ffcv(split: Split, *, mean: Sequence[float], std: Sequence[float], workers: int, batch_size: int) -> Epoch:
    """FFCV's own operations; the batches stay on the CPU."""
    from harness.data.ffcv_loader import stock_epochs

    batches = stock_epochs(split.path, mean=mean, std=std, workers=workers, batch_size=batch_size)
    return lambda number: sum(len(images_BCHW) for images_BCHW in batches())


class _PillowImages(Dataset[tuple[torch.Tensor, int]]):
    """Images as torchvision's own datasets give them: through Pillow, with a list of transforms."""

    def __init__(self, split: Split, count: int, mean: Sequence[float], std: Sequence[float]) -> None:
        # In memory, as torchvision's CIFAR10 holds them.
        self.images_BHWC, self.labels_B = np.array(split.images_BHWC[:count]), split.labels_B[:count]
        size = self.images_BHWC.shape[1:3]
        # These are quicker than their successors in transforms.v2 when they begin with a Pillow image.
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=CROP_PADDING_PX),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(list(mean), list(std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images_BHWC)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images_BHWC[index])), int(self.labels_B[index])


def _torchvision(
    split: Split,
    count: int,
    device: torch.device,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int,
    batch_size: int,
) -> Epoch:
    """The pipeline most people write; its processes stay alive between epochs."""
    loader = DataLoader(
        _PillowImages(split, count, mean, std),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )

    def batches() -> Iterator[torch.Tensor]:
        for images_BCHW, _ in loader:
            yield images_BCHW.to(device, non_blocking=True)

    return lambda number: sum(len(images_BCHW) for images_BCHW in batches())


def _measure(
    contestants: Mapping[str, Epoch | None], rounds: int, device: torch.device
) -> dict[str, dict[str, float] | None]:
    """Round 0 warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    images: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, epoch in contestants.items():
            if epoch is None:
                continue
            start = time.perf_counter()
            images[name] = epoch(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    results: dict[str, dict[str, float] | None] = {}
    for name, times in seconds.items():
        if not times:
            results[name] = None
            continue
        speeds = [images[name] / each for each in times[1:]]
        results[name] = {
            "images_per_second_median": statistics.median(speeds),
            "images_per_second_min": min(speeds),
            "images_per_second_max": max(speeds),
            "images_per_round": images[name],
            "first_epoch_seconds": times[0],
        }
    return results


def _ratios(results: Mapping[str, dict[str, float] | None]) -> dict[str, float]:
    """Medians of ours over those of the peers."""
    ratios = {}
    for ours in ("harness_ffcv", "harness_device"):
        for peer in ("torchvision", "stock_ffcv"):
            one, other = results[ours], results[peer]
            if one is not None and other is not None:
                ratios[f"{ours}_over_{peer}"] = one["images_per_second_median"] / other["images_per_second_median"]
    return ratios
