"""The loader benchmark as people see it: real contestants, one short round."""

from __future__ import annotations

import json

import pytest

from harness.benchmarks.loader import bench_loader
from harness.benchmarks.report import render
from harness.cli import main


@pytest.mark.slow
@pytest.mark.ffcv
def test_bench_loader_prints_one_json_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    monkeypatch.setattr("harness.benchmarks.report.bench_loader", short)  # a full round takes half a minute
    assert main(["bench", "loader", "--json", "--rounds", "1", "--workers", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["contestants"]) == {"harness_ffcv", "harness_device", "stock_ffcv", "torchvision"}
    assert all(c["images_per_second_median"] > 0 for c in result["contestants"].values())
    assert result["ratios"]["harness_ffcv_over_torchvision"] > 0
    text = render(result)
    assert "harness_ffcv" in text
    result["contestants"]["stock_ffcv"] = None
    assert "not installed" in render(result)


def short(rounds: int, workers: int | None) -> dict[str, object]:
    return bench_loader(rounds=rounds, workers=workers, torchvision_images=200)
