"""What the console prints, on a terminal and elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest

from harness.tracking.console import ConsoleTracker
from tests.tracking.conftest import record

TRAIN = record("epoch", "train", 4, steps=391, seconds=38.0, loss=0.4089, accuracy=0.90238)
TEST = record("epoch", "test", 4, loss=0.5928, accuracy=0.8171, correct=8171, total=10000)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step_record(step: int) -> dict[str, Any]:
    speed = {"images_per_second": 1234.5, "milliseconds_per_step": 12.0}
    return record("step", "train", step, loss=1.5, accuracy=0.5, **speed)


def printed(stream: io.StringIO, *end: dict[str, Any]) -> str:
    tracker = ConsoleTracker(epochs=2, steps_per_epoch=4, total_steps=8, stream=stream)
    for step in range(1, 5):
        tracker.tick(step)
        tracker.log(step_record(step))
    tracker.note("a note")
    for each in end:
        tracker.log(each)
    tracker.finish(None)
    return stream.getvalue()


def test_plain_lines_after_each_epoch_are_the_seeds() -> None:
    assert printed(io.StringIO(), TRAIN, TEST).splitlines() == [
        "a note",
        "Epoch 1/2  391 steps - 38s 97ms/step - loss: 0.4089 - accuracy: 90.2380%",
        "  test: loss 0.5928, accuracy 8171/10000 (81.71%)",
    ]


def test_a_terminal_gets_a_live_line() -> None:
    text = printed(Terminal(), TEST)
    assert "Epoch 1/2" in text
    assert "\r" in text
    assert "a note\n" in text


def test_plain_step_lines_come_at_a_sane_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("harness.tracking.console.time.monotonic", lambda: now[0])  # ten seconds without waiting
    stream = io.StringIO()
    tracker = ConsoleTracker(epochs=2, steps_per_epoch=4, total_steps=8, stream=stream)
    for step in range(1, 9):
        now[0] += 4.0
        tracker.log(step_record(step))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/8", "6/8"]
    assert "1,234 img/s" in lines[0]
    assert "ETA 00:20" in lines[0]
