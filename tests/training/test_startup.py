"""Where the time to the first step went: each phase once, said once, and only this training's own."""

from __future__ import annotations

import time

import pytest

from harness.training import startup
from tests.training.conftest import Train, result


def test_a_training_tells_each_phase_once(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    run = train("run")
    took = time.perf_counter() - began
    seconds = result(run)["startup_seconds"]
    assert list(seconds) == ["imports", "ranks", "data", "network", "loaders", "trackers", "first_step"]
    assert all(each >= 0 for each in seconds.values())
    assert seconds["network"] > 0
    out, err = capfd.readouterr()
    assert (out + err).count("first step after ") == 1
    again = result(train("again"))["startup_seconds"]
    assert 0 < sum(again.values()) < took + 30  # not the age of a process that has trained before


def test_the_first_training_counts_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup.Startup, "_process_is_new", True)
    first, later = startup.Startup(), startup.Startup()
    for each in (first, later):
        each.lap("imports")
    assert first.seconds["imports"] > 0.1  # this process has imported torch
    assert later.seconds["imports"] < 0.1
    line = first.first_step()
    assert line is not None
    assert line.startswith("first step after ")
    assert first.first_step() is None
