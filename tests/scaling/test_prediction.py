"""Predictions against values worked out by hand, and what must hold for any workload and network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.scaling.collectives import Link
from harness.scaling.networks import NETWORKS, Network
from harness.scaling.prediction import Impossible, Prediction, Workload, exposed_seconds, predict

# Two ranks that reach each other by a ring: α = 1 s, no cost of bytes, so that an all-reduce takes 2 s.
TWO_SECONDS = Network("two seconds", Link(1.0, 0.0), algorithm="ring")


def test_what_the_backward_pass_hides_worked_out_by_hand() -> None:
    def five_seconds(size_bytes: float) -> float:
        return 5.0

    # Buckets are full after 10, 20, 30 and 40 s, each exchanged within 5 s: only the last is left over.
    assert exposed_seconds([7, 7, 7, 7], 40.0, five_seconds) == pytest.approx(5)
    # Full after 2, 4, 6, 8 s: the exchange cannot follow and ends 2 + 4·5 s after the start.
    assert exposed_seconds([7, 7, 7, 7], 8.0, five_seconds) == pytest.approx(2 + 20 - 8)
    assert exposed_seconds([28], 8.0, five_seconds) == pytest.approx(5)  # one bucket hides nothing
    # A small last bucket: full at 36 and 40 s, with the first done at 41.
    assert exposed_seconds([9, 1], 40.0, five_seconds) == pytest.approx(41 + 5 - 40)
    assert exposed_seconds([], 8.0, five_seconds) == 0


def test_a_step_worked_out_by_hand() -> None:
    work = Workload(
        global_batch_size=8, accumulation_steps=2, fixed_seconds=1.0, seconds_per_image=3.0,
        bucket_bytes=(100,), sync_batch_norm_bytes=(8, 8, 8),
    )  # fmt: skip
    strong = predict(work, TWO_SECONDS, 2, mode="strong")
    assert isinstance(strong, Prediction)
    assert strong.images_per_gpu == 4
    assert strong.compute_seconds == pytest.approx(2 * (1 + 3 * 2))  # two micro-batches of two images
    assert strong.sync_batch_norm_seconds == pytest.approx(2 * 3 * 2)  # in both
    assert strong.exchange_seconds == strong.exchange_total_seconds == pytest.approx(2)  # after the last
    assert strong.step_seconds == pytest.approx(14 + 12 + 2)
    assert strong.images_per_second == pytest.approx(8 / 28)
    assert strong.efficiency == pytest.approx((8 / 28) / (2 * 8 / 26))
    weak = predict(work, TWO_SECONDS, 2, mode="weak")
    assert isinstance(weak, Prediction)
    assert weak.images_per_gpu == 8
    assert weak.step_seconds == pytest.approx(26 + 12 + 2)
    assert weak.efficiency == pytest.approx(26 / 40)


def test_a_batch_that_does_not_reach_is_a_row_with_its_reason() -> None:
    work = Workload(100, 1, 0.0, 1.0, (4,))
    few = predict(work, TWO_SECONDS, 128, mode="strong")
    assert few == Impossible(128, "a micro-batch of 100 images is smaller than the number of GPUs")
    odd = predict(work, TWO_SECONDS, 8, mode="strong")
    assert odd == Impossible(8, "a micro-batch of 100 images does not divide among 8 GPUs")
    assert isinstance(predict(work, TWO_SECONDS, 128, mode="weak"), Prediction)
    large = predict(work, NETWORKS["nvlink4"], 1024, mode="weak")
    assert large == Impossible(1024, "nvlink4 joins at most 256 GPUs")


WORKLOADS = st.builds(
    Workload,
    global_batch_size=st.sampled_from([64, 512, 4096]),
    accumulation_steps=st.sampled_from([1, 2, 4]),
    fixed_seconds=st.floats(0, 1),
    seconds_per_image=st.floats(1e-7, 1),
    bucket_bytes=st.lists(st.integers(1, 2**28), max_size=8).map(tuple),
    sync_batch_norm_bytes=st.lists(st.integers(8, 2**16), max_size=40).map(tuple),
)
ANY_NETWORK = st.sampled_from(sorted(NETWORKS)).map(NETWORKS.__getitem__)
MODES = st.sampled_from(["strong", "weak"])


@given(work=WORKLOADS, network=ANY_NETWORK, mode=MODES)
def test_one_gpu_has_no_communication(work: Workload, network: Network, mode) -> None:
    one = predict(work, network, 1, mode=mode)
    assert isinstance(one, Prediction)
    assert one.exchange_seconds == one.exchange_total_seconds == one.sync_batch_norm_seconds == 0
    assert one.step_seconds == one.compute_seconds
    assert one.efficiency == pytest.approx(1)


@given(work=WORKLOADS, network=ANY_NETWORK, mode=MODES, gpus=st.integers(1, 2048) | st.sampled_from([2, 4, 8, 16]))
def test_no_prediction_is_too_good_to_be_true(work: Workload, network: Network, mode, gpus: int) -> None:
    found = predict(work, network, gpus, mode=mode)
    if isinstance(found, Impossible):
        assert found.why
        return
    one = predict(work, network, 1, mode=mode)
    assert isinstance(one, Prediction)
    assert min(found.exchange_seconds, found.sync_batch_norm_seconds) >= 0
    assert found.exchange_seconds <= found.exchange_total_seconds * (1 + 1e-9) + 1e-12
    assert found.step_seconds >= found.compute_seconds > 0
    assert found.images_per_second <= gpus * one.images_per_second * (1 + 1e-9)  # before the cut at 1
    assert 0 < found.efficiency <= 1
    if mode == "weak":
        assert found.compute_seconds == one.compute_seconds


@given(work=WORKLOADS, gpus=st.sampled_from([2, 4, 8, 16]), mode=MODES)
def test_a_slower_network_is_never_faster(work: Workload, gpus: int, mode) -> None:
    fast, slow = (Network("x", Link.of(alpha_us=a, gbps=g)) for a, g in ((1, 400), (20, 25)))
    one, other = predict(work, fast, gpus, mode=mode), predict(work, slow, gpus, mode=mode)
    assert isinstance(one, Prediction)
    assert isinstance(other, Prediction)
    assert one.step_seconds <= other.step_seconds * (1 + 1e-9)
