"""Digits and synthetic patterns: stable, balanced, learnable."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from harness.data.embedded import SYNTHETIC_DEFAULTS, check_synthetic
from harness.data.imagesets import ImageSets
from harness.data.sources import locate
from harness.errors import HarnessError

# Anything that changes these changes the data that recorded results stand on.
DIGITS_SHA256 = {
    8: "07948ae260791aecc037ca530282789abb6b001fe25816945e8c8b87c4afabac",
    32: "6686fec47028e1683c06f3f9ec2e2c507e50a550da7cec3466eeb02c54b2e075",
}
SYNTHETIC_SHA256 = "5d0f63986cfae188ef6bdaf379133f04d335edcffd9a186ff2ac1eb9ed4d1db9"


def digest(sets: ImageSets) -> str:
    sha256 = hashlib.sha256()
    for split in (sets.train, sets.test):
        sha256.update(np.ascontiguousarray(split.images_BHWC))
        sha256.update(split.labels_B.astype("<i8"))
    return sha256.hexdigest()


def centroid_accuracy(sets: ImageSets) -> float:
    """Of the nearest class mean, the simplest classifier there is."""
    train, test = (s.images_BHWC.reshape(len(s.labels_B), -1).astype(float) for s in (sets.train, sets.test))
    centroids = np.stack([train[sets.train.labels_B == label].mean(0) for label in range(len(sets.classes))])
    distances = ((test[:, None] - centroids) ** 2).sum(-1)
    return float((distances.argmin(1) == sets.test.labels_B).mean())


@pytest.mark.parametrize("image_size_px", [8, 32])
def test_digits_are_always_the_same(image_size_px: int) -> None:
    sets = locate("digits", image_size_px=image_size_px).load()
    assert digest(sets) == DIGITS_SHA256[image_size_px]


def test_digits_are_split_by_class_without_overlap() -> None:
    sets = locate("digits", image_size_px=8).load()
    true = load_digits()
    counts, test_counts = np.bincount(true.target), np.bincount(sets.test.labels_B)
    assert (np.abs(test_counts - counts / 5) <= 0.5).all()
    assert len(sets.train.labels_B) + len(sets.test.labels_B) == 1797
    both = np.concatenate([sets.train.images_BHWC, sets.test.images_BHWC])
    assert (both == both[..., :1]).all()
    found = sorted(np.rint(image[..., 0] * (16 / 255)).astype(int).tobytes() for image in both)
    assert found == sorted(image.astype(int).tobytes() for image in true.images)
    assert 0.85 < centroid_accuracy(sets) < 0.95


def test_synthetic_is_a_pure_function_of_its_options() -> None:
    options = {"train_images": 600, "test_images": 50, "num_classes": 7}
    first = locate("synthetic", synthetic=options, image_size_px=16).load()
    assert digest(first) == SYNTHETIC_SHA256
    assert digest(locate("synthetic", synthetic=options | {"seed": 1}, image_size_px=16).load()) != SYNTHETIC_SHA256
    more = locate("synthetic", synthetic=options | {"train_images": 700}, image_size_px=16).load()
    np.testing.assert_array_equal(more.train.images_BHWC[:600], first.train.images_BHWC)
    assert not np.array_equal(first.train.images_BHWC[:50], first.test.images_BHWC)


def test_synthetic_defaults_are_balanced_and_learnable() -> None:
    sets = locate("synthetic").load()
    assert sets.train.images_BHWC.shape == (SYNTHETIC_DEFAULTS["train_images"], 32, 32, 3)
    assert len(sets.test.labels_B) == SYNTHETIC_DEFAULTS["test_images"]
    assert sets.classes == tuple("0123456789")
    assert np.ptp(np.bincount(sets.train.labels_B)) <= 1
    assert centroid_accuracy(sets) > 0.95


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_image": 5}, 'unknown option "train_image"\n  HINT: Did you mean "train_images"'),
        ({"train_images": 0}, "train_images: must be at least 1, not 0"),
        ({"test_images": -1}, "test_images: must be at least 1"),
        ({"num_classes": 1}, "num_classes: must be at least 2 and at most 1000, not 1"),
        ({"num_classes": 1001}, "not 1001"),
        ({"num_classes": True}, "must be a whole number, not True"),
        ({"train_images": 5.0}, "must be a whole number, not 5.0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(HarnessError, match=words):
        check_synthetic(options)
