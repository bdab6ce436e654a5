"""scripts/gpu_kit.sh: what it says to mistakes, and a kit of data. Wheels need minutes and a package index: by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.benchmarks.gpu.kit_unpack import main
from tests.conftest import ROOT
from tests.data.test_parquet import rows, write


def gpu_kit(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"} | {"HARNESS_VENV": sys.prefix}
    command = [str(ROOT / "scripts" / "gpu_kit.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env | extra, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--all"], 'unknown option "--all"'),
        (["--no-wheels", "--out"], "--out needs a value"),
        (["--there", "absent.txt"], "there is no file absent.txt"),
        (["--python", "3.99"], "no Python 3.99 found"),
        (["--no-wheels", "--no-data"], "there is nothing to pack"),
        (["--no-wheels", "--part-mb", "0"], "a part must have room for a byte"),
        (["--no-wheels", "--part-mb", "nan"], "--part-mb: must be a number, not nan"),
    ],
)
def test_mistakes_are_told_and_nothing_is_made(
    arguments: list[str], said: str, tmp_path: Path, empty_cache: Path
) -> None:
    write(tmp_path / "data" / "cifar10", train=[rows(3)], test=[rows(3)])
    done = gpu_kit(*arguments, cwd=tmp_path, HARNESS_DATA=str(tmp_path / "data"))
    assert done.returncode == 2
    assert said in done.stderr
    assert "HINT: " in done.stderr
    assert not (tmp_path / "gpu-kit").exists()


def test_help_is_the_scripts_head(tmp_path: Path) -> None:
    done = gpu_kit("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("Builds what an offline GPU machine lacks")
    assert "--there FILE" in done.stdout


def test_a_kit_of_data_alone(tmp_path: Path, empty_cache: Path) -> None:
    write(tmp_path / "data" / "cifar10", train=[rows(30)], test=[rows(10)])
    done = gpu_kit("--no-wheels", "--out", "a kit", cwd=tmp_path, HARNESS_DATA=str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert "read a kit/README.txt" in done.stderr
    assert main([str(tmp_path / "place"), "--kit", str(tmp_path / "a kit")]) == 0
    for file in (tmp_path / "data" / "cifar10").iterdir():
        assert (tmp_path / "place" / "data" / "cifar10" / file.name).read_bytes() == file.read_bytes()
