"""Real trainings that are compared: three seeds of a small recipe, three of it with another learning rate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.cli import main
from tests.conftest import TINY


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs `a-0` … `a-2` and `b-0` … `b-2`; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    for name, lr in (("a", 0.1), ("b", 0.0001)):
        for seed in range(3):
            overrides = [f"seed={seed}", f"optimizer.lr={lr}", "model.args.dropout=0.0", "ema.decay=0.5"]
            assert main(["train", str(recipe), *overrides, "--run-dir", str(folder / f"{name}-{seed}")]) == 0
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the runs, to be changed at will."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"
