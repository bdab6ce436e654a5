"""Overhead, ranks, scaling and start-up: each runs end to end, as short as can be; and their page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.bench import spread
from harness.cli import main
from harness.recipe import load
from harness.scaling import workload_of
from scripts.benchmarks.overhead import bench_overhead, bench_ranks
from scripts.benchmarks.page import GOALS, page, write
from scripts.benchmarks.scaling import COSTS, VARIANTS, bench_scaling, render_scaling
from scripts.benchmarks.startup import bench_startup

OVERHEAD = {"pytorch", "pytorch_channels_last", "accelerate", "lightning", "timm", "harness_plain", "harness"}
RANKS = {"pytorch_ddp", "pytorch_ddp_channels_last", "accelerate", "harness_plain", "harness"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("bench", "bare", "names"), [(bench_overhead, "pytorch", OVERHEAD), (bench_ranks, "pytorch_ddp", RANKS)]
)
def test_each_loop_is_measured_against_the_bare_one(bench: Any, bare: str, names: set[str]) -> None:
    result = bench(rounds=1, steps=2)
    assert json.loads(json.dumps(result)) == result
    measured = {name: each for name, each in result["contestants"].items() if each is not None}
    assert set(result["contestants"]) == names
    assert set(measured) >= names - {"lightning"}  # which is not among what tests need
    assert all(0 < each["milliseconds_per_step_median"] < math.inf for each in measured.values())
    pairs = {f"{name}_over_{bare}": (name, bare) for name in measured if name != bare}
    pairs[f"harness_plain_over_{bare}_channels_last"] = ("harness_plain", f"{bare}_channels_last")  # like with like
    assert set(result["ratios"]) == set(pairs)
    for ratio, names_of_two in pairs.items():
        one, other = (measured[name]["milliseconds_per_step_median"] for name in names_of_two)
        assert result["ratios"][ratio] == pytest.approx(one / other)


@pytest.mark.slow
def test_real_ranks_are_measured(tiny: Path) -> None:
    result = bench_scaling(str(tiny), ranks=[1, 2], rounds=2)
    assert json.loads(json.dumps(result)) == result
    one, two = result["ranks"]
    assert (one["ranks"], one["images_per_rank"], set(one["variants"])) == (1, 16, {"full"})
    assert (two["ranks"], two["images_per_rank"], set(two["variants"])) == (2, 8, set(VARIANTS))
    assert (set(one["costs"]), set(two["costs"])) == (set(), set(COSTS))
    for variant in [*one["variants"].values(), *two["variants"].values()]:
        for unit in ("images_per_second", "step_ms"):
            assert 0 < variant[f"{unit}_min"] <= variant[f"{unit}_median"] <= variant[f"{unit}_max"]
        assert variant["images_per_second_max"] == pytest.approx(16 / variant["step_ms_min"] * 1e3)
    assert one["predicted_step_ms"] is None
    if not two["oversubscribed"]:
        assert two["predicted_step_ms"] > two["variants"]["independent"]["step_ms_median"]
    assert result["speedup_over_one_rank"]["1"] == 1
    buckets = {name: variant["bucket_bytes"] for name, variant in two["variants"].items()}
    predicted = workload_of(load(tiny)).bucket_bytes
    assert buckets["full"] == predicted  # the model's buckets are DDP's
    assert buckets["one_bucket"] == [sum(predicted)]
    assert len(buckets["small_buckets"]) > 1
    assert buckets["no_exchange"] == buckets["independent"] == []
    assert "gradient_exchange:" in render_scaling(result)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--ranks 3", "16 images does not divide among 3 ranks"),
        ("--ranks 16", "HINT: Choose other ranks, or training.global_batch_size=32."),
        ("--ranks 2 training.precision=fp16", "fp16 needs a GPU"),
    ],
)
def test_ranks_that_cannot_be(tiny: Path, options: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", str(tiny), *options.split()]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "HINT:" in error


@pytest.mark.long
def test_commands_are_timed() -> None:
    result = bench_startup(rounds=1)
    assert set(result["contestants"]) == {"help", "import_torch", "train_to_first_step"}
    assert all(0 < each["seconds_min"] < 1000 for each in result["contestants"].values())
    assert {"imports", "data", "first_step"} <= set(result["breakdown_seconds"])


def test_the_page_says_what_is_met_and_where_we_lose(tmp_path: Path) -> None:
    """Images a second are to be many, milliseconds few; peers stand next to ours alone, and only what is installed."""
    slow, fast = (spread("images_per_second", [value]) for value in (2.0, 5.0))
    short, long = (spread("milliseconds_per_step", [value]) for value in (2.0, 5.0))
    results: dict[str, dict[str, Any]] = {
        "loader": {
            "contestants": {"harness_a": slow, "harness_b": fast, "peer": fast, "absent": None},
            "ratios": {"harness_ffcv_over_torchvision": 31.0, "harness_ffcv_over_stock_ffcv": 4.0},
        },
        "step": {
            "contestants": {"harness": fast, "peer": None},
            "ratios": {"harness_bf16_over_pytorch_fp32": 8.5},
            "settings": {"threads": 2},
            "machine": {"cpu": "some", "cpus": 2, "versions": {"torch": "2.0"}},
        },
        "overhead": {
            "contestants": {"harness_plain": long, "harness": short, "peer": short, "other": long},
            "ratios": {"harness_over_pytorch": 1.06, "harness_plain_over_pytorch_channels_last": 1.05},
        },
        "ranks": {"contestants": {"harness": short, "peer": long}, "ratios": {}},
        "startup": {"contestants": {"help": spread("seconds", [0.25])}},
    }
    lines = page(results, date="2026-01-02").splitlines()
    verdicts = [line for line in lines if line.startswith("| ") and ("yes" in line or "**no**" in line)]
    assert len(verdicts) == len(GOALS)
    assert ["**no**" in line for line in verdicts] == [False, True, False, True, False, True, False, True]
    assert "not measured" in verdicts[5]
    assert [line for line in lines if line.startswith("- ")] == [
        "- loader: `harness_a` takes 2.50 times as long as `peer` (medians).",
        "- overhead: `harness_plain` takes 2.50 times as long as `peer` (medians).",
    ]
    assert "2026-01-02: some, 2 cores, 2 threads; torch 2.0." in "\n".join(lines)
    pytest.importorskip("matplotlib", reason="the picture needs the extra bench")
    write(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"benchmarks.md", "benchmarks.json", "benchmarks.svg"}
