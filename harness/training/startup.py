"""Where the time from the command to the first step goes."""

from __future__ import annotations

import time


class Startup:
    """Seconds of each phase, one after another, to the first step.

    Args:
        began_at: when the first phase began, by `time.perf_counter()`; None is now.
    """

    def __init__(self, began_at: float | None = None) -> None:
        self._last = time.perf_counter() if began_at is None else began_at
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
