"""The loop: epochs, steps, evaluations and checkpoints. It sees steps only; recipes stop at `build`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from harness.data.loaders import WaitTimer
from harness.errors import Diverged
from harness.training.build import TrainingComponents
from harness.training.state import Meter, Progress, Score
from harness.training.step import Stopped

_HINT = "Lower optimizer.lr or add warm-up; --resume auto resumes from the last checkpoint."


class Due(NamedTuple):
    """What follows a step. Anything of it waits for the device, so that is when numbers are checked."""

    log: bool
    epoch_end: bool
    evaluation: bool
    checkpoint: bool


@dataclass(frozen=True)
class Cadence:
    """When things happen, in optimizer steps; an evaluation and a checkpoint end the run."""

    total_steps: int
    log_steps: int
    evaluate_steps: int
    checkpoint_steps: tuple[int, ...]  # each of these numbers and their multiples

    def due(self, step: int, *, ends_epoch: bool) -> Due:
        """What follows optimizer step number `step` (1 is the first)."""
        final = step == self.total_steps
        return Due(
            log=final or step % self.log_steps == 0,
            epoch_end=ends_epoch,
            evaluation=final or step % self.evaluate_steps == 0,
            checkpoint=final or any(step % every == 0 for every in self.checkpoint_steps),
        )


def fit(components: TrainingComponents, cadence: Cadence, progress: Progress) -> None:
    """Train from where `progress` stands to the end; `progress` is kept up to date in place.

    Raises Diverged: a loss or gradient is not finite; Stopped: a signal asked for it, and a checkpoint is written.
    """
    while progress.step < cadence.total_steps:
        run_epoch(components, cadence, progress)
    if progress.last is None or progress.last["step"] != progress.step:
        evaluate_all(components, progress)  # nothing was left to train: the weights as they are
        components.checkpointer.save(progress)
    components.checkpointer.wait()


def run_epoch(components: TrainingComponents, cadence: Cadence, progress: Progress) -> None:
    """Train the rest of the epoch under way, with what falls due in it."""
    plan, step = components.plan, components.step
    remaining = cadence.total_steps - progress.step
    micro_batches = plan.micro_batches(progress.epoch, progress.step_in_epoch)[:remaining]
    ids_per_batch = list(chain.from_iterable(micro_batches))
    batches = WaitTimer(components.train_loader.batches(ids_per_batch, epoch=progress.epoch))
    window = _Window(components, progress, batches)
    step.model.train()
    for ids_per_micro in micro_batches:
        if components.stop_vote.agreed():
            _stop(components, progress, window)
        due = cadence.due(progress.step + 1, ends_epoch=progress.step_in_epoch + 1 == plan.steps_per_epoch)
        refetch = partial(components.train_loader.batches, ids_per_micro, epoch=progress.epoch)
        with step.profiler.step(progress.step):
            step(
                batches,
                refetch=refetch,
                micro_batches=len(ids_per_micro),
                step=progress.step,
                global_count=plan.global_count(progress.step_in_epoch),
                meter=window.meter,
                check=any(due),
            )
        progress.step, progress.step_in_epoch = progress.step + 1, progress.step_in_epoch + 1
        components.runtime.tick()
        components.tracker.tick(progress.step)
        if line := components.startup.first_step():
            components.tracker.note(f"  {line}")
        if not any(due):
            continue
        if not math.isfinite(window.close(log=due.log).loss):
            step.raise_diverged(refetch(), progress.step)
        if due.epoch_end or progress.step == cadence.total_steps:
            _log_epoch(components, progress)
        if due.epoch_end:
            progress.next_epoch()
        if due.evaluation:
            evaluate_all(components, progress)
        if due.checkpoint or (due.evaluation and components.checkpointer.keep_best and progress.is_best):
            components.checkpointer.save(progress)
        window.restart_clock()


def _stop(components: TrainingComponents, progress: Progress, window: _Window) -> None:
    """Write a checkpoint of this very step and leave; numbers that are not finite are not worth one."""
    score = window.close(log=False)
    weights = components.step.unwrapped_model.parameters()
    if not math.isfinite(score.loss) or not all(bool(p.isfinite().all()) for p in weights):
        what = f"training diverged before it was stopped after step {progress.step}: loss or weights are not finite"
        raise Diverged(what, hint=_HINT)
    if not (components.checkpointer.directory / f"step_{progress.step}").exists():
        components.checkpointer.save(progress)
    components.checkpointer.wait()
    raise Stopped(progress.step)


class _Window:
    """The stretch since the last log line: what was learnt in it, and how fast."""

    def __init__(self, components: TrainingComponents, progress: Progress, batches: WaitTimer) -> None:
        self.meter = Meter(components.runtime.device)
        self._components, self._progress, self._batches = components, progress, batches
        self._from_step = progress.step
        self.restart_clock()

    def restart_clock(self) -> None:
        self._started_at = time.perf_counter()

    def close(self, *, log: bool) -> Score:
        """Add the stretch to the epoch's sums, log it where a line is due, begin a new one, and return its score."""
        progress, step, score = self._progress, self._components.step, self.meter.take()  # waits for the device
        seconds, steps = time.perf_counter() - self._started_at, progress.step - self._from_step
        loader_wait_seconds = self._batches.take_seconds()
        progress.add(score, seconds, loader_wait_seconds)
        if log:
            self._components.tracker.log(
                {
                    **_place(self._components, progress, "step", "train"),
                    **score.to_json(),
                    "lr": step.lr,
                    **step.norms(),
                    "images_per_second": score.total / seconds,
                    "milliseconds_per_step": 1000 * seconds / max(1, steps),
                    "loader_wait_seconds": loader_wait_seconds,
                }
            )
        self._from_step = progress.step
        self.restart_clock()
        return score


