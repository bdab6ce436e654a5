"""A rank that dies, stands still or fails: the others say which one it was, and soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, RunRanks, kill_tree

LONG = ("training.epochs=100000", "evaluation.every_epochs=1000", "checkpoint.every_epochs=1000")


@contextmanager
def two_ranks(recipe: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    """A training of two ranks that is under way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "harness", "train", str(recipe), *LONG, "--run-dir", str(run)]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HARNESS_COLLECTIVE_TIMEOUT_SECONDS": "6",
    }
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def rank_process(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    ranks = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == str(rank)]
    return ranks[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stands_still_is_named(what: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    with two_ranks(tiny, tmp_path / "run") as launcher:
        stopped = rank_process(launcher, 1)
        survivor = rank_process(launcher, 0)
        stopped.send_signal(what)
        began = time.monotonic()
        survivor.wait(60)
        assert time.monotonic() - began < 40
        if what == signal.SIGSTOP:
            stopped.send_signal(signal.SIGKILL)
        _, text = launcher.communicate(timeout=60)
    assert "ERROR this rank cannot go on: rank 1 is gone or stopped" in text, text
    assert "--resume auto" in text, text


@pytest.mark.slow
def test_a_rank_that_fails_is_quoted_by_the_others(tiny: Path, tmp_path: Path, run_ranks: RunRanks) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        """
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
    )
    done = run_ranks(2, script, "train", tiny, "--run-dir", tmp_path / "run", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    own = done.stderr.index("ValueError: the disk of this node is on fire")
    assert own < done.stderr.index("rank 1 failed: ValueError: the disk of this node is on fire")
