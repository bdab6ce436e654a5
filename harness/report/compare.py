"""A comparison of runs: groups of one experiment, what their recipes differ in, their figures, and whether their
accuracies differ by more than chance.

Two kinds of chance are told apart. Over the test images: the trained networks are taken as they are, and the question
is whether the difference would be there on other images of the kind. Over the seeds: the test images are taken as they
are, and the question is whether it would be there in other trainings.

Legend of shape letters: N test images; A, B runs of the two groups.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from tqdm import tqdm

from harness.errors import HarnessError, ManyErrors
from harness.runs import Run, finite, open_run

LEVEL = 0.95  # of the intervals
NOT_SET = "(not set)"  # a key that a recipe of another version has not got
_TITLES = {
    "last_accuracy": "test accuracy, last",
    "best_accuracy": "test accuracy, best",
    "last_ema_accuracy": "EMA test accuracy, last",
    "best_ema_accuracy": "EMA test accuracy, best",
    "last_loss": "test loss, last",
    "epochs": "epochs",
    "seconds": "training, seconds",
    "images_per_second": "images a second",
    "parameters": "parameters",
}


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

    def to_json(self) -> dict[str, Any]:
        runs = [{"run": str(r.path), "state": r.state, "seed": r.seed, "problems": list(r.problems)} for r in self.runs]
        return {"letter": self.letter, "recipe": self.name, "runs": runs}


class Answers(NamedTuple):
    """What a checkpoint makes of N test images: their SHA-256, true classes (int64), and whether it has them right."""

    images_sha256: Mapping[str, str]
    labels_N: np.ndarray  # noqa: N815
    correct_N: np.ndarray  # noqa: N815


@dataclass(frozen=True)
class Estimate:
    """A difference of accuracies, the second group less the first, in shares from -1 to 1."""

    difference: float
    low: float | None  # of the 95 % interval; None where nothing tells the spread
    high: float | None
    p_value: float | None  # two-sided, that there is none; None where it cannot be tested
    method: str
    count: int  # images, or runs of both groups


@dataclass
class Pair:
    """A group next to the first one, by their letters."""

    first: str
    second: str
    first_accuracy: float | None  # mean over the finished runs; None where no run has one
    second_accuracy: float | None
    counts: list[int]  # finished runs with a test accuracy, of the first and the second
    images: Estimate | None  # over the test images; None where they cannot be paired, and `refusal` says why
    seeds: Estimate | None  # over the runs; None where a group has no accuracy
    refusal: str | None
    other_images: bool  # the test images of the groups are known to differ
    images_p_adjusted: float | None = None  # by Holm's method over all pairs
    seeds_p_adjusted: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs in groups; `differences` has the values of a recipe's key by the letters of the groups, `figures` are as
    `headline_figures` makes them, `notes` are sentences on what is missing or to be heeded."""

    groups: list[Group]
    differences: dict[str, dict[str, Any]]
    figures: list[dict[str, Any]]
    checkpoint: str
    weights: str
    pairs: list[Pair]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        groups = [group.to_json() for group in self.groups]
        return vars(self) | {"groups": groups, "pairs": [asdict(pair) for pair in self.pairs]}


def compare(paths: Sequence[Path], *, checkpoint: str, weights: str) -> Comparison:
    """Compare runs, grouped by their recipes, by their "last" or "best" checkpoint with "raw" or "ema" weights.

    Raises:
        HarnessError: paths that are no runs, all of them named.
    """
    runs = _open_all(paths)
    groups = group_runs(runs)
    notes = _notes(runs, groups)
    pairs = []
    if len(groups) > 1:
        if checkpoint == "best":
            notes.append("The best checkpoints were chosen by their test accuracy, so they look a little too good.")
        answers: dict[Path, Answers] = {}
        finished = [run for run in runs if run.state == "finished"]
        for run in tqdm(finished, desc="test images", unit="run", leave=False, disable=None):
            try:
                answers[run.path] = _answers_of(run, which=checkpoint, weights=weights)
            except (HarnessError, OSError) as error:  # such as a checkpoint that its training deletes in this moment
                why = error.what if isinstance(error, HarnessError) else error.strerror
                notes.append(f"{run.label} says nothing of single images: {why}.")
        accuracies = {  # by what they say of each image, or else as the training wrote them down
            run.path: float(answers[run.path].correct_N.mean())
            if run.path in answers
            else run.recorded_accuracy(checkpoint, weights)
            for run in finished
        }
        pairs = [_pair(groups[0], group, answers, accuracies) for group in groups[1:]]
        for over in ("images", "seeds"):
            tested = [pair for pair in pairs if (estimate := getattr(pair, over)) and estimate.p_value is not None]
            adjusted = holm([getattr(pair, over).p_value for pair in tested])
            for pair, p_value in zip(tested, adjusted, strict=True):
                setattr(pair, f"{over}_p_adjusted", p_value)
    figures = headline_figures(groups)
    return Comparison(groups, differing_settings(groups), figures, checkpoint, weights, pairs, notes)


