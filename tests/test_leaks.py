"""The leak check itself: every kind of leak is found, named and cleared away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import leaks
from tests.leaks import Snapshot

ALIVE = [sys.executable, "-c", "import time; time.sleep(60)"]
LEAKS: dict[str, Callable[[Path], object]] = {
    "environment variable HARNESS_LEAK: None → '1'": lambda root: os.environ.update(HARNESS_LEAK="1"),
    "environment variable HOME:": lambda root: os.environ.pop("HOME"),
    "working directory": os.chdir,
    "file in the repository: left.txt": lambda root: (root / "left.txt").touch(),
    "time.sleep(60)": lambda root: subprocess.Popen(ALIVE, stdin=subprocess.DEVNULL),
    "process group": lambda root: dist.init_process_group(
        "gloo", init_method=f"file://{root}/../meet", rank=0, world_size=1
    ),
    "number of threads": lambda root: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype: torch.float32 → torch.float64": lambda root: torch.set_default_dtype(torch.float64),
    "deterministic algorithms": lambda root: torch.use_deterministic_algorithms(True),
    "cudnn.benchmark": lambda root: setattr(torch.backends.cudnn, "benchmark", True),
}


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_SECONDS", 0.2)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.parametrize("words", LEAKS)
def test_a_leak_is_found_named_and_cleared(tmp_path: Path, words: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    before = Snapshot.take(root)
    LEAKS[words](root)
    found = before.clear_leaks()
    assert len(found) == 1
    assert words in found[0]
    (root / "left.txt").unlink(missing_ok=True)
    assert before.clear_leaks() == []


def test_a_thread_is_found_and_a_daemon_is_not(tmp_path: Path) -> None:
    before = Snapshot.take(tmp_path)
    release = threading.Event()
    threads = [threading.Thread(target=release.wait, name=f"leak-{d}", daemon=d) for d in (False, True)]
    for thread in threads:
        thread.start()
    found = before.clear_leaks()
    release.set()
    for thread in threads:
        thread.join()
    assert found == ["thread leak-False"]


def test_nothing_is_found_where_nothing_was_left(tmp_path: Path) -> None:
    before = Snapshot.take(tmp_path)
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert before.clear_leaks() == []
    assert os.getcwd() == before.directory