def _log_epoch(components: TrainingComponents, progress: Progress) -> None:
    """One record for the epoch, or the part of it, that ends here."""
    score, seconds = progress.epoch_score, progress.epoch_seconds
    components.tracker.log(
        {
            **_place(components, progress, "epoch", "train"),
            "steps": progress.step_in_epoch,
            "seconds": seconds,
            "loader_wait_seconds": progress.epoch_loader_wait_seconds,
            **score.to_json(),
            "lr": components.step.lr,
            "images_per_second": score.total / max(seconds, 1e-9),
        }
    )


def _place(components: TrainingComponents, progress: Progress, kind: str, split: str) -> dict[str, Any]:
    epoch = round(progress.step / components.plan.steps_per_epoch, 4)
    return {"kind": kind, "split": split, "step": progress.step, "epoch": epoch}


def evaluate_all(components: TrainingComponents, progress: Progress) -> None:
    """Evaluate the raw weights, and apart from them the averaged ones, over the whole test split."""
    models: dict[str, nn.Module] = {"test": components.step.unwrapped_model}
    if components.step.ema is not None:
        models["test_ema"] = components.step.ema.module
    for split, model in models.items():
        components.evaluator.share_statistics(model, average=split == "test")
    recalibration = list(chain.from_iterable(components.plan.micro_batches(progress.epoch)))
    del recalibration[components.recalibration_batches :]
    place = _place(components, progress, "epoch", "test")
    evaluation: Any = {"step": place["step"], "epoch": place["epoch"]}
    for split, model in models.items():
        started_at = time.perf_counter()
        if recalibration:
            batches = components.train_loader.batches(recalibration, epoch=progress.epoch)
            components.evaluator.recalibrate_batch_norm(model, batches)
        score = components.evaluator.score(model)
        if not math.isfinite(score.loss):
            raise Diverged(f"the {split} loss is not finite after step {progress.step}", hint=_HINT)
        evaluation[split] = score.to_json()
        seconds = time.perf_counter() - started_at
        components.tracker.log({**place, "split": split, **evaluation[split], "seconds": seconds})
    progress.take_evaluation(evaluation, judged_by=components.best_by)
