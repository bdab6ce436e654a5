"""What changes while a run goes on: progress, and counts that add up exactly over ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Loss and accuracy over a number of images.

    Attributes:
        loss_sum: summed cross-entropy, float64.
        correct: images whose highest logit is the label.
        total: images.
    """

    loss_sum: float
    correct: int
    total: int

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.total)

    @property
    def accuracy(self) -> float:
        """Share of correct images, 0 to 1."""
        return self.correct / max(1, self.total)

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.total + other.total)

    def to_json(self) -> dict[str, float | int]:
        return {"loss": self.loss, "accuracy": self.accuracy, "correct": self.correct, "total": self.total}


class Meter:
    """Adds loss and correct answers up on the device; only `read` waits for it."""

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

    def reset(self) -> None:
        self._loss_sum.zero_()
        self._correct.zero_()
        self._total = 0

    def read(self) -> Score:
        """The sums over all ranks (a collective where there are several)."""
        loss_sum = self._loss_sum.clone()
        counts = torch.stack((self._correct, torch.full_like(self._correct, self._total)))
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
        epoch: whole epochs done; the one under way has this number.
        step_in_epoch: optimizer steps done of the epoch under way.
        epoch_score: sums over the epoch under way, all ranks.
        epoch_seconds: training time of the epoch under way.
        epoch_loader_wait_seconds: of it, what this rank waited for batches.
        train_seconds: training time of the whole run, over all starts, evaluations left out.
        images_seen: images trained on, all ranks.
        last: the latest evaluation.
        best: the evaluation with the most correct images.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    epoch_score: Score = field(default_factory=lambda: Score(0.0, 0, 0))
    epoch_seconds: float = 0.0
    epoch_loader_wait_seconds: float = 0.0
    train_seconds: float = 0.0
    images_seen: int = 0
    last: dict[str, Any] | None = None
    best: dict[str, Any] | None = None

    def add(self, score: Score, seconds: float, loader_wait_seconds: float) -> None:
        """A stretch of training, and how much of it was waited for batches."""
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

    def take_evaluation(self, evaluation: dict[str, Any], *, judged_by: str) -> None:
        """Keep an evaluation, and as the best one when its split `judged_by` has the most correct images."""
        self.last = evaluation
        if self.best is None or evaluation[judged_by]["correct"] > self.best[judged_by]["correct"]:
            self.best = evaluation

    def is_best(self) -> bool:
        """Whether the latest evaluation is the best one and of this very step."""
        return self.best is not None and self.best["step"] == self.step

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        return cls(**{**data, "epoch_score": Score(**data["epoch_score"])})
