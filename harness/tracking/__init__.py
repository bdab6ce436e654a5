"""Where a run's figures go: metrics.jsonl, the console, Weights & Biases, all behind one protocol."""

from harness.tracking.base import NullTracker, Tracker, Trackers

__all__ = ["NullTracker", "Tracker", "Trackers"]
