"""Ranks change nothing but the speed: images, learning rates and losses are those of one rank and of plain DDP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from harness.cli import main
from harness.models import fused_units
from tests.conftest import ROOT, RunRanks
from tests.training.conftest import Capsys, Train, metrics, result, weights

WORKERS = Path(__file__).parent
KERNELS = ("auto", "plain")
PLAIN = ("model.args.dropout=0.0", "data.synthetic.train_images=96")  # draws of dropout belong to a rank
# The seed's recipe with a network that is small enough for a test: what is tested is the way of the data.
SMALL = ("model.name=dual_branch", "model.args={widths: [[8], [16]], transition_widths: [8], head_width: 8}")


@pytest.mark.slow
def test_losses_are_those_of_raw_ddp(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    """The very same numbers: the wrapper adds nothing. Without synchronised BatchNorm, which DDP lacks on CPUs."""
    words = (*PLAIN, "training.sync_batch_norm=false")
    environment = {"PYTHONPATH": str(ROOT)}
    raw = run_ranks(2, WORKERS / "ddp_worker.py", tiny, tmp_path / "raw.json", *words, env=environment)
    assert raw.returncode == 0, raw.stderr
    ours = run_ranks(2, "-m", "harness", "train", tiny, *words, "--run-dir", tmp_path / "run")
    assert ours.returncode == 0, ours.stderr
    expected = json.loads((tmp_path / "raw.json").read_text())
    assert len(expected) == 12
    assert [r["loss"] for r in metrics(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)


def images_by_step(folder: Path) -> dict[int, list[int]]:
    """The ids of each step over all ranks, in rising order; an id taken twice stands there twice."""
    taken: dict[int, list[int]] = {}
    for file in folder.glob("rank_*.json"):
        for step, ids in json.loads(file.read_text()):
            taken.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in sorted(taken.items())}


@pytest.mark.slow
def test_one_two_and_three_ranks_train_as_one(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    """102 images: a last batch of 6, which is one image for each of 3 ranks, twice."""
    words = (*PLAIN, "data.synthetic.train_images=102", "training.global_batch_size=12")
    words += ("schedule.name=cosine", "schedule.warmup_steps=3", "training.gradient_accumulation_steps=2")
    for ranks in (1, 2, 3):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        command = (WORKERS / "trace_worker.py", folder, "train", tiny, *words, "--run-dir", folder / "run")
        done = run_ranks(ranks, *command, env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    one = tmp_path / "1/run"
    assert len(metrics(one)) == 18
    for ranks in (2, 3):
        run = tmp_path / f"{ranks}/run"
        assert images_by_step(run.parent) == images_by_step(one.parent)
        for a, b in zip(metrics(one), metrics(run), strict=True):
            assert (a["step"], a["total"], a["lr"]) == (b["step"], b["total"], b["lr"])
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert (result(run)["world_size"], result(run)["total"]) == (ranks, 37)
        assert result(run)["loss"] == pytest.approx(result(one)["loss"], rel=0.02)
        for name, tensor in weights(one, 18).items():
            torch.testing.assert_close(weights(run, 18)[name], tensor, rtol=0.02, atol=2e-3)


def test_the_saved_network_is_the_evaluated_one_on_any_number_of_ranks(
    tiny: Path, tmp_path: Path, run_ranks: RunRanks, capsys: Capsys
) -> None:
    """Without synchronised BatchNorm each rank has statistics of its own; 37 images are not divisible by 3."""
    run = tmp_path / "run"
    words = ["training.sync_batch_norm=false", "training.global_batch_size=8", "training.epochs=1", "ema.decay=0.5"]
    done = run_ranks(2, "-m", "harness", "train", tiny, *words, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert main(["eval", str(run), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    together = json.loads(run_ranks(3, "-m", "harness", "eval", run, "--json").stdout)
    scores = {key: result(run)[key] for key in ("loss", "accuracy", "correct", "total")}
    for split, expected in (("test", scores), ("test_ema", result(run)["ema"])):
        expected["loss"] = pytest.approx(expected["loss"], rel=1e-5)
        assert (alone[split], together[split]) == (expected, expected)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 2e-3), ("bf16", 3e-2)])
def test_compiled_passes_give_the_loss_curve_of_the_plain_layers(
    train: Train, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float
) -> None:
    """And of the test split. Without dropout, whose draws are others; roundings grow from step to step."""
    monkeypatch.setattr(fused_units, "FEW_VALUES", 0)  # small as they are, these tensors take the passes
    runs = [
        train(kernels, *PLAIN, f"training.precision={precision}", f"training.kernels={kernels}") for kernels in KERNELS
    ]
    said = [result(run)["kernels"] for run in runs]
    assert said[0].startswith("compiled (6 depthwise convolutions, 6 units"), said[0]
    assert said[1] == "plain (training.kernels)"
    for kind, split in (("step", "train"), ("epoch", "test")):
        compiled, plain = ([record["loss"] for record in metrics(run, kind, split)] for run in runs)
        assert len(compiled) >= 2
        assert compiled == pytest.approx(plain, rel=tolerance)
        if split == "train" and precision == "no":
            assert compiled != plain  # not the same code twice


FAILS = """
import os, sys
from harness.cli import main
from harness.training.step import TrainingStep

real = TrainingStep.__call__

def call(self, *args, **kwargs):  # stands for any defect that one rank alone meets
    if os.environ["RANK"] == "1" and kwargs["step"] == 3:
        raise ValueError("the disk of this node is on fire")
    return real(self, *args, **kwargs)

TrainingStep.__call__ = call
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_that_fails_is_quoted_by_the_others(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = run_ranks(2, script, "train", tiny, "--run-dir", tmp_path / "run", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    own = done.stderr.index("ValueError: the disk of this node is on fire")
    assert own < done.stderr.index("rank 1 failed: ValueError: the disk of this node is on fire")


def test_ranks_fail_with_the_reason_and_the_code(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    codes, run = tmp_path / "codes", tmp_path / "run"
    words = ("-m", "harness", "train", tiny, "training.global_batch_size=15", "--run-dir", run)
    done = run_ranks(2, *words, env={"HARNESS_EXIT_CODE_FILE": str(codes)})
    assert done.returncode != 0
    assert "global_batch_size 15" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(codes.read_text().split()) == {"2"}
    assert not run.exists()


@pytest.mark.cifar10
@pytest.mark.ffcv
@pytest.mark.slow
def test_an_epoch_of_the_seeds_recipe_has_391_steps_and_tests_10_000_images(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = str(ROOT / "recipes" / "seed.yaml")
    assert main(["train", recipe, *SMALL, "training.epochs=1", "tracking.wandb=disabled", "--run-dir", str(run)]) == 0
    (epoch,) = metrics(run, "epoch")
    assert (epoch["steps"], epoch["total"]) == (391, 50_000)
    assert (result(run)["total"], result(run)["step"]) == (10_000, 391)
    assert result(run)["accuracy"] > 0.2  # by chance 0.1


@pytest.mark.cifar10
@pytest.mark.slow
def test_three_ranks_evaluate_each_of_10_000_images_once(tmp_path: Path, run_ranks: RunRanks) -> None:
    words = (*SMALL, "training.epochs=0", "data.loader=device", "training.global_batch_size=126")
    command = ("-m", "harness", "train", ROOT / "recipes" / "seed.yaml", *words, "tracking.wandb=disabled")
    done = run_ranks(3, *command, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (result(tmp_path / "run")["total"], result(tmp_path / "run")["world_size"]) == (10_000, 3)
