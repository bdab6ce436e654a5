"""The recipes that come with the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.recipe.document import packaged_names

ROOT = Path(__file__).resolve().parents[2]


def test_the_list_names_and_describes_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    assert all(len(line.split()) > 5 for line in lines[:-1])


@pytest.mark.slow
def test_a_wheel_carries_them(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "harness", source / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", installed, source], check=True, timeout=120)
    shown = subprocess.run(
        [sys.executable, "-m", "harness", "recipe", "show", "seed"],
        cwd=installed,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "dual_branch_seed" in shown.stdout
    assert {p.name for p in (installed / "harness" / "recipes" / "launch").iterdir()} >= {"cpu.yaml", "multi_gpu.yaml"}
    assert len(packaged_names()) == len(list((installed / "harness" / "recipes").glob("*.yaml")))
