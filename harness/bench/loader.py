"""How many images a second the loaders give, next to a conventional pipeline and stock FFCV, in one run.

Every contestant crops (padding 4) and flips at random and gives normalised float32 batches; stock FFCV cuts out as
well, as its CIFAR-10 example does. A round is an epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from harness.bench import Contestant, Round, rates, run_contest
from harness.data.augment import Augmentation
from harness.data.loaders import build_loader
from harness.data.order import BatchPlan
from harness.data.prepare import PreparedDataset, Split, open_beton, prepare
from harness.errors import HarnessError
from harness.machine import seconds_of

HERE = "harness.bench.loader"
CROP_PADDING_PX = 4
BATCH_SIZE = 512
SLOW_IMAGES = 10_000  # of a round of torchvision's pipeline and of ours like it
OURS = ("harness_ffcv", "harness_device", "harness_torch")


def bench_loader(*, rounds: int, workers: int | None = None, synthetic_images: int | None = None) -> dict[str, Any]:
    """Measure all loaders on CIFAR-10 where it is at hand, else on synthetic images. Returns and raises as `rates`
    and `run_contest`.

    Where there is a GPU, batches are wanted there, and "settings" says so; stock FFCV's stay on the CPU.

    Args:
        workers: threads or processes; None is one for each CPU that this process may use.
        synthetic_images: so many of them instead of CIFAR-10.
    """
    workers = workers or len(os.sched_getaffinity(0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = _store(synthetic_images)
    split, scale = store.split("train"), {"mean": store.manifest.mean, "std": store.manifest.std}
    count, height_px, width_px, _ = split.images_BHWC.shape
    how = {"workers": workers, "batch_size": min(BATCH_SIZE, count)}
    task, few = {"path": str(split.path), "device": device, "scale": scale, **how}, min(SLOW_IMAGES, count)
    contestants = {
        "harness_ffcv": Contestant(f"{HERE}:ours", {"kind": "ffcv", "count": count, **task}, needs="ffcv"),
        "harness_device": Contestant(f"{HERE}:ours", {"kind": "device", "count": count, **task}),
        "harness_torch": Contestant(f"{HERE}:ours", {"kind": "torch", "count": few, **task}),
        "stock_ffcv": Contestant(f"{HERE}:stock_ffcv", task, needs="ffcv"),
        "torchvision": Contestant(f"{HERE}:torchvision", {"count": few, **task}),
    }
    times = run_contest(contestants, rounds=rounds, threads=workers)
    settings = {"data": store.manifest.source, "images": count, "image_size_px": [height_px, width_px], **how}
    settings |= {"rounds": rounds, "crop_padding_px": CROP_PADDING_PX}
    settings["batches_on"] = "cuda (stock_ffcv: cpu)" if device == "cuda" else "cpu"
    return rates(times, OURS, settings)


def _store(synthetic_images: int | None) -> PreparedDataset:
    if synthetic_images is None:
        with suppress(HarnessError):  # it is not here
            return prepare("cifar10", download=False)
    return prepare("synthetic", synthetic={"train_images": synthetic_images or 20_000})


def _round_of(epoch: Callable[[int], Iterable[Tensor]], device: str) -> Round:
    """An epoch of this number a round; epoch 0, with what it compiles and starts, is not measured."""
    counts: list[int] = []

    def load() -> None:
        counts.append(sum(map(len, epoch(len(counts)))))

    load()
    return lambda: (seconds_of(load, device=device), counts[-1])


def ours(
    *, kind: str, path: str, count: int, batch_size: int, workers: int, device: str, scale: dict[str, Any]
) -> Round:
    """One of our loaders, with the order of its epochs, which is part of what is measured."""
    plan = BatchPlan(count, batch_size)
    augmentation = Augmentation(seed=0, crop_padding_px=CROP_PADDING_PX, flip="random")
    how: dict[str, Any] = {"device": torch.device(device), "workers": workers, "augmentation": augmentation}
    loader = build_loader(kind, open_beton(Path(path)), **scale, **how)

    def epoch(number: int) -> Iterable[Tensor]:
        ids_per_batch = [ids_B for step in plan.micro_batches(number) for ids_B in step]
        return (batch.images_BCHW for batch in loader.batches(ids_per_batch, epoch=number))

    return _round_of(epoch, device)


def stock_ffcv(*, path: str, batch_size: int, workers: int, device: str, scale: dict[str, Any]) -> Round:
    """FFCV's own operations; the batches stay on the CPU."""
    from harness.data.ffcv_loader import stock_epochs

    batches = stock_epochs(Path(path), batch_size=batch_size, workers=workers, **scale)
    return _round_of(lambda number: batches(), device)


class _Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, each given through Pillow, as torchvision's CIFAR10 does."""

    def __init__(self, split: Split, count: int, transform: Callable[[Any], Tensor]) -> None:
        self._data, self._labels = np.array(split.images_BHWC[:count]), split.labels_B[:count].tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._data[index])), self._labels[index]


def torchvision(*, path: str, count: int, batch_size: int, workers: int, device: str, scale: dict[str, Any]) -> Round:
    """The pipeline most people write; its processes stay alive between epochs."""
    split = open_beton(Path(path))
    # These are quicker than their successors in transforms.v2 when they begin with a Pillow image.
    crop = transforms.RandomCrop(split.images_BHWC.shape[1:3], padding=CROP_PADDING_PX)
    rest = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(**scale)]
    loader: DataLoader[Any] = DataLoader(
        _Images(split, count, transforms.Compose([crop, *rest])),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device == "cuda",
        generator=torch.Generator(),
    )
    return _round_of(lambda number: (images.to(device, non_blocking=True) for images, _ in loader), device)
