"""What changes during a run: progress, and counts that add up exactly over ranks.

`Progress` goes into every checkpoint as JSON; its types are what a checkpoint is held against when it is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated, NotRequired

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Score:
    """Cross-entropy summed over `total` images, of which `correct` have their label as the highest logit."""

    loss_sum: float
    correct: Count
    total: Count
    __pydantic_config__ = STRICT

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.total)

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.total + other.total)

    def to_json(self) -> ScoreRecord:
        accuracy = self.correct / max(1, self.total)
        return {"loss": self.loss, "accuracy": accuracy, "correct": self.correct, "total": self.total}


@with_config(STRICT)
class ScoreRecord(TypedDict):
    """A mean loss, and an accuracy from 0 to 1."""

    loss: float
    accuracy: Share
    correct: Count
    total: Count


@with_config(STRICT)
class Evaluation(TypedDict):
    """Scores of the raw weights and, where there are any, of the averaged ones."""

    step: Count
    epoch: Seconds
    test: ScoreRecord
    test_ema: NotRequired[ScoreRecord]


class Meter:
    """Adds loss and correct answers up on the device; only `take` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._total = 0  # the host knows it

    @torch.no_grad()
    def add(self, loss_sum: Tensor, logits_BK: Tensor, labels_B: Tensor) -> None:
        """Add a batch: summed loss (scalar), logits (B, classes), labels (B,) int64."""
        self._loss_sum += loss_sum.detach()
        self._correct += (logits_BK.argmax(1) == labels_B).sum()
        self._total += len(labels_B)

    def take(self) -> Score:
        """The sums over all ranks (a collective where there are several); afterwards they are 0 again."""
        loss_sum = self._loss_sum.clone()
        counts = torch.stack((self._correct, torch.full_like(self._correct, self._total)))
        self._loss_sum.zero_()
        self._correct.zero_()
        self._total = 0
        if dist.is_initialized():
            dist.all_reduce(loss_sum)
            dist.all_reduce(counts)
        correct, total = counts.tolist()
        return Score(loss_sum.item(), correct, total)


@dataclass
class Progress:
    """Where a run stands; all of it goes into a checkpoint.

    Attributes:
        step: optimizer steps done.
        epoch: whole epochs done; `step_in_epoch` steps are done of the one under way.
        epoch_score, epoch_seconds, epoch_loader_wait_seconds: of training in the epoch under way; all ranks' score.
        train_seconds: training time of the whole run, over all starts, without evaluations.
        images_seen: images trained on, all ranks.
        last, best: the latest evaluation, and the first one with the most correct images.
    """

    step: Count = 0
    epoch: Count = 0
    step_in_epoch: Count = 0
    epoch_score: Score = field(default_factory=lambda: Score(0.0, 0, 0))
    epoch_seconds: Seconds = 0.0
    epoch_loader_wait_seconds: Seconds = 0.0
    train_seconds: Seconds = 0.0
    images_seen: Count = 0
    last: Evaluation | None = None
    best: Evaluation | None = None
    __pydantic_config__ = STRICT

    def add(self, score: Score, seconds: float, loader_wait_seconds: float) -> None:
        """Add a stretch of training."""
        self.epoch_score = self.epoch_score + score
        self.epoch_seconds += seconds
        self.epoch_loader_wait_seconds += loader_wait_seconds
        self.train_seconds += seconds
        self.images_seen += score.total

    def next_epoch(self) -> None:
        """The epoch under way is whole."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.epoch_score = Score(0.0, 0, 0)
        self.epoch_seconds = self.epoch_loader_wait_seconds = 0.0

    def take_evaluation(self, evaluation: Evaluation, *, judged_by: str) -> None:
        """Keep an evaluation, also as the best one where `judged_by` ("test" or "test_ema") has the most correct."""
        self.last = evaluation
        if self.best is None or evaluation[judged_by]["correct"] > self.best[judged_by]["correct"]:  # type: ignore[literal-required]
            self.best = evaluation

    @property
    def is_best(self) -> bool:
        """Whether the best evaluation is of this very step."""
        return self.best is not None and self.best["step"] == self.step


class Startup:
    """Seconds of each phase from the command, which began at `began_at` by `time.perf_counter()`, to the first step."""

    def __init__(self, began_at: float | None = None) -> None:
        self._last = time.perf_counter() if began_at is None else began_at
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """What was since the last lap was this phase."""
        now = time.perf_counter()
        self.seconds[phase] = round(now - self._last, 3)
        self._last = now

    def first_step(self) -> str | None:
        """End the last phase at the first call and say in a line where the time went; None at all other calls."""
        if "first_step" in self.seconds:
            return None
        self.lap("first_step")
        phases = ", ".join(f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {phases}"
