"""Small images inside a page, as data URIs with text alternatives.

Shapes: H height, W width in pixels, 3 channels red, green, blue.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from markupsafe import Markup
from PIL import Image

LARGEST_PX = 128  # of the longer side; larger images are made smaller
LOSSLESS_UP_TO_PX = 48
_QUALITY = 85

# From dark blue over magenta to yellow, rising in lightness, so that it reads in greyscale and by colour-blind eyes
# (after matplotlib's "plasma", https://bids.github.io/colormap).
_HEAT = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float64)


def data_uri(image_HW3: np.ndarray) -> str:
    """A uint8 (H, W, 3) image as WebP, small ones without loss, large ones made smaller."""
    image = Image.fromarray(np.ascontiguousarray(image_HW3))
    image.thumbnail((LARGEST_PX, LARGEST_PX))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=max(image.size) <= LOSSLESS_UP_TO_PX, quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def picture(image_HW3: np.ndarray, alt: str) -> Markup:
    """An `<img>` of a uint8 (H, W, 3) image; `alt` says in words what it shows."""
    height, width = image_HW3.shape[:2]
    return Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(data_uri(image_HW3), width, height, alt)


def heat_colours(values_HW: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as uint8 (H, W, 3), from dark blue to yellow."""
    at = np.clip(values_HW, 0, 1) * (len(_HEAT) - 1)
    stops = np.arange(len(_HEAT))
    channels = [np.interp(at, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlaid(image_HW3: np.ndarray, heat_HW: np.ndarray, *, share: float = 0.55) -> np.ndarray:
    """A uint8 image with heat from 0 to 1 of the same height and width laid over it, uint8 (H, W, 3)."""
    mixed = (1 - share) * image_HW3.astype(np.float64) + share * heat_colours(heat_HW).astype(np.float64)
    return mixed.round().astype(np.uint8)


def resized(image: np.ndarray, size_px: int) -> np.ndarray:
    """A uint8 (H, W, 3) or float32 (H, W) image of size_px × size_px; float values smoothly, pixels as squares."""
    if image.dtype == np.uint8:
        method = Image.Resampling.NEAREST if max(image.shape[:2]) <= size_px else Image.Resampling.BOX
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size_px, size_px), method))
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BILINEAR))
