"""What a recipe's step is made of: buckets as DistributedDataParallel makes them, messages, times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.recipe import load
from harness.scaling.workload import (
    affine,
    batch_norm_channels,
    given_timing,
    gradient_buckets,
    measured_timing,
    sync_batch_norm_messages,
    workload_of,
)

ROOT = Path(__file__).resolve().parents[2]
SEED = ROOT / "recipes" / "seed.yaml"
CPU = torch.device("cpu")


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_buckets_are_those_of_torch(sizes: list[int]) -> None:
    """By torch's own function, with limits small enough for these tensors."""
    first, cap = 256, 1024
    parameters = [torch.empty(size) for size in reversed(sizes)]
    indices, _ = dist._compute_bucket_assignment_by_size(parameters, [first, cap])
    theirs = tuple(sum(parameters[i].numel() * 4 for i in bucket) for bucket in indices)
    ours = gradient_buckets([4 * size for size in sizes], first_bytes=first, cap_bytes=cap)
    assert sorted(ours) == sorted(theirs)
    assert sum(ours) == 4 * sum(sizes)


def test_the_seeds_network() -> None:
    recipe = load(SEED)
    work = workload_of(recipe, given_timing(recipe, 20.0))
    assert sum(work.bucket_bytes) == 4 * 380_646
    assert len(work.bucket_bytes) == 2
    assert len(work.sync_batch_norm_bytes) == 2 * 18
    assert work.pass_seconds(128) == pytest.approx(0.020)
    off = workload_of(load(SEED, ["training.sync_batch_norm=false"]), given_timing(recipe, 20.0))
    assert off.sync_batch_norm_bytes == ()
    halves = load(SEED, ["training.gradient_accumulation_steps=2"])
    assert workload_of(halves, given_timing(halves, 20.0)).pass_seconds(64) == pytest.approx(0.010)


def test_messages_of_a_normalisation() -> None:
    layers = torch.nn.Sequential(torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.BatchNorm2d(3))
    assert batch_norm_channels(layers) == [5, 3]
    assert sync_batch_norm_messages([5, 3], element_bytes=8) == (88, 80, 56, 48)


@pytest.mark.parametrize(
    ("small", "large", "fixed", "slope"),
    [
        ((16, 0.5), (64, 1.1), 0.3, 0.0125),
        ((16, 0.1), (64, 1.1), 0.0, 1.1 / 64),  # steeper than through the origin: nothing is fixed
        ((16, 1.2), (64, 1.1), 1.1, 0.0),  # falling, by noise: all is fixed
    ],
)
def test_two_times_give_a_fixed_part_and_one_for_each_image(small, large, fixed: float, slope: float) -> None:
    assert affine(small, large) == (pytest.approx(fixed), pytest.approx(slope))


@pytest.mark.parametrize("step_ms", [0.0, -3.0, float("nan"), float("inf")])
def test_a_step_takes_time(step_ms: float) -> None:
    with pytest.raises(HarnessError, match="more than 0"):
        given_timing(load(SEED), step_ms)


def test_a_step_is_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.scaling.workload.MEASURE_SECONDS", 0.0)  # no more steps than the least
    recipe = load(tiny)
    timing = measured_timing(recipe, CPU)
    assert timing.step_seconds > 0
    assert timing.fixed_seconds + 16 * timing.seconds_per_image == pytest.approx(timing.step_seconds)
    assert "at 16 images a pass and at 4" in timing.how
    with pytest.raises(HarnessError, match="fp16 needs a GPU"):
        measured_timing(load(tiny, ["training.precision=fp16"]), CPU)
