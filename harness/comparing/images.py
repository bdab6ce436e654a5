"""Which test images a run's checkpoint has right, and whether two runs can be compared image by image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.runs import Run


@dataclass(frozen=True)
class Answers:
    """What a checkpoint says of the test split of N images.

    Attributes:
        images_sha256: of the test images, as the checkpoint has it.
        labels_N: true classes, int64.
        correct_N: whether each is classified correctly, bool.
    """

    images_sha256: str
    labels_N: np.ndarray  # noqa: N815
    correct_N: np.ndarray  # noqa: N815

    @property
    def accuracy(self) -> float:
        """Share of correct images, 0 to 1."""
        return float(self.correct_N.mean())


def answers_of(run: Run, *, which: str, weights: str) -> Answers:
    """Classify the test split by a run's checkpoint, or take what was kept of the last time.

    Args:
        which: "last" or "best".
        weights: "raw" or "ema".

    Raises:
        HarnessError: no such checkpoint or weights, a broken checkpoint, or no data.
    """
    from harness.training.checkpoint import STATE
    from harness.training.predictions import predict_test_split

    found = predict_test_split(run.path, which=which, weights=weights)
    digests = json.loads((found.checkpoint / STATE).read_text())["data_sha256"]
    test = {name: digest for name, digest in digests.items() if name.startswith("test")}
    return Answers(json.dumps(test, sort_keys=True), found.labels_N.numpy(), found.correct_N.numpy())


def why_not_paired(answers: Sequence[Answers]) -> str | None:
    """Why the answers cannot be compared image by image, in words; None where they can."""
    first = answers[0]
    if any(len(other.labels_N) != len(first.labels_N) for other in answers):
        counts = " and ".join(f"{count:,}" for count in sorted({len(a.labels_N) for a in answers}))
        return f"they were tested on {counts} images"
    if any(other.images_sha256 != first.images_sha256 for other in answers):
        return "they were tested on other images (the SHA-256 of the test split differs)"
    if any(not np.array_equal(other.labels_N, first.labels_N) for other in answers):
        return "the labels of their test images differ"
    return None
