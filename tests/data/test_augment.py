"""Augmentation parameters and the normalisation table."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from harness.data.augment import Augmentation, SampleParameters, normalisation_table
from harness.data.prepare import channel_statistics
from harness.errors import HarnessError

IDS = np.arange(20_000)


def parameters(augmentation: Augmentation, epoch: int = 0, ids: np.ndarray = IDS) -> SampleParameters:
    return augmentation.parameters(epoch, ids, height_px=32, width_px=24)


def assert_uniform(values: np.ndarray, lowest: int, highest: int) -> None:
    seen = np.bincount(values - lowest, minlength=highest - lowest + 1)
    assert len(seen) == highest - lowest + 1
    expected, freedom = len(values) / len(seen), len(seen) - 1
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_parameters_are_uniform_over_their_ranges() -> None:
    how = parameters(Augmentation(seed=5, crop_padding_px=4, flip="random", cutout_size_px=9))
    assert_uniform(how.crop_y_B, 0, 8)
    assert_uniform(how.crop_x_B, 0, 8)
    assert_uniform(how.cutout_y_B, -4, 27)
    assert_uniform(how.cutout_x_B, -4, 19)
    assert_uniform(how.flip_B.astype(np.int64), 0, 1)


def test_parameters_are_independent_of_one_another() -> None:
    augmentation = Augmentation(seed=5, crop_padding_px=4, flip="random", cutout_size_px=8)
    columns = [*parameters(augmentation), *parameters(augmentation, epoch=1)]
    columns += parameters(Augmentation(seed=6, crop_padding_px=4, flip="random", cutout_size_px=8))
    correlation = np.corrcoef(np.stack([column.astype(float) for column in columns]))
    # The standard deviation of each is 1 / sqrt(20,000) = 0.007.
    assert np.abs(correlation - np.eye(len(columns))).max() < 0.035


def test_parameters_depend_on_seed_epoch_and_id_alone() -> None:
    augmentation = Augmentation(seed=5, crop_padding_px=4, flip="random", cutout_size_px=8)
    whole = parameters(augmentation, epoch=3)
    some = np.array([17, 3, 3, 19_999])
    for all_B, some_B in zip(whole, parameters(augmentation, epoch=3, ids=some), strict=True):
        assert np.array_equal(all_B[some], some_B)
    other_flip = parameters(Augmentation(seed=5, crop_padding_px=4, flip="alternating"), epoch=3)
    assert np.array_equal(whole.crop_y_B, other_flip.crop_y_B)


def test_pinned_parameters() -> None:
    # A change here changes every run.
    how = parameters(Augmentation(seed=1, crop_padding_px=4, flip="random", cutout_size_px=8), 2, np.arange(6))
    assert [column.astype(int).tolist() for column in how] == [
        [2, 0, 4, 6, 7, 7],
        [5, 0, 4, 7, 4, 5],
        [1, 0, 1, 0, 0, 0],
        [14, 3, 19, 27, 0, 23],
        [1, 15, 18, 18, 8, 18],
    ]
    flips = parameters(Augmentation(seed=1, flip="alternating"), 2, np.arange(6)).flip_B
    assert flips.astype(int).tolist() == [1, 1, 1, 1, 0, 1]


def test_nothing_asked_for_is_nothing_done() -> None:
    how = parameters(Augmentation(seed=5))
    assert not any(column.any() for column in how)


def test_a_random_flip_is_a_new_coin_each_epoch() -> None:
    augmentation = Augmentation(seed=5, flip="random")
    agree = parameters(augmentation, 0).flip_B == parameters(augmentation, 1).flip_B
    assert 0.48 < agree.mean() < 0.52


def test_an_alternating_flip_shows_both_sides_in_two_epochs() -> None:
    augmentation = Augmentation(seed=5, flip="alternating")
    flips = [parameters(augmentation, epoch).flip_B for epoch in range(4)]
    assert 0.48 < flips[0].mean() < 0.52
    assert all(np.array_equal(one, ~other) for one, other in pairwise(flips))


def test_mistakes_are_named() -> None:
    with pytest.raises(HarnessError, match='no flip "alternate"') as caught:
        Augmentation(seed=0, flip="alternate")  # type: ignore[arg-type]
    assert 'Did you mean "alternating"?' in str(caught.value)
    with pytest.raises(HarnessError, match='no crop_padding_mode "zero"'):
        Augmentation(seed=0, crop_padding_mode="zero")  # type: ignore[arg-type]
    with pytest.raises(HarnessError, match="cutout_size_px must not be negative"):
        Augmentation(seed=0, cutout_size_px=-1)


def test_reflection_needs_an_image_larger_than_its_padding() -> None:
    augmentation = Augmentation(seed=0, crop_padding_px=8, crop_padding_mode="reflect")
    augmentation.check_image_size(9, 32)
    with pytest.raises(HarnessError, match="8 cannot be reflected in images of 32×8 pixels") as caught:
        augmentation.check_image_size(32, 8)
    assert "Use at most 7" in str(caught.value)
    Augmentation(seed=0, crop_padding_px=8).check_image_size(8, 8)


def test_the_table_is_what_torchvision_computes() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    table = normalisation_table(mean, std)
    assert table.shape == (3, 256)
    assert table.dtype == np.float32
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), mean, std)
    looked_up = torch.stack([torch.from_numpy(table[c])[pixels[c].long()] for c in range(3)])
    assert torch.equal(looked_up, expected)
    exact = (np.arange(256) / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
    assert np.abs(table - exact).max() < 1e-6


@pytest.mark.parametrize("std", [0.0, -0.1, 1e-50, 1e-42, math.nan, math.inf])
@pytest.mark.parametrize(("index", "channel"), [(0, "red"), (1, "green"), (2, "blue")])
def test_a_deviation_that_cannot_be_divided_by_is_refused(std: float, index: int, channel: str) -> None:
    deviations = [0.5, 0.5, 0.5]
    deviations[index] = std
    with pytest.raises(HarnessError, match=rf"must be positive.* that of {channel} is {std:g}") as caught:
        normalisation_table((0.5, 0.5, 0.5), deviations)
    assert "data.std=[0.25, 0.25, 0.25]" in str(caught.value.hint)
    assert ("one value" in str(caught.value)) == (std == 0)


def test_a_channel_that_is_constant_in_all_images_is_refused() -> None:
    images_BHWC = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    images_BHWC[..., 1] = 77
    mean, std = channel_statistics(images_BHWC)
    with pytest.raises(HarnessError, match="that of green is 0: all pixels of that channel have one value"):
        normalisation_table(mean, std)
    table = normalisation_table(mean, (std[0], 1e-3, std[2]))  # what the hint says to do
    assert np.isfinite(table).all()


def test_a_table_is_finite_for_the_smallest_deviation() -> None:
    smallest = float(np.finfo(np.float32).tiny)
    assert np.isfinite(normalisation_table((0.5,) * 3, (smallest,) * 3)).all()


def test_a_table_needs_three_channels() -> None:
    with pytest.raises(HarnessError, match="three"):
        normalisation_table((0.5,), (0.5, 0.5, 0.5))
