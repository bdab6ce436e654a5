"""The loop: epochs, steps, evaluations and checkpoints. It sees steps only; recipes stop at `assemble`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from harness.data.loaders import WaitTimer
from harness.errors import Diverged
from harness.training.evaluate import (
    average_buffers,
    evaluate,
    recalibrate_batch_norm,
    take_buffers_of_first_rank,
)
from harness.training.parts import Parts
from harness.training.state import Meter, Progress, Score
from harness.training.stopping import Stopped


@dataclass(frozen=True)
class Cadence:
    """When things happen, in optimizer steps.

    Attributes:
        total_steps: length of the run.
        log_steps: between log lines.
        evaluate_steps: between evaluations; one always ends the run.
        checkpoint_steps: each of these numbers and their multiples get a checkpoint; one always ends the run.
    """

    total_steps: int
    log_steps: int
    evaluate_steps: int
    checkpoint_steps: tuple[int, ...]

    def due(self, step: int, *, ends_epoch: bool) -> Due:
        """What follows optimizer step number `step` (1 is the first)."""
        final = step == self.total_steps
        return Due(
            log=final or step % self.log_steps == 0,
            epoch_end=ends_epoch,
            evaluation=final or step % self.evaluate_steps == 0,
            checkpoint=final or any(step % every == 0 for every in self.checkpoint_steps),
        )


@dataclass(frozen=True)
class Due:
    """What follows a step. Anything of it waits for the device, so that is when numbers are checked."""

    log: bool
    epoch_end: bool
    evaluation: bool
    checkpoint: bool

    @property
    def anything(self) -> bool:
        return self.log or self.epoch_end or self.evaluation or self.checkpoint


def fit(parts: Parts, cadence: Cadence, progress: Progress) -> None:
    """Train from where `progress` stands to the end; `progress` is kept up to date in place.

    Raises:
        Diverged: a loss or gradient is not finite.
        Stopped: a signal asked for it; a checkpoint is written.
    """
    while progress.step < cadence.total_steps:
        run_epoch(parts, cadence, progress)
    if progress.last is None or progress.last["step"] != progress.step:
        evaluate_all(parts, progress)  # nothing was left to train: the weights as they are
        parts.save(progress)
    parts.writer.wait()


def run_epoch(parts: Parts, cadence: Cadence, progress: Progress) -> None:
    """Train the rest of the epoch under way, with what falls due in it."""
    plan = parts.plan
    remaining = cadence.total_steps - progress.step
    micro_batches = plan.micro_batches(progress.epoch, progress.step_in_epoch)[:remaining]
    ids_per_batch = list(chain.from_iterable(micro_batches))
    batches = WaitTimer(parts.train_loader.batches(ids_per_batch, epoch=progress.epoch))
    window = _Window(parts, progress, batches)
    parts.model.train()
    for ids_per_micro in micro_batches:
        if parts.stop.agreed():
            _stop(parts, progress, window)
        count = plan.global_count(progress.step_in_epoch)
        due = cadence.due(progress.step + 1, ends_epoch=progress.step_in_epoch + 1 == plan.steps_per_epoch)
        refetch = partial(parts.train_loader.batches, ids_per_micro, epoch=progress.epoch)
        with parts.profiler.step(progress.step):
            parts.step(
                batches,
                refetch=refetch,
                micro_batches=len(ids_per_micro),
                step=progress.step,
                global_count=count,
                meter=window.meter,
                check=due.anything,
                phase=parts.profiler.phase,
            )
        progress.step, progress.step_in_epoch = progress.step + 1, progress.step_in_epoch + 1
        parts.runtime.tick()
        parts.tracker.tick(progress.step)
        if line := parts.startup.first_step():
            parts.tracker.note(f"  {line}")
        if due.anything and not math.isfinite(window.close(log=due.log).loss):
            parts.step.raise_diverged(refetch(), progress.step)
        if due.epoch_end or progress.step == cadence.total_steps:
            _log_epoch(parts, progress)
        if due.epoch_end:
            progress.next_epoch()
        if due.evaluation:
            evaluate_all(parts, progress)
        if due.checkpoint or (due.evaluation and parts.keep_best and progress.is_best()):
            parts.save(progress)
        if due.anything:
            window.restart_clock()


def _stop(parts: Parts, progress: Progress, window: _Window) -> None:
    """Write a checkpoint of this very step and leave; numbers that are not finite are not worth one."""
    score = window.close(log=False)
    if not math.isfinite(score.loss) or not all(bool(p.isfinite().all()) for p in parts.bare_model.parameters()):
        raise Diverged(
            f"training diverged before it was stopped after step {progress.step}: loss or weights are not finite",
            hint="Lower optimizer.lr or add warm-up; --resume auto goes on from the last checkpoint.",
        )
    if not (parts.checkpoint_directory / f"step_{progress.step}").exists():
        parts.save(progress)
    parts.writer.wait()
    raise Stopped(progress.step)


class _Window:
    """The stretch since the last log line: what was learnt in it, and how fast."""

    def __init__(self, parts: Parts, progress: Progress, batches: WaitTimer) -> None:
        self.meter = Meter(parts.runtime.device)
        self._parts, self._progress, self._batches = parts, progress, batches
        self._from_step = progress.step
        self._started_at = time.perf_counter()

    def restart_clock(self) -> None:
        self._started_at = time.perf_counter()

    def close(self, *, log: bool) -> Score:
        """Add the stretch to the epoch's sums, log it where a line is due, begin a new one, and return its score."""
        progress, score = self._progress, self.meter.read()  # the read waits for the device
        seconds, steps = time.perf_counter() - self._started_at, progress.step - self._from_step
        loader_wait_seconds = self._batches.take_seconds()
        progress.add(score, seconds, loader_wait_seconds)
        if log:
            self._parts.tracker.log(
                {
                    "kind": "step",
                    "split": "train",
                    "step": progress.step,
                    "epoch": round(progress.epoch + progress.step_in_epoch / self._parts.plan.steps_per_epoch, 4),
                    **score.to_json(),
                    "lr": self._parts.step.lr,
                    "grad_norm": self._parts.step.grad_norm_value(),
                    "param_norm": self._parts.step.param_norm_value(),
                    "images_per_second": score.total / seconds,
                    "milliseconds_per_step": 1000 * seconds / max(1, steps),
                    "loader_wait_seconds": loader_wait_seconds,
                }
            )
        self.meter.reset()
        self._from_step = progress.step
        self.restart_clock()
        return score


