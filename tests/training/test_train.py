"""Whole trainings: what a run directory holds, resuming, divergence, several ranks."""

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
from PIL import Image
from safetensors.torch import load_file

from harness.cli import main
from harness.recipe import load
from harness.tracking.metrics import read
from tests.conftest import ROOT, RunRanks
from tests.training.conftest import Train, metrics, result

EVERYTHING = (
    "training.gradient_accumulation_steps=2",
    "mix.mixup_alpha=0.2",
    "mix.cutmix_alpha=1.0",
    "ema.decay=0.9",
    "optimizer.weight_decay=0.001",
    "schedule.name=multistep",
    "schedule.milestones_epochs=[1]",
    "schedule.warmup_steps=2",
    "data.cutout_size_px=6",
    "data.flip=alternating",
    "training.clip_grad_norm=1.0",
    "checkpoint.every_steps=3",
)


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step}" / f"{name}.safetensors")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def test_a_run_directory_has_what_is_promised(train: Train) -> None:
    run = train("run")
    assert {p.name for p in run.iterdir()} - {".lock"} == {
        "recipe.yaml",
        "provenance.json",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
    }
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
    (start,) = json.loads((run / "provenance.json").read_text())["starts"]
    assert start["libraries"]["torch"] == version("torch")
    assert len(start["recipe_sha256"]) == 64


def test_training_learns(train: Train) -> None:
    run = train("run", "training.epochs=12", "schedule.name=cosine", "model.args.dropout=0.0")
    assert result(run)["accuracy"] > 0.8
    first, *_, last = metrics(run, "epoch")
    assert last["loss"] < first["loss"] / 2


def test_same_seed_same_weights_and_another_seed_others(train: Train) -> None:
    first, second, other = train("a"), train("b"), train("c", "seed=1")
    assert_equal(weights(first, 14), weights(second, 14))
    name = "depthwise_branches.0.0.conv.depthwise.weight"
    assert not torch.equal(weights(first, 14)[name], weights(other, 14)[name])


@pytest.mark.parametrize("stop", [4, 7, 9], ids=["mid-epoch", "epoch-end", "second-epoch"])
def test_resumed_training_ends_bit_equal(train: Train, stop: int) -> None:
    whole = train("whole", "training.epochs=null", "training.steps=14", *EVERYTHING)
    train("parts", "training.epochs=null", f"training.steps={stop}", *EVERYTHING)
    parts = train("parts", "training.epochs=null", "training.steps=14", *EVERYTHING, resume="auto")
    assert_equal(weights(whole, 14), weights(parts, 14))
    assert_equal(weights(whole, 14, "ema"), weights(parts, 14, "ema"))
    assert_equal(weights(whole, 14, "optimizer"), weights(parts, 14, "optimizer"))
    timing = {"time_unix_seconds", "images_per_second", "milliseconds_per_step", "seconds", "loader_wait_seconds"}
    a, b = ([{k: v for k, v in r.items() if k not in timing} for r in metrics(x)] for x in (whole, parts))
    assert [r["step"] for r in b] == list(range(1, 15))
    assert a == b
    assert result(parts)["accuracy"] == result(whole)["accuracy"]
    assert result(parts)["ema"] == result(whole)["ema"]


