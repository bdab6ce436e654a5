"""The loader benchmark: its form always, its figures where ffcv is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.benchmarks import loader as benchmark
from harness.benchmarks.loader import bench_loader, synthetic_split
from harness.errors import HarnessError

OURS, PEERS = ("harness_ffcv", "harness_device"), ("torchvision", "stock_ffcv")
NAMES = {*OURS, *PEERS}


def check_form(report: dict[str, Any], images: dict[str, int | None], rounds: int) -> None:
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {"contestants", "ratios", "settings", "machine"}
    assert set(report["contestants"]) == NAMES
    for name, result in report["contestants"].items():
        if images[name] is None:
            assert result is None
            continue
        assert result["images_per_round"] == images[name]
        assert 0 < result["images_per_second_min"] <= result["images_per_second_median"]
        assert result["images_per_second_median"] <= result["images_per_second_max"]
        assert result["first_epoch_seconds"] > 0
    for name, ratio in report["ratios"].items():
        one, other = (report["contestants"][part]["images_per_second_median"] for part in name.split("_over_"))
        assert ratio == one / other
    assert report["settings"]["rounds"] == rounds
    assert report["machine"]["cpus"] >= 1
    assert report["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_without_ffcv_the_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for a machine without ffcv.
    monkeypatch.setattr(benchmark, "ffcv_available", lambda: False)
    split = synthetic_split(tmp_path, count=300)
    report = bench_loader(split, data="some", rounds=2, workers=0, batch_size=64, torchvision_images=100)
    images = {"harness_ffcv": None, "stock_ffcv": None, "harness_device": 300, "torchvision": 100}
    check_form(report, images, rounds=2)
    assert set(report["ratios"]) == {"harness_device_over_torchvision"}
    assert report["settings"]["data"] == "some"
    assert report["settings"]["batch_size"] == 64
    assert report["machine"]["versions"].keys() >= {"torchvision", "numpy"}


def test_numbers_must_be_positive(tmp_path: Path) -> None:
    split = synthetic_split(tmp_path, count=10)
    for name in ("rounds", "batch_size", "torchvision_images"):
        with pytest.raises(HarnessError, match=f"{name} must be at least 1, it is 0\n  HINT: "):
            bench_loader(split, **{name: 0})


@pytest.mark.ffcv
@pytest.mark.slow
def test_all_contestants_are_measured(tmp_path: Path) -> None:
    """The figures themselves belong to a benchmark on quiet cores: docs/results.md."""
    split = synthetic_split(tmp_path, count=2_000)
    report = bench_loader(split, data="some", rounds=2, workers=2, torchvision_images=500)
    images: dict[str, int | None] = dict.fromkeys(NAMES, 2_000) | {"torchvision": 500}
    check_form(report, images, rounds=2)
    assert set(report["ratios"]) == {f"{ours}_over_{peer}" for ours in OURS for peer in PEERS}
