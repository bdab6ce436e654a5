"""The contract of the loaders: batches of given ids, on the device.

Shapes: B batch, C = 3 channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch


class Batch(NamedTuple):
    """One batch. Its tensors are valid until the next batch is asked for.

    Attributes:
        images_BCHW: float32, normalised, channels_last strides, on the device.
        labels_B: int64, on the device.
        ids_B: int64 sample ids, on the host.
    """

    images_BCHW: torch.Tensor  # noqa: N815
    labels_B: torch.Tensor  # noqa: N815
    ids_B: np.ndarray  # noqa: N815


class Loader(Protocol):
    """Yields given batches of one split."""

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        """Yield exactly these batches, in this order.

        Args:
            ids_per_batch: int64 sample ids of each batch; lengths may differ, none is empty.
            epoch: from 0; decides the augmentation.

        Raises:
            ValueError: an empty batch, or an id that is not in the split.
            RuntimeError: the loader is closed.
        """
        ...

    def close(self) -> None:
        """Release threads, processes and memory. Closing twice does no harm."""
        ...


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


def checked_batches(ids_per_batch: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """The batches as int64 arrays of their own, once each id is known to lie in 0 … count - 1.

    Compiled code reads memory by these ids, so a wrong one must not come so far.

    Raises:
        ValueError: an empty batch or a wrong id.
    """
    batches = [np.array(ids, dtype=np.int64) for ids in ids_per_batch]
    for index, ids_B in enumerate(batches):
        if ids_B.ndim != 1 or len(ids_B) == 0:
            raise ValueError(f"batch {index} must be a list of ids that is not empty, its shape is {ids_B.shape}")
        if ids_B.min() < 0 or ids_B.max() >= count:
            raise ValueError(f"batch {index} holds ids outside 0 … {count - 1}")
    return batches


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the array on the device, without waiting for work that is under way there."""
    tensor = torch.from_numpy(np.array(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