def test_resume_sets_a_broken_checkpoint_aside(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train("whole")
    run = train("run", "training.epochs=1")
    train("run", resume="auto")
    file = run / "checkpoints" / "step_14" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (run / "result.json").unlink()
    train("run", resume="auto")
    assert "broken checkpoint: model.safetensors has" in capsys.readouterr().err
    assert (run / "checkpoints" / "broken_step_14").is_dir()
    assert_equal(weights(whole, 14), weights(run, 14))


def test_a_run_is_never_overwritten(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    train("run", expect=2)
    assert "the run directory is not empty" in capsys.readouterr().err
    train("run", "optimizer.lr=0.1", resume="auto", expect=2)
    assert "optimizer.lr: 0.05 → 0.1" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_checkpoint_of_another_network(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=1")
    train("other", "model.args.head_width=9", resume=str(run), expect=2)
    assert "model.args.head_width: 8 → 9" in capsys.readouterr().err
    (run / "recipe.yaml").unlink()  # a checkpoint alone is judged by its weights
    train("other", "model.args.head_width=9", resume=str(run / "checkpoints" / "step_7"), expect=2)
    assert "a checkpoint of another network" in capsys.readouterr().err


def test_keep_last_and_best(train: Train) -> None:
    run = train("run", "training.epochs=6", "checkpoint.keep_last=1", "optimizer.lr=0.2")
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert kept == {"step_42", f"step_{result(run)['best']['step']}"}


def test_no_epochs_evaluates_only(train: Train) -> None:
    run = train("run", "training.epochs=0")
    assert (result(run)["step"], result(run)["total"]) == (0, 37)
    assert metrics(run) == []


@pytest.mark.parametrize("extra", [(), ("training.gradient_accumulation_steps=2", "mix.mixup_alpha=0.5")])
def test_divergence_names_step_and_layer(train: Train, capsys: pytest.CaptureFixture[str], extra: tuple[str]) -> None:
    run = train("run", "optimizer.lr=1e30", "model.args.norm=none", *extra, expect=3)
    error = capsys.readouterr().err
    assert "training diverged at step 2: the output of layer " in error
    assert "depthwise_branches.0.0" in error
    assert not (run / "result.json").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.precision=bf16",),
        ("training.memory_format=contiguous",),
        ("optimizer.name=muon", "optimizer.lr=0.01"),
        ("optimizer.name=adamw", "optimizer.lr=0.001"),
        ("training.label_smoothing=0.1",),
        ("evaluation.recalibrate_batch_norm_batches=3",),
        ("data.loader=torch", "data.workers=0"),
        ("model.name=resnet18", "model.args={}"),
    ],
    ids=lambda o: o[0],
)
def test_settings_train(train: Train, tiny: Path, overrides: tuple[str, ...]) -> None:
    if "resnet18" in overrides[0]:
        tiny.write_text(tiny.read_text().replace(next(x for x in tiny.read_text().splitlines() if "args:" in x), ""))
    run = train("run", "training.epochs=null", "training.steps=3", *overrides)
    assert all(0 < r["loss"] < 5 for r in metrics(run))


@pytest.mark.long
def test_a_compiled_training_is_evaluated_as_its_weights_are(
    train: Train, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_eval_and_predict_agree_with_the_run(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=4", "ema.decay=0.8", "evaluation.recalibrate_batch_norm_batches=2")
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"] == {k: result(run)[k] for k in ("loss", "accuracy", "correct", "total")}
    assert found["test_ema"] == result(run)["ema"]
    assert main(["eval", str(run), "--checkpoint", "best", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["test"]["accuracy"] == result(run)["best"]["accuracy"]
    assert main(["eval", str(run), "--checkpoint", "step_99"]) == 2
    capsys.readouterr()
    assert main(["eval", str(run), "--recalibrate", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["loss"] != found["test"]["loss"]  # of 1 batch, not of 2

    picture = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), (200, 30, 30)).save(picture)
    capsys.readouterr()
    assert main(["predict", str(run), str(picture), "--json", "--top", "9", "--weights", "ema"]) == 0
    classes = json.loads(capsys.readouterr().out)[0]["classes"]
    assert len(classes) == 4
    assert sum(classes.values()) == pytest.approx(1, abs=1e-5)
    (tmp_path / "no.png").write_text("no picture")
    assert main(["predict", str(run), str(picture), str(tmp_path / "no.png"), str(tmp_path / "missing.png")]) == 2
    error = capsys.readouterr().err
    assert "no.png" in error
    assert "missing.png" in error


def test_two_and_three_ranks_train_as_one(train: Train, tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    # No dropout and no mixing: their draws belong to a rank. What is left must agree up to rounding.
    overrides = ["model.args.dropout=0.0", "training.global_batch_size=12", "training.gradient_accumulation_steps=2"]
    overrides += ["data.synthetic.train_images=102"]  # a last batch of 6: one image for each of 3 ranks, twice
    one = train("one", *overrides)
    for ranks in (2, 3):
        run = tmp_path / f"ranks{ranks}"
        done = run_ranks(ranks, "-m", "harness", "train", tiny, *overrides, "--run-dir", run)
        assert done.returncode == 0, done.stderr
        assert result(run)["total"] == 37
        assert result(run)["world_size"] == ranks
        for a, b in zip(metrics(one), metrics(run), strict=True):
            assert (a["step"], a["total"], a["lr"]) == (b["step"], b["total"], b["lr"])
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        last = metrics(one, "epoch", "test")[-1], metrics(run, "epoch", "test")[-1]
        assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=0.02)
        for name, tensor in weights(one, 18).items():
            torch.testing.assert_close(weights(run, 18)[name], tensor, rtol=0.02, atol=2e-3)
        evaluated = run_ranks(ranks, "-m", "harness", "eval", run, "--json")
        assert json.loads(evaluated.stdout)["test"]["correct"] == result(run)["correct"]


def test_ranks_fail_with_the_reason_and_the_code(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    codes = tmp_path / "codes"
    done = run_ranks(
        2,
        *("-m", "harness", "train", tiny, "training.global_batch_size=15", "--run-dir", tmp_path / "run"),
        env={"HARNESS_EXIT_CODE_FILE": str(codes)},
    )
    assert done.returncode != 0
    assert "global_batch_size 15" in done.stderr
    assert "Traceback (most recent call last)" not in done.stderr.split("ChildFailedError")[0].split("torch/distrib")[0]
    assert set(codes.read_text().split()) == {"2"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_nothing_is_lost(
    train: Train, tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole = train("whole", "training.epochs=40")
    run = tmp_path / "run"
    command = [sys.executable, "-m", "harness", "train", str(tiny), "training.epochs=40", "--run-dir", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for_step(run, 5)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert f"stopped by {number.name} after step" in error
    train("run", "training.epochs=40", resume="auto")
    assert_equal(weights(whole, 280), weights(run, 280))
    assert [r["step"] for r in metrics(run)] == list(range(1, 281))


def start_pair(tiny: Path, run: Path, port: int, *words: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher between."""
    command = [sys.executable, "-m", "harness", "train", str(tiny), *words, "--run-dir", str(run)]
    common = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
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
def test_two_ranks_with_statistics_of_their_own_go_on_bit_equal(tiny: Path, tmp_path: Path, free_port: int) -> None:
    """Without synchronised BatchNorm ranks differ in their running statistics; a checkpoint holds the first one's."""
    words = ("training.epochs=12", "training.sync_batch_norm=false", "ema.decay=0.9")
    end_of(start_pair(tiny, tmp_path / "whole", free_port, *words), 0)
    run = tmp_path / "run"
    ranks = start_pair(tiny, run, free_port, *words)
    wait_for_step(run, 10)
    ranks[0].send_signal(signal.SIGTERM)
    end_of(ranks, 75)
    end_of(start_pair(tiny, run, free_port, *words, "--resume", "auto"), 0)
    for name in ("model", "ema", "optimizer"):
        assert_equal(weights(tmp_path / "whole", 84, name), weights(run, 84, name))
    assert result(run)["ema"] == result(tmp_path / "whole")["ema"]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in read(run / "metrics.jsonl")):
            return
        time.sleep(0.02)
    pytest.fail(f"no step {step} in {run} within a minute")
