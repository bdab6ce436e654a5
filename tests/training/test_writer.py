"""Training waits for the copy of a checkpoint, not for the disk."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from harness.errors import HarnessError
from harness.training import checkpoint
from harness.training.writer import CheckpointWriter
from tests.training.states import whole_state


def snapshot(step: int, weight: torch.Tensor) -> checkpoint.Snapshot:
    optimizer = {"state": {}, "param_groups": []}
    return checkpoint.snapshot(step, model={"weight": weight}, ema=None, optimizer=optimizer, state=whole_state(step))


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_is_free, real = threading.Event(), checkpoint._sync

    def slow(path: Path) -> None:
        assert disk_is_free.wait(30)
        real(path)

    monkeypatch.setattr(checkpoint, "_sync", slow)  # a disk that takes as long as the test wants
    writer, weight = CheckpointWriter(tmp_path, keep_last=1), torch.zeros(3)
    writer.submit(snapshot(1, weight), keep=None)
    assert checkpoint.list_checkpoints(tmp_path) == []
    weight += 1  # the next step; the checkpoint is of the one before
    disk_is_free.set()
    writer.submit(snapshot(2, weight), keep=None)
    assert checkpoint.list_checkpoints(tmp_path)  # one at a time
    writer.wait()
    writer.close()
    assert checkpoint.load(tmp_path / "step_2").model["weight"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]


def test_what_is_saved_is_what_was_when_it_was_asked_for(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    saved = snapshot(1, weight)
    weight += 1
    path = checkpoint.write(tmp_path, saved)
    assert checkpoint.load(path).model["weight"].tolist() == [0, 0, 0]


def test_an_error_of_the_disk_arrives_at_the_next_occasion(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    writer = CheckpointWriter(tmp_path / "checkpoints", keep_last=1)
    writer.submit(snapshot(1, torch.zeros(3)), keep=None)
    with pytest.raises(HarnessError, match="the checkpoint of step 1 could not be written"):
        writer.submit(snapshot(2, torch.zeros(3)), keep=None)
    writer.wait()
    writer.close()


def test_a_directory_that_another_process_took_over_is_not_written_to(tmp_path: Path) -> None:
    """Noticed when a checkpoint is asked for, and at the latest just before it is put in place."""
    looks = iter([False, True, True])

    def check_hold() -> None:
        if next(looks):
            raise HarnessError("taken over")

    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.check_hold = check_hold
    writer.submit(snapshot(1, torch.zeros(3)), keep=None)
    with pytest.raises(HarnessError, match="taken over"):
        writer.wait()
    with pytest.raises(HarnessError, match="taken over"):
        writer.submit(snapshot(2, torch.zeros(3)), keep=None)
    writer.close()
    assert list(tmp_path.iterdir()) == []
