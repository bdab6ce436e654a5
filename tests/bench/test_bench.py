"""`harness bench`: contests in real processes, and ours as short as can be. Figures belong to quiet cores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import cli
from harness.bench import Contestant, Times, loader, rates, render, run_contest, step
from harness.cli import main
from harness.errors import HarnessError

HERE = "tests.bench.contestants"
LOADERS = {"harness_ffcv", "harness_device", "harness_torch", "stock_ffcv", "torchvision"}


def test_they_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    """One round each in turn, each as often as it has rounds; who lacks its package is left out."""
    file, seen = tmp_path / "lines", []
    contestants = {
        name: Contestant(f"{HERE}:note", {"file": str(file), "name": name, "with_payload": name != "a"}, rounds=rounds)
        for name, rounds in {"a": 1, "b": None, "c": 4}.items()
    }
    contestants["d"] = Contestant(f"{HERE}:note", {"file": str(file)}, needs="a_package_that_is_not_there")
    times = run_contest(contestants, rounds=2, threads=1, after_round=lambda name, each: seen.append((name, each)))
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [line[0] for line in lines] == [name for name, _ in seen] == list("abcbccc")
    assert len({process for _, process, _ in lines}) == 3
    assert {threads for *_, threads in lines} == {"1"}
    assert times["a"] == Times([0.5], [4])
    assert times["b"] == Times([0.5] * 2, [4] * 2, [{"turns": 1}, {"turns": 2}])
    assert times["c"] == Times([0.5] * 4, [4] * 4, [{"turns": n} for n in range(1, 5)])
    assert times["d"] is None


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("fail", {"late": False}, "ValueError: the reason of the failure"),
        ("fail", {"late": True}, "ValueError: the reason of the failure"),
        ("vanish", {}, "it said nothing"),
    ],
)
def test_a_failure_is_named_with_its_reason(function: str, arguments: Any, reason: str, tmp_path: Path) -> None:
    slow = Contestant(f"{HERE}:note", {"file": str(tmp_path / "lines"), "name": "a"})
    with pytest.raises(HarnessError, match=f'contestant "x" failed: {reason}') as error:
        run_contest({"x": Contestant(f"{HERE}:{function}", arguments), "a": slow}, rounds=30, threads=1)
    assert error.value.exit_code == 1


def test_ranks_work_together_and_the_first_one_answers() -> None:
    times = run_contest({"several": Contestant(f"{HERE}:add_up_ranks", ranks=2)}, rounds=2, threads=1)["several"]
    assert times is not None
    assert times.counts == [2, 2]


def test_figures_are_medians_with_their_spread() -> None:
    """Rates are counts over seconds; what was not measured has no ratio and is said in the table."""
    times = {"ours": Times([1.0], [4321]), "theirs": Times([1.0, 2.0, 4.0], [8, 8, 8]), "absent": None}
    result = rates(times, ("ours", "other"), {"rounds": 1})
    figures = {"median": 4.0, "min": 2.0, "max": 8.0}
    wanted = {f"images_per_second_{name}": figure for name, figure in figures.items()} | {"images_per_round": 8}
    assert result["contestants"]["theirs"] == wanted
    assert result["ratios"] == {"ours_over_theirs": 4321 / 4.0}
    del result["machine"]
    assert [line.split() for line in render(result).splitlines()] == [
        ["images_per_second", "median", "lowest", "highest"],
        ["ours", "4,321", "4,321", "4,321"],
        ["theirs", "4", "2", "8"],
        ["absent", "not", "installed"],
        ["ratios:"],
        ["ours_over_theirs:", "1,080"],
        ["settings:"],
        ["rounds:", "1"],
    ]


def check_form(result: Mapping[str, Any]) -> set[str]:
    """Finite figures in order, ratios of medians; returns the contestants that are installed."""
    assert json.loads(json.dumps(result)) == result
    assert result["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    measured = {name: each for name, each in result["contestants"].items() if each is not None}
    for each in measured.values():
        low, median, high = (each[f"images_per_second_{x}"] for x in ("min", "median", "max"))
        assert 0 < low <= median <= high < math.inf
    for name, ratio in result["ratios"].items():
        one, other = (measured[part]["images_per_second_median"] for part in name.split("_over_"))
        assert ratio == pytest.approx(one / other)
    return set(measured)


@pytest.mark.slow
def test_loaders_next_to_theirs() -> None:
    result = loader.bench_loader(rounds=1, workers=1, synthetic_images=300)
    measured = check_form(result)
    assert set(result["contestants"]) == LOADERS
    assert LOADERS - measured in (set(), {"harness_ffcv", "stock_ffcv"})  # without ffcv
    assert {each["images_per_round"] for each in result["contestants"].values() if each} == {300}
    assert "harness_device_over_torchvision" in result["ratios"]
    assert (result["settings"]["data"], result["settings"]["batch_size"]) == ("synthetic", 300)
    gpu = torch.cuda.is_available()
    assert result["settings"]["batches_on"] == ("cuda (stock_ffcv: cpu)" if gpu else "cpu")


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    measured = step.bench_step(rounds=1, batch_size=8)
    assert measured["machine"]["gpu"]
    check_form(measured)


@pytest.mark.long
def test_steps_next_to_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--rounds", "1", "--batch-size", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours = {"harness_fp32", "harness_bf16", "harness_bf16_plain"}
    assert check_form(result) == ours | {"pytorch_fp32", "pytorch_fp32_channels_last", "pytorch_bf16_channels_last"}
    assert "harness_bf16_over_pytorch_fp32" in result["ratios"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loader --rounds 0", "--rounds: must be a whole number from 1"),
        ("loader --workers 0", "--workers: must be a whole number from 1"),
        ("loader --workers -2", "--workers: must be a whole number from 1"),
        ("step --batch-size 1", "--batch-size: must be a whole number from 2"),  # batch statistics
        ("overhead --ronds 3", 'unknown argument "--ronds"'),
        ("scaling debug --ranks 0", "--ranks: must be a whole number from 1"),
        ("nothing", "invalid choice: 'nothing'"),
    ],
)
def test_mistakes_are_explained(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "HINT: " in error


def test_what_compares_with_peers_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)  # as an installed package finds itself
    assert main(["bench", "overhead", "--json"]) == 2
    assert "HINT: What compares the project with its peers needs a checkout" in capsys.readouterr().err
