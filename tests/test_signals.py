"""What a process notices: that the launcher above it died."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_rank_stops_when_its_launcher_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK, str(tmp_path)], env=environment, cwd=ROOT)
    wait_for(tmp_path / "ready")
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path / "received")
    assert (tmp_path / "received").read_text() == "SIGTERM"
