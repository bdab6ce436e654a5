"""How many workers a loader has where the recipe does not say."""

import os
from pathlib import Path

import pytest
import torch

from harness.benchmarks.loader import synthetic_split
from harness.data import loaders
from harness.data.torch_loader import TorchLoader


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


def workers_of_a_loader(tmp_path: Path) -> int:
    loader = loaders.build_loader(
        "torch",
        synthetic_split(tmp_path, count=4),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        augmentation=None,
        device=torch.device("cpu"),
        workers=None,
    )
    assert isinstance(loader, TorchLoader)
    return loader._workers
