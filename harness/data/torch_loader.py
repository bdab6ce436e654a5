"""The plain reference: PyTorch's DataLoader over the mapped file, torchvision's functions for each sample.

It is slow and easy to read. The other loaders are right when they give the same pixels as this one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from harness.data.augment import Augmentation
from harness.data.batches import Batch, checked_batches
from harness.errors import EXIT_FAILED, HarnessError

if TYPE_CHECKING:
    from harness.data.store import Split

Sample = tuple[torch.Tensor, int]  # image float32 (C, H, W), label


class AugmentedImages(Dataset[Sample]):
    """The samples of a split as one epoch shows them, by id."""

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation,
        epoch: int,
    ) -> None:
        self.split = split
        self.mean, self.std = list(mean), list(std)
        self.augmentation, self.epoch = augmentation, epoch

    def __len__(self) -> int:
        return self.split.count

    def __getitem__(self, sample_id: int) -> Sample:
        image_CHW = torch.from_numpy(np.array(self.split.images_BHWC[sample_id])).permute(2, 0, 1)
        height_px, width_px = image_CHW.shape[1:]
        how = self.augmentation.parameters(self.epoch, np.array([sample_id]), height_px=height_px, width_px=width_px)
        padding = self.augmentation.crop_padding_px
        if padding:
            mode = "constant" if self.augmentation.crop_padding_mode == "zeros" else "reflect"
            padded_CHW = functional.pad(image_CHW, [padding], fill=0, padding_mode=mode)
            top, left = int(how.crop_y_B[0]), int(how.crop_x_B[0])
            image_CHW = functional.crop(padded_CHW, top, left, height_px, width_px)
        if how.flip_B[0]:
            image_CHW = functional.horizontal_flip(image_CHW)
        image_CHW = functional.to_dtype(image_CHW, torch.float32, scale=True)
        image_CHW = functional.normalize(image_CHW, self.mean, self.std)
        size = self.augmentation.cutout_size_px
        if size:
            top, left = int(how.cutout_y_B[0]), int(how.cutout_x_B[0])
            bottom, right = min(top + size, height_px), min(left + size, width_px)
            top, left = max(top, 0), max(left, 0)
            image_CHW = functional.erase(image_CHW, top, left, bottom - top, right - left, torch.zeros(()))
        return image_CHW, int(self.split.labels_B[sample_id])


class TorchLoader:
    """See `harness.data.loaders.Loader`. New worker processes are started for each epoch."""

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation,
        device: torch.device,
        workers: int,
    ) -> None:
        self._split, self._mean, self._std, self._augmentation = split, mean, std, augmentation
        self._device, self._workers = device, workers
        self._closed = False

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        """See `harness.data.loaders.Loader.batches`."""
        if self._closed:
            raise RuntimeError("this loader is closed")
        dataset = AugmentedImages(
            self._split, mean=self._mean, std=self._std, augmentation=self._augmentation, epoch=epoch
        )
        batches = checked_batches(ids_per_batch, len(dataset))
        loader = DataLoader(
            dataset,
            batch_sampler=[ids_B.tolist() for ids_B in batches],
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else each epoch would take a number from the global generator
        )
        return self._yield(loader, batches)

    def _yield(self, loader: DataLoader[Sample], batches: list[np.ndarray]) -> Iterator[Batch]:
        for (images_BCHW, labels_B), ids_B in zip(_explained(loader), batches, strict=True):
            yield Batch(
                images_BCHW.to(self._device, memory_format=torch.channels_last, non_blocking=True),
                labels_B.to(self._device, non_blocking=True),
                ids_B,
            )

    def close(self) -> None:
        """Worker processes end with their epoch's iterator; there is nothing else to release."""
        self._closed = True


_FULL = ("/dev/shm is full", "In a container: --shm-size=1g. Else data.workers=0, or data.loader=ffcv.")
_TOO_MANY = ("too many files are open", "ulimit -n 65536, or fewer data.workers.")
# What torch's error says where a worker process was let down by the machine: what is so, and what to do.
_LET_DOWN = {
    "Too many open files": _TOO_MANY,
    "ancdata": _TOO_MANY,
    "Cannot allocate memory": ("memory ran out", "Fewer data.workers, or data.loader=ffcv."),
    "</torch_": _FULL,
    "shared memory": _FULL,
    "Bus error": _FULL,
    "Pin memory thread": ("the thread that pins memory ended", "See its own message above, or try data.workers=0."),
    "signal: Killed": (
        "a loader's process was killed, probably for memory",
        "Fewer data.workers, or data.loader=ffcv.",
    ),
    "DataLoader worker": ("a loader's process ended", "See its own message above, or try data.workers=0."),
}


def _explained(loader: DataLoader[Sample]) -> Iterator[list[torch.Tensor]]:
    """The loader's batches, with errors of its processes in the user's words.

    Raises:
        HarnessError: shared memory, open files or memory ran out. Errors of our own code are passed on.
    """
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        text = "shared memory" if full else str(error)
        ours = "in DataLoader worker process" in text and not ("shared memory" in text or "</torch_" in text)
        what, hint = next((told for part, told in _LET_DOWN.items() if part in text and not ours), ("", ""))
        if not what:
            raise
        last = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
        raise HarnessError(f"{what} ({last})", where="data.loader=torch", hint=hint, exit_code=EXIT_FAILED) from error
