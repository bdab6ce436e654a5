"""Augmentation parameters and the normalisation table."""

from itertools import pairwise

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from harness.data.augment import Augmentation, SampleParameters, normalisation_table

IDS = np.arange(20_000)


def parameters(augmentation: Augmentation, epoch: int = 0, ids: np.ndarray = IDS) -> SampleParameters:
    return augmentation.parameters(epoch, ids, height_px=32, width_px=24)


def test_parameters_are_uniform_over_their_ranges() -> None:
    how = parameters(Augmentation(seed=5, crop_padding_px=4, flip="random", cutout_size_px=9))
    for values_B, lowest, highest in zip(how, (0, 0, 0, -4, -4), (8, 8, 1, 27, 19), strict=True):
        seen = np.bincount(values_B.astype(int) - lowest, minlength=highest - lowest + 1)
        assert len(seen) == highest - lowest + 1
        expected, freedom = len(IDS) / len(seen), len(seen) - 1
        assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


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
