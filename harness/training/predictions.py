"""What a run's checkpoint says of each image of its test split, kept beside the run for whoever looks at it.

Legend of shape letters: N images of the test split, in the order of their ids; K classes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.errors import HarnessError
from harness.files import hex_digest, replacing
from harness.runs import CHECKPOINTS
from harness.training import checkpoint
from harness.training.evaluate import classified
from harness.training.finished import Opened, opened
from harness.training.resuming import find_checkpoint

FOLDER = "predictions"


@dataclass(frozen=True)
class Predictions:
    """Logits of the whole test split.

    Attributes:
        checkpoint: its folder, `step_N`.
        weights: "raw" or "ema".
        labels_N: true classes, int64.
        logits_NK: float32.
    """

    checkpoint: Path
    weights: str
    labels_N: Tensor  # noqa: N815
    logits_NK: Tensor  # noqa: N815

    @property
    def probabilities_NK(self) -> Tensor:  # noqa: N802
        """Softmax of the logits, float32."""
        return self.logits_NK.softmax(dim=1)

    @property
    def predicted_N(self) -> Tensor:  # noqa: N802
        """The likeliest class, int64."""
        return self.logits_NK.argmax(dim=1)

    @property
    def correct_N(self) -> Tensor:  # noqa: N802
        """Whether it is the true one, bool."""
        return self.predicted_N == self.labels_N


def predict_test_split(path: Path, *, which: str, weights: str = "raw", keep: bool = True) -> Predictions:
    """Classify the test split of a run by one of its checkpoints, as the evaluation while training does.

    The answer is kept under `RUN/predictions/` with the digest of the checkpoint, and taken from there the next time.
    A folder that cannot be written to is no hindrance.

    Args:
        path: a run directory or one of its checkpoints.
        which: "last", "best" or "step_N".
        weights: "raw" or "ema".
        keep: write the answer there too; what is there already is taken in any case.

    Raises:
        HarnessError: no such run, checkpoint or weights, a broken checkpoint, or no data.
    """
    found = find_checkpoint(path, which)
    manifest_sha256 = hex_digest(found / checkpoint.MANIFEST)
    kept = _file(found, weights)
    if kept is not None and (before := _read(kept, found, weights, manifest_sha256)) is not None:
        return before
    with opened(found, which=which) as run:
        made = _classify(run, weights)
        its_own_images = run.has_its_images()
    if keep and kept is not None and its_own_images:
        tensors = {"labels": made.labels_N, "logits": made.logits_NK}
        with contextlib.suppress(OSError, HarnessError):
            kept.parent.mkdir(exist_ok=True)
            with replacing(kept) as file:
                file.write(save(tensors, metadata={"checkpoint_sha256": manifest_sha256}))
    return made


def worst_mistakes(probabilities_NK: np.ndarray, labels_N: np.ndarray, *, most: int) -> np.ndarray:
    """Ids of the misclassified images with the lowest probability of their true class, that one first, int64.

    These are the images of the highest cross-entropy among those that are misclassified; where several are equal,
    lower ids come first.
    """
    wrong = np.flatnonzero(probabilities_NK.argmax(1) != labels_N)
    true_probability = probabilities_NK[wrong, labels_N[wrong]]
    return wrong[np.argsort(true_probability, kind="stable")][:most]


def _classify(run: Opened, weights: str) -> Predictions:
    if run.runtime.world_size > 1:
        raise HarnessError("predictions are made by one process", hint="Run it without a launcher of ranks.")
    tensors = run.weights().get(weights)
    if tensors is None:
        raise HarnessError("the run has no averaged weights", where=str(run.saved.path), hint="Use the raw weights.")
    checkpoint.load_weights(run.model, tensors, run.saved.path)
    count, classes = run.store.split("test").count, len(run.store.manifest.classes)
    labels_N = torch.full((count,), -1)
    logits_NK = torch.empty(count, classes)
    for batch, logits_BK in classified(run.model, **run.evaluation()):
        ids_B = torch.from_numpy(batch.ids_B)
        labels_N[ids_B], logits_NK[ids_B] = batch.labels_B.cpu(), logits_BK.cpu()
    return Predictions(run.saved.path, weights, labels_N, logits_NK)


def _file(found: Path, weights: str) -> Path | None:
    """Where the answers of a checkpoint are kept; None for a checkpoint outside a run."""
    return (
        found.parent.parent / FOLDER / f"{found.name}_{weights}.safetensors"
        if found.parent.name == CHECKPOINTS
        else None
    )


def _read(file: Path, found: Path, weights: str, manifest_sha256: str) -> Predictions | None:
    """What was kept; None where nothing was, or of other weights."""
    try:
        with safe_open(file, framework="pt") as kept:
            if (kept.metadata() or {}).get("checkpoint_sha256") != manifest_sha256:
                return None
            return Predictions(found, weights, kept.get_tensor("labels"), kept.get_tensor("logits"))
    except (OSError, SafetensorError):
        return None
