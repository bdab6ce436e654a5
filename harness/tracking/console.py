"""The console: a live line on a terminal, plain lines at a sane rate elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from tqdm import tqdm

from harness.tracking.metrics import Record, Tracker

SECONDS_BETWEEN_PLAIN_LINES = 10.0
_BAR = "Epoch {desc} {n_fmt}/{total_fmt} [{bar:24}] {elapsed}<{remaining} {postfix}"


@dataclass(kw_only=True)
class ConsoleTracker(Tracker):
    """Prints progress to `stream`."""

    epochs: float  # of the whole run; a fraction where its length is given in steps
    steps_per_epoch: int
    total_steps: int
    from_step: int = 0  # steps already done
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def __post_init__(self) -> None:
        self._live = self.stream.isatty()
        self._bar: tqdm | None = None
        self._train: Record | None = None
        self._started_at = self._last_line_at = time.monotonic()

    def tick(self, step: int) -> None:
        if not self._live:
            return
        if self._bar is None:
            epoch, done = divmod(step - 1, self.steps_per_epoch)
            self._bar = tqdm(
                total=min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch),
                initial=done,
                desc=f"{epoch + 1}/{self.epochs:g}",
                bar_format=_BAR,
                ascii=" >=",
                file=self.stream,
                leave=False,
                dynamic_ncols=True,
            )
        self._bar.update()

    def log(self, record: Record) -> None:
        if record["kind"] == "step":
            self._log_step(record)
        elif record["split"] == "train":
            self._train = record  # printed with the evaluation
        else:
            self._log_evaluation(record)

    def note(self, text: str) -> None:
        self._last_line_at = time.monotonic()
        with contextlib.suppress(OSError):  # nobody reads any more; the training continues
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self.stream, flush=True)

    def finish(self, result: Record | None) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log_step(self, record: Record) -> None:
        text = (
            f"loss {record['loss']:.4f} accuracy {record['accuracy']:.2%} "
            f"{record['images_per_second']:,.0f} img/s {record['milliseconds_per_step']:.0f} ms/step"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif not self._live and time.monotonic() - self._last_line_at >= SECONDS_BETWEEN_PLAIN_LINES:
            step, total = record["step"], self.total_steps
            seconds_per_step = (time.monotonic() - self._started_at) / max(1, step - self.from_step)
            eta = tqdm.format_interval(seconds_per_step * (total - step))
            self.note(f"  step {step}/{total}  {text}  ETA {eta}")

    def _log_evaluation(self, record: Record) -> None:
        self.finish(None)  # the epoch's bar
        train, self._train = self._train, None
        if train is not None:
            steps, seconds = train["steps"], train["seconds"]
            self.note(
                f"Epoch {train['epoch']:g}/{self.epochs:g}  {steps} steps - {seconds:.0f}s "
                f"{1000 * seconds / max(1, steps):.0f}ms/step - loss: {train['loss']:.4f} - "
                f"accuracy: {train['accuracy']:.4%}"
            )
        counts = f"{record['correct']}/{record['total']} ({record['accuracy']:.2%})"
        self.note(f"  {record['split'].replace('_', ' ')}: loss {record['loss']:.4f}, accuracy {counts}")
