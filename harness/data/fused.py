"""The one pass over memory of the ffcv loader, compiled by numba (which comes with the ffcv extra).

Shapes: B batch, H height, W width, C = 3 channels, V = 256 pixel values, N samples of the split, P bytes.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from harness.data.compiling import compiled

# Given here, so that the function is compiled, or found in the cache, when this file is imported.
_SIGNATURE = types.void(
    types.Array(types.uint8, 1, "C", readonly=True),
    types.int64[::1],
    types.int64[::1],
    types.int32[:, ::1],
    types.float32[:, ::1],
    types.boolean,
    types.int64,
    types.float32[:, :, :, ::1],
)


@numba.njit(nogil=True)
def _fill_black(out_WC: np.ndarray, start: int, stop: int, table_CV: np.ndarray) -> None:
    for x in range(start, stop):
        for channel in range(3):
            out_WC[x, channel] = table_CV[channel, 0]


@numba.njit(nogil=True)
def _fill_mirrored(
    out_WC: np.ndarray, start: int, stop: int, row_P: np.ndarray, first: int, step: int, table_CV: np.ndarray
) -> None:
    last = len(out_WC) - 1
    for x in range(start, stop):
        column = last - abs(last - abs(first + step * x))
        for channel in range(3):
            out_WC[x, channel] = table_CV[channel, row_P[3 * column + channel]]


@compiled(_SIGNATURE, parallel=True)
def fuse_batch(
    file_P: np.ndarray,
    starts_N: np.ndarray,
    ids_B: np.ndarray,
    how_NF: np.ndarray,
    table_CV: np.ndarray,
    reflect: bool,
    cutout_size: int,
    out_BHWC: np.ndarray,
) -> None:
    """Read, crop, flip, normalise and cut out.

    Args:
        file_P: uint8, the bytes of the file.
        starts_N: int64, where in it the pixels of each sample begin, H × W × 3 bytes in that order. Nothing checks
            that they lie in the file: `harness.data.beton.open_beton` has.
        ids_B: int64 sample ids.
        how_NF: int32 (N, 5), by id: the shift down and to the right of what is read, whether to flip, the
            first row and the first column to cut out.
        table_CV: float32 (3, 256), see `harness.data.augment.normalisation_table`.
        reflect: mirror what lies outside the image; otherwise it is black.
        cutout_size: side of the square set to 0.0, in pixels.
        out_BHWC: float32 (B, H, W, 3), is written.
    """
    height, width = out_BHWC.shape[1], out_BHWC.shape[2]
    for index in numba.prange(len(ids_B)):
        shift_y, shift_x, flip, cut_y, cut_x = how_NF[ids_B[index]]
        # The flip comes after the crop, so a flipped image is read from the crop's right end. What stands at x is
        # read at first + step * x, which lies in the image from `start` to before `stop`.
        if flip:
            first, step, start, stop = width - 1 + shift_x, -1, shift_x, width + shift_x
        else:
            first, step, start, stop = shift_x, 1, -shift_x, width - shift_x
        start, stop = min(max(start, 0), width), max(min(stop, width), 0)
        for y in range(height):
            row = y + shift_y
            if reflect:
                row = height - 1 - abs(height - 1 - abs(row))
            out_WC = out_BHWC[index, y]
            if not 0 <= row < height:
                _fill_black(out_WC, 0, width, table_CV)
                continue
            row_start = starts_N[ids_B[index]] + row * width * 3
            row_P = file_P[row_start : row_start + width * 3]
            for x in range(start, stop):
                column = first + step * x
                for channel in range(3):
                    out_WC[x, channel] = table_CV[channel, row_P[3 * column + channel]]
            if reflect:
                _fill_mirrored(out_WC, 0, start, row_P, first, step, table_CV)
                _fill_mirrored(out_WC, stop, width, row_P, first, step, table_CV)
            else:
                _fill_black(out_WC, 0, start, table_CV)
                _fill_black(out_WC, stop, width, table_CV)
        for y in range(max(cut_y, 0), min(cut_y + cutout_size, height)):
            for x in range(max(cut_x, 0), min(cut_x + cutout_size, width)):
                for channel in range(3):
                    out_BHWC[index, y, x, channel] = 0.0
