"""A comparison of runs: groups, differences, figures, and what the differences of accuracy may be put down to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.comparing.groups import (
    Figure,
    Group,
    differing_settings,
    group_runs,
    headline_figures,
    recorded_accuracy,
)
from harness.comparing.images import Answers, answers_of, why_not_paired
from harness.comparing.significance import Estimate, holm, over_images, over_seeds
from harness.errors import HarnessError, ManyErrors
from harness.runs import Run, open_run


@dataclass(frozen=True)
class Pair:
    """A group beside the first one; differences are this group less the first.

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
        figures: headline figures.
        pairs: every other group beside the first.
        checkpoint, weights: whose answers were compared: "last" or "best", "raw" or "ema".
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
        groups = [
            {
                "letter": group.letter,
                "recipe": group.name,
                "runs": [
                    {"run": str(run.path), "state": run.state, "seed": seed, "problems": list(run.problems)}
                    for run, seed in zip(group.runs, group.seeds, strict=True)
                ],
            }
            for group in self.groups
        ]
        letters = [group.letter for group in self.groups]
        differences = {key: dict(zip(letters, values, strict=True)) for key, values in self.differences.items()}
        return {
            "groups": groups,
            "differences": differences,
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
    # What a training has reached so far is no answer to which recipe is better.
    ended = [replace(group, runs=[run for run in group.runs if _has_ended(run)]) for group in groups]
    notes = [note for run in runs for note in _notes_on(run, paired=len(groups) > 1)] + _notes_on_seeds(ended)
    answers: dict[Path, Answers] = {}
    if len(groups) > 1:
        if checkpoint == "best":
            notes.append("The best checkpoints were chosen by their test accuracy, so they look a little too good.")
        answers = _all_answers([run for run in runs if _has_ended(run)], checkpoint, weights, notes)
    pairs = [_pair(ended[0], other, answers, checkpoint, weights) for other in ended[1:]]
    return Comparison(
        groups, differing_settings(groups), headline_figures(groups), _adjusted(pairs), checkpoint, weights, notes
    )


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


def _has_ended(run: Run) -> bool:
    return run.state == "finished"


def _notes_on(run: Run, *, paired: bool) -> list[str]:
    notes = [f"{run.label}: {problem}." for problem in run.problems]
    if not _has_ended(run):
        left_out = ", and it is left out where groups are set beside each other" if paired else ""
        notes.append(
            f"{run.label} is not finished ({run.state}, epoch {run.epoch:.4g}): its figures are those so far{left_out}."
        )
    return notes


def _notes_on_seeds(groups: Sequence[Group]) -> list[str]:
    notes = []
    for group in groups:
        known = [seed for seed in group.seeds if seed is not None]
        twice = sorted({str(seed) for seed in known if known.count(seed) > 1})
        if twice:
            notes.append(
                f"{group.letter} has several runs of seed {', '.join(twice)}: they are no independent trainings, and "
                "what is said over seeds is too sure."
            )
    return notes


def _all_answers(runs: Sequence[Run], checkpoint: str, weights: str, notes: list[str]) -> dict[Path, Answers]:
    """The answers of every run that has them; why another has none goes into the notes."""
    answers = {}
    for run in tqdm(runs, desc="test images", unit="run", leave=False, disable=None):
        try:
            answers[run.path] = answers_of(run, which=checkpoint, weights=weights)
        except HarnessError as error:
            notes.append(f"{run.label} says nothing of single images: {error.what}.")
        except OSError as error:  # a checkpoint that its training deletes in this moment
            notes.append(f"{run.label} says nothing of single images: {error.strerror}.")
    return answers


def _pair(first: Group, second: Group, answers: dict[Path, Answers], checkpoint: str, weights: str) -> Pair:
    accuracies = [_accuracies(group, answers, checkpoint, weights) for group in (first, second)]
    seeds = over_seeds(*accuracies) if all(accuracies) else None
    there = [[answers[run.path] for run in group.runs if run.path in answers] for group in (first, second)]
    images, refusal, other_images = None, None, False
    if unfinished := [group.letter for group in (first, second) if not group.runs]:
        refusal = f"no run of {' and '.join(unfinished)} is finished"
    elif not all(there):
        missing = [g.letter for g, found in zip((first, second), there, strict=True) if not found]
        refusal = f"no run of {' and '.join(missing)} has a checkpoint that could be asked"
    else:
        refusal = why_not_paired([*there[0], *there[1]])
        other_images = refusal is not None
    if refusal is None:
        images = over_images(*(np.stack([found.correct_N for found in side]) for side in there))
    means = [float(np.mean(side)) if side else None for side in accuracies]
    counts = (len(accuracies[0]), len(accuracies[1]))
    return Pair(first.letter, second.letter, means[0], means[1], counts, images, seeds, refusal, other_images)


def _accuracies(group: Group, answers: dict[Path, Answers], checkpoint: str, weights: str) -> list[float]:
    """Of each run: by its answers, else as its training wrote it down."""
    found = [
        answers[run.path].accuracy if run.path in answers else recorded_accuracy(run, checkpoint, weights)
        for run in group.runs
    ]
    return [accuracy for accuracy in found if accuracy is not None]


def _adjusted(pairs: Sequence[Pair]) -> list[Pair]:
    """With Holm's correction, for the tests over images and for those over seeds."""
    images = _holm_over([pair.images for pair in pairs])
    seeds = _holm_over([pair.seeds for pair in pairs])
    return [
        replace(pair, images_p_adjusted=of_images, seeds_p_adjusted=of_seeds)
        for pair, of_images, of_seeds in zip(pairs, images, seeds, strict=True)
    ]


def _holm_over(estimates: Sequence[Estimate | None]) -> list[float | None]:
    """Adjusted p-values in order; None where nothing was tested."""
    p_values = [None if estimate is None else estimate.p_value for estimate in estimates]
    adjusted = iter(holm([p_value for p_value in p_values if p_value is not None]))
    return [None if p_value is None else next(adjusted) for p_value in p_values]
