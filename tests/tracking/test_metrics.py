"""metrics.jsonl, and several trackers as one."""

from __future__ import annotations

import json
import time
from pathlib import Path

from harness.tracking import Tracker, Trackers
from harness.tracking.metrics import JsonlTracker, Record, read
from tests.tracking.conftest import record


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


def test_all_trackers_are_given_everything_and_each_record_with_one_time(tmp_path: Path) -> None:
    class Remembering(Tracker):
        def __init__(self) -> None:
            self.seen: list[object] = []

        def tick(self, step: int) -> None:
            self.seen.append(step)

        def log(self, record: Record) -> None:
            self.seen.append(record)

        def note(self, text: str) -> None:
            self.seen.append(text)

        def finish(self, result: Record | None) -> None:
            self.seen.append(result)

    one, two = Remembering(), Remembering()
    every = Trackers([one, JsonlTracker(tmp_path / "m.jsonl"), two])
    every.tick(1)
    every.log({"step": 1})
    every.note("x")
    every.finish({"a": 1})
    written = json.loads((tmp_path / "m.jsonl").read_text())
    assert one.seen == two.seen == [1, written, "x", {"a": 1}]
    assert written["step"] == 1
    assert abs(written["time_unix_seconds"] - time.time()) < 60
