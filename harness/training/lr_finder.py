"""The learning-rate range test: how the loss answers to a rate that grows from step to step.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks" (WACV 2017), section 3.3, with rates that are even
on a logarithmic scale and the smoothing and end of Gugger, "How Do You Find A Good Learning Rate" (2018), as fastai and
Lightning have them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.distributed.runtime import distributed_context
from harness.errors import Diverged, HarnessError
from harness.recipe import Recipe
from harness.recipe.schema import Ema, Schedule
from harness.tracking.metrics import Tracker
from harness.training.build import TrainingComponents
from harness.training.loop import Cadence, run_epoch
from harness.training.state import Progress, Startup

BETA = 0.98  # of the smoothing; Gugger's and fastai's
DIVERGED_TIMES = 4.0  # the smoothed loss over its least so far; Gugger's and fastai's
SKIPPED_SHARE = 0.1  # of the first steps, in which the average is of few losses; fastai's and Lightning's
FEWEST_STEPS = 10
MUST_FALL_SHARE = 0.05  # of the loss at the start; a smaller fall is noise
STEEPEST = "steepest descent of the smoothed loss over log(lr)"
TENTH = "a tenth of the rate at the least smoothed loss"


@dataclass(frozen=True)
class Suggestion:
    """A rate and the rule that it comes from; without a rate, why the rule has none here."""

    rule: str
    source: str
    lr: float | None
    reason: str = ""


@dataclass(frozen=True)
class LrRange:
    """What a range test found.

    Attributes:
        lrs: the rate of each step.
        losses: mean loss over the step's images before its update; without what is not finite.
        smoothed: their exponential moving average, corrected for its start.
        diverged_at: the rate at which the test ended early; None where it went to its end.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged_at: float | None
    suggestions: list[Suggestion]
    beta: float = BETA

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_lr(recipe: Recipe, *, min_lr: float, max_lr: float, steps: int) -> LrRange:
    """Run the range test on a recipe's own data, loader, network, optimizer and precision, one optimizer step a rate.

    A network is made for it, without the recipe's schedule, averaged weights and tracking; nothing is written.
    """
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        what = "the range test takes one process: the recipe's global batch means the same on any number of ranks"
        raise HarnessError(what, hint="Start it without accelerate launch, torchrun or srun: harness lr-find RECIPE.")
    if not 0 < min_lr < max_lr or not math.isfinite(max_lr / min_lr):  # of which either may be infinite or NaN
        what = f"--min-lr {min_lr:g} and --max-lr {max_lr:g} are no range of rates"
        hint = "Both above 0, the first the smaller one, for example --min-lr 1e-6 --max-lr 1."
        raise HarnessError(what, hint=hint)
    if steps < FEWEST_STEPS:
        raise HarnessError(f"--steps {steps} are too few to see a curve", hint=f"At least {FEWEST_STEPS}; usual: 100.")
    plain = recipe.model_copy(update={"schedule": Schedule(), "ema": Ema()})
    lrs = rates(min_lr, max_lr, steps)
    with distributed_context(precision=recipe.training.precision, seed=recipe.seed) as runtime:
        never_written = Path(os.devnull)
        with closing(TrainingComponents(plain, runtime, never_written, Startup())) as components:
            losses, diverged_at = _measure(components, lrs)
    smoothed, tried = smooth(losses), lrs[: len(losses)]
    suggestions = suggest(tried, smoothed, diverged=diverged_at is not None)
    return LrRange(tried, losses, smoothed, diverged_at, suggestions)


def rates(min_lr: float, max_lr: float, steps: int) -> list[float]:
    """Rates that grow by the same factor from step to step, both ends included."""
    return [min_lr * (max_lr / min_lr) ** (i / (steps - 1)) for i in range(steps)]


def smooth(losses: list[float], beta: float = BETA) -> list[float]:
    """Exponential moving average, divided by the weight it has gathered so far (as Adam corrects its averages)."""
    average, found = 0.0, []
    for number, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss
        found.append(average / (1 - beta**number))
    return found


def suggest(lrs: list[float], smoothed: list[float], *, diverged: bool) -> list[Suggestion]:
    """Rates by both rules, each only where the curve has one; `diverged` says that the test ended by divergence."""
    first = math.ceil(SKIPPED_SHARE * len(lrs))
    least = first + int(np.argmin(smoothed[first:])) if len(smoothed) > first else 0
    tenth, steepest = (TENTH, "Gugger 2018; fastai's `minimum`"), (STEEPEST, "fastai's `steep`; Lightning's `lr_find`")
    reason = ""
    if len(smoothed) < FEWEST_STEPS:
        reason = f"the loss diverged within {len(smoothed)} steps: give a smaller --min-lr"
    elif least - first < 2 or smoothed[first] - smoothed[least] < MUST_FALL_SHARE * abs(smoothed[first]):
        reason = (
            f"the smoothed loss does not fall by {MUST_FALL_SHARE:.0%} anywhere in this range (from "
            f"{smoothed[first]:.4g} to {smoothed[least]:.4g}): try more --steps, or another range"
        )
    if reason:
        return [Suggestion(*steepest, None, reason), Suggestion(*tenth, None, reason)]
    slopes = np.diff(smoothed[first : least + 1]) / np.diff(np.log(lrs[first : least + 1]))
    found = [Suggestion(*steepest, lrs[first + int(np.argmin(slopes))])]
    if least == len(lrs) - 1 and not diverged:
        return [*found, Suggestion(*tenth, None, "the loss still falls at the largest rate: give a larger --max-lr")]
    return [*found, Suggestion(*tenth, lrs[least] / 10)]


class _RangeEnds(Exception):
    """All rates were tried, or the loss has grown too far."""


class _Losses(Tracker):
    """Takes the loss of each step until the range ends."""

    def __init__(self, most: int) -> None:
        self.losses: list[float] = []
        self.diverged = False
        self._most, self._least = most, math.inf

    def log(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "step":
            self.losses.append(record["loss"])
            smoothed = smooth(self.losses)[-1]
            self._least = min(self._least, smoothed)
            self.diverged = smoothed > DIVERGED_TIMES * self._least
            if self.diverged or len(self.losses) == self._most:
                raise _RangeEnds


def _measure(components: TrainingComponents, lrs: list[float]) -> tuple[list[float], float | None]:
    """The training loop, one optimizer step a rate, until the loss diverges: the losses, and the rate where it did."""

    def set_lr(step: int) -> float:
        for group in components.step.raw_optimizer.param_groups:
            group["lr"] = lrs[step]
        return lrs[step]

    never = 1 << 60
    components.tracker = taken = _Losses(len(lrs))
    components.step.schedule = set_lr
    progress = Progress()
    try:
        while True:
            run_epoch(components, Cadence(never, 1, never, checkpoint_steps=()), progress)
    except _RangeEnds:
        return taken.losses, lrs[progress.step - 1] if taken.diverged else None
    except Diverged:
        return taken.losses, components.step.lr
