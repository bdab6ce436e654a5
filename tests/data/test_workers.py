"""How many workers a loader has where the recipe does not say."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.data import loaders
from harness.data.prepare import prepare
from harness.data.torch_loader import TorchLoader, _explained
from harness.errors import HarnessError
from tests.conftest import run_limited


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(8, None, 8), (8, "1", 8), (8, "3", 2), (2, "2", 1), (1, "4", 1)]
)
def test_the_cores_are_shared_out_among_the_ranks_of_the_machine(
    cores: int, ranks: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "usable_cores", lambda: cores)  # stands for machines of all sizes
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert workers_of_a_loader(tmp_path) == expected


# What SLURM tells a task: tasks of the step, and CPUs on the node for each CPU that this process may use.
@pytest.mark.parametrize(
    ("tasks", "cpus", "expected"),
    [
        pytest.param(2, 2, 8, id="each task bound to its half"),
        pytest.param(2, 1, 4, id="tasks that share the cores"),
        pytest.param(1, 2, 4, id="torchrun in one task of half a node"),
    ],
)
def test_cores_that_slurm_has_shared_out_are_not_shared_out_again(
    tasks: int, cpus: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "usable_cores", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(tasks))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(cpus * len(os.sched_getaffinity(0))))
    assert workers_of_a_loader(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, to mount a small /dev/shm"
)
def test_a_full_shared_memory_is_an_error_with_a_hint(tiny: Path, tmp_path: Path) -> None:
    words = f"{tiny} data.loader=torch data.workers=2 data.image_size_px=128 --run-dir {tmp_path / 'run'}"
    script = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} -m harness train {words}"
    done = run_limited(["unshare", "--mount", "bash", "-c", script], 120, dict(os.environ), tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("/dev/shm is full", "--shm-size", "data.workers=0", "data.loader=ffcv"))


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError("unable to open shared memory object </torch_1_1>: Too many open files (24)"), "too many files"),
        (RuntimeError("received 0 items of ancdata"), "too many files"),
        (RuntimeError("unable to write to file </torch_1_1>: No space left on device (28)"), "/dev/shm is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "probably for memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (RuntimeError("Caught ValueError in DataLoader worker process 0.\nours"), None),
        (RuntimeError("of our own"), None),
    ],
)
def test_what_lets_a_worker_down_is_told_in_other_words(error: Exception, what: str | None) -> None:
    def breaks() -> Iterator[object]:
        raise error
        yield

    with pytest.raises(HarnessError if what else type(error), match=what or str(error).splitlines()[0]):
        list(_explained(breaks()))  # type: ignore[arg-type]


def workers_of_a_loader(tmp_path: Path) -> int:
    loader = loaders.build_loader(
        "torch",
        prepare("synthetic", synthetic={"train_images": 40}).split("train"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        augmentation=None,
        device=torch.device("cpu"),
        workers=None,
    )
    assert isinstance(loader, TorchLoader)
    return loader._workers
