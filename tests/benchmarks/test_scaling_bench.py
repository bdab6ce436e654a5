"""The scaling benchmark: the form of a short real measurement, and mistakes. Figures: docs/results.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.benchmarks.scaling import COSTS, bench_scaling, render_scaling
from harness.benchmarks.scaling_rank import VARIANTS
from harness.cli import main
from harness.recipe import load
from harness.scaling.workload import given_timing, workload_of


@pytest.mark.slow
def test_real_ranks_are_measured(tiny: Path) -> None:
    result = bench_scaling(tiny, ranks=[1, 2], rounds=2)
    assert json.loads(json.dumps(result)) == result
    one, two = result["ranks"]
    assert (one["ranks"], one["images_per_rank"], set(one["variants"])) == (1, 16, {"full"})
    assert (two["ranks"], two["images_per_rank"], set(two["variants"])) == (2, 8, set(VARIANTS))
    assert one["costs"] == {}
    assert set(two["costs"]) == set(COSTS)
    for variant in [*one["variants"].values(), *two["variants"].values()]:
        for unit in ("images_per_second", "step_ms"):
            assert 0 < variant[f"{unit}_min"] <= variant[f"{unit}_median"] <= variant[f"{unit}_max"]
        assert variant["images_per_second_max"] == pytest.approx(16 / variant["step_ms_min"] * 1e3)
    assert one["predicted"] is None
    told, without = two["predicted"], two["variants"]["independent"]["step_ms_median"]
    assert told["step_ms"] == pytest.approx(without + told["sync_batch_norm_ms"] + told["gradient_exchange_ms"])
    assert min(told["sync_batch_norm_ms"], told["gradient_exchange_ms"]) > 0
    assert result["speedup_over_one_rank"]["1"] == 1
    assert result["machine"]["versions"]["torch"]

    buckets = {name: variant["bucket_bytes"] for name, variant in two["variants"].items()}
    recipe = load(tiny)
    predicted = workload_of(recipe, given_timing(recipe, 1.0)).bucket_bytes
    assert buckets["full"] == list(predicted)  # the model's buckets are DDP's
    assert buckets["one_bucket"] == [sum(predicted)]
    assert len(buckets["small_buckets"]) > 1
    assert sum(buckets["small_buckets"]) == sum(predicted)
    assert buckets["no_exchange"] == buckets["independent"] == []

    text = render_scaling(result)
    assert "2 × " in text
    assert "gradient_exchange:" in text


@pytest.mark.slow
def test_without_sync_batch_norm_nothing_is_measured_twice(tiny: Path) -> None:
    (two,) = bench_scaling(tiny, ["training.sync_batch_norm=false"], ranks=[2], rounds=1)["ranks"]
    assert "no_sync_batch_norm" not in two["variants"]
    assert "sync_batch_norm" not in two["costs"]
    assert "gradient_exchange" in two["costs"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--ranks 3", "16 images does not divide among 3 ranks"),
        ("--ranks 16", "HINT: Choose other ranks, or training.global_batch_size=32."),
        ("--ranks 0", "must be a whole number of at least 1"),
        ("--rounds 0", "rounds must be at least 1"),
        ("training.precision=fp16", "fp16 needs a GPU"),
    ],
)
def test_mistakes_are_explained(tiny: Path, options: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", str(tiny), *options.split()]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "HINT:" in error
