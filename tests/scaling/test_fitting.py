"""The fit gives back the constants that made the points, with and without noise."""

from __future__ import annotations

import random

import pytest

from harness.errors import HarnessError
from harness.scaling.collectives import Link, ring_seconds
from harness.scaling.fitting import LoopbackModel, Measured, error_summary, fit_link, fit_loopback

TRUTH = LoopbackModel(Link.of(alpha_us=200, gbps=8), cores=2, wait_seconds=1.5e-3, busy_share=0.75)
SIZES = [4096 << doubling for doubling in range(13)]


def points_of(model: LoopbackModel, ranks: list[int], noise: float = 0.0) -> list[Measured]:
    generator = random.Random(0)
    return [
        Measured(n, size, model.seconds(n, size) * (1 + generator.uniform(-noise, noise)))
        for n in ranks
        for size in SIZES
    ]


def test_the_constants_come_back() -> None:
    fitted = fit_loopback(points_of(TRUTH, [2, 3]), cores=2)
    assert fitted.link.alpha_us == pytest.approx(200, rel=1e-6)
    assert fitted.link.gbps == pytest.approx(8, rel=1e-6)
    assert fitted.wait_seconds == pytest.approx(1.5e-3, rel=0.05)  # the width of the search's steps
    assert fitted.busy_share == pytest.approx(0.75, abs=0.02)
    assert error_summary(fitted, points_of(TRUTH, [4]))["error_percent_max"] < 2


def test_noise_of_ten_percent_moves_them_little() -> None:
    fitted = fit_loopback(points_of(TRUTH, [2, 3], noise=0.1), cores=2)
    assert fitted.link.alpha_us == pytest.approx(200, rel=0.1)
    assert fitted.link.gbps == pytest.approx(8, rel=0.1)
    assert error_summary(fitted, points_of(TRUTH, [4]))["error_percent_max"] < 15


def test_errors_are_relative() -> None:
    """A message that takes 10,000 times as long must not decide alone: both ends are met to the same percentage."""
    link = Link.of(alpha_us=100, gbps=10)
    points = [Measured(2, size, ring_seconds(2, size, link)) for size in (4, 4, 4, 2**26)]
    off = [*points, Measured(2, 4, 1.4 * points[0].seconds), Measured(2, 2**26, 0.9 * points[-1].seconds)]
    fitted = fit_link(off)
    assert fitted.alpha_us == pytest.approx(110, rel=0.05)
    assert fitted.gbps == pytest.approx(10.6, rel=0.03)


def test_constants_are_never_negative() -> None:
    falling = [Measured(2, 4096, 1e-3), Measured(2, 2**20, 0.5e-3)]  # more bytes in less time
    assert fit_link(falling).beta_seconds_per_byte == 0
    steep = [Measured(2, 4096, 1e-6), Measured(2, 8192, 4e-6)]
    assert fit_link(steep).alpha_seconds == 0
    assert fit_link(steep).beta_seconds_per_byte > 0


def test_a_machine_with_fewer_cores_than_any_group_is_fitted_by_its_share() -> None:
    one_core = LoopbackModel(TRUTH.link, cores=1, wait_seconds=0.0)
    fitted = fit_loopback(points_of(one_core, [2, 3]), cores=1)
    assert fitted.link.alpha_us == pytest.approx(200, rel=1e-6)
    assert fitted.wait_seconds < 1e-4


def test_too_little_to_fit_is_an_error() -> None:
    with pytest.raises(HarnessError, match="cannot be told apart"):
        fit_link([Measured(2, 4096, 1e-3), Measured(2, 4096, 1.1e-3)])
    with pytest.raises(HarnessError, match="cannot be told apart"):
        fit_link([Measured(1, 4096, 1e-3), Measured(1, 8192, 1.1e-3)])
    with pytest.raises(HarnessError, match="held out"):
        error_summary(TRUTH, [])


def test_the_summary_is_in_percent_of_what_was_measured() -> None:
    model = LoopbackModel(Link(1.0, 0.0), cores=8)  # 2 s for two ranks, whatever the bytes
    points = [Measured(2, 4, 1.0), Measured(2, 4, 2.0), Measured(2, 4, 4.0)]
    assert error_summary(model, points) == {"points": 3, "error_percent_median": 50, "error_percent_max": 100}
