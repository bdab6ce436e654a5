"""What W&B can be given beside curves. Each is made when it is asked for, and may fail without harm to the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Guess:
    """A misclassified image.

    Attributes:
        sample_id: index in the test split.
        image_HWC: uint8.
        label, predicted: class names.
        label_probability, predicted_probability: 0 to 1.
    """

    sample_id: int
    image_HWC: Any  # noqa: N815
    label: str
    predicted: str
    label_probability: float
    predicted_probability: float


@dataclass(frozen=True)
class Answers:
    """What a checkpoint says of the test split.

    Attributes:
        checkpoint: name of its folder.
        worst: misclassified images, the least likely label first.
        confusion: (true class, predicted class, images) of every pair that occurs.
    """

    checkpoint: str
    worst: Sequence[Guess]
    confusion: Sequence[tuple[str, str, int]]


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint to be kept as an artifact."""

    path: Path
    aliases: Sequence[str]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Extras:
    """Makers of what is wanted; None is not wanted."""

    model_summary: Callable[[], str] | None = None
    checkpoints: Callable[[], Sequence[CheckpointFolder]] | None = None
    answers: Callable[[], Answers] | None = None
