"""The step, overhead and start-up benchmarks: their form and their page. Figures belong to quiet cores: docs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.benchmarks import step
from harness.benchmarks.page import GOALS, page
from harness.benchmarks.report import bench_all, render, table
from harness.errors import HarnessError
from tests.conftest import ROOT

FIGURES = {"images_per_second_median": 20.0, "images_per_second_min": 10.0, "images_per_second_max": 1234.5}
RESULT: dict[str, Any] = {
    "contestants": {"harness": FIGURES, "peer": None},
    "ratios": {"harness_over_peer": 2.0},
    "settings": {"rounds": 1, "threads": 2},
    "machine": {"cpu": "some", "cpus": 2, "gpu": None, "versions": {"torch": "2.0", "lightning": None}},
}
SECONDS = {
    "help": {"median": 0.25, "min": 0.2, "max": 0.3},
    "train_to_first_step": {"median": 11.0, "min": 10.0, "max": 12.0},
}


@pytest.mark.long
def test_overhead_is_measured_against_each_loop() -> None:
    command = [sys.executable, "-m", "harness", "bench", "overhead", "--rounds", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["contestants"]) == {
        "pytorch",
        "pytorch_channels_last",
        "accelerate",
        "lightning",
        "timm",
        "harness_plain",
        "harness",
    }
    measured = {name: each for name, each in result["contestants"].items() if each is not None}
    assert set(measured) >= set(result["contestants"]) - {"lightning"}  # which is not among what tests need
    for each in measured.values():
        low, median, high = (each[f"milliseconds_per_step_{x}"] for x in ("min", "median", "max"))
        assert 0 < low <= median <= high < 1000
    pairs = {f"{name}_over_pytorch": (name, "pytorch") for name in measured if name != "pytorch"}
    pairs["harness_plain_over_pytorch_channels_last"] = ("harness_plain", "pytorch_channels_last")  # like with like
    assert set(result["ratios"]) == set(pairs)
    for ratio, names in pairs.items():
        one, other = (measured[name]["milliseconds_per_step_median"] for name in names)
        assert result["ratios"][ratio] == pytest.approx(one / other)
    assert "harness_over_pytorch" in render(result)


@pytest.mark.long
def test_all_benchmarks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = bench_all(rounds=1)
    text = page(results, date="2026-01-01", picture="x.svg")
    assert all(goal in text for goal in GOALS)
    assert "not measured" not in text


def test_a_recipe_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for bench in (step.bench_step, step.bench_overhead, step.bench_ranks):
        with pytest.raises(HarnessError, match="recipe is not here"):
            bench()


def test_a_table_has_the_unit_and_what_is_missing() -> None:
    assert table(RESULT) == ("images_per_second", [("harness", [20.0, 10.0, 1234.5]), ("peer", None)])
    assert table({"seconds": {"help": SECONDS["help"]}}) == ("seconds", [("help", [0.25, 0.2, 0.3])])
    text = render(RESULT)
    assert "1,234" in text
    assert "not installed" in text
    assert "harness_over_peer: 2" in text


def test_the_page_says_what_is_met_and_what_is_not() -> None:
    loader = {**RESULT, "ratios": {"harness_ffcv_over_torchvision": 31.0, "harness_ffcv_over_stock_ffcv": 4.0}}
    one_step = {**RESULT, "ratios": {"harness_bf16_over_pytorch_fp32": 8.5}}
    overhead = {**RESULT, "ratios": {"harness_over_pytorch": 1.06, "harness_plain_over_pytorch_channels_last": 1.05}}
    startup = {"seconds": SECONDS, "settings": {}, "machine": RESULT["machine"]}
    ranks = {**RESULT, "ratios": {"harness_over_pytorch_ddp": 1.05}}
    results = {"loader": loader, "step": one_step, "overhead": overhead, "ranks": ranks, "startup": startup}
    lines = page(results, date="2026-01-02", picture="b.svg").splitlines()
    verdicts = [line for line in lines if line.startswith("| ") and ("yes" in line or "**no**" in line)]
    assert ["**no**" in line for line in verdicts] == [False, True, False, True, False, False, False, True]
    assert "2026-01-02: some, 2 cores, 2 threads; torch 2.0." in "\n".join(lines)
    assert "![Bars of the medians](b.svg)" in lines
    assert "Nowhere in this run." in lines
    del one_step["ratios"]["harness_bf16_over_pytorch_fp32"]
    assert "| not measured | >= 8 | **no** |" in page(results, date="2026-01-02", picture="b.svg")


def figures(unit: str, value: float) -> dict[str, float]:
    return {f"{unit}_{x}": value for x in ("median", "min", "max")}


def test_the_page_says_where_we_lose() -> None:
    """Images a second are to be many, milliseconds few; peers stand beside ours alone, and only what is installed."""
    slow, fast = (figures("images_per_second", value) for value in (2.0, 5.0))
    short, long = (figures("milliseconds_per_step", value) for value in (2.0, 5.0))
    results = {
        "loader": {**RESULT, "contestants": {"harness_a": slow, "harness_b": fast, "peer": fast, "absent": None}},
        "step": RESULT,
        "overhead": {**RESULT, "contestants": {"harness_plain": long, "harness": short, "peer": short, "other": long}},
        "ranks": {**RESULT, "contestants": {"harness": short, "peer": long}},
        "startup": {"seconds": SECONDS, "settings": {}, "machine": RESULT["machine"]},
    }
    lines = page(results, date="2026-01-02", picture="b.svg").splitlines()
    assert [line for line in lines if line.startswith("- ")] == [
        "- loader: `harness_a` takes 2.50 times as long as `peer` (medians).",
        "- overhead: `harness_plain` takes 2.50 times as long as `peer` (medians).",
    ]


def test_the_script_of_the_page_tells_mistakes(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"date": "2026-01-01", "results": {}}')
    script = [sys.executable, str(ROOT / "scripts" / "benchmarks.py")]
    for options, said in (
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--from", str(tmp_path / "absent.json")], "absent.json: holds no results of this script"),
        (["--from", str(tmp_path / "other.json")], "other.json: holds no results of this script"),
    ):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*script, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr
        assert "HINT: " in done.stderr
        assert "Traceback" not in done.stderr
