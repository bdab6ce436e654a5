"""`harness bench`, as short as can be: every contestant runs and its figures are finite. They belong to quiet cores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from harness import commands_speed
from harness.bench import loader, step
from harness.cli import main
from harness.errors import HarnessError

LOADERS = {"harness_ffcv", "harness_device", "harness_torch", "stock_ffcv", "torchvision"}


def check_form(result: Mapping[str, Any], unit: str) -> dict[str, dict[str, float]]:
    """Finite figures in order, ratios of medians; returns the contestants that are installed."""
    assert json.loads(json.dumps(result)) == result
    assert result["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    measured = {name: each for name, each in result["contestants"].items() if each is not None}
    for each in measured.values():
        assert 0 < each[f"{unit}_min"] <= each[f"{unit}_median"] <= each[f"{unit}_max"] < math.inf
    for name, ratio in result["ratios"].items():
        one, other = (measured[part][f"{unit}_median"] for part in name.split("_over_"))
        assert ratio == pytest.approx(one / other)
    return measured


@pytest.mark.slow
def test_loaders_beside_theirs() -> None:
    result = loader.bench_loader(rounds=1, workers=1, batch_size=64, synthetic_images=300, slow_images=50)
    measured = check_form(result, "images_per_second")
    assert set(result["contestants"]) == LOADERS
    assert LOADERS - set(measured) in (set(), {"harness_ffcv", "stock_ffcv"})  # without ffcv
    images = {name: each["images_per_round"] for name, each in measured.items()}
    slow = {"harness_torch": 50, "torchvision": 50}
    assert images == dict.fromkeys(measured, 300) | slow
    assert "harness_device_over_torchvision" in result["ratios"]
    assert (result["settings"]["data"], result["settings"]["batch_size"]) == ("synthetic", 64)
    gpu = torch.cuda.is_available()
    assert result["settings"]["batches_on"] == ("cuda (stock_ffcv: cpu)" if gpu else "cpu")


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    measured = step.bench_step(rounds=1, batch_size=8)
    assert measured["machine"]["gpu"]
    check_form(measured, "images_per_second")


@pytest.mark.long
def test_steps_beside_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--rounds", "1", "--batch-size", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours = {"harness_fp32", "harness_bf16", "harness_bf16_plain"}
    theirs = {"pytorch_fp32", "pytorch_fp32_channels_last", "pytorch_bf16_channels_last"}
    assert set(check_form(result, "images_per_second")) == ours | theirs
    assert "harness_bf16_over_pytorch_fp32" in result["ratios"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loader --rounds 0", "--rounds: must be a whole number from 1"),
        ("step --batch-size 1", "batch_size must be at least 2, it is 1"),
        ("overhead --ronds 3", 'unknown argument "--ronds"'),
        ("scaling debug --ranks 0", "--ranks: must be a whole number from 1"),
        ("nothing", "invalid choice: 'nothing'"),
    ],
)
def test_mistakes_are_explained(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "HINT: " in error


def test_what_compares_with_peers_needs_a_checkout(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands_speed, "ROOT", tmp_path)  # as an installed package finds itself
    assert main(["bench", "overhead", "--json"]) == 2
    assert "is not installed\n  HINT: Run it in a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["batch_size", "synthetic_images", "slow_images"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(HarnessError, match=f"{name} must be at least 1, it is 0"):
        loader.bench_loader(**{name: 0})
