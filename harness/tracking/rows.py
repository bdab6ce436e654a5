"""What W&B is told of a record, as pure functions: the training and `harness track sync` make the same rows.

A record of metrics.jsonl is one row of W&B's history. Its number there (`_step`) follows from the record alone, so that
whoever uploads, and however often, each record has one place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.tracking.base import Record

# Of an optimizer step, in the order in which they are written.
PLACES = {("step", "train"): 0, ("epoch", "train"): 1, ("epoch", "test"): 2, ("epoch", "test_ema"): 3}
ROWS_PER_STEP = len(PLACES)
STEP_METRIC = "step"  # the optimizer step, which all charts are drawn over
# Summaries other than the last value.
SUMMARIES = {
    "test/accuracy": "max",
    "test_ema/accuracy": "max",
    "test/loss": "min",
    "test_ema/loss": "min",
    "perf/images_per_second": "mean",
}
_PLACE_KEYS = ("kind", "split")
_SPEED = ("images_per_second", "milliseconds_per_step", "loader_wait_seconds", "seconds", "steps")
_NOT_FINITE = ("nan", "inf", "-inf")


def row_number(record: Record) -> int:
    """The record's `_step`: 4 × optimizer step + its place among the records of that step.

    Raises:
        ValueError: a kind or split that has no place.
    """
    place = PLACES.get((record["kind"], record["split"]))
    if place is None:
        raise ValueError(f"a record of kind {record['kind']} and split {record['split']} has no place in W&B's history")
    return ROWS_PER_STEP * int(record["step"]) + place


def has_place(record: Record) -> bool:
    """Whether a record is of a kind and split that this version writes."""
    return (record.get("kind"), record.get("split")) in PLACES


def values_of(record: Record) -> dict[str, float]:
    """A record's row: `step`, `epoch` and numbers under train/, test/, test_ema/, perf/ and lr/.

    Of the training, values of a log step have plain names (`train/loss`) and those of an epoch the prefix `epoch_`
    (`train/epoch_loss`). The record's time is W&B's own `_timestamp`, seconds since 1970. system/ is filled by W&B's
    client. Takes records as they are made and as they are read from the file, where NaN and infinity are texts.
    """
    row: dict[str, float] = {}
    for key, value in record.items():
        number = _number(value)
        if number is not None and key not in _PLACE_KEYS:
            row[_name(key, record)] = number
    return row


def _name(key: str, record: Record) -> str:
    if key in (STEP_METRIC, "epoch"):
        return key
    if key == "time_unix_seconds":
        return "_timestamp"
    if key == "lr":
        return "lr/learning_rate"
    split, whole_epoch = str(record["split"]), record["kind"] == "epoch"
    if key in _SPEED:
        of_what = "" if not whole_epoch else "epoch_" if split == "train" else f"{split}_"
        return f"perf/{of_what}{key}"
    return f"{split}/epoch_{key}" if whole_epoch and split == "train" else f"{split}/{key}"


def _number(value: object) -> float | None:
    if isinstance(value, str) and value in _NOT_FINITE:
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


class Best:
    """The highest accuracy of a split so far, the first where several are equal.

    Args:
        split: whose accuracy is judged, test or test_ema.
    """

    def __init__(self, split: str) -> None:
        self._split = split
        self._record: Record | None = None

    def take(self, record: Record) -> bool:
        """Whether the record is a new best one."""
        if record["kind"] != "epoch" or record["split"] != self._split:
            return False
        accuracy = _number(record.get("accuracy"))
        if accuracy is None or not math.isfinite(accuracy):
            return False
        if self._record is not None and accuracy <= self._record["accuracy"]:
            return False
        self._record = record
        return True

    def summary(self) -> dict[str, float]:
        """`best/accuracy` (a share from 0 to 1) with its `best/epoch` and `best/step`."""
        record = self._record
        return (
            {}
            if record is None
            else {f"best/{key}": record[key] for key in ("accuracy", "epoch", "step") if key in record}
        )


class Summaries:
    """`SUMMARIES` over all records of a run. W&B's client knows of those alone that this start has sent."""

    def __init__(self) -> None:
        self._kept: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def take(self, record: Record) -> None:
        for name, value in values_of(record).items():
            if name in SUMMARIES and math.isfinite(value):
                count = self._counts[name] = self._counts.get(name, 0) + 1
                kept = self._kept.get(name, value)
                of_kind = {"max": max(kept, value), "min": min(kept, value), "mean": kept + (value - kept) / count}
                self._kept[name] = of_kind[SUMMARIES[name]]

    def summary(self) -> dict[str, dict[str, float]]:
        """As the client gives them: `{"test/accuracy": {"max": …}, …}`."""
        return {name: {kind: self._kept[name]} for name, kind in SUMMARIES.items() if name in self._kept}


def judged_split(settings: Mapping[str, Any]) -> str:
    """The split that decides what is best, by a resolved recipe."""
    return "test_ema" if (settings.get("checkpoint") or {}).get("best_by") == "ema" else "test"


def result_summary(result: Mapping[str, Any], prefix: str = "result") -> dict[str, float | str]:
    """result.json as summary values: `result/accuracy`, `result/best/accuracy`, …"""
    flat: dict[str, float | str] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            flat |= result_summary(value, f"{prefix}/{key}")
        elif value is not None:
            flat[f"{prefix}/{key}"] = value
    return flat