def _log_epoch(parts: Parts, progress: Progress) -> None:
    """One record for the epoch, or the part of it, that ends here."""
    score, seconds = progress.epoch_score, progress.epoch_seconds
    parts.tracker.log(
        {
            "kind": "epoch",
            "split": "train",
            "step": progress.step,
            "epoch": round(progress.epoch + progress.step_in_epoch / parts.plan.steps_per_epoch, 4),
            "steps": progress.step_in_epoch,
            "seconds": seconds,
            "loader_wait_seconds": progress.epoch_loader_wait_seconds,
            **score.to_json(),
            "lr": parts.step.lr,
            "images_per_second": score.total / max(seconds, 1e-9),
        }
    )


def evaluate_all(parts: Parts, progress: Progress) -> None:
    """Evaluate the raw weights, and apart from them the averaged ones, over the whole test split."""
    average_buffers(parts.bare_model)
    if parts.ema is not None:
        take_buffers_of_first_rank(parts.ema.module)
    last: dict[str, Any] = {"step": progress.step, "epoch": parts.epochs_done(progress)}
    for split, model in parts.models_to_evaluate():
        started_at = time.perf_counter()
        score = evaluate_one(parts, model, progress.epoch)
        if not math.isfinite(score.loss):
            raise Diverged(
                f"the {split} loss is not finite after step {progress.step}",
                hint="Lower optimizer.lr or add warm-up; --resume auto goes on from the last checkpoint.",
            )
        last[split] = score.to_json()
        parts.tracker.log(
            {
                "kind": "epoch",
                "split": split,
                "step": progress.step,
                "epoch": last["epoch"],
                **score.to_json(),
                "seconds": time.perf_counter() - started_at,
            }
        )
    progress.take_evaluation(last, judged_by=parts.best_by)


def evaluate_one(parts: Parts, model: nn.Module, epoch: int) -> Score:
    """Score of one network on the test split; BatchNorm statistics are taken anew first where the recipe says so."""
    if parts.recalibration_batches:
        plan = parts.plan
        ids = list(chain.from_iterable(plan.micro_batches(epoch)))[: parts.recalibration_batches]
        recalibrate_batch_norm(
            model,
            parts.train_loader.batches(ids, epoch=epoch),
            autocast=parts.runtime.accelerator.autocast,
            memory_format=parts.memory_format,
        )
    return evaluate(
        model,
        parts.test_loader,
        parts.test_batches,
        autocast=parts.runtime.accelerator.autocast,
        device=parts.runtime.device,
        memory_format=parts.memory_format,
        expected_total=parts.test_count,
        tick=parts.runtime.tick,
    )
