"""Whole trainings: what a run directory holds, divergence, signals, several ranks, where the time of a start goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from harness.cli import main
from harness.recipe import load
from harness.training.state import Startup
from tests.conftest import ROOT, run_limited
from tests.training.conftest import (
    DELAY_SECONDS,
    Capsys,
    Train,
    assert_same_state,
    metrics,
    result,
    starts,
    wait_for_step,
    weights,
)


def test_a_run_directory_has_what_is_promised(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    run = train("run")
    took = time.perf_counter() - began
    names = {"recipe.yaml", "provenance.json", "metrics.jsonl", "result.json", "checkpoints"}
    assert {p.name for p in run.iterdir()} - {".lock"} == names
    found = result(run)
    assert (found["step"], found["epoch"], found["total"]) == (14, 2.0, 37)
    assert found["accuracy"] == found["correct"] / 37
    assert found["best"]["correct"] == max(r["correct"] for r in metrics(run, "epoch", "test"))
    assert (found["data_source"], found["world_size"], found["parameters"]) == ("synthetic", 1, 816)
    steps = metrics(run)
    assert [r["step"] for r in steps] == list(range(1, 15))
    assert [r["total"] for r in steps] == [16] * 6 + [4] + [16] * 6 + [4]
    assert all(r["images_per_second"] > 0 and r["lr"] == 0.05 and r["grad_norm"] > 0 for r in steps)
    assert [r["total"] for r in metrics(run, "epoch")] == [100, 100]
    assert load(run / "recipe.yaml").training.epochs == 2
    (start,) = starts(run)
    assert start["libraries"]["torch"] == version("torch")
    assert len(start["recipe_sha256"]) == 64

    seconds = found["startup_seconds"]
    assert list(seconds) == ["imports", "ranks", "data", "network", "loaders", "trackers", "first_step"]
    assert all(each >= 0 for each in seconds.values())
    assert 0 < sum(seconds.values()) < took  # not the age of the process
    out, err = capfd.readouterr()
    assert (out + err).count("first step after ") == 1


def test_training_learns(train: Train) -> None:
    run = train("run", "training.epochs=12", "schedule.name=cosine", "model.args.dropout=0.0")
    assert result(run)["accuracy"] > 0.8
    first, *_, last = metrics(run, "epoch")
    assert last["loss"] < first["loss"] / 2


def test_same_seed_same_weights_and_another_seed_others(train: Train) -> None:
    first, second, other = train("a"), train("b"), train("c", "seed=1")
    assert_same_state(first, second, 14, ["model"])
    name = "depthwise_branches.0.0.conv.depthwise.weight"
    assert not torch.equal(weights(first, 14)[name], weights(other, 14)[name])


def test_the_last_and_the_best_are_kept_even_between_checkpoints(train: Train, capsys: Capsys) -> None:
    run = train("run", "training.epochs=6", "checkpoint.every_epochs=3", "checkpoint.keep_last=1", "optimizer.lr=0.3")
    best = result(run)["best"]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step_42", f"step_{best['step']}"}
    capsys.readouterr()
    assert main(["eval", str(run), "--checkpoint", "best", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["test"]["correct"]) == (best["step"], best["correct"])


def test_no_epochs_evaluates_only(train: Train) -> None:
    run = train("run", "training.epochs=0")
    assert (result(run)["step"], result(run)["total"]) == (0, 37)
    assert metrics(run) == []


@pytest.mark.parametrize("extra", [(), ("training.gradient_accumulation_steps=2", "mix.mixup_alpha=0.5")])
def test_divergence_names_step_and_layer(train: Train, capsys: Capsys, extra: tuple[str]) -> None:
    run = train("run", "optimizer.lr=1e30", "model.args.norm=none", *extra, expect=3)
    error = capsys.readouterr().err
    assert "training diverged at step 2: the output of layer " in error
    assert "depthwise_branches.0.0" in error
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("words", [("training.epochs=null", "training.steps=1"), ("training.epochs=2",)])
def test_divergence_at_the_very_end_of_a_step_is_no_traceback(train: Train, words: tuple[str, ...]) -> None:
    run = train("run", "optimizer.lr=1e30", *words, expect=3)
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run"])
def test_a_run_directory_that_cannot_be(tmp_path: Path, place: str, tiny: Path) -> None:
    (tmp_path / "file").write_text("a file")
    assert main(["train", str(tiny), "--run-dir", str(tmp_path / place)]) == 2
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize(
    "words",
    [
        ("training.precision=bf16", "training.label_smoothing=0.1"),
        ("training.memory_format=contiguous",),
        ("optimizer.name=adamw", "optimizer.lr=0.001", "evaluation.recalibrate_batch_norm_batches=3"),
        ("data.loader=torch", "data.workers=0"),
        ("model.name=resnet18", "model.args={}"),
    ],
    ids=lambda words: words[0],
)
def test_settings_train(train: Train, words: tuple[str, ...]) -> None:
    run = train("run", "training.epochs=null", "training.steps=3", *words)
    assert all(0 < r["loss"] < 5 for r in metrics(run))


@pytest.mark.usefixtures("slow_loaders")
def test_what_is_waited_for_a_slow_loader_is_noted(train: Train) -> None:
    run = train("run", "tracking.log_every_steps=2", "training.gradient_accumulation_steps=2")
    steps, epochs = metrics(run), metrics(run, "epoch")
    assert [r["step"] for r in steps] == [2, 4, 6, 8, 10, 12, 14]
    # Two micro-batches a step. Step 7 ends an epoch, and with it a window without a line: the next is of step 8 alone.
    for record, count in zip(steps, [4, 4, 4, 2, 4, 4, 4], strict=True):
        seconds = record["total"] / record["images_per_second"]
        assert count * DELAY_SECONDS <= record["loader_wait_seconds"] < seconds
    assert [r["steps"] for r in epochs] == [7, 7]
    for record in epochs:
        assert 14 * DELAY_SECONDS <= record["loader_wait_seconds"] < record["seconds"]
    assert epochs[1]["loader_wait_seconds"] == pytest.approx(sum(r["loader_wait_seconds"] for r in steps[3:]))


@pytest.mark.long
def test_a_compiled_training_is_evaluated_as_its_weights_are(
    train: Train, tiny: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """In a process of its own: the compiler leaves threads and variables behind."""
    run, small = tmp_path / "run", ("model.args.widths=[[4]]", "model.args.transition_widths=[]")
    settings = ["training.epochs=null", "training.steps=2", "training.global_batch_size=20", "model.args.dropout=0.0"]
    command = [sys.executable, "-m", "harness", "train", str(tiny), *settings, *small, "training.compile=true"]
    subprocess.run([*command, "--run-dir", str(run)], cwd=ROOT, check=True, capture_output=True, timeout=250)
    for compiled, eager in zip(metrics(run), metrics(train("plain", *settings, *small)), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["loss"] == result(run)["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_nothing_is_lost(
    train: Train, tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = ("training.epochs=30", "evaluation.every_epochs=30", "checkpoint.every_epochs=30")
    whole, run = train("whole", *words), tmp_path / "run"
    command = [sys.executable, "-m", "harness", "train", str(tiny), *words, "--run-dir", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for_step(run, 5)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert f"stopped by {number.name} after step" in error
    train("run", *words, resume="auto")
    assert_same_state(whole, run, 210, ["model"])
    assert [r["step"] for r in metrics(run)] == list(range(1, 211))


def start_pair(tiny: Path, run: Path, port: int, *words: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher between."""
    command = [sys.executable, "-m", "harness", "train", str(tiny), *words, "--run-dir", str(run)]
    common = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    environments = [os.environ | common | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for environment in environments
    ]


