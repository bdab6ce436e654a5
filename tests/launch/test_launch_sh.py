"""launch.sh: help, set-up and real launches. How it chooses ranks is the matter of test_local.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_limited

LIMIT_SECONDS = 180


def launch(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HARNESS_VENV": sys.prefix, "HARNESS_SKIP_SETUP": "1"} | variables
    return run_limited([str(ROOT / "launch.sh"), *arguments], LIMIT_SECONDS, env, cwd)


def test_help_and_usage() -> None:
    asked = launch("--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "./launch.sh recipes/quickstart.yaml" in asked.stdout
    bare = launch()
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", asked.stdout)


def test_a_dry_run_makes_no_environment(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    done = launch("seed", "a b=1", HARNESS_VENV=absent, HARNESS_SKIP_SETUP="", DRY_RUN="1")
    assert done.returncode == 0
    assert shlex.split(done.stdout) == [f"{absent}/bin/python", "-m", "harness.launch.local", "seed", "a b=1"]
    assert "after scripts/setup.sh it runs" in done.stderr
    assert not Path(absent).exists()
    assert launch("seed", HARNESS_VENV=absent, DRY_RUN="0").returncode == 2


def test_a_wrong_recipe_ends_with_2_and_no_traceback() -> None:
    done = launch("recipes/seed.yaml", "training.epochs=-1", "--gpus", "0", "--ranks", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "training.epochs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_ranks_train_and_leave_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch("recipes/debug.yaml", "--gpus", "0", "--ranks", "2", "--run-dir", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_bad_data_on_two_ranks_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    arguments = ["data.source=imagefolder", f"data.path={tmp_path / 'absent'}", "--ranks", "2", "--gpus", "0"]
    done = launch("recipes/debug.yaml", *arguments, "--run-dir", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "absent" in done.stderr
    assert "Traceback" not in done.stderr
