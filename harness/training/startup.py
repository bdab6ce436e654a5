"""Where the time from the command to the first step goes."""

from __future__ import annotations

import time

import psutil


class Startup:
    """Seconds of each phase, one after another, from the start of the process to the first step.

    The first training of a process counts from the start of the process; a later one from its own.
    """

    _process_is_new = True

    def __init__(self) -> None:
        since_start = time.time() - psutil.Process().create_time() if Startup._process_is_new else 0.0
        Startup._process_is_new = False
        self._last = time.perf_counter() - max(0.0, since_start)
        self.seconds: dict[str, float] = {}
        self.done = False

    def lap(self, phase: str) -> None:
        """What was since the last lap was this phase."""
        now = time.perf_counter()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._last, 3)
        self._last = now

    def first_step(self) -> str | None:
        """Ends the last phase at the first call and says in a line where the time went; None at all other calls."""
        if self.done:
            return None
        self.done = True
        self.lap("first_step")
        parts = ", ".join(f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"
