"""The leak check itself: every kind of leak is found, named and cleared away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests import leaks
from tests.leaks import Snapshot


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_SECONDS", 0.2)


def leave_variable(root: Path) -> None:
    os.environ["HARNESS_LEAK"] = "1"


def leave_directory(root: Path) -> None:
    os.chdir(root)


def leave_file(root: Path) -> None:
    (root / "left.txt").touch()


def leave_process(root: Path) -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.DEVNULL)


def leave_process_group(root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/../meet", rank=0, world_size=1)


def leave_threads(root: Path) -> None:
    torch.set_num_threads(torch.get_num_threads() + 1)


def leave_dtype(root: Path) -> None:
    torch.set_default_dtype(torch.float64)


def leave_determinism(root: Path) -> None:
    torch.use_deterministic_algorithms(True)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (leave_variable, "environment variable HARNESS_LEAK: None → '1'"),
        (leave_directory, "working directory"),
        (leave_file, "file in the repository: left.txt"),
        (leave_process, "time.sleep(60)"),
        (leave_process_group, "process group"),
        (leave_threads, "number of threads"),
        (leave_dtype, "default dtype: torch.float32 → torch.float64"),
        (leave_determinism, "deterministic algorithms"),
    ],
)
def test_a_leak_is_found_named_and_cleared(tmp_path: Path, leave: Callable[[Path], None], words: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    before = Snapshot.take(root)
    leave(root)
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
    assert psutil.Process().cwd() == before.directory
