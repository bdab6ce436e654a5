"""Runs as groups of one recipe: what their recipes differ in, and their headline figures. Nothing imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.comparing.significance import mean_and_deviation
from harness.runs import Run

NOT_SET = "(not set)"  # a key that a recipe of another version has not got
# What tells runs of one group apart, or is no part of the training.
_BESIDE_THE_RECIPE = ("seed", "name", "tracking")
_DEEPEST = 20


@dataclass(frozen=True)
class Group:
    """Runs whose recipes are equal but for the seed, in the order given.

    Attributes:
        letter: A for the first group, and so on.
        runs: at least one.
        settings: of the recipe, by dotted keys, without what may differ within the group.
    """

    letter: str
    runs: list[Run]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The recipes' names, usually one."""
        return ", ".join(dict.fromkeys(run.recipe_name for run in self.runs))

    @property
    def seeds(self) -> list[Any]:
        """The seed of each run; None where it is not known."""
        return [_plain(run.setting("seed")) for run in self.runs]


@dataclass(frozen=True)
class Figure:
    """A figure of each group.

    Attributes:
        key: in JSON.
        title: in tables.
        kind: "share", "number", "measured" (by a clock) or "count": how it is written.
        values: of the runs, by the letters of their groups; runs without one are left out.
    """

    key: str
    title: str
    kind: str
    values: Mapping[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """By letter: values, their number, mean and sample standard deviation."""
        told: dict[str, Any] = {}
        for letter, values in self.values.items():
            mean, deviation = mean_and_deviation(values) if values else (None, None)
            told[letter] = {"values": values, "n": len(values), "mean": mean, "standard_deviation": deviation}
        return {"key": self.key, "title": self.title, "groups": told}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by their recipes; one whose recipe cannot be read is a group of its own."""
    groups: dict[str, Group] = {}
    for number, run in enumerate(runs):
        settings = {key: value for key, value in _flat(run.settings) if key.split(".")[0] not in _BESIDE_THE_RECIPE}
        mark = json.dumps(settings, sort_keys=True) if settings else f"unknown {number}"
        groups.setdefault(mark, Group(_letter(len(groups)), [], settings)).runs.append(run)
    return list(groups.values())


def differing_settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The keys in which the recipes of groups differ, each with its value in every group, or `NOT_SET`.

    A group whose recipe is not known says nothing of any key.
    """
    known = [group for group in groups if group.settings]
    keys = dict.fromkeys(key for group in known for key in group.settings)
    return {
        key: [group.settings.get(key, NOT_SET) for group in groups]
        for key in keys
        if len({json.dumps(group.settings.get(key, NOT_SET), sort_keys=True) for group in known}) > 1
    }


def headline_figures(groups: Sequence[Group]) -> list[Figure]:
    """Accuracies, loss, length and speed of each run of each group; figures that no run has are left out."""
    kinds = (
        ("last_accuracy", "test accuracy, last", "share", lambda run: _last(run, "test", "accuracy")),
        ("best_accuracy", "test accuracy, best", "share", lambda run: _best(run, "test")),
        ("last_ema_accuracy", "EMA test accuracy, last", "share", lambda run: _last(run, "test_ema", "accuracy")),
        ("best_ema_accuracy", "EMA test accuracy, best", "share", lambda run: _best(run, "test_ema")),
        ("last_loss", "test loss, last", "number", lambda run: _last(run, "test", "loss")),
        ("epochs", "epochs", "number", lambda run: run.epoch if run.records else None),
        ("seconds", "training, seconds", "measured", lambda run: _result(run, "seconds") or _seconds(run)),
        ("images_per_second", "images a second", "measured", _images_per_second),
        ("parameters", "parameters", "count", lambda run: _result(run, "parameters")),
    )
    found = []
    for key, title, kind, of in kinds:
        values = {g.letter: [value for run in g.runs if (value := of(run)) is not None] for g in groups}
        if any(values.values()):
            found.append(Figure(key, title, kind, values))
    return found


def recorded_accuracy(run: Run, which: str, weights: str) -> float | None:
    """The test accuracy of a run's last or best checkpoint as its training wrote it down, a share from 0 to 1.

    Args:
        which: "last" or "best".
        weights: "raw" or "ema".
    """
    points = run.curve("test_ema" if weights == "ema" else "test", "accuracy")
    if which == "best" and run.best is not None:
        points = [point for point in points if point.step == run.best.step]
    return points[-1].value if points else None


def _flat(data: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    """A value that JSON has; infinities and what is not a number are told by name."""
    return json.loads(json.dumps(value, default=str, skipkeys=True), parse_constant=str)


def _letter(number: int) -> str:
    """A, B, … Z, then A2, B2, …"""
    letter = chr(ord("A") + number % 26)
    return letter if number < 26 else f"{letter}{number // 26 + 1}"


def _last(run: Run, split: str, key: str) -> float | None:
    points = run.curve(split, key)
    return points[-1].value if points else None


def _best(run: Run, split: str) -> float | None:
    return max((point.value for point in run.curve(split, "accuracy")), default=None)


def _result(run: Run, key: str) -> float | None:
    value = (run.result or {}).get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def _seconds(run: Run) -> float | None:
    points = run.curve("train", "seconds")
    return sum(point.value for point in points) if points else None


def _images_per_second(run: Run) -> float | None:
    """Over the whole training; of a run that is not finished, the mean of its epochs."""
    points = run.curve("train", "images_per_second")
    mean = sum(point.value for point in points) / len(points) if points else None
    return _result(run, "images_per_second") or mean
