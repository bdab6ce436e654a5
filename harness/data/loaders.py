"""Three loaders, one contract: the same ids and the same pixels from each, as batches on the device.

`ffcv` (the quickest on a CPU), `device` (the data lies on the device, augmentation there) and `torch` (DataLoader and
torchvision, the plain reference). What a loader yields depends on its arguments alone, never on its workers.

Shapes: B batch, C = 3 channels, H height, W width.
"""

from __future__ import annotations

import errno
import importlib.util
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from harness.data.augment import Augmentation, SampleParameters, normalisation_table
from harness.environment import whole_number
from harness.errors import EXIT_FAILED, HarnessError
from harness.machine import rank_has_its_own_cores, usable_cores

if TYPE_CHECKING:
    from harness.data.prepare import Split


class Batch(NamedTuple):
    """One batch on the device. Its tensors are valid until the next batch is asked for."""

    images_BCHW: torch.Tensor  # noqa: N815 - float32, normalised, channels_last strides
    labels_B: torch.Tensor  # noqa: N815 - int64
    ids_B: np.ndarray  # noqa: N815 - int64 sample ids, on the host


class Loader:
    """Yields given batches of one split."""

    def __init__(
        self, split: Split, augmentation: Augmentation, mean: list[float], std: list[float], device: torch.device
    ) -> None:
        self._split, self._augmentation, self._device, self._closed = split, augmentation, device, False
        self._mean, self._std = mean, std
        self._count, self._height_px, self._width_px, _ = split.images_BHWC.shape

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        """Yield exactly these batches of int64 sample ids, in this order; the epoch (from 0) decides the augmentation.

        Raises:
            ValueError: an empty batch, or an id that is not in the split: compiled code reads memory by these ids.
            RuntimeError: the loader is closed.
        """
        if self._closed:
            raise RuntimeError("this loader is closed")
        batches = [np.array(ids, dtype=np.int64) for ids in ids_per_batch]
        for index, ids_B in enumerate(batches):
            if len(ids_B) == 0 or ids_B.min() < 0 or ids_B.max() >= self._count:
                raise ValueError(f"batch {index} is empty or holds ids outside 0 … {self._count - 1}")
        return self._yield(batches, epoch) if batches else iter(())

    def _yield(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        raise NotImplementedError

    def _parameters(self, epoch: int, ids_B: np.ndarray) -> SampleParameters:
        return self._augmentation.parameters(epoch, ids_B, height_px=self._height_px, width_px=self._width_px)

    def close(self) -> None:
        """Release threads, processes and memory. Closing twice does no harm."""
        self._closed = True


class WaitTimer(Iterator[Batch]):
    """Batches as they come, and how long they were waited for."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self._seconds = batches, 0.0

    def __next__(self) -> Batch:
        started_at = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._seconds += time.perf_counter() - started_at

    def take_seconds(self) -> float:
        """Seconds in which the caller stood still since this was last asked: on the host, whatever a GPU did then."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def build_loader(
    kind: str,
    split: Split,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation | None,
    device: torch.device,
    workers: int | None,
) -> Loader:
    """A loader ("ffcv", "device" or "torch") of one split.

    Args:
        mean, std: of pixels scaled to [0, 1].
        augmentation: of training images; None only normalises.
        workers: threads (ffcv) or processes (torch; 0 loads in this process); None is one for each core of this rank.

    Raises:
        HarnessError: ffcv is not installed, or a channel is constant in all images.
    """
    for channel, value in zip(("red", "green", "blue"), std, strict=True):
        if value == 0:
            what = f"the standard deviation of {channel} is 0: all pixels of that channel have one value"
            hint = "Set data.std in the recipe, for example data.std=[0.25, 0.25, 0.25], or check the images."
            raise HarnessError(what, hint=hint)
    how = (split, augmentation or Augmentation(seed=0), list(mean), list(std), device)
    if kind == "device":
        return DeviceLoader(*how)
    if workers is None:  # the cores that this rank is bound to, or its share of those that all ranks here use
        share = 1 if rank_has_its_own_cores() else whole_number("LOCAL_WORLD_SIZE", 1, at_least=1)
        workers = max(1, usable_cores() // share)
    if kind == "torch":
        return TorchLoader(*how, workers=workers)
    from harness.data.ffcv_loader import FfcvLoader  # the others must not need it, or wait for it

    return FfcvLoader(*how, workers=workers)


def ffcv_available() -> bool:
    """Whether ffcv is installed, without importing it. Its libraries may still fail to load."""
    return importlib.util.find_spec("ffcv") is not None


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the array on the device, without waiting for work that is under way there."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DeviceLoader(Loader):
    """All images lie on the device as uint8; batches are gathered, augmented and normalised there.

    Nothing waits for the device: what a whole epoch needs from the host goes there in one copy at its start.
    """

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._pixels = to_device(self._split.images_BHWC, self._device).view(-1, 3)
        self._labels_B = to_device(self._split.labels_B, self._device)
        self._table = to_device(normalisation_table(self._mean, self._std).reshape(-1), self._device)
        self._table_starts_C = torch.arange(3, device=self._device, dtype=torch.int32) * 256
        self._y_H = torch.arange(self._height_px, device=self._device)
        self._x_W = torch.arange(self._width_px, device=self._device)

    def _yield(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        ids = np.concatenate(batches)
        fields = to_device(np.stack([ids, *self._parameters(epoch, ids)]).astype(np.int64), self._device)
        for ids_B, fields_FB in zip(batches, fields.split([len(ids_B) for ids_B in batches], dim=1), strict=True):
            yield Batch(self._images(fields_FB), self._labels_B.index_select(0, fields_FB[0]), ids_B)

    def _images(self, fields_FB: torch.Tensor) -> torch.Tensor:
        """float32 (B, C, H, W) of the samples whose id and parameters are the rows of int64 (6, B)."""
        ids_B, crop_y_B, crop_x_B, flip_B, cutout_y_B, cutout_x_B = fields_FB.unbind(0)
        height_px, width_px, padding = self._height_px, self._width_px, self._augmentation.crop_padding_px
        # The flip comes after the crop, so a flipped image is read from the crop's right end.
        x_BW = torch.where(flip_B[:, None].bool(), width_px - 1 - self._x_W, self._x_W)
        rows_BH = self._y_H + (crop_y_B - padding)[:, None]
        columns_BW = x_BW + (crop_x_B - padding)[:, None]
        outside_BHW = None
        if padding and self._augmentation.crop_padding_mode == "reflect":
            rows_BH, columns_BW = _reflected(rows_BH, height_px), _reflected(columns_BW, width_px)
        elif padding:
            inside_BH, inside_BW = _within(rows_BH, height_px), _within(columns_BW, width_px)
            outside_BHW = ~(inside_BH[:, :, None] & inside_BW[:, None, :])
            rows_BH, columns_BW = rows_BH.clamp(0, height_px - 1), columns_BW.clamp(0, width_px - 1)
        first_B = ids_B * (height_px * width_px)
        places_BHW = (first_B[:, None] + rows_BH * width_px)[:, :, None] + columns_BW[:, None, :]
        # Selecting whole pixels of one flat list is three times as quick as indexing.
        pixels_BHWC = self._pixels.index_select(0, places_BHW.view(-1)).view(*places_BHW.shape, -1)
        if outside_BHW is not None:
            pixels_BHWC.masked_fill_(outside_BHW[..., None], 0)
        entries_BHWC = pixels_BHWC.int() + self._table_starts_C
        images_BHWC = self._table.index_select(0, entries_BHWC.view(-1)).view(pixels_BHWC.shape)
        size = self._augmentation.cutout_size_px
        if size:
            cut_BH = _within(self._y_H - cutout_y_B[:, None], size)
            cut_BW = _within(self._x_W - cutout_x_B[:, None], size)
            images_BHWC.masked_fill_((cut_BH[:, :, None] & cut_BW[:, None, :])[..., None], 0.0)
        return images_BHWC.permute(0, 3, 1, 2)

    def close(self) -> None:
        super().close()
        self._pixels = self._pixels[:0].clone()  # releases the device's memory


def _within(values: torch.Tensor, stop: int) -> torch.Tensor:
    return (values >= 0) & (values < stop)


def _reflected(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places beyond 0 … size - 1 mirrored there, without repeating the edge."""
    return size - 1 - (size - 1 - places.abs()).abs()


class TorchLoader(Loader, Dataset[tuple[torch.Tensor, int]]):
    """The plain reference, slow and easy to read: the other loaders are right when they give the same pixels.

    PyTorch's DataLoader with torchvision's functions; its processes are started for each epoch and end with it.
    """

    def __init__(self, *how: Any, workers: int) -> None:
        super().__init__(*how)
        self._workers = workers

    def _yield(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        samples: DataLoader[tuple[torch.Tensor, int]] = DataLoader(
            self,
            batch_sampler=[[(epoch, int(sample_id)) for sample_id in ids_B] for ids_B in batches],
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else each epoch would take a number from the global generator
        )
        for (images_BCHW, labels_B), ids_B in zip(explained(samples), batches, strict=True):
            yield Batch(
                images_BCHW.to(self._device, memory_format=torch.channels_last, non_blocking=True),
                labels_B.to(self._device, non_blocking=True),
                ids_B,
            )

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """A sample, by epoch and id, as the epoch shows it: image float32 (C, H, W) and label."""
        epoch, sample_id = key
        image_CHW = torch.from_numpy(np.array(self._split.images_BHWC[sample_id])).permute(2, 0, 1)
        how = self._parameters(epoch, np.array([sample_id]))
        crop_y, crop_x, flip, cutout_y, cutout_x = (int(values_B[0]) for values_B in how)
        padding, size = self._augmentation.crop_padding_px, self._augmentation.cutout_size_px
        if padding:
            mode = "constant" if self._augmentation.crop_padding_mode == "zeros" else "reflect"
            padded_CHW = functional.pad(image_CHW, [padding], fill=0, padding_mode=mode)
            image_CHW = functional.crop(padded_CHW, crop_y, crop_x, self._height_px, self._width_px)
        if flip:
            image_CHW = functional.horizontal_flip(image_CHW)
        image_CHW = functional.to_dtype(image_CHW, torch.float32, scale=True)
        image_CHW = functional.normalize(image_CHW, self._mean, self._std)
        if size:
            top, left = max(cutout_y, 0), max(cutout_x, 0)
            bottom, right = min(cutout_y + size, self._height_px), min(cutout_x + size, self._width_px)
            image_CHW = functional.erase(image_CHW, top, left, bottom - top, right - left, torch.zeros(()))
        return image_CHW, int(self._split.labels_B[sample_id])


_FULL = ("/dev/shm is full", "In a container: --shm-size=1g. Else data.workers=0, or data.loader=ffcv.")
_TOO_MANY = ("too many files are open", "ulimit -n 65536, or fewer data.workers.")
_FEWER = "Fewer data.workers, or data.loader=ffcv."
_ABOVE = "See its own message above, or try data.workers=0."
# What torch's error says where the machine let a worker process down: what is so, and what to do.
_WORKER_FAILURES = {
    "Too many open files": _TOO_MANY,
    "ancdata": _TOO_MANY,
    "Cannot allocate memory": ("memory ran out", _FEWER),
    "</torch_": _FULL,
    "shared memory": _FULL,
    "Bus error": _FULL,
    "Pin memory thread": ("the thread that pins memory ended", _ABOVE),
    "signal: Killed": ("a loader's process was killed, probably for memory", _FEWER),
    "DataLoader worker": ("a loader's process ended", _ABOVE),
}


def explained(samples: Iterable[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """A DataLoader's batches; what let its processes down becomes a HarnessError, errors of our own are passed on."""
    try:
        yield from samples
    except (RuntimeError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        text = "shared memory" if full else str(error)
        ours = "in DataLoader worker process" in text and not ("shared memory" in text or "</torch_" in text)
        what, hint = next((known for part, known in _WORKER_FAILURES.items() if part in text and not ours), ("", ""))
        if not what:
            raise
        last = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
        raise HarnessError(f"{what} ({last})", where="data.loader=torch", hint=hint, exit_code=EXIT_FAILED) from error
