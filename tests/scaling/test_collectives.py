"""The alpha–beta model against values worked out by hand, and what must hold for any numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.scaling.collectives import (
    Link,
    all_reduce_seconds,
    halving_doubling_seconds,
    hierarchical_seconds,
    recursive_doubling_seconds,
    ring_seconds,
    shared_cores_ring_seconds,
    tree_seconds,
)

LINK = Link(alpha_seconds=10.0, beta_seconds_per_byte=1.0)  # round numbers: 10 s a message, 1 s a byte
RANKS = st.integers(1, 5000)
# Nothing, or what a message or a link can have: products near 1e-308 have no digits left to compare.
BYTES = st.just(0.0) | st.floats(1, 1e10)
LINKS = st.builds(Link, st.just(0.0) | st.floats(1e-9, 1e-2), st.just(0.0) | st.floats(1e-15, 1e-6))


@pytest.mark.parametrize(
    ("function", "ranks", "seconds"),
    [
        (ring_seconds, 2, 2 * (10 + 8 / 2)),
        (ring_seconds, 4, 6 * (10 + 8 / 4)),
        (recursive_doubling_seconds, 2, 10 + 8),
        (recursive_doubling_seconds, 8, 3 * (10 + 8)),
        (recursive_doubling_seconds, 5, (2 + 2) * (10 + 8)),  # four exchange, the fifth hands in and gets back
        (halving_doubling_seconds, 4, 4 * 10 + 2 * 3 / 4 * 8),
        (halving_doubling_seconds, 5, 4 * 10 + 2 * 3 / 4 * 8 + 2 * (10 + 8)),
        (tree_seconds, 8, 54),  # doubling 54, halving-doubling 60 + 14
        (all_reduce_seconds, 4, 2 * (10 + 8)),  # ring 72, doubling 36, halving-doubling 52
    ],
)
def test_costs_worked_out_by_hand(function, ranks: int, seconds: float) -> None:
    assert function(ranks, 8, LINK) == pytest.approx(seconds)


def test_a_long_message_takes_the_algorithm_that_moves_the_fewest_bytes() -> None:
    size = 1_000_000
    assert all_reduce_seconds(4, size, LINK) == halving_doubling_seconds(4, size, LINK)
    assert all_reduce_seconds(5, size, LINK) == ring_seconds(5, size, LINK)  # doubling pays twice for the fifth
    assert all_reduce_seconds(4, size, LINK, "ring") == ring_seconds(4, size, LINK)
    assert all_reduce_seconds(5, size, LINK, "tree") == tree_seconds(5, size, LINK)


def test_nodes_worked_out_by_hand() -> None:
    """2 nodes of 4: a ring of 4 within, then 2 nodes exchange a fourth of the bytes by doubling."""
    intra = Link(1.0, 0.5)
    within = 6 * (1 + 0.5 * 8 / 4)
    between = 10 + 8 / 4
    assert hierarchical_seconds(2, 4, 8, intra=intra, inter=LINK) == pytest.approx(within + between)
    # With one adapter the four share its bandwidth, not its latency.
    shared = hierarchical_seconds(2, 4, 8, intra=intra, inter=LINK, adapter_per_rank=False)
    assert shared == pytest.approx(within + 10 + 8)
    assert hierarchical_seconds(1, 4, 8, intra=intra, inter=LINK) == pytest.approx(within)
    assert hierarchical_seconds(2, 1, 8, intra=intra, inter=LINK) == all_reduce_seconds(2, 8, LINK)


def test_ranks_that_share_cores_worked_out_by_hand() -> None:
    """4 ranks on 2 cores: 6 steps at half speed, each with 1 - 2/4 of the wait; 3 and 4 give 5 at right angles."""
    found = shared_cores_ring_seconds(4, 8, Link(10.0, 1.0), cores=2, wait_seconds=6.0)
    assert found == pytest.approx(6 * (2 * 10 + 5))
    # Busy for three quarters of a message, they take half as long again.
    found = shared_cores_ring_seconds(4, 8, Link(10.0, 4 / 3), cores=2, wait_seconds=6.0, busy_share=0.75)
    assert found == pytest.approx(6 * (1.5 * 10 + 5))
    assert shared_cores_ring_seconds(2, 8, LINK, cores=2, wait_seconds=6.0) == ring_seconds(2, 8, LINK)


def test_units() -> None:
    link = Link.of(alpha_us=5, gbps=400)
    assert link.alpha_seconds == pytest.approx(5e-6)
    assert link.seconds(50e9) == pytest.approx(1.0, rel=1e-4)  # 400 Gbit/s are 50 GB/s
    assert (link.alpha_us, link.gbps) == (pytest.approx(5), pytest.approx(400))
    assert Link(0.0, 0.0).gbps == math.inf


@given(size=BYTES, link=LINKS, wait=st.floats(0, 1), cores=st.integers(1, 64))
def test_one_rank_has_no_communication(size: float, link: Link, wait: float, cores: int) -> None:
    for algorithm in ("ring", "tree", "best"):
        assert all_reduce_seconds(1, size, link, algorithm) == 0
    assert hierarchical_seconds(1, 1, size, intra=link, inter=link) == 0
    assert shared_cores_ring_seconds(1, size, link, cores=cores, wait_seconds=wait) == 0


@given(ranks=RANKS, size=BYTES, link=LINKS, nodes=st.integers(1, 500))
def test_times_are_finite_and_never_below_what_the_bytes_need(ranks: int, size: float, link: Link, nodes: int) -> None:
    least = 2 * (ranks - 1) / ranks * size * link.beta_seconds_per_byte  # Patarasuk & Yuan 2009
    for found in (ring_seconds(ranks, size, link), hierarchical_seconds(nodes, ranks, size, intra=link, inter=link)):
        assert math.isfinite(found)
        assert found >= least * (1 - 1e-9) >= 0
    assert 0 <= all_reduce_seconds(ranks, size, link) <= ring_seconds(ranks, size, link)


@given(ranks=RANKS, size=BYTES, link=LINKS, factor=st.floats(1, 10))
def test_more_bytes_and_more_ring_members_take_no_less_time(ranks: int, size: float, link: Link, factor: float) -> None:
    slack = 1 + 1e-9
    assert all_reduce_seconds(ranks, size, link) <= all_reduce_seconds(ranks, size * factor, link) * slack
    assert ring_seconds(ranks, size, link) <= ring_seconds(ranks + 1, size, link) * slack


@given(ranks=st.integers(2, 200), size=BYTES, link=LINKS, cores=st.integers(1, 64), wait=st.floats(0, 1))
def test_fewer_cores_take_no_less_time(ranks: int, size: float, link: Link, cores: int, wait: float) -> None:
    few, many = (shared_cores_ring_seconds(ranks, size, link, cores=c, wait_seconds=wait) for c in (cores, cores + 1))
    assert few >= many * (1 - 1e-9)
    assert many >= ring_seconds(ranks, size, link) * (1 - 1e-9)
