"""The learning-rate range test: its curve and its suggestions, and that nothing is left of it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness.cli import main
from harness.errors import HarnessError
from harness.recipe import load
from harness.report.terminal import curve_page, render_curve, render_suggestions
from harness.training.lr_finder import STEEPEST, TENTH, find_lr, rates, smooth, suggest
from tests.training.conftest import Capsys, Train, assert_same_state

LINES = re.compile(r'<polyline class="series" data-name="([^"]+)"[^>]*points="([^"]+)"')
Shape = Callable[[float], float]


def test_rates_are_even_on_a_logarithmic_scale() -> None:
    assert rates(1e-4, 1.0, 5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_smoothing_is_a_weighted_mean_of_all_losses_so_far() -> None:
    losses, beta = [3.0, 1.0, 2.0, 5.0], 0.9
    for number in range(1, len(losses) + 1):
        weights = [beta ** (number - 1 - i) for i in range(number)]
        expected = np.average(losses[:number], weights=weights)
        assert smooth(losses, beta)[number - 1] == pytest.approx(expected)


def curve(value_of: Shape) -> tuple[list[float], list[float]]:
    lrs = rates(1e-5, 1.0, 101)  # 20 steps a decade
    return lrs, [value_of(math.log10(lr)) for lr in lrs]


def test_suggestions_are_the_steepest_descent_and_a_tenth_of_the_least() -> None:
    # A fall of logistic shape that is steepest at 1e-3, and a rise from 1e-1 on.
    lrs, losses = curve(lambda x: 2 - 1 / (1 + math.exp(-4 * (x + 3))) + 5 * max(0.0, x + 1) ** 2)
    found = {s.rule: s.lr for s in suggest(lrs, losses, diverged=True)}
    least = lrs[int(np.argmin(losses))]
    assert 0.05 < least < 0.15
    assert found == {STEEPEST: pytest.approx(1e-3, rel=0.15), TENTH: pytest.approx(least / 10)}


@pytest.mark.parametrize(
    "shape", [lambda x: 2.0, lambda x: 2.0 + (x + 5), lambda x: 2 - 0.01 * (x + 5)], ids=["flat", "rises", "noise"]
)
def test_a_curve_that_does_not_fall_has_no_suggestion(shape: Shape) -> None:
    found = suggest(*curve(shape), diverged=False)
    assert [(s.lr, "does not fall" in s.reason) for s in found] == [(None, True)] * 2


def test_a_curve_that_falls_to_the_end_has_no_least_loss() -> None:
    steepest, tenth = suggest(*curve(lambda x: 2 - 0.3 * (x + 5)), diverged=False)
    assert steepest.lr is not None
    assert tenth.lr is None
    assert "larger --max-lr" in tenth.reason


def test_the_test_finds_rates_and_its_own_end(tiny: Path) -> None:
    found = find_lr(load(tiny, ["training.global_batch_size=50"]), min_lr=1e-4, max_lr=1e3, steps=100)
    assert found.diverged_at is not None
    assert found.diverged_at < 1e3
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) < 100
    assert found.lrs == rates(1e-4, 1e3, 100)[: len(found.lrs)]
    assert all(map(math.isfinite, found.losses))
    assert found.losses[0] == pytest.approx(math.log(4), rel=0.5)  # four classes, nothing learnt yet
    assert all(s.lr is None or found.lrs[0] / 10 <= s.lr <= found.lrs[-1] for s in found.suggestions)


@pytest.mark.parametrize("lr", [1e25, 1e38])
def test_what_is_not_finite_is_divergence_and_no_error(tiny: Path, lr: float) -> None:
    found = find_lr(load(tiny), min_lr=lr, max_lr=2 * lr, steps=20)
    assert found.diverged_at is not None
    assert [s.lr for s in found.suggestions] == [None, None]
    assert "none: the loss diverged within" in render_suggestions(found)
    assert "give a smaller --min-lr" in render_suggestions(found)
    assert render_curve(found, size=os.terminal_size((80, 24)), colours=False)
    assert "a &amp; b: learning-rate range test" in curve_page(found, "a & b")


def test_a_training_after_it_is_equal_to_the_bit_and_nothing_is_left(
    train: Train, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    before = train("before", "training.epochs=1")
    monkeypatch.chdir(tmp_path)
    files, environment = sorted(tmp_path.rglob("*")), dict(os.environ)
    capsys.readouterr()
    assert main(["lr-find", str(tiny), "--min-lr", "1e-4", "--max-lr", "1", "--steps", "12", "--json"]) == 0
    assert dict(os.environ) == environment
    assert sorted(tmp_path.rglob("*")) == files
    found = json.loads(capsys.readouterr().out)
    assert (len(found["losses"]), found["lrs"][-1], found["diverged_at"]) == (12, pytest.approx(1.0), None)
    assert_same_state(before, train("after", "training.epochs=1"), 7, ["model"])


def test_the_command_draws_the_curve(tiny: Path, tmp_path: Path, capsys: Capsys) -> None:
    html = tmp_path / "curve.html"
    words = ["--min-lr", "1e-4", "--max-lr", "1", "--steps", "30", "--html", str(html)]
    assert main(["lr-find", str(tiny), "optimizer.name=adamw", *words]) == 0
    printed = capsys.readouterr().out
    assert "training loss by learning rate" in printed
    assert all(rate in printed for rate in ("0.0001", "0.001", "0.01", "0.1"))  # evenly spaced powers of ten
    assert "30 steps" in printed
    page = html.read_text()
    assert "fastai&#39;s <code>steep</code>; Lightning&#39;s <code>lr_find</code>" in page
    assert STEEPEST in page.split('class="legend"')[1].split("</ul>")[0]
    assert "tiny: learning-rate range test" in page
    drawn = {name: places.split() for name, places in LINES.findall(page)}
    assert {name: len(drawn[name]) for name in ("loss", "smoothed")} == {"loss": 30, "smoothed": 30}
    gaps = np.diff([float(place.split(",")[0]) for place in drawn["loss"]])
    assert np.ptp(gaps) <= 0.21  # the same factor from rate to rate, written with one digit


def test_nothing_is_overwritten_by_the_page(tiny: Path, tmp_path: Path, capsys: Capsys) -> None:
    other = tmp_path / "thesis.html"
    other.write_text("<html>")
    assert main(["lr-find", str(tiny), "--html", str(other)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert other.read_text() == "<html>"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min-lr", "1", "--max-lr", "0.1"], "are no range of rates"),
        (["--min-lr", "0"], "are no range of rates"),
        (["--max-lr", "inf"], "are no range of rates"),
        (["--min-lr", "1e-300", "--max-lr", "1e300"], "are no range of rates"),
        (["--steps", "3"], "too few to see a curve"),
        (["optimizer.nam=sgd"], 'unknown key "optimizer.nam"'),
    ],
)
def test_mistakes_are_explained(tiny: Path, capsys: Capsys, words: list[str], message: str) -> None:
    assert main(["lr-find", str(tiny), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "HINT:" in error


def test_several_ranks_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HarnessError, match=r"(?s)takes one process.*HINT"):
        find_lr(load(tiny), min_lr=1e-4, max_lr=1.0, steps=20)
