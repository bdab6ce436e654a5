"""Where a run's figures go: metrics.jsonl, the console, Weights & Biases, all through one interface."""

from harness.tracking.metrics import Tracker, Trackers

__all__ = ["Tracker", "Trackers"]