def _open_all(paths: Sequence[Path]) -> list[Run]:
    runs: dict[Path, Run] = {}
    errors = []
    for path in paths:
        try:
            run = open_run(path)
            runs.setdefault(run.path.resolve(), run)
        except HarnessError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else ManyErrors("compare", errors)
    return list(runs.values())


def _notes(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    notes = []
    for run in runs:
        notes += [f"{run.label}: {problem}." for problem in run.problems]
        if run.state != "finished":
            left_out = ", and it is left out where groups are set beside each other" if len(groups) > 1 else ""
            so_far = f"({run.state}, epoch {run.epoch:.4g}): its figures are those so far"
            notes.append(f"{run.label} is not finished {so_far}{left_out}.")
    for group in groups:
        seeds = [run.seed for run in group.finished if run.seed is not None]
        if twice := sorted({str(seed) for seed in seeds if seeds.count(seed) > 1}):
            notes.append(
                f"{group.letter} has several runs of seed {', '.join(twice)}: they are no independent trainings, and "
                "what is said over seeds is too sure."
            )
    return notes


# --- groups and figures


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by their experiment; one whose recipe cannot be read is a group of its own."""
    groups: dict[str, Group] = {}
    for number, run in enumerate(runs):
        mark = json.dumps(run.experiment, sort_keys=True) if run.experiment else f"unknown {number}"
        times, place = divmod(len(groups), 26)
        letter = chr(ord("A") + place) + (str(times + 1) if times else "")  # A, B, … Z, then A2, B2, …
        groups.setdefault(mark, Group(letter, [])).runs.append(run)
    return list(groups.values())


def differing_settings(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """The keys in which the known recipes of groups differ, each with its value in every group, or `NOT_SET`."""
    recipes = {group.letter: group.runs[0].experiment for group in groups}
    known = [recipe for recipe in recipes.values() if recipe]
    return {
        key: {letter: recipe.get(key, NOT_SET) for letter, recipe in recipes.items()}
        for key in dict.fromkeys(key for recipe in known for key in recipe)
        if len({json.dumps(recipe.get(key, NOT_SET), sort_keys=True) for recipe in known}) > 1
    }


def headline_figures(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Accuracies, loss, length and speed: `key`, `title` and by the letter of each group the `values` of the runs that
    have one, `n`, `mean` and sample `standard_deviation`; figures that no run has are left out."""
    of_runs = {group.letter: [_figures_of(run) for run in group.runs] for group in groups}
    found = []
    for key, title in _TITLES.items():
        figures: dict[str, dict[str, Any]] = {}
        for letter, runs in of_runs.items():
            values = [value for run in runs if (value := run[key]) is not None]
            mean, deviation = mean_and_deviation(values) if values else (None, None)
            figures[letter] = {"values": values, "n": len(values), "mean": mean, "standard_deviation": deviation}
        if any(figure["values"] for figure in figures.values()):
            found.append({"key": key, "title": title, "groups": figures})
    return found


def _figures_of(run: Run) -> dict[str, float | None]:
    """Of the whole training; of one that is not finished, seconds and rate are those of its epochs."""
    result = run.result or {}
    points = {
        "last_accuracy": run.last_in("test"),
        "best_accuracy": run.best_in("test"),
        "last_ema_accuracy": run.last_in("test_ema"),
        "best_ema_accuracy": run.best_in("test_ema"),
        "last_loss": run.last_in("test", "loss"),
    }
    figures = {key: None if point is None else point.value for key, point in points.items()}
    seconds, rates = ([p.value for p in run.curve("train", key)] for key in ("seconds", "images_per_second"))
    figures["epochs"] = run.epoch if run.records else None
    figures["seconds"] = finite(result.get("seconds")) or (sum(seconds) if seconds else None)
    figures["images_per_second"] = finite(result.get("images_per_second")) or (
        sum(rates) / len(rates) if rates else None
    )
    figures["parameters"] = finite(result.get("parameters"))
    return figures


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for the latter of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


# --- pairs


def _pair(
    first: Group, second: Group, answers: Mapping[Path, Answers], accuracies: Mapping[Path, float | None]
) -> Pair:
    both = (first, second)
    there = [[answers[run.path] for run in group.finished if run.path in answers] for group in both]
    known = [[a for run in group.finished if (a := accuracies[run.path]) is not None] for group in both]
    refusal, other_images = why_not_paired([*there[0], *there[1]]), False
    if unfinished := [group.letter for group in both if not group.finished]:
        refusal = f"no run of {' and '.join(unfinished)} is finished"
    elif silent := [group.letter for group, found in zip(both, there, strict=True) if not found]:
        refusal = f"no run of {' and '.join(silent)} has a checkpoint that could be asked"
    else:
        other_images = refusal is not None
    images = None if refusal else over_images(*(np.stack([found.correct_N for found in side]) for side in there))
    seeds = over_seeds(*known) if all(known) else None
    means = [float(np.mean(side)) if side else None for side in known]
    counts = [len(side) for side in known]
    return Pair(first.letter, second.letter, means[0], means[1], counts, images, seeds, refusal, other_images)


def _answers_of(run: Run, *, which: str, weights: str) -> Answers:
    """Classify the test split by a run's checkpoint, or take what was kept of the last time."""
    from harness.training.checkpoint import STATE
    from harness.training.inference import predict_test_split

    found = predict_test_split(run.path, which=which, weights=weights)
    digests = json.loads((found.checkpoint / STATE).read_text())["data_sha256"]
    test = {name: digest for name, digest in digests.items() if name.startswith("test")}
    return Answers(test, found.labels_N.numpy(), found.correct_N.numpy())


def why_not_paired(answers: Sequence[Answers]) -> str | None:
    """Why the answers cannot be compared image by image, in words; None where they can."""
    counts = sorted({len(other.labels_N) for other in answers})
    if len(counts) > 1:
        return f"they were tested on {' and '.join(f'{count:,}' for count in counts)} images"
    if any(other.images_sha256 != answers[0].images_sha256 for other in answers):
        return "they were tested on other images (the SHA-256 of the test split differs)"
    if any(not np.array_equal(other.labels_N, answers[0].labels_N) for other in answers):
        return "the labels of their test images differ"
    return None


# --- significance


def over_images(first_AN: np.ndarray, second_BN: np.ndarray) -> Estimate:
    """The difference of mean accuracies over the same images, by whether each run has each image right (bool).

    With a run each the p-value is McNemar's mid-p, with several that of the permutation test that swaps the two groups
    image by image, the same test for means. The interval is Bonett & Price's adjusted Wald interval (2012, Journal of
    Educational and Behavioral Statistics 37:479), with means of runs in place of ones and zeros.
    """
    runs_a, runs_b = len(first_AN), len(second_BN)
    scale = math.lcm(runs_a, runs_b)
    # In whole numbers: `scale` times the difference of the means.
    steps_N = second_BN.sum(0, dtype=np.int64) * (scale // runs_b) - first_AN.sum(0, dtype=np.int64) * (scale // runs_a)
    if runs_a == runs_b == 1:
        p_value, method = mcnemar(int((steps_N < 0).sum()), int((steps_N > 0).sum())), "McNemar's mid-p test"
    else:
        p_value, method = swap_test(steps_N), "paired permutation test, mid-p"
    difference_N = steps_N / scale
    # Wald's interval after an image more for either side was added, which keeps its level where few images differ.
    count = len(difference_N) + 2
    mean = float(difference_N.sum()) / count
    variance = (float((difference_N**2).sum()) + 2) / count - mean**2
    room = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance / count)
    low, high = max(-1.0, mean - room), min(1.0, mean + room)
    return Estimate(float(difference_N.mean()), low, high, p_value, method, len(steps_N))


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's two-sided mid-p value, by the numbers of images that only one of two networks has right.

    Fagerland, Lydersen & Laake 2013, https://doi.org/10.1186/1471-2288-13-91: exact is conservative, mid-p not.
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    just_there = float(stats.binom.pmf(fewer, discordant, 0.5))
    if only_first == only_second:
        return 1 - just_there / 2 if discordant else 1.0
    return 2 * float(stats.binom.cdf(fewer, discordant, 0.5)) - just_there


def swap_test(steps_N: np.ndarray) -> float:
    """Two-sided mid-p value of a sum of whole numbers that could as well have had the other sign each.

    The distribution of the sum of N values, each with a random sign, comes from its characteristic function, a product
    of cosines, by one Fourier transform: exact but for rounding, some 1e-15. With values of -1, 0 and 1 it is McNemar's
    test.
    """
    sizes, counts = np.unique(np.abs(steps_N[steps_N != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    divisor = int(np.gcd.reduce(sizes))
    sizes, total = sizes // divisor, abs(int(steps_N.sum())) // divisor
    largest = int((sizes * counts).sum())
    length = 1 << (2 * largest + 1).bit_length()  # sums from -largest to largest fit without meeting
    angle = 2 * np.pi * np.arange(length // 2 + 1) / length
    wave = np.ones(len(angle))
    for size, count in zip(sizes, counts, strict=True):
        wave *= np.cos(size * angle) ** int(count)
    chance = np.clip(np.fft.irfft(wave, length), 0.0, 1.0)  # of the sum s at place s modulo length
    beyond = float(chance[total + 1 : largest + 1].sum())
    # Of the sum itself and its negative half each counts; they are the same where it is 0.
    return min(1.0, 2 * beyond + float(chance[total]) * (0.5 if total == 0 else 1.0))


def over_seeds(first_A: Sequence[float], second_B: Sequence[float]) -> Estimate:
    """The difference of mean accuracies (shares) over runs with other seeds: Welch's t-test and its interval."""
    method, total = "Welch's t-test", len(first_A) + len(second_B)
    difference = float(np.mean(second_B) - np.mean(first_A))
    if min(len(first_A), len(second_B)) < 2 or not (np.ptp(first_A) or np.ptp(second_B)):
        return Estimate(difference, None, None, None, method, total)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # scipy's, where one group is constant
        found = stats.ttest_ind(second_B, first_A, equal_var=False)
        low, high = found.confidence_interval(LEVEL)
    return Estimate(difference, float(low), float(high), float(found.pvalue), method, total)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method (1979), in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
