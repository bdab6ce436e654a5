"""Time to accuracy: turns, seconds, accuracies and the table. Figures belong to the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.bench import Contestant, Times, run_contest
from harness.cli import main
from harness.models.build import build_model
from harness.models.summary import constraints
from harness.recipe import load
from scripts.benchmarks.accuracy import HERE, entries, figures, print_epoch, render_accuracy
from scripts.benchmarks.airbench import Settings
from tests.conftest import ROOT

TARGETS = ["80", "85", "90", "92", "93", "94"]


def payload(raw: int, other: int) -> dict[str, Any]:
    return {"parameters": 7, "correct": {"raw": raw, "ema": other}, "total": 1000, "evaluation_seconds": 0.5}


def test_the_figures_of_a_contestant() -> None:
    """Seconds add up over epochs, and those to an accuracy are of the first epoch that reached it."""
    result = figures(Times([2.0, 4.0], [40, 40], [payload(800, 799), payload(810, 900)]), {"epochs": 2})
    assert (result["seconds"], result["evaluation_seconds"]) == ([2.0, 6.0], [0.5, 0.5])
    assert (result["parameters"], result["epochs"], result["test_images"]) == (7, 2, 1000)
    assert result["images_per_second_median"] == 15.0
    assert result["correct"] == {"raw": [800, 810], "ema": [799, 900]}
    assert result["seconds_to_accuracy"]["raw"] == dict(zip(TARGETS, [2.0] + [None] * 5, strict=True))
    assert result["seconds_to_accuracy"]["ema"] == dict(zip(TARGETS, [6.0] * 3 + [None] * 3, strict=True))
    whole = {"contestants": {"ours": result}, "settings": {"threads": 2}, "machine": {"cpu": "some"}}
    head, raw, ema, *rest = render_accuracy(whole).splitlines()
    assert head.split()[-12:] == [part for target in TARGETS for part in (target, "%")]
    assert raw.split() == ["ours,", "raw", "2", "15", "6", "81.00", "%", "2", *"-----"]
    assert ema.split() == ["ours,", "ema", "2", "15", "6", "90.00", "%", *"666", *"---"]
    assert rest == ["threads: 2", "cpu: some"]


def test_each_has_its_own_number_of_epochs() -> None:
    whole, short = entries(None), entries(2)
    rounds = {name: each.rounds for name, each in whole.items()}
    assert rounds == {"airbench94": 8, "harness_seed_bf16": 8, "harness_fast": load("fast").training.epochs}
    assert whole["harness_fast"].arguments["overrides"] == []  # the recipe as it is
    assert whole["harness_seed_bf16"].arguments["overrides"] == ["training.precision=bf16", "training.epochs=8"]
    assert {each.rounds for each in short.values()} == {2}
    assert short["airbench94"].arguments["settings"]["epochs"] == 2.0
    epochs, warmup = short["harness_fast"].arguments["overrides"]
    assert epochs == "training.epochs=2"
    assert warmup.startswith("schedule.warmup_epochs=0.")


def test_the_fast_network_keeps_to_the_constraints() -> None:
    model = load("fast").model
    found = constraints(build_model(model.name, num_classes=10, image_size_px=32, args=model.args))
    assert [each.passed for each in found] == [True] * 3, found


@pytest.mark.slow
def test_both_kinds_of_contestants_train_by_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way but for the images: CIFAR-10 takes minutes."""
    settings = asdict(Settings(epochs=1.5, batch_size=128, widths=(24, 32, 32)))
    peer = Contestant(f"{HERE}:airbench94", {"settings": settings, "source": "digits"}, rounds=2)
    arguments = {"recipe": "debug", "overrides": ["training.epochs=3", "ema.decay=0.5"]}
    ours = Contestant(f"{HERE}:harness", arguments, rounds=3)
    times = run_contest({"peer": peer, "ours": ours}, rounds=1, threads=1, after_round=print_epoch)
    counts = {name: each.counts for name, each in times.items() if each is not None}
    assert counts == {"peer": [11 * 128, 6 * 128], "ours": [256] * 3}  # 16.5 steps, rounded up, of 11 an epoch
    found = {name: figures(each, {}) for name, each in times.items()}
    answers = {name: {kind: len(each) for kind, each in of["correct"].items()} for name, of in found.items()}
    assert answers == {"peer": {"raw": 2, "tta": 2}, "ours": {"raw": 3, "ema": 3}}
    assert (found["peer"]["test_images"], found["ours"]["test_images"]) == (359, 128)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["peer", "ours", "peer", "ours", "ours"]


def test_without_the_real_images_nothing_is_measured(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    assert main(["bench", "accuracy"]) == 2
    error = capsys.readouterr().err
    assert "harness bench accuracy: needs the real CIFAR-10, since accuracies on other images would mean no" in error
    assert "HINT: Set HARNESS_DATA" in error


@pytest.mark.long
@pytest.mark.cifar10
def test_an_epoch_of_each_on_the_real_images() -> None:
    command = [sys.executable, "-m", "harness", "bench", "accuracy", "--epochs", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    contestants = json.loads(done.stdout)["contestants"]
    assert all((each["epochs"], each["test_images"]) == (1, 10_000) for each in contestants.values())
    assert contestants["airbench94"]["parameters"] == 1_972_792
    assert contestants["harness_seed_bf16"]["parameters"] == 380_646
    assert contestants["airbench94"]["correct"]["tta"][0] > 4_000
    assert contestants["harness_fast"]["correct"]["ema"][0] > 4_000
