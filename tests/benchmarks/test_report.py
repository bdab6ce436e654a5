"""The loader benchmark as people see it: real contestants, one short round."""

from __future__ import annotations

import json

import pytest
import torch

from harness.benchmarks.loader import bench_loader
from harness.benchmarks.report import bench_loader_here, render
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
    assert result["settings"]["batches_on"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    text = render(result)
    assert "harness_ffcv" in text
    result["contestants"]["stock_ffcv"] = None
    assert "not installed" in render(result)


def short(rounds: int, workers: int | None, device: torch.device | None = None) -> dict[str, object]:
    return bench_loader(rounds=rounds, workers=workers, device=device, torchvision_images=200)


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_are_wanted_on_the_gpu_where_there_is_one(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device | None] = []

    def bench(*_: object, device: torch.device | None = None, **__: object) -> dict[str, dict[str, object]]:
        asked.append(device)
        return {"settings": {}}

    # Stands for a machine with or without a GPU; what is measured there is another test's matter.
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("harness.benchmarks.report.bench_loader", bench)
    settings = bench_loader_here(rounds=1, workers=1)["settings"]
    assert asked == [torch.device("cuda") if gpu else None]
    assert settings == {"batches_on": "cuda (stock_ffcv: cpu)" if gpu else "cpu"}


@pytest.mark.gpu
def test_a_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    monkeypatch.setattr("harness.benchmarks.report.bench_loader", short)
    result = bench_loader_here(rounds=1, workers=1)
    assert result["machine"]["gpu"]
    assert result["settings"]["batches_on"] == "cuda (stock_ffcv: cpu)"
    assert result["contestants"]["harness_device"]["images_per_second_median"] > 0
