"""What a process notices: that the launcher above it died, and signals though nobody reads its output."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

RANK = """
import sys, time
from pathlib import Path
from harness import signals
folder = Path(sys.argv[1])
with signals.noticed():
    (folder / "ready").touch()
    deadline = time.monotonic() + 30
    while signals.received() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (folder / "part").write_text(str(signals.received()))
    (folder / "part").rename(folder / "received")
"""
LAUNCHER = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])", RANK]
CONTAINER = ["unshare", "--pid", "--fork", "--kill-child"]
ENVIRONMENT = os.environ | {"TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT)}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_rank_stops_when_its_launcher_is_killed(tmp_path: Path) -> None:
    launcher = subprocess.Popen([*LAUNCHER, str(tmp_path)], env=ENVIRONMENT, cwd=ROOT)
    wait_for(tmp_path / "ready")
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path / "received")
    assert (tmp_path / "received").read_text() == "SIGTERM"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a process 1 of its own needs root, on Linux")
def test_a_launcher_that_is_process_1_as_in_a_container_is_no_dead_one(tmp_path: Path) -> None:
    with subprocess.Popen([*CONTAINER, *LAUNCHER, str(tmp_path)], env=ENVIRONMENT, cwd=ROOT) as container:
        wait_for(tmp_path / "ready")
        time.sleep(0.2)
        assert not (tmp_path / "received").exists()
        container.kill()


def test_a_signal_counts_though_nobody_reads_the_output() -> None:
    """As in front of `| tee log`, which Ctrl-C ends first."""
    script = "import os, signal\nfrom harness import signals\nwith signals.noticed():\n"
    script += "    signal.raise_signal(signal.SIGINT)\n    os._exit(signals.received() != 'SIGINT')\n"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as nobody:
        done = subprocess.run([sys.executable, "-c", script], stderr=nobody, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
