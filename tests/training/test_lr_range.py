"""The learning-rate range test: its curve and its suggestions, and that nothing is left of it."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.cli import main
from harness.errors import HarnessError
from harness.recipe import load
from harness.report.terminal import curve_page, render_curve, render_suggestions
from harness.training.lr_range import STEEPEST, TENTH, find_lr, rates, smooth, suggest
from harness.training.run import train

STEPS = 100
SIZE = os.terminal_size((80, 24))
LINES = re.compile(r'<polyline class="series" data-name="([^"]+)"[^>]*points="([^"]+)"')


def test_rates_are_even_on_a_logarithmic_scale() -> None:
    found = rates(1e-4, 1.0, 5)
    assert found == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_smoothing_is_a_weighted_mean_of_all_losses_so_far() -> None:
    losses, beta = [3.0, 1.0, 2.0, 5.0], 0.9
    for number in range(1, len(losses) + 1):
        weights = [beta ** (number - 1 - i) for i in range(number)]
        expected = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
        assert smooth(losses, beta)[number - 1] == pytest.approx(expected)


def curve(value_of: object) -> tuple[list[float], list[float]]:
    lrs = rates(1e-5, 1.0, 101)  # 20 steps a decade
    return lrs, [value_of(math.log10(lr)) for lr in lrs]  # type: ignore[operator]


def suggested(lrs: list[float], smoothed: list[float], *, diverged: bool = True) -> dict[str, float | None]:
    return {s.rule: s.lr for s in suggest(lrs, smoothed, diverged=diverged)}


def test_suggestions_are_the_steepest_descent_and_a_tenth_of_the_least() -> None:
    # A fall of logistic shape that is steepest at 1e-3, and a rise behind 1e-1.
    lrs, losses = curve(lambda x: 2 - 1 / (1 + math.exp(-4 * (x + 3))) + 5 * max(0.0, x + 1) ** 2)
    found = suggested(lrs, losses)
    assert found[STEEPEST] == pytest.approx(1e-3, rel=0.15)
    least = lrs[int(np.argmin(losses))]
    assert found[TENTH] == pytest.approx(least / 10)
    assert 0.05 < least < 0.15


@pytest.mark.parametrize(
    "shape", [lambda x: 2.0, lambda x: 2.0 + (x + 5), lambda x: 2 - 0.01 * (x + 5)], ids=["flat", "rises", "noise"]
)
def test_a_curve_that_does_not_fall_has_no_suggestion(shape: object) -> None:
    found = suggest(*curve(shape), diverged=False)
    assert [s.lr for s in found] == [None, None]
    assert all("does not fall" in s.reason for s in found)


def test_a_curve_that_falls_to_the_end_has_no_least_loss() -> None:
    found = {s.rule: s for s in suggest(*curve(lambda x: 2 - 0.3 * (x + 5)), diverged=False)}
    assert found[STEEPEST].lr is not None
    assert found[TENTH].lr is None
    assert "larger --max-lr" in found[TENTH].reason


def test_a_curve_that_diverges_at_once_has_no_suggestion() -> None:
    found = suggest([1.0, 2.0, 3.0], [1.0, 0.5, 2.0], diverged=True)
    assert [s.lr for s in found] == [None, None]
    assert "smaller --min-lr" in found[0].reason


def test_the_test_finds_rates_and_its_own_end(tiny: Path) -> None:
    found = find_lr(load(tiny, ["training.global_batch_size=50"]), min_lr=1e-4, max_lr=1e3, steps=STEPS)
    assert found.diverged_at is not None
    assert found.diverged_at < 1e3
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) < STEPS
    assert found.lrs == rates(1e-4, 1e3, STEPS)[: len(found.lrs)]
    assert all(map(math.isfinite, found.losses))
    assert found.losses[0] == pytest.approx(math.log(4), rel=0.5)  # four classes, nothing learnt yet
    assert all(s.lr is None or found.lrs[0] / 10 <= s.lr <= found.lrs[-1] for s in found.suggestions)


@pytest.mark.parametrize("lr", [1e25, 1e38])
def test_what_is_not_finite_is_divergence_and_no_error(tiny: Path, lr: float) -> None:
    found = find_lr(load(tiny), min_lr=lr, max_lr=2 * lr, steps=20)
    assert found.diverged_at is not None
    assert [s.lr for s in found.suggestions] == [None, None]
    assert "none: the loss diverged within" in render_suggestions(found)
    assert render_curve(found, size=SIZE, colours=False)
    assert "a &amp; b: learning-rate range test" in curve_page(found, "a & b")


def weights_of(run: Path) -> bytes:
    (path,) = sorted(run.glob("checkpoints/step_*"))[-1:]
    return (path / "model.safetensors").read_bytes()


def test_a_training_behind_it_is_equal_to_the_bit(tiny: Path, tmp_path: Path) -> None:
    recipe = load(tiny, ["training.epochs=1"])
    train(recipe, run_directory=tmp_path / "before", resume="never")
    find_lr(recipe, min_lr=1e-4, max_lr=1.0, steps=20)
    train(recipe, run_directory=tmp_path / "behind", resume="never")
    assert weights_of(tmp_path / "before") == weights_of(tmp_path / "behind")


def test_generators_environment_and_runs_are_left_as_they_were(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files, environment = sorted(tmp_path.rglob("*")), dict(os.environ)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert main(["lr-find", str(tiny), "--min-lr", "1e-4", "--max-lr", "1", "--steps", "12", "--json"]) == 0
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert dict(os.environ) == environment
    assert sorted(tmp_path.rglob("*")) == files
    assert len(json.loads(capsys.readouterr().out)["losses"]) == 12


def test_the_command_draws_the_curve(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = tmp_path / "curve.html"
    words = ["--min-lr", "1e-4", "--max-lr", "1", "--steps", "30", "--html", str(html)]
    assert main(["lr-find", str(tiny), "optimizer.name=adamw", *words]) == 0
    printed = capsys.readouterr().out
    assert "training loss by learning rate" in printed
    assert all(rate in printed for rate in ("0.0001", "0.001", "0.01", "0.1"))  # evenly spaced powers of ten
    assert "30 steps" in printed
    page = html.read_text()
    assert "`" not in page.split("<main>")[1].split("<footer>")[0]
    assert "fastai&#39;s <code>steep</code>; Lightning&#39;s <code>lr_find</code>" in page
    legend = page.split('class="legend"')[1].split("</ul>")[0]
    assert STEEPEST in legend
    assert "e-0" not in legend
    assert "tiny: learning-rate range test" in page
    drawn = {name: places.split() for name, places in LINES.findall(page)}
    assert {name: len(drawn[name]) for name in ("loss", "smoothed")} == {"loss": 30, "smoothed": 30}
    x = [float(place.split(",")[0]) for place in drawn["loss"]]
    gaps = [b - a for a, b in itertools.pairwise(x)]
    assert max(gaps) - min(gaps) <= 0.21  # the same factor from rate to rate, written with one digit


def test_nothing_is_overwritten_by_the_page(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_mistakes_are_told(tiny: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["lr-find", str(tiny), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "HINT:" in error


def test_several_ranks_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HarnessError, match="takes one process") as caught:
        find_lr(load(tiny), min_lr=1e-4, max_lr=1.0, steps=20)
    assert caught.value.hint
