"""Whether two groups of runs differ by more than chance: pure functions on arrays, deterministic.

Two kinds of chance are told apart. Over the test images: the trained networks are taken as they are, and the question
is whether the difference would be there on other images of the kind. Over the seeds: the test images are taken as they
are, and the question is whether it would be there in other trainings.

Legend of shape letters: N test images; A, B runs of the two groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Estimate:
    """A difference of accuracies, the second group less the first, with what is known of it.

    Attributes:
        difference: in shares, from -1 to 1.
        low, high: its 95 % interval; None where nothing tells its spread.
        p_value: two-sided, that there is none; None where it cannot be tested.
        method: how the p-value was made.
        count: images, or runs of both groups.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    method: str
    count: int


def over_images(first_AN: np.ndarray, second_BN: np.ndarray) -> Estimate:
    """The difference of mean accuracies over the same images, each group's runs averaged for each image.

    With a run each the p-value is McNemar's mid-p. With several it is that of the permutation test that swaps the two
    groups image by image, the same test for means: its distribution is computed whole, not sampled. The interval is
    Bonett & Price's adjusted Wald interval (2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data", Journal of Educational and Behavioral Statistics 37:479), with means of runs in
    place of ones and zeros.

    Args:
        first_AN, second_BN: (runs, images) bool, whether a run classifies an image correctly.

    Raises:
        ValueError: the groups have other numbers of images, or none.
    """
    if first_AN.shape[1] != second_BN.shape[1] or not first_AN.size or not second_BN.size:
        raise ValueError("the groups must have the same images, and at least one")
    runs_a, runs_b = len(first_AN), len(second_BN)
    scale = math.lcm(runs_a, runs_b)
    # In whole numbers: `scale` times the difference of the means.
    steps_N = second_BN.sum(0, dtype=np.int64) * (scale // runs_b) - first_AN.sum(0, dtype=np.int64) * (scale // runs_a)
    if runs_a == runs_b == 1:
        p_value, method = mcnemar(int((steps_N < 0).sum()), int((steps_N > 0).sum())), "McNemar's mid-p test"
    else:
        p_value, method = swap_test(steps_N), "paired permutation test, mid-p"
    difference_N = steps_N / scale
    # Wald's interval after an image more for either side was added, which keeps its level where few images differ.
    count = len(difference_N) + 2
    mean = float(difference_N.sum()) / count
    variance = (float((difference_N**2).sum()) + 2) / count - mean**2
    room = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance / count)
    low, high = max(-1.0, mean - room), min(1.0, mean + room)
    return Estimate(float(difference_N.mean()), low, high, p_value, method, len(steps_N))


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's test for two networks on the same images: the mid-p value, two-sided.

    Fagerland, Lydersen & Laake (2013), "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better
    than exact conditional", BMC Medical Research Methodology 13:91: the exact test is conservative, mid-p is not.

    Args:
        only_first, only_second: images that only one of them classifies correctly.
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    just_there = float(stats.binom.pmf(fewer, discordant, 0.5))
    if only_first == only_second:
        return 1 - just_there / 2 if discordant else 1.0
    return 2 * float(stats.binom.cdf(fewer, discordant, 0.5)) - just_there


def swap_test(steps_N: np.ndarray) -> float:
    """Two-sided mid-p value of a sum whose parts could as well have had the other sign each.

    The distribution of the sum of N values, each with a random sign, comes from its characteristic function, a product
    of cosines, by one Fourier transform: exact but for rounding, some 1e-15. With values of -1, 0 and 1 it is McNemar's
    test.

    Args:
        steps_N: (N,) whole numbers.
    """
    sizes, counts = np.unique(np.abs(steps_N[steps_N != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    divisor = int(np.gcd.reduce(sizes))
    sizes, total = sizes // divisor, abs(int(steps_N.sum())) // divisor
    largest = int((sizes * counts).sum())
    length = 1 << (2 * largest + 1).bit_length()  # sums from -largest to largest fit without meeting
    angle = 2 * np.pi * np.arange(length // 2 + 1) / length
    wave = np.ones(len(angle))
    for size, count in zip(sizes, counts, strict=True):
        wave *= np.cos(size * angle) ** int(count)
    chance = np.clip(np.fft.irfft(wave, length), 0.0, 1.0)  # of the sum s at place s modulo length
    beyond = float(chance[total + 1 : largest + 1].sum())
    # Of the sum itself and its negative half each counts; they are the same where it is 0.
    return min(1.0, 2 * beyond + float(chance[total]) * (0.5 if total == 0 else 1.0))


def over_seeds(first_A: Sequence[float], second_B: Sequence[float]) -> Estimate:
    """The difference of mean accuracies over runs with other seeds: Welch's t-test and its interval.

    Args:
        first_A, second_B: an accuracy a run, shares from 0 to 1.
    """
    method, total = "Welch's t-test", len(first_A) + len(second_B)
    difference = float(np.mean(second_B) - np.mean(first_A))
    if min(len(first_A), len(second_B)) < 2 or not (np.ptp(first_A) or np.ptp(second_B)):
        return Estimate(difference, None, None, None, method, total)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # scipy's, where one group is constant
        found = stats.ttest_ind(second_B, first_A, equal_var=False)
        low, high = found.confidence_interval(LEVEL)
    return Estimate(difference, float(low), float(high), float(found.pvalue), method, total)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method (1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[int(index)] = highest
    return adjusted


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for the latter of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