def end_of(ranks: list[subprocess.Popen[str]], code: int) -> list[str]:
    errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), errors
    return errors


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tiny: Path, tmp_path: Path, free_port: int) -> None:
    run = tmp_path / "run"
    ranks = start_pair(tiny, run, free_port, "training.epochs=1000")
    wait_for_step(run, 5)
    ranks[1].send_signal(signal.SIGUSR1)
    steps = [int(e.split("after step ")[1].split(";")[0]) for e in end_of(ranks, 75)]
    assert steps[0] == steps[1]
    assert (run / "checkpoints" / f"step_{steps[0]}").is_dir()


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_by_the_other(
    tiny: Path, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_COLLECTIVE_TIMEOUT_SECONDS", "6")
    run = tmp_path / "run"
    survivor, stopped = start_pair(tiny, run, free_port, "training.epochs=1000")
    wait_for_step(run, 5)
    stopped.send_signal(signal.SIGSTOP)
    (error,) = end_of([survivor], 1)
    stopped.kill()
    stopped.communicate()
    assert "ERROR this rank cannot continue: rank 1 is gone or stopped" in error
    assert "--resume auto" in error


@pytest.mark.slow
def test_two_ranks_with_statistics_of_their_own_resume_bit_equal(tiny: Path, tmp_path: Path, free_port: int) -> None:
    """Without synchronised BatchNorm ranks differ in their running statistics; a checkpoint holds the first one's."""
    words = ("training.epochs=12", "training.sync_batch_norm=false", "ema.decay=0.9")
    end_of(start_pair(tiny, tmp_path / "whole", free_port, *words), 0)
    run = tmp_path / "run"
    ranks = start_pair(tiny, run, free_port, *words)
    wait_for_step(run, 10)
    ranks[0].send_signal(signal.SIGTERM)
    end_of(ranks, 75)
    end_of(start_pair(tiny, run, free_port, *words, "--resume", "auto"), 0)
    assert_same_state(tmp_path / "whole", run, 84)
    assert result(run)["ema"] == result(tmp_path / "whole")["ema"]


def test_phases_of_the_start_count_from_when_the_command_began() -> None:
    given, now = Startup(time.perf_counter() - 5), Startup()
    for each in (given, now):
        each.lap("imports")
    assert 5 <= given.seconds["imports"] < 6
    assert now.seconds["imports"] < 1
    assert (given.first_step() or "").startswith("first step after 5.")
    assert given.first_step() is None


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
