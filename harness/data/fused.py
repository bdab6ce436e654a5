"""The one pass over memory of the ffcv loader, compiled by numba (which comes with the ffcv extra).

Shapes: B batch, H height, W width, C = 3 channels, V = 256 pixel values, N samples of the split.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled by numba, and kept for later processes: beside this file or, else, in the user's cache."""
    try:
        return numba.njit(parallel=True, nogil=True, cache=True)(function)
    except RuntimeError:  # no place for a cache
        return numba.njit(parallel=True, nogil=True)(function)


@_compiled
def fuse_batch(
    images_BHWC: np.ndarray,
    ids_B: np.ndarray,
    how_NF: np.ndarray,
    table_CV: np.ndarray,
    reflect: bool,
    cutout_size: int,
    out_BHWC: np.ndarray,
) -> None:
    """Crop, flip, normalise and cut out.

    Args:
        images_BHWC: uint8, the images as stored.
        ids_B: int64 sample ids.
        how_NF: int32 (N, 5), by id: the shift down and to the right of what is read, whether to flip, the
            first row and the first column to cut out.
        table_CV: float32 (3, 256), see `harness.data.augment.normalisation_table`.
        reflect: mirror what lies outside the image; otherwise it is black.
        cutout_size: side of the square set to 0.0, in pixels.
        out_BHWC: float32, is written.
    """
    height, width = images_BHWC.shape[1], images_BHWC.shape[2]
    for index in numba.prange(len(ids_B)):
        shift_y, shift_x, flip, cut_y, cut_x = how_NF[ids_B[index]]
        for y in range(height):
            row = y + shift_y
            if reflect:
                row = height - 1 - abs(height - 1 - abs(row))
            for x in range(width):
                # The flip comes after the crop, so a flipped image is read from the crop's right end.
                column = (width - 1 - x if flip else x) + shift_x
                if reflect:
                    column = width - 1 - abs(width - 1 - abs(column))
                inside = 0 <= row < height and 0 <= column < width
                for channel in range(3):
                    pixel = images_BHWC[index, row, column, channel] if inside else 0
                    out_BHWC[index, y, x, channel] = table_CV[channel, pixel]
        for y in range(max(cut_y, 0), min(cut_y + cutout_size, height)):
            for x in range(max(cut_x, 0), min(cut_x + cutout_size, width)):
                for channel in range(3):
                    out_BHWC[index, y, x, channel] = 0.0
