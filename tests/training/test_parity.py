"""Ranks change nothing but the speed: images, learning rates and losses are those of one rank and of plain DDP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.cli import main
from harness.models import fused_units
from tests.conftest import ROOT, RunRanks
from tests.training.conftest import Train, metrics, result

WORKERS = Path(__file__).parent
KERNELS = ("auto", "plain")
PLAIN = ("model.args.dropout=0.0", "data.synthetic.train_images=96")  # draws of dropout belong to a rank


@pytest.mark.slow
def test_losses_are_those_of_raw_ddp(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    """The very same numbers: the wrapper adds nothing. Without synchronised BatchNorm, which DDP lacks on CPUs."""
    overrides = (*PLAIN, "training.sync_batch_norm=false")
    environment = {"PYTHONPATH": str(ROOT)}
    raw = run_ranks(2, WORKERS / "ddp_worker.py", tiny, tmp_path / "raw.json", *overrides, env=environment)
    assert raw.returncode == 0, raw.stderr
    ours = run_ranks(2, "-m", "harness", "train", tiny, *overrides, "--run-dir", tmp_path / "run")
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
def test_one_two_and_four_ranks_take_the_same_images_at_the_same_rates(
    tiny: Path, tmp_path: Path, run_ranks: RunRanks
) -> None:
    schedule = ("schedule.name=cosine", "schedule.warmup_steps=3", "training.gradient_accumulation_steps=2")
    for ranks in (1, 2, 4):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        command = (WORKERS / "trace_worker.py", folder, "train", tiny, *PLAIN, *schedule, "--run-dir", folder / "run")
        done = run_ranks(ranks, *command, env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    one = metrics(tmp_path / "1/run")
    assert len(one) == 12
    assert len(images_by_step(tmp_path / "1")[0]) == 16
    for ranks in (2, 4):
        assert images_by_step(tmp_path / f"{ranks}") == images_by_step(tmp_path / "1")
        other = metrics(tmp_path / f"{ranks}/run")
        assert [r["lr"] for r in other] == [r["lr"] for r in one]
        assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in one], rel=2e-3)
        assert result(tmp_path / f"{ranks}/run")["world_size"] == ranks


@pytest.mark.slow
def test_three_ranks_evaluate_every_image_once(
    train: Train, run_ranks: RunRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    """37 images are not divisible by 3."""
    run = train("run", "training.epochs=1")
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["test"]
    together = json.loads(run_ranks(3, "-m", "harness", "eval", run, "--json").stdout)["test"]
    assert together == {**alone, "loss": pytest.approx(alone["loss"], rel=1e-6)}
    assert alone["total"] == 37


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
