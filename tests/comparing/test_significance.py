"""The statistics against references: scipy's, examples computed by hand, and simulations whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from harness.comparing.significance import (
    holm,
    mcnemar,
    mean_and_deviation,
    over_images,
    over_seeds,
    swap_test,
)


def one_each(only_first: int, only_second: int, both: int = 50, neither: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Two runs with so many images that only one of them, both or neither has right."""
    first = [True] * (only_first + both) + [False] * (only_second + neither)
    second = [False] * only_first + [True] * (both + only_second) + [False] * neither
    return np.array([first]), np.array([second])


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 0), (5, 5), (2, 9), (12, 3), (100, 140), (3000, 3100)])
def test_mcnemar_is_scipys_binomial_test(b: int, c: int) -> None:
    exact, mid = mcnemar(b, c)
    assert exact == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1.0)
    assert 0 < mid <= exact <= 1


def test_mcnemars_mid_p_as_published() -> None:
    """Fagerland, Lydersen & Laake (2013), airway hyper-responsiveness before and after transplantation: 1 and 7."""
    exact, mid = mcnemar(1, 7)
    assert exact == pytest.approx(0.0703, abs=5e-5)
    assert mid == pytest.approx(0.0391, abs=5e-5)
    assert mcnemar(3, 3)[1] == pytest.approx(1 - stats.binom.pmf(3, 6, 0.5) / 2)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 4), (3, 3), (2, 9), (60, 41)])
def test_with_a_run_each_the_swap_test_is_mcnemars(b: int, c: int) -> None:
    first, second = one_each(b, c)
    steps = second[0].astype(int) - first[0].astype(int)
    assert swap_test(steps) == pytest.approx(mcnemar(b, c), abs=1e-12)
    found = over_images(first, second)
    assert found.p_value == pytest.approx(mcnemar(b, c)[1])
    assert found.difference == pytest.approx((c - b) / first.size)


def test_the_swap_test_is_what_all_swaps_give() -> None:
    steps = np.array([3, -1, 2, 2, -3, 1, 0, 3, 1])
    sums = [sum(s * v for s, v in zip(signs, steps, strict=True)) for signs in itertools.product((-1, 1), repeat=9)]
    beyond = np.mean(np.abs(sums) > abs(steps.sum()))
    there = np.mean(np.abs(sums) == abs(steps.sum()))
    assert swap_test(steps) == pytest.approx((beyond + there, beyond + there / 2), abs=1e-12)
    assert swap_test(-steps) == pytest.approx(swap_test(steps))


def test_the_swap_test_is_scipys_permutation_test() -> None:
    generator = np.random.default_rng(0)
    steps = generator.integers(-3, 5, 200)
    sampled = stats.permutation_test(
        (steps.astype(float),), np.sum, permutation_type="samples", n_resamples=4_000, rng=generator, vectorized=True
    )
    assert swap_test(steps)[0] == pytest.approx(sampled.pvalue, abs=0.025)


def test_many_seeds_of_many_images_take_no_time() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.random((4, 10_000)) < 0.5, generator.random((5, 10_000)) < 0.52
    found = over_images(first, second)
    assert found.p_value is not None
    assert found.p_value < 1e-6
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.02 < found.high


def test_bonett_and_prices_interval_by_hand() -> None:
    """b = 9, c = 25 of 100: p12 = 10/102, p21 = 26/102, difference 16/102, variance (36/102 - (16/102)²) / 102."""
    found = over_images(*one_each(9, 25, both=40, neither=26))
    mean = 16 / 102
    room = 1.959964 * ((36 / 102 - mean**2) / 102) ** 0.5
    assert (found.low, found.high) == pytest.approx((mean - room, mean + room), rel=1e-6)
    assert found.count == 100


def simulated(generator: np.random.Generator, runs: int, images: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Two groups of networks on images of all difficulties; the second has `gain` more of them right."""
    ease = generator.beta(4, 1, images)
    draws = generator.random((2, runs, images))
    return draws[0] < ease, draws[1] < np.minimum(1, ease + gain)


@pytest.mark.parametrize("runs", [1, 3])
def test_false_alarms_are_as_rare_as_they_should_be(runs: int) -> None:
    """Without a difference, 5 % of the p-values are below 0.05 and 95 % of the intervals hold 0."""
    generator = np.random.default_rng(1)
    found = [over_images(*simulated(generator, runs, 300, 0.0)) for _ in range(1000)]
    alarms = np.mean([f.p_value < 0.05 for f in found if f.p_value is not None])
    holding = np.mean([f.low <= 0 <= f.high for f in found if f.low is not None and f.high is not None])
    assert 0.03 < alarms < 0.07  # three standard errors of 1,000 are 0.02
    assert 0.93 < holding < 0.975


def test_a_true_difference_is_found_and_held_by_the_interval() -> None:
    generator = np.random.default_rng(2)
    truth, found = [], []
    for _ in range(200):
        ease = generator.beta(4, 1, 2000)
        first, second = generator.random((3, 2000)) < ease, generator.random((3, 2000)) < np.minimum(1, ease + 0.04)
        truth.append(float(np.mean(np.minimum(1, ease + 0.04) - ease)))
        found.append(over_images(first, second))
    assert np.mean([f.p_value < 0.05 for f in found if f.p_value is not None]) > 0.95
    held = [f.low < t < f.high for f, t in zip(found, truth, strict=True) if f.low is not None and f.high is not None]
    assert np.mean(held) > 0.92


def test_over_seeds_is_scipys_welch_test() -> None:
    first, second = [0.90, 0.92, 0.91], [0.95, 0.93, 0.96, 0.94]
    found, reference = over_seeds(first, second), stats.ttest_ind(second, first, equal_var=False)
    assert found.p_value == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.difference == pytest.approx(0.035)
    assert found.count == 7


def test_welch_by_hand() -> None:
    """Means 2 and 5, variances 1 and 4 over 3 each: t = 3 / sqrt(5/3), 2.94 degrees of freedom."""
    found = over_seeds([1, 2, 3], [3, 5, 7])
    t, freedom = 3 / (5 / 3) ** 0.5, (5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    assert found.p_value == pytest.approx(2 * stats.t.sf(t, freedom))


@pytest.mark.parametrize(("first", "second"), [([0.9], [0.8, 0.7]), ([0.9], [0.8]), ([0.5, 0.5], [0.6, 0.6])])
def test_seeds_that_tell_no_spread_are_not_tested(first: list[float], second: list[float]) -> None:
    found = over_seeds(first, second)
    assert (found.p_value, found.low, found.high) == (None, None, None)
    assert found.difference == pytest.approx(np.mean(second) - np.mean(first))


def test_false_alarms_over_seeds() -> None:
    generator = np.random.default_rng(3)
    found = [over_seeds(generator.normal(0.9, 0.01, 3), generator.normal(0.9, 0.01, 3)).p_value for _ in range(1000)]
    assert np.mean([p < 0.05 for p in found if p is not None]) < 0.065


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_the_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation([1, 2, 3, 4]) == pytest.approx((2.5, (5 / 3) ** 0.5))
    assert mean_and_deviation([0.5]) == (0.5, None)


def test_other_numbers_of_images_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same images"):
        over_images(np.ones((1, 3), bool), np.ones((1, 4), bool))
