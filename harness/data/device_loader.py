"""All images lie on the device as uint8; batches are gathered, augmented and normalised there.

Nothing waits for the device: what a whole epoch needs from the host goes there in one copy at its start.

Shapes: B batch, C = 3 channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.data.augment import Augmentation, normalisation_table
from harness.data.batches import Batch, checked_batches, to_device

if TYPE_CHECKING:
    from harness.data.store import Split


class DeviceLoader:
    """See `harness.data.loaders.Loader`. Needs H × W × 3 bytes of device memory for each image."""

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation,
        device: torch.device,
    ) -> None:
        self._augmentation, self._device = augmentation, device
        self._count, self._height_px, self._width_px, channels = split.images_BHWC.shape
        self._pixels: torch.Tensor | None = to_device(split.images_BHWC, device).view(-1, channels)
        self._labels_B = to_device(split.labels_B, device)
        self._table = to_device(normalisation_table(mean, std).reshape(-1), device)
        self._table_starts_C = torch.arange(channels, device=device, dtype=torch.int32) * 256
        self._y_H = torch.arange(self._height_px, device=device)
        self._x_W = torch.arange(self._width_px, device=device)

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        """See `harness.data.loaders.Loader.batches`."""
        if self._pixels is None:
            raise RuntimeError("this loader is closed")
        batches = checked_batches(ids_per_batch, self._count)
        return self._yield(batches, epoch) if batches else iter(())

    def _yield(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        ids = np.concatenate(batches)
        how = self._augmentation.parameters(epoch, ids, height_px=self._height_px, width_px=self._width_px)
        fields = to_device(np.stack([ids, *how]).astype(np.int64), self._device)
        start = 0
        for ids_B in batches:
            fields_FB = fields.narrow(1, start, len(ids_B))
            start += len(ids_B)
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
            inside_BH, inside_BW = _within(rows_BH, 0, height_px), _within(columns_BW, 0, width_px)
            outside_BHW = ~(inside_BH[:, :, None] & inside_BW[:, None, :])
            rows_BH, columns_BW = rows_BH.clamp(0, height_px - 1), columns_BW.clamp(0, width_px - 1)
        pixels_BHWC = self._gather(ids_B, rows_BH, columns_BW)
        if outside_BHW is not None:
            pixels_BHWC.masked_fill_(outside_BHW[..., None], 0)
        places_BHWC = pixels_BHWC.int() + self._table_starts_C
        images_BHWC = self._table.index_select(0, places_BHWC.view(-1)).view(pixels_BHWC.shape)
        size = self._augmentation.cutout_size_px
        if size:
            cut_BH = _within(self._y_H - cutout_y_B[:, None], 0, size)
            cut_BW = _within(self._x_W - cutout_x_B[:, None], 0, size)
            images_BHWC.masked_fill_((cut_BH[:, :, None] & cut_BW[:, None, :])[..., None], 0.0)
        return images_BHWC.permute(0, 3, 1, 2)

    def _gather(self, ids_B: torch.Tensor, rows_BH: torch.Tensor, columns_BW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, C). Selecting whole pixels of one flat list is three times as quick as indexing."""
        if self._pixels is None:
            raise RuntimeError("this loader was closed")
        first_B = ids_B * (self._height_px * self._width_px)
        places_BHW = (first_B[:, None] + rows_BH * self._width_px)[:, :, None] + columns_BW[:, None, :]
        return self._pixels.index_select(0, places_BHW.view(-1)).view(*places_BHW.shape, -1)

    def close(self) -> None:
        """Release the device's memory."""
        self._pixels = None


def _within(values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return (values >= start) & (values < stop)


def _reflected(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places beyond 0 … size - 1 mirrored there, without repeating the edge."""
    return size - 1 - (size - 1 - places.abs()).abs()
