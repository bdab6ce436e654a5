"""The console: a live line on a terminal, plain lines at a sane rate elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TextIO

from tqdm import tqdm

from harness.tracking.base import NullTracker, Record

SECONDS_BETWEEN_PLAIN_LINES = 10.0
_BAR = "Epoch {desc} {n_fmt}/{total_fmt} [{bar:24}] {elapsed}<{remaining} {postfix}"


class ConsoleTracker(NullTracker):
    """Prints progress to `stream`.

    Args:
        epochs: of the whole run; may be a fraction where its length is given in steps.
        steps_per_epoch: optimizer steps an epoch.
        total_steps: optimizer steps of the run.
        from_step: optimizer steps already done.
    """

    def __init__(
        self,
        *,
        epochs: float,
        steps_per_epoch: int,
        total_steps: int,
        from_step: int = 0,
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        self._epochs, self._steps_per_epoch, self._total_steps = epochs, steps_per_epoch, total_steps
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() if live is None else live
        self._bar: tqdm | None = None
        self._last_line_at = time.monotonic()
        self._train: Record | None = None
        self._from_step, self._started_at = from_step, time.monotonic()

    def tick(self, step: int) -> None:
        if not self._live:
            return
        if self._bar is None:
            epoch = (step - 1) // self._steps_per_epoch
            done = (step - 1) % self._steps_per_epoch
            length = min(self._steps_per_epoch, self._total_steps - epoch * self._steps_per_epoch)
            self._bar = tqdm(
                total=length,
                initial=done,
                desc=f"{epoch + 1}/{self._epochs:g}",
                bar_format=_BAR,
                ascii=" >=",
                file=self._stream,
                leave=False,
                dynamic_ncols=True,
            )
        self._bar.update()

    def log(self, record: Record) -> None:
        if record["kind"] == "step":
            self._step(record)
        elif record["split"] == "train":
            self._train = record
        else:
            self._evaluation(record)

    def note(self, text: str) -> None:
        self._print(text)

    def finish(self, result: Record | None) -> None:
        self._close_bar()

    def _step(self, record: Record) -> None:
        text = (
            f"loss {record['loss']:.4f} accuracy {record['accuracy']:.2%} "
            f"{record['images_per_second']:,.0f} img/s {record['milliseconds_per_step']:.0f} ms/step"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif not self._live and time.monotonic() - self._last_line_at >= SECONDS_BETWEEN_PLAIN_LINES:
            self._print(f"  step {record['step']}/{self._total_steps}  {text}  ETA {self._eta(record['step'])}")

    def _eta(self, step: int) -> str:
        done = max(1, step - self._from_step)
        seconds = (time.monotonic() - self._started_at) / done * (self._total_steps - step)
        return tqdm.format_interval(seconds)

    def _evaluation(self, record: Record) -> None:
        self._close_bar()
        name = record["split"].replace("_", " ")
        counts = f"{record['correct']}/{record['total']} ({record['accuracy']:.2%})"
        train, self._train = self._train, None
        if train is not None:
            steps, seconds = train["steps"], train["seconds"]
            head = f"Epoch {train['epoch']:g}/{self._epochs:g}  {steps} steps - {seconds:.0f}s "
            head += f"{1000 * seconds / max(1, steps):.0f}ms/step - loss: {train['loss']:.4f} - accuracy: "
            self._print(f"{head}{train['accuracy']:.4%}")
        self._print(f"  {name}: loss {record['loss']:.4f}, accuracy {counts}")

    def _print(self, text: str) -> None:
        self._last_line_at = time.monotonic()
        with contextlib.suppress(OSError):  # nobody reads any more; the training goes on
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self._stream, flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
