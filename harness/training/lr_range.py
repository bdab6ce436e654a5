"""The learning-rate range test: how the loss answers to a rate that grows from step to step.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks" (WACV 2017), section 3.3, with rates that are even
on a logarithmic scale and the smoothing and end of Gugger, "How Do You Find A Good Learning Rate" (2018), as fastai and
Lightning have them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.errors import Diverged, HarnessError
from harness.recipe import Recipe
from harness.recipe.schema import Ema, Schedule
from harness.runtime import joined
from harness.training.parts import Parts, assemble
from harness.training.startup import Startup
from harness.training.state import Meter

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
        suggestions: by the rules that are in use.
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
    """Run the range test on a recipe's own data, loader, network, optimizer and precision.

    A network is made for it. Schedule, averaged weights and tracking of the recipe are left out. Nothing is written
    but converted data; random generators and the environment are as before afterwards.

    Args:
        min_lr, max_lr: rates of the first and the last step.
        steps: optimizer steps, one a rate.

    Raises:
        HarnessError: the range is none, several ranks, or something in the recipe does not go with data or machine.
    """
    _check(min_lr, max_lr, steps)
    plain = recipe.model_copy(update={"schedule": Schedule(), "ema": Ema()})
    with _as_before(), ExitStack() as stack:
        runtime = stack.enter_context(joined(precision=recipe.training.precision, seed=recipe.seed))
        parts = assemble(plain, runtime, Path(os.devnull), Startup())  # no checkpoint is ever written
        stack.callback(parts.close)
        lrs, losses, diverged = _measure(parts, rates(min_lr, max_lr, steps))
    smoothed = smooth(losses)
    return LrRange(
        lrs=lrs[: len(losses)],
        losses=losses,
        smoothed=smoothed,
        diverged_at=lrs[-1] if diverged else None,
        suggestions=suggest(lrs[: len(losses)], smoothed, diverged=diverged),
    )


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
    """Rates by both rules, each only where the curve has one.

    Args:
        diverged: whether the test ended by divergence, or at its largest rate.
    """
    first = math.ceil(SKIPPED_SHARE * len(lrs))
    least = first + int(np.argmin(smoothed[first:])) if len(smoothed) > first else 0
    reason = _reason_for_none(smoothed, first, least)
    tenth, steepest = (TENTH, "Gugger 2018; fastai's `minimum`"), (STEEPEST, "fastai's `steep`; Lightning's `lr_find`")
    if reason:
        return [Suggestion(*steepest, None, reason), Suggestion(*tenth, None, reason)]
    slopes = np.diff(smoothed[first : least + 1]) / np.diff(np.log(lrs[first : least + 1]))
    found = [Suggestion(*steepest, lrs[first + int(np.argmin(slopes))])]
    if least == len(lrs) - 1 and not diverged:
        found.append(Suggestion(*tenth, None, "the loss still falls at the largest rate: give a larger --max-lr"))
    else:
        found.append(Suggestion(*tenth, lrs[least] / 10))
    return found


def _reason_for_none(smoothed: list[float], first: int, least: int) -> str:
    """Why the curve says nothing about a good rate; empty where it does."""
    if len(smoothed) < FEWEST_STEPS:
        return f"the loss diverged within {len(smoothed)} steps: give a smaller --min-lr"
    start = smoothed[first]
    if least - first < 2 or start - smoothed[least] < MUST_FALL_SHARE * abs(start):
        return (
            f"the smoothed loss does not fall by {MUST_FALL_SHARE:.0%} anywhere in this range (from {start:.4g} to "
            f"{smoothed[least]:.4g}): try more --steps, or another range"
        )
    return ""


def _measure(parts: Parts, lrs: list[float]) -> tuple[list[float], list[float], bool]:
    """One optimizer step a rate, until the loss diverges: the rates tried, their losses, and whether it did."""
    losses: list[float] = []
    least = math.inf
    meter = Meter(parts.runtime.device)
    parts.model.train()
    optimizer = parts.optimizer.optimizer
    take = _steps(parts)
    try:
        for number, lr in enumerate(lrs):
            for group in optimizer.param_groups:
                group["lr"] = lr
            meter.reset()
            try:
                next(take)(step=number, meter=meter)
            except Diverged:
                return lrs[: number + 1], losses, True
            loss = meter.read().loss
            if not math.isfinite(loss):
                return lrs[: number + 1], losses, True
            losses.append(loss)
            smoothed = smooth(losses)[-1]
            least = min(least, smoothed)
            if smoothed > DIVERGED_TIMES * least:
                return lrs[: number + 1], losses, True
    finally:
        take.close()
    return lrs, losses, False


def _steps(parts: Parts) -> Generator[Any, None, None]:
    """Optimizer steps on the recipe's batches, epoch after epoch, each to be called with `step` and `meter`."""
    epoch = 0
    while True:
        micro_batches = parts.plan.micro_batches(epoch)
        batches = parts.train_loader.batches(list(chain.from_iterable(micro_batches)), epoch=epoch)
        for in_epoch, ids_per_micro in enumerate(micro_batches):
            yield partial(
                parts.step,
                batches,
                refetch=partial(parts.train_loader.batches, ids_per_micro, epoch=epoch),
                micro_batches=len(ids_per_micro),
                global_count=parts.plan.global_count(in_epoch),
                check=True,
            )
        epoch += 1


def _check(min_lr: float, max_lr: float, steps: int) -> None:
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        raise HarnessError(
            "the range test takes one process: the recipe's global batch means the same on any number of ranks",
            hint="Start it without accelerate launch, torchrun or srun: harness lr-find RECIPE.",
        )
    if not 0 < min_lr < max_lr or not math.isfinite(max_lr / min_lr):  # of which either may be infinite or NaN
        raise HarnessError(
            f"--min-lr {min_lr:g} and --max-lr {max_lr:g} are no range of rates",
            hint="Both above 0, the first the smaller one, for example --min-lr 1e-6 --max-lr 1.",
        )
    if steps < FEWEST_STEPS:
        raise HarnessError(f"--steps {steps} are too few to see a curve", hint=f"At least {FEWEST_STEPS}; usual: 100.")


@contextmanager
def _as_before() -> Iterator[None]:
    """Put global random generators and environment variables back behind the block."""
    environment = dict(os.environ)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        os.environ.clear()
        os.environ.update(environment)
