"""Augmentation as pure functions of (seed, epoch, sample id), and normalisation as a table.

An image is cropped, then flipped, then cut out, whichever loader does it: `Augmentation.parameters` says how, so the
pixels of a sample do not depend on the loader, the number of workers or ranks, or where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from harness.data.order import Stream, hash64, uniform_below


class SampleParameters(NamedTuple):
    """What happens to each of B images, thought of with its padding around it.

    The cut-out square covers the rows cutout_y … cutout_y + size - 1 and the columns cutout_x … cutout_x + size - 1 of
    the finished image, as far as they exist.
    """

    crop_y_B: np.ndarray  # noqa: N815 - int64, 0 … 2 × padding: the crop's upper edge; the padding means no shift
    crop_x_B: np.ndarray  # noqa: N815 - its left edge
    flip_B: np.ndarray  # noqa: N815 - bool
    cutout_y_B: np.ndarray  # noqa: N815 - int64, -(size // 2) … H - 1 - size // 2
    cutout_x_B: np.ndarray  # noqa: N815 - int64, -(size // 2) … W - 1 - size // 2


@dataclass(frozen=True)
class Augmentation:
    """What training does to the images; evaluation has none.

    Args:
        crop_padding_px: added on each side before a crop of the image's own size; 0 is no crop.
        crop_padding_mode: "zeros" pads with raw black, as torchvision's RandomCrop(padding=…) does on raw pixels;
            "reflect" mirrors without repeating the edge.
        flip: "random", by a fresh coin each epoch; "alternating", by a coin in epoch 0 and then the other way each
            epoch (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).
        cutout_size_px: side of a square set to exactly 0.0 in the normalised image; its centre is uniform over the
            image (DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", 2017).
    """

    seed: int
    crop_padding_px: int = 0
    crop_padding_mode: Literal["zeros", "reflect"] = "zeros"
    flip: Literal["none", "random", "alternating"] = "none"
    cutout_size_px: int = 0

    def parameters(self, epoch: int, ids_B: np.ndarray, *, height_px: int, width_px: int) -> SampleParameters:
        """The parameters of the samples with these ids in this epoch (from 0)."""
        crops = 2 * self.crop_padding_px + 1
        half = self.cutout_size_px // 2

        def uniform(stream: Stream, bound: int) -> np.ndarray:
            return uniform_below(bound, hash64(self.seed, stream, epoch, ids_B))

        zeros_B = np.zeros(len(ids_B), dtype=np.int64)
        cropped, cut = self.crop_padding_px > 0, self.cutout_size_px > 0
        return SampleParameters(
            crop_y_B=uniform(Stream.CROP_Y, crops) if cropped else zeros_B,
            crop_x_B=uniform(Stream.CROP_X, crops) if cropped else zeros_B,
            flip_B=self._flips(epoch, ids_B),
            cutout_y_B=uniform(Stream.CUTOUT_Y, height_px) - half if cut else zeros_B,
            cutout_x_B=uniform(Stream.CUTOUT_X, width_px) - half if cut else zeros_B,
        )

    def _flips(self, epoch: int, ids_B: np.ndarray) -> np.ndarray:
        if self.flip == "random":
            return (hash64(self.seed, Stream.FLIP, epoch, ids_B) & np.uint64(1)).astype(bool)
        if self.flip == "alternating":
            coin_B = hash64(self.seed, Stream.ALTERNATING_FLIP, ids_B) & np.uint64(1)
            return coin_B.astype(np.int64) != epoch % 2
        return np.zeros(len(ids_B), dtype=bool)


def normalisation_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What each of the 256 pixel values becomes in each channel, float32 (3, 256).

    Made by torchvision's own `to_dtype(scale=True)` and `normalize`, so that a look-up gives the very bits that they
    give. `mean` and `std` are of pixels scaled to [0, 1].
    """
    import torch
    from torchvision.transforms.v2 import functional

    values_CHW = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    scaled_CHW = functional.to_dtype(values_CHW, torch.float32, scale=True)
    return functional.normalize(scaled_CHW, list(mean), list(std)).reshape(3, 256).contiguous().numpy()
