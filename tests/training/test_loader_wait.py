"""How long the step stood still for its batches: told in every training record."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from harness.data.loaders import Batch, Loader, build_loader
from harness.training import parts
from harness.training.saved_state import SavedProgress
from harness.training.state import Progress
from tests.training.conftest import Train, metrics

DELAY_SECONDS = 0.04


class SlowLoader:
    """A real loader whose batches come late, as over a slow network."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        for batch in self._loader.batches(ids_per_batch, epoch=epoch):
            time.sleep(DELAY_SECONDS)
            yield batch

    def close(self) -> None:
        self._loader.close()


@pytest.fixture
def slow_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any, **named: Any) -> Loader:
        return SlowLoader(build_loader(*arguments, **named))

    monkeypatch.setattr(parts, "build_loader", slow)


@pytest.mark.usefixtures("slow_loaders")
def test_what_is_waited_for_a_slow_loader_is_told(train: Train) -> None:
    words = ("tracking.log_every_steps=2", "training.gradient_accumulation_steps=2")
    run = train("run", *words)
    steps, epochs = metrics(run), metrics(run, "epoch")
    assert [r["step"] for r in steps] == [2, 4, 6, 8, 10, 12, 14]
    # Two micro-batches a step. Step 7 ends an epoch, and with it a window without a line: the next is of step 8 alone.
    batches = [4, 4, 4, 2, 4, 4, 4]
    for record, count in zip(steps, batches, strict=True):
        seconds = record["total"] / record["images_per_second"]
        assert count * DELAY_SECONDS <= record["loader_wait_seconds"] < seconds
    assert [r["steps"] for r in epochs] == [7, 7]
    for record in epochs:
        assert 14 * DELAY_SECONDS <= record["loader_wait_seconds"] < record["seconds"]
    assert epochs[1]["loader_wait_seconds"] == pytest.approx(sum(r["loader_wait_seconds"] for r in steps[3:]))


def test_a_quick_loader_is_hardly_waited_for(train: Train) -> None:
    run = train("run", "training.epochs=1")
    (epoch,) = metrics(run, "epoch")
    assert sum(r["loader_wait_seconds"] for r in metrics(run)) == pytest.approx(epoch["loader_wait_seconds"])
    assert 0 < epoch["loader_wait_seconds"] < epoch["seconds"] / 2


def test_a_checkpoint_from_before_the_counter_can_be_gone_on_with() -> None:
    saved = Progress(step=3).to_json()
    del saved["epoch_loader_wait_seconds"]
    SavedProgress.model_validate(saved)
    assert Progress.from_json(saved) == Progress(step=3)
