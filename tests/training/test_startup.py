"""Where the time to the first step went: each phase once, said once, and only this training's own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from harness.cli import main
from harness.training.startup import Startup
from tests.conftest import ROOT, run_limited
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
    assert 0 < sum(seconds.values()) < took  # not the age of the process


def test_phases_count_from_when_the_command_began() -> None:
    told, untold = Startup(time.perf_counter() - 5), Startup()
    for each in (told, untold):
        each.lap("imports")
    assert 5 <= told.seconds["imports"] < 6
    assert untold.seconds["imports"] < 1
    line = told.first_step()
    assert line is not None
    assert line.startswith("first step after 5.")
    assert told.first_step() is None


@pytest.mark.parametrize("as_command", [True, False])
def test_what_python_worked_before_counts_where_the_process_is_the_command(
    as_command: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", str(tiny), "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["harness", *words])
    monkeypatch.setattr(time, "process_time", lambda: 1000.0)
    assert main(None if as_command else words) == 0
    imports = result(tmp_path / "run")["startup_seconds"]["imports"]
    assert imports > 1000 if as_command else imports < 1000


@pytest.mark.slow
def test_what_a_shell_waited_for_before_it_became_the_training_is_not_counted(tiny: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "harness", "train", str(tiny), "--run-dir", str(tmp_path / "run")]
    began = time.perf_counter()
    done = run_limited(["bash", "-c", 'sleep 4; exec "$@"', "bash", *words], 120, dict(os.environ), ROOT)
    took = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    seconds = result(tmp_path / "run")["startup_seconds"]
    assert seconds["imports"] > 0.5  # torch's among them
    assert sum(seconds.values()) < took - 4
