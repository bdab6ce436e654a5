"""The interface of trackers, and metrics.jsonl: the truth about a run, a JSON object a line, written as it happens."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.files import write_text

Record = Mapping[str, Any]


class Tracker:
    """Takes what a run reports; this one, which ranks other than the first have, does nothing with it.

    A record has at least `kind` ("step": since the last log line; "epoch": a whole epoch or an evaluation), `split`,
    `step` and `epoch`; `Trackers` adds `time_unix_seconds`.
    """

    def tick(self, step: int) -> None:
        """An optimizer step is done; called every step, so it must cost nothing."""

    def log(self, record: Record) -> None:
        """Take a record of metrics."""

    def note(self, text: str) -> None:
        """Take a sentence for people."""

    def finish(self, result: Record | None) -> None:
        """The run ends, with its result or, where it broke off, None."""


class Trackers(Tracker):
    """Hands everything to several trackers, each record with one time for all."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def tick(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.tick(step)

    def log(self, record: Record) -> None:
        timed = {**record, "time_unix_seconds": round(time.time(), 3)}
        for tracker in self._trackers:
            tracker.log(timed)

    def note(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.note(text)

    def finish(self, result: Record | None) -> None:
        for tracker in self._trackers:
            tracker.finish(result)


class JsonlTracker(Tracker):
    """Appends records to a file, without those after `from_step`: a resumed run makes them again."""

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        if path.exists():
            kept = [r for r in _parse(path.read_bytes().splitlines()) if isinstance(r, dict)]
            kept = [r for r in kept if isinstance(step := r.get("step"), int) and step <= from_step]
            write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = path.open("a", buffering=1)

    def log(self, record: Record) -> None:
        # JSON has no NaN or infinity: they become their names, so that a diverged run can still be read.
        named = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        self._file.write(json.dumps({**record, **named}, allow_nan=False) + "\n")

    def finish(self, result: Record | None) -> None:
        with contextlib.suppress(OSError):  # what could not be written was reported when it happened
            self._file.close()


def read(path: Path, *, steps: bool = True) -> list[Any]:
    """What the lines of a metrics.jsonl hold; those that are no JSON, as one cut off by a crash, are left out.

    Args:
        steps: False leaves out the records of single steps, but for the last three lines: most of a file, and most of
            the time that reading it takes.
    """
    lines = path.read_text().splitlines()
    if not steps:
        lines = [line for line in lines[:-3] if '"kind": "step"' not in line] + lines[-3:]
    return _parse(lines)


def _parse(lines: Iterable[str | bytes]) -> list[Any]:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found
