"""A comparison of runs: groups of one experiment, what their recipes differ in, their figures, and what the
differences of accuracy may be put down to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.errors import HarnessError, ManyErrors
from harness.report.significance import Estimate, holm, mean_and_deviation, over_images, over_seeds
from harness.runs import Run, finite, open_run

NOT_SET = "(not set)"  # a key that a recipe of another version has not got


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, in the order given; `letter` is A for the first group, and so on."""

    letter: str
    runs: list[Run]

    @property
    def name(self) -> str:
        """The recipes' names, usually one."""
        return ", ".join(dict.fromkeys(run.recipe_name for run in self.runs))

    @property
    def finished(self) -> list[Run]:
        """Runs whose accuracy says which recipe is better; what a training has reached so far does not."""
        return [run for run in self.runs if run.state == "finished"]


@dataclass(frozen=True)
class Figure:
    """A figure of each group: its `key` in JSON, its `title` in tables, and its `values` by the letters of the groups.

    Runs without one are left out. The `kind` says how it is written: "share", "number", "measured" (by a clock) or
    "count".
    """

    key: str
    title: str
    kind: str
    values: Mapping[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """By letter: values, their number, mean and sample standard deviation."""
        groups: dict[str, Any] = {}
        for letter, values in self.values.items():
            mean, deviation = mean_and_deviation(values) if values else (None, None)
            groups[letter] = {"values": values, "n": len(values), "mean": mean, "standard_deviation": deviation}
        return {"key": self.key, "title": self.title, "groups": groups}


@dataclass(frozen=True)
class Answers:
    """A checkpoint on N test images: their SHA-256, true classes (int64), and whether it has them right (bool)."""

    images_sha256: Mapping[str, str]
    labels_N: np.ndarray  # noqa: N815
    correct_N: np.ndarray  # noqa: N815


@dataclass(frozen=True)
class Pair:
    """A group next to the first one; differences are this group less the first.

    Attributes:
        first, second: letters.
        first_accuracy, second_accuracy: means over the finished runs, shares; None where no run has one.
        counts: finished runs with a test accuracy, of the first and the second.
        images: over the test images; None where the runs cannot be paired, and `refusal` says why.
        seeds: over the runs; None where a group has no accuracy.
        other_images: the test images of the groups are known to differ.
        images_p_adjusted, seeds_p_adjusted: by Holm's method over all pairs.
    """

    first: str
    second: str
    first_accuracy: float | None
    second_accuracy: float | None
    counts: tuple[int, int]
    images: Estimate | None
    seeds: Estimate | None
    refusal: str | None
    other_images: bool = False
    images_p_adjusted: float | None = None
    seeds_p_adjusted: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        groups: in the order of their first runs.
        differences: recipe key -> its value in each group.
        pairs: every other group next to the first.
        notes: sentences on what is missing or to be heeded.
    """

    groups: list[Group]
    differences: dict[str, list[Any]]
    figures: list[Figure]
    pairs: list[Pair]
    checkpoint: str
    weights: str
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        groups = []
        for group in self.groups:
            runs = [
                {"run": str(run.path), "state": run.state, "seed": run.seed, "problems": list(run.problems)}
                for run in group.runs
            ]
            groups.append({"letter": group.letter, "recipe": group.name, "runs": runs})
        letters = [group.letter for group in self.groups]
        return {
            "groups": groups,
            "differences": {key: dict(zip(letters, values, strict=True)) for key, values in self.differences.items()},
            "figures": [figure.to_json() for figure in self.figures],
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "pairs": [asdict(pair) for pair in self.pairs],
            "notes": self.notes,
        }


def compare(paths: Sequence[Path], *, checkpoint: str, weights: str) -> Comparison:
    """Compare runs, grouped by their recipes.

    Args:
        paths: run directories; one that is given twice counts once.
        checkpoint: "last" or "best".
        weights: "raw" or "ema".

    Raises:
        HarnessError: paths that are no runs, all of them named.
    """
    runs = _open_all(paths)
    groups = group_runs(runs)
    notes = [note for run in runs for note in _notes_on(run, paired=len(groups) > 1)] + _notes_on_seeds(groups)
    pairs = []
    if len(groups) > 1:
        if checkpoint == "best":
            notes.append("The best checkpoints were chosen by their test accuracy, so they look a little too good.")
        answers: dict[Path, Answers] = {}
        finished = [run for run in runs if run.state == "finished"]
        for run in tqdm(finished, desc="test images", unit="run", leave=False, disable=None):
            try:
                answers[run.path] = answers_of(run, which=checkpoint, weights=weights)
            except (HarnessError, OSError) as error:  # such as a checkpoint that its training deletes in this moment
                why = error.what if isinstance(error, HarnessError) else error.strerror
                notes.append(f"{run.label} says nothing of single images: {why}.")
        pairs = [_pair(groups[0], other, answers, checkpoint, weights) for other in groups[1:]]
        images, seeds = (_holm_over([getattr(pair, over) for pair in pairs]) for over in ("images", "seeds"))
        pairs = [
            replace(pair, images_p_adjusted=of_images, seeds_p_adjusted=of_seeds)
            for pair, of_images, of_seeds in zip(pairs, images, seeds, strict=True)
        ]
    figures = headline_figures(groups)
    return Comparison(groups, differing_settings(groups), figures, pairs, checkpoint, weights, notes)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by their experiment; one whose recipe cannot be read is a group of its own."""
    groups: dict[str, Group] = {}
    for number, run in enumerate(runs):
        mark = json.dumps(run.experiment, sort_keys=True) if run.experiment else f"unknown {number}"
        groups.setdefault(mark, Group(_letter(len(groups)), [])).runs.append(run)
    return list(groups.values())


def differing_settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The keys in which the recipes of groups differ, each with its value in every group, or `NOT_SET`.

    A group whose recipe is not known says nothing of any key.
    """
    recipes = [group.runs[0].experiment for group in groups]
    known = [recipe for recipe in recipes if recipe]
    keys = dict.fromkeys(key for recipe in known for key in recipe)
    return {
        key: [recipe.get(key, NOT_SET) for recipe in recipes]
        for key in keys
        if len({json.dumps(recipe.get(key, NOT_SET), sort_keys=True) for recipe in known}) > 1
    }


def headline_figures(groups: Sequence[Group]) -> list[Figure]:
    """Accuracies, loss, length and speed of each run of each group; figures that no run has are left out."""
    kinds: tuple[tuple[str, str, str, Callable[[Run], float | None]], ...] = (
        ("last_accuracy", "test accuracy, last", "share", lambda run: _value(run.last_in("test"))),
        ("best_accuracy", "test accuracy, best", "share", lambda run: _value(run.best_in("test"))),
        ("last_ema_accuracy", "EMA test accuracy, last", "share", lambda run: _value(run.last_in("test_ema"))),
        ("best_ema_accuracy", "EMA test accuracy, best", "share", lambda run: _value(run.best_in("test_ema"))),
        ("last_loss", "test loss, last", "number", lambda run: _value(run.last_in("test", "loss"))),
        ("epochs", "epochs", "number", lambda run: run.epoch if run.records else None),
        ("seconds", "training, seconds", "measured", _seconds),
        ("images_per_second", "images a second", "measured", _images_per_second),
        ("parameters", "parameters", "count", lambda run: finite((run.result or {}).get("parameters"))),
    )
    found = []
    for key, title, kind, of in kinds:
        values = {g.letter: [value for run in g.runs if (value := of(run)) is not None] for g in groups}
        if any(values.values()):
            found.append(Figure(key, title, kind, values))
    return found


def answers_of(run: Run, *, which: str, weights: str) -> Answers:
    """Classify the test split by a run's checkpoint, or take what was kept of the last time.

    Raises:
        HarnessError: no such checkpoint or weights, a broken checkpoint, or no data.
    """
    from harness.training.checkpoint import STATE
    from harness.training.inference import predict_test_split

    found = predict_test_split(run.path, which=which, weights=weights)
    digests = json.loads((found.checkpoint / STATE).read_text())["data_sha256"]
    test = {name: digest for name, digest in digests.items() if name.startswith("test")}
    return Answers(test, found.labels_N.numpy(), found.correct_N.numpy())


def why_not_paired(answers: Sequence[Answers]) -> str | None:
    """Why the answers cannot be compared image by image, in words; None where they can."""
    first = answers[0]
    if any(len(other.labels_N) != len(first.labels_N) for other in answers):
        counts = " and ".join(f"{count:,}" for count in sorted({len(a.labels_N) for a in answers}))
        return f"they were tested on {counts} images"
    if any(other.images_sha256 != first.images_sha256 for other in answers):
        return "they were tested on other images (the SHA-256 of the test split differs)"
    if any(not np.array_equal(other.labels_N, first.labels_N) for other in answers):
        return "the labels of their test images differ"
    return None


def _open_all(paths: Sequence[Path]) -> list[Run]:
    runs: dict[Path, Run] = {}
    errors: list[HarnessError] = []
    for path in paths:
        try:
            run = open_run(path)
            runs.setdefault(run.path.resolve(), run)
        except HarnessError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else ManyErrors("compare", errors)
    return list(runs.values())


def _notes_on(run: Run, *, paired: bool) -> list[str]:
    notes = [f"{run.label}: {problem}." for problem in run.problems]
    if run.state != "finished":
        left_out = ", and it is left out where groups are set beside each other" if paired else ""
        notes.append(
            f"{run.label} is not finished ({run.state}, epoch {run.epoch:.4g}): its figures are those so far{left_out}."
        )
    return notes


def _notes_on_seeds(groups: Sequence[Group]) -> list[str]:
    notes = []
    for group in groups:
        seeds = [run.seed for run in group.finished if run.seed is not None]
        twice = sorted({str(seed) for seed in seeds if seeds.count(seed) > 1})
        if twice:
            notes.append(
                f"{group.letter} has several runs of seed {', '.join(twice)}: they are no independent trainings, and "
                "what is said over seeds is too sure."
            )
    return notes


def _pair(first: Group, second: Group, answers: Mapping[Path, Answers], checkpoint: str, weights: str) -> Pair:
    both = (first, second)
    there = [[answers[run.path] for run in group.finished if run.path in answers] for group in both]
    accuracies = [_accuracies(group, answers, checkpoint, weights) for group in both]
    images, other_images = None, False
    if unfinished := [group.letter for group in both if not group.finished]:
        refusal: str | None = f"no run of {' and '.join(unfinished)} is finished"
    elif silent := [group.letter for group, found in zip(both, there, strict=True) if not found]:
        refusal = f"no run of {' and '.join(silent)} has a checkpoint that could be asked"
    else:
        refusal = why_not_paired([*there[0], *there[1]])
        other_images = refusal is not None
    if refusal is None:
        images = over_images(*(np.stack([found.correct_N for found in side]) for side in there))
    means = [float(np.mean(side)) if side else None for side in accuracies]
    seeds = over_seeds(*accuracies) if all(accuracies) else None
    counts = (len(accuracies[0]), len(accuracies[1]))
    return Pair(first.letter, second.letter, means[0], means[1], counts, images, seeds, refusal, other_images)


def _accuracies(group: Group, answers: Mapping[Path, Answers], checkpoint: str, weights: str) -> list[float]:
    """Of each finished run: by its answers, else as its training wrote it down."""
    found = [
        float(answers[run.path].correct_N.mean()) if run.path in answers else run.recorded_accuracy(checkpoint, weights)
        for run in group.finished
    ]
    return [accuracy for accuracy in found if accuracy is not None]


def _holm_over(estimates: Sequence[Estimate | None]) -> list[float | None]:
    """Adjusted p-values in order; None where nothing was tested."""
    p_values = [None if estimate is None else estimate.p_value for estimate in estimates]
    adjusted = iter(holm([p_value for p_value in p_values if p_value is not None]))
    return [None if p_value is None else next(adjusted) for p_value in p_values]


def _letter(number: int) -> str:
    """A, B, … Z, then A2, B2, …"""
    letter = chr(ord("A") + number % 26)
    return letter if number < 26 else f"{letter}{number // 26 + 1}"


def _value(point: Any) -> float | None:
    return None if point is None else point.value


def _seconds(run: Run) -> float | None:
    """Of the whole training; of a run that is not finished, the sum of its epochs."""
    epochs = [point.value for point in run.curve("train", "seconds")]
    return finite((run.result or {}).get("seconds")) or (sum(epochs) if epochs else None)


def _images_per_second(run: Run) -> float | None:
    """Over the whole training; of a run that is not finished, the mean of its epochs."""
    epochs = [point.value for point in run.curve("train", "images_per_second")]
    mean = sum(epochs) / len(epochs) if epochs else None
    return finite((run.result or {}).get("images_per_second")) or mean
