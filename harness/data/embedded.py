"""Data that needs no files: scikit-learn's handwritten digits, and synthetic patterns.

Both are made with whole numbers and a stateless hash, so they are the same on every machine.

Shapes: B images, H height, W width, C = 3 channels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping

import numpy as np

from harness.data.images import resize_images
from harness.data.imagesets import ImageSets, LabelledImages
from harness.data.order import hash64, uniform_below
from harness.errors import HarnessError, nearest

SYNTHETIC_DEFAULTS: Mapping[str, int] = {
    "train_images": 512,
    "test_images": 256,
    "num_classes": 10,
    "seed": 0,
}

_DIGITS_SEED = 20  # of the split; a new number would be a new data set
_TEST_SHARE = 5  # every fifth image
_MAX_CLASSES = 1000
_NOISE = 48  # peak to peak, of 255
_CHUNK = 512


def digits(*, image_size_px: int) -> ImageSets:
    """1,797 handwritten digits, real: 8×8 pixels of 17 grey levels, enlarged (bilinear) and repeated as RGB.

    The split is stratified and fixed: of each digit, the fifth of the images with the smallest hash of
    (seed, digit, index) is for testing, rounded to the nearest whole number. 1,438 train, 359 test.

    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI machine learning
    repository (1998), the test part, as scikit-learn's `load_digits` holds it.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey_BHW = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels_B = bunch.target.astype(np.int64)
    images_BHWC = resize_images(np.repeat(grey_BHW[..., None], 3, axis=3), image_size_px)
    is_test_B = np.zeros(len(labels_B), dtype=bool)
    for digit in range(10):
        ids = np.flatnonzero(labels_B == digit)
        ids = ids[np.argsort(hash64(_DIGITS_SEED, digit, ids), kind="stable")]
        is_test_B[ids[: (2 * len(ids) + _TEST_SHARE) // (2 * _TEST_SHARE)]] = True
    return ImageSets(
        LabelledImages(images_BHWC[~is_test_B], labels_B[~is_test_B]),
        LabelledImages(images_BHWC[is_test_B], labels_B[is_test_B]),
        tuple(str(digit) for digit in range(10)),
    )


def check_synthetic(options: Mapping[str, int] | None) -> dict[str, int]:
    """The options of `synthetic`, completed with their defaults.

    Raises:
        HarnessError: an unknown option or a number out of its range.
    """
    for key in options or {}:
        if key not in SYNTHETIC_DEFAULTS:
            raise HarnessError(f'unknown option "{key}"', where="synthetic", hint=nearest(key, SYNTHETIC_DEFAULTS))
    merged = {**SYNTHETIC_DEFAULTS, **(options or {})}
    lowest = {"train_images": 1, "test_images": 1, "num_classes": 2, "seed": 0}
    highest = {"num_classes": _MAX_CLASSES}
    for key, value in merged.items():
        hint = f"Leave it out for the default, {SYNTHETIC_DEFAULTS[key]}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise HarnessError(f"must be a whole number, not {value!r}", where=f"synthetic.{key}", hint=hint)
        if value < lowest[key] or value > highest.get(key, value):
            limit = f"at least {lowest[key]}" + (f" and at most {highest[key]}" if key in highest else "")
            raise HarnessError(f"must be {limit}, not {value}", where=f"synthetic.{key}", hint=hint)
    return merged


def synthetic(*, train_images: int, test_images: int, num_classes: int, seed: int, image_size_px: int) -> ImageSets:
    """Coloured waves with noise: colour, direction and frequency tell the class, the phase is random.

    Image i has the class i modulo num_classes. A pure function of its arguments, in whole numbers.
    """
    sides = {"image_size_px": image_size_px, "num_classes": num_classes, "seed": seed}
    return ImageSets(
        _waves(train_images, split=0, **sides),
        _waves(test_images, split=1, **sides),
        tuple(str(label) for label in range(num_classes)),
    )


def _waves(count: int, *, split: int, image_size_px: int, num_classes: int, seed: int) -> LabelledImages:
    labels_B = np.arange(count, dtype=np.int64) % num_classes
    # Hues a golden section apart differ for neighbouring classes, however many there are.
    hues = [label * 0.6180339887498949 % 1.0 for label in range(num_classes)]
    colours = np.array([[round(224 * c) for c in colorsys.hsv_to_rgb(hue, 0.7, 1.0)] for hue in hues])
    images_BHWC = np.empty((count, image_size_px, image_size_px, 3), dtype=np.uint8)
    y_HW, x_HW = np.mgrid[:image_size_px, :image_size_px]
    pixels = np.arange(image_size_px * image_size_px * 3).reshape(1, image_size_px, image_size_px, 3)
    for start in range(0, count, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, count))
        label_B111 = labels_B[ids].reshape(-1, 1, 1)
        phase_B11 = uniform_below(256, hash64(seed, split, ids)).reshape(-1, 1, 1)
        # Cycles across the image along y and x; the phase runs from 0 to 255, and so does a cycle.
        cycles_y, cycles_x = 1 + label_B111 % 3, label_B111 // 3 % 4
        phase_BHW = (256 * (cycles_y * y_HW + cycles_x * x_HW) // image_size_px + phase_B11) % 256
        wave_BHW = np.abs(phase_BHW - 128)  # a triangle from 128 down to 0 and up again
        hashes_BHWC = hash64(seed, split, ids.reshape(-1, 1, 1, 1), pixels)
        noise_BHWC = uniform_below(_NOISE, hashes_BHWC) - _NOISE // 2
        base_BHWC = (64 + wave_BHW[..., None]) * colours[labels_B[ids]].reshape(-1, 1, 1, 3) // 192
        images_BHWC[ids] = np.clip(base_BHWC + 16 + noise_BHWC, 0, 255)
    return LabelledImages(images_BHWC, labels_B)
