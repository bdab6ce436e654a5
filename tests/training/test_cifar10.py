"""The whole way on the real CIFAR-10: the recipe of the seed, FFCV, exact evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli import main
from tests.conftest import ROOT, RunRanks
from tests.training.conftest import metrics, result

# The seed's recipe with a network that is small enough for a test: what is tested is the way of the data.
SMALL = ("model.name=dual_branch", "model.args={widths: [[8], [16]], transition_widths: [8], head_width: 8}")


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
    run = tmp_path / "run"
    done = run_ranks(
        3,
        *("-m", "harness", "train", ROOT / "recipes" / "seed.yaml", *SMALL, "training.epochs=0", "data.loader=device"),
        "training.global_batch_size=126",
        *("tracking.wandb=disabled", "--run-dir", run),
    )
    assert done.returncode == 0, done.stderr
    assert (result(run)["total"], result(run)["world_size"]) == (10_000, 3)
    assert main(["eval", str(run)]) == 0
