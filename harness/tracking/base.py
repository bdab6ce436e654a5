"""The protocol of a tracker, the one that does nothing, and the one that is several."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Record = Mapping[str, Any]


class Tracker(Protocol):
    """Takes what a run has to say. A record has at least `kind`, `split`, `step` and `epoch`.

    `kind` is "step" (since the last log line) or "epoch" (a whole epoch or an evaluation). `Trackers` adds
    `time_unix_seconds`.
    """

    def tick(self, step: int) -> None:
        """An optimizer step is done; called every step, so it must cost nothing."""

    def log(self, record: Record) -> None:
        """A record of metrics."""

    def note(self, text: str) -> None:
        """A sentence for people."""

    def finish(self, result: Record | None) -> None:
        """The end of the run: its result, or None when it broke off."""


class NullTracker:
    """Says nothing; for ranks other than the first, and for tests."""

    def tick(self, step: int) -> None: ...

    def log(self, record: Record) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, result: Record | None) -> None: ...


class Trackers:
    """Hands everything to each of several trackers, records with their time: all tell of the same one."""

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
