"""The statistics of `harness compare` against references: scipy's, examples computed by hand, and simulations whose
truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from harness.report.compare import Estimate, holm, mcnemar, mean_and_deviation, over_images, over_seeds, swap_test


def one_each(only_first: int, only_second: int, both: int = 50, neither: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Two runs with so many images that only one of them, both or neither has right."""
    first = [True] * (only_first + both) + [False] * (only_second + neither)
    second = [False] * only_first + [True] * (both + only_second) + [False] * neither
    return np.array([first]), np.array([second])


def interval(found: Estimate) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 4), (1, 0), (3, 3), (2, 9), (60, 41), (3000, 3100)])
def test_with_a_run_each_it_is_mcnemars_mid_p(b: int, c: int) -> None:
    """That is scipy's exact binomial test less half of what is just as likely as what was seen."""
    exact = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    just_there = stats.binom.pmf(b, b + c, 0.5) * (1 if b == c else 2) if b + c else 0.0
    assert mcnemar(b, c) == pytest.approx(exact - just_there / 2)
    first, second = one_each(b, c)
    assert swap_test(second[0].astype(int) - first[0].astype(int)) == pytest.approx(mcnemar(b, c), abs=1e-12)
    found = over_images(first, second)
    assert found.p_value == mcnemar(b, c)
    assert found.difference == pytest.approx((c - b) / first.size)
    # Fagerland, Lydersen & Laake (2013), airway hyper-responsiveness before and after transplantation.
    assert mcnemar(1, 7) == pytest.approx(0.0391, abs=5e-5)


@pytest.mark.parametrize("steps", [[3, -1, 2, 2, -3, 1, 0, 3, 1], [2, -2, 4, 0], [1, -1], [5]], ids=str)
def test_the_swap_test_is_what_all_swaps_give(steps: list[int]) -> None:
    swaps = itertools.product((-1, 1), repeat=len(steps))
    sums = np.array([sum(s * v for s, v in zip(signs, steps, strict=True)) for signs in swaps])
    beyond, there = np.mean(np.abs(sums) > abs(sum(steps))), np.mean(np.abs(sums) == abs(sum(steps)))
    assert swap_test(np.array(steps)) == pytest.approx(beyond + there / 2, abs=1e-12)
    assert swap_test(-np.array(steps)) == pytest.approx(swap_test(np.array(steps)))


def test_many_seeds_of_many_images_take_no_time() -> None:
    generator = np.random.default_rng(0)
    found = over_images(generator.random((4, 10_000)) < 0.5, generator.random((5, 10_000)) < 0.52)
    assert found.p_value is not None
    assert found.p_value < 1e-6
    low, high = interval(found)
    assert low < 0.02 < high


def test_bonett_and_prices_interval_by_hand() -> None:
    """b = 9, c = 25 of 100: p12 = 10/102, p21 = 26/102, difference 16/102, variance (36/102 - (16/102)²) / 102."""
    found = over_images(*one_each(9, 25, both=40, neither=26))
    mean = 16 / 102
    room = 1.959964 * ((36 / 102 - mean**2) / 102) ** 0.5
    assert interval(found) == pytest.approx((mean - room, mean + room), rel=1e-6)
    assert found.count == 100


@pytest.mark.parametrize(("runs", "images", "gain"), [(1, 300, 0.0), (3, 300, 0.0), (3, 2000, 0.04)])
def test_how_often_differences_are_found(runs: int, images: int, gain: float) -> None:
    """Without one, 5 % of the p-values are below 0.05; a true one is found; 95 % of the intervals hold it."""
    generator, found, held = np.random.default_rng(1), [], []
    for _ in range(200 if gain else 1000):  # three standard errors of 1,000 are 0.02
        ease = generator.beta(4, 1, images)  # of images of all difficulties
        easier = np.minimum(1, ease + gain)
        draws = generator.random((2, runs, images))
        found.append(over_images(draws[0] < ease, draws[1] < easier))
        low, high = interval(found[-1])
        held.append(low <= np.mean(easier - ease) <= high)
    below = np.mean([f.p_value < 0.05 for f in found])  # type: ignore[operator]
    assert below > 0.95 if gain else 0.03 < below < 0.07
    assert 0.92 < np.mean(held) < 0.98


@pytest.mark.parametrize("first", [[0.90, 0.92, 0.91], [0.5, 0.5, 0.5], [1, 2, 3]], ids=str)
def test_welch_by_hand(first: list[float]) -> None:
    """t = difference / sqrt(s²/n + s²/n), with Welch & Satterthwaite's degrees of freedom; a group may be constant."""
    second = [0.95, 0.93, 0.96, 0.94]
    parts = np.array([np.var(first, ddof=1) / 3, np.var(second, ddof=1) / 4])
    difference, error = np.mean(second) - np.mean(first), parts.sum() ** 0.5
    freedom = parts.sum() ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    found = over_seeds(first, second)
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(difference) / error, freedom))
    room = stats.t.ppf(0.975, freedom) * error
    assert interval(found) == pytest.approx((difference - room, difference + room))
    assert (found.difference, found.count) == (pytest.approx(difference), 7)


@pytest.mark.parametrize(("first", "second"), [([0.9], [0.8, 0.7]), ([0.9], [0.8]), ([0.5, 0.5], [0.6, 0.6])])
def test_seeds_that_tell_no_spread_are_not_tested(first: list[float], second: list[float]) -> None:
    found = over_seeds(first, second)
    assert (found.p_value, found.low, found.high) == (None, None, None)
    assert found.difference == pytest.approx(np.mean(second) - np.mean(first))


def test_holm_and_the_deviation_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    assert mean_and_deviation([1, 2, 3, 4]) == pytest.approx((2.5, (5 / 3) ** 0.5))  # of a sample
    assert mean_and_deviation([0.5]) == (0.5, None)
