"""The sandbox itself: `scripts/slurm_sandbox` by hand, and that nothing is left of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.sandbox import Sandbox
from tests.conftest import ROOT

SCRIPT = str(ROOT / "scripts" / "slurm_sandbox")


@pytest.mark.slurm
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_starts_says_how_to_use_it_and_leaves_nothing(number: signal.Signals) -> None:
    words = [sys.executable, SCRIPT, "--nodes", "1", "--gpus", "3"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert re.match(r"# 1 nodes? (is|are) idle", process.stdout.readline())
        configuration = Path(process.stdout.readline().removeprefix("export SLURM_CONF=").strip())
        env = os.environ | {"SLURM_CONF": str(configuration)}
        gpus = subprocess.run(["sinfo", "-h", "-o", "%G"], env=env, capture_output=True, text=True).stdout
        assert "gpu:3" in gpus
        process.send_signal(number)
        assert process.wait(timeout=60) == 0  # each daemon has its own limit
    finally:
        process.kill()
        process.communicate()
    assert Sandbox(configuration.parent).leftovers() == []
    assert not configuration.parent.exists()


@pytest.mark.long
def test_without_slurm_it_says_what_to_install() -> None:
    code = (
        "import sys, runpy; from tests.cluster import sandbox; sandbox.program = lambda name: None; "
        f"sys.argv = ['slurm_sandbox']; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "HINT: apt-get install slurm-wlm munge" in done.stderr
