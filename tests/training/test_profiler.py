"""A profile says where the time goes, and the training does not notice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cli import main
from harness.training.profiler import LOADER_WAIT_TO_ACT_ON, MIN_STEPS, PHASES, plan_steps
from tests.conftest import RunRanks
from tests.training.conftest import DELAY_SECONDS, EVERYTHING, Capsys, Train, assert_same_state, metrics, result

FILES = {"trace_rank_0.json.gz", "operations.txt", "summary.json"}


def profiled(tiny: Path, run: Path, *words: str, expect: int = 0) -> Path:
    assert main(["train", str(tiny), *words, "--run-dir", str(run), "--profile"]) == expect
    assert not torch.autograd._profiler_enabled()
    return run


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "profile" / "summary.json").read_text())


def test_a_profiled_training_ends_bit_equal(train: Train, tiny: Path, tmp_path: Path) -> None:
    plain, run = train("plain", *EVERYTHING), profiled(tiny, tmp_path / "run", *EVERYTHING)
    assert_same_state(plain, run, 14)
    assert [r["loss"] for r in metrics(run)] == [r["loss"] for r in metrics(plain)]
    assert result(run)["accuracy"] == result(plain)["accuracy"]
    assert not (plain / "profile").exists()


def test_what_a_profile_holds(tiny: Path, tmp_path: Path, capsys: Capsys) -> None:
    run = profiled(tiny, tmp_path / "run", "training.epochs=3", "training.gradient_accumulation_steps=2")
    assert {path.name for path in (run / "profile").iterdir()} == FILES
    summary = summary_of(run)
    # 21 steps of 7 an epoch: fewer are timed and traced than of a long training, and the traced ones in one epoch.
    assert (summary["timed_steps"], summary["traced_steps"]) == ([4, 10], [16, 21])
    seconds = summary["seconds_per_step"]
    assert set(seconds) == {"total", *PHASES, "other"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])
    assert summary["loader_wait_share"] == pytest.approx(seconds["loader_wait"] / seconds["total"])
    assert summary["peak_memory_mib"]["host"] > 100  # torch alone takes more
    assert summary["peak_memory_mib"]["device"] is None
    operations = (run / "profile" / "operations.txt").read_text()
    assert "Self CPU" in operations
    assert "conv" in operations

    with gzip.open(run / "profile" / "trace_rank_0.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    counts = {"loader_wait": 12, "forward": 12, "backward": 12, "optimizer": 6}
    assert {name: names.count(name) for name in PHASES} == counts
    assert len([name for name in names if name.startswith("ProfilerStep")]) == 6
    # One a pass: an evaluation, whose loss of the test images would be another, is not traced.
    assert names.count("aten::log_softmax") == 12
    error = capsys.readouterr().err
    assert "profile of steps 4 to 10 (rank 0 of 1, cpu)" in error
    assert all(f"  {name.replace('_', ' ')} " in error for name in PHASES)
    assert str(run / "profile") in error
    assert "USDT" not in error


@pytest.mark.usefixtures("slow_loaders")
def test_a_slow_loader_shows(tiny: Path, tmp_path: Path, capsys: Capsys) -> None:
    run = profiled(tiny, tmp_path / "run", "training.gradient_accumulation_steps=2")
    summary = summary_of(run)
    assert summary["seconds_per_step"]["loader_wait"] >= 2 * DELAY_SECONDS
    slow = summary["loader_wait_share"] > LOADER_WAIT_TO_ACT_ON  # but on a machine on which the step is slower still
    assert ("HINT: the step waits for the loader" in capsys.readouterr().err) is slow


def test_a_training_too_short_says_so(tiny: Path, tmp_path: Path, capsys: Capsys) -> None:
    run = profiled(tiny, tmp_path / "run", "training.epochs=null", "training.steps=3")
    assert not (run / "profile").exists()
    assert f"profile: none, it takes at least {MIN_STEPS} steps" in capsys.readouterr().err


def test_a_training_that_breaks_off_leaves_no_tracer_running(tiny: Path, tmp_path: Path) -> None:
    """At 18 steps of 9 an epoch, the steps from 10 are traced; a warm-up to too high a rate breaks it off in them."""
    words = ("data.synthetic.train_images=144", "schedule.warmup_steps=18")
    diverging = ("optimizer.lr=7", "model.args.norm=none")
    run = profiled(tiny, tmp_path / "run", *words, *diverging, expect=3)
    assert metrics(run)[-1]["step"] >= 9
    assert not (run / "profile").exists()


def test_a_profile_that_cannot_be_written_ends_nothing(
    train: Train, tiny: Path, tmp_path: Path, capsys: Capsys
) -> None:
    run = train("run", "training.epochs=1")
    (run / "profile").write_text("in the way")
    words = ["train", str(tiny), "training.epochs=4", "--run-dir", str(run), "--resume", "auto", "--profile"]
    assert main(words) == 0
    assert result(run)["step"] == 28
    assert "profile: cannot be written" in capsys.readouterr().err


def test_two_ranks_are_profiled_by_the_first(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    run = tmp_path / "run"
    done = run_ranks(2, "-m", "harness", "train", tiny, "training.epochs=3", "--run-dir", run, "--profile")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (run / "profile").iterdir()} == FILES
    assert (summary_of(run)["world_size"], summary_of(run)["rank"]) == (2, 0)
    assert done.stderr.count("profile of steps") == 1


def test_plans_fit_the_training() -> None:
    for first in (0, 3, 50):
        for steps in range(120):
            for per_epoch in (1, 2, 3, 7, 13, 40, 1000):
                plan = plan_steps(first, first + steps, per_epoch)
                if plan is None:
                    assert steps < MIN_STEPS
                    continue
                assert first < plan.timed.start < plan.timed.stop <= plan.warmup.start
                assert plan.warmup.start < plan.warmup.stop == plan.traced.start < plan.traced.stop <= first + steps
                assert max(len(plan.timed), len(plan.traced)) <= 10
                if per_epoch >= 13 and steps >= 27 + min(per_epoch, 40):
                    assert plan.warmup.start // per_epoch == (plan.traced.stop - 1) // per_epoch
                    assert (len(plan.timed), len(plan.traced)) == (10, 10)
