"""metrics.jsonl, and several trackers as one."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from harness.tracking.console import ConsoleTracker
from harness.tracking.metrics import JsonlTracker, Trackers, read
from tests.tracking.conftest import record
from tests.tracking.test_console import TEST, Terminal


def test_a_resumed_run_drops_what_it_makes_again_and_lines_that_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path)
    for step in (1, 2, 3):
        first.log(record("step", "train", step))
        assert read(path)[-1]["step"] == step  # written as it happens
    first.finish(None)
    path.write_bytes(b'5\n\xff\n{"step": "1"}\n' + path.read_bytes() + b'{"step": 4, "loss')  # and a crash in a line
    second = JsonlTracker(path, from_step=2)
    assert [r["step"] for r in read(path)] == [1, 2]
    second.log(record("step", "train", 3, loss=float("nan"), grad_norm=float("-inf")))
    second.finish(None)
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    assert (read(path)[-1]["loss"], read(path)[-1]["grad_norm"]) == ("nan", "-inf")


def test_several_trackers_are_one(tmp_path: Path) -> None:
    path, stream = tmp_path / "m.jsonl", Terminal()
    console = ConsoleTracker(epochs=2, steps_per_epoch=4, total_steps=8, stream=stream)
    every = Trackers([JsonlTracker(path), console, second := JsonlTracker(tmp_path / "second")])
    every.tick(1)
    every.note("a note")
    every.log(TEST)
    every.finish(None)
    assert re.search("Epoch 1/2.*a note\n.*test: loss", stream.getvalue(), re.DOTALL)
    (written,) = read(path)
    assert [written] == read(tmp_path / "second")  # with one time
    assert abs(written.pop("time_unix_seconds") - time.time()) < 60
    assert written == TEST
    with pytest.raises(ValueError, match="closed"):
        second.log(TEST)
