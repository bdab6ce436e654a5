"""Checkpoints, tables and texts for a W&B run. Tables are summary values, so that the history holds metrics alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.files import write_text
from harness.tracking.extras import Answers, CheckpointFolder

MODEL_SUMMARY = "model_summary.txt"
WORST, CONFUSION = "predictions/worst", "predictions/confusion"
_WORST_COLUMNS = ["id", "image", "label", "predicted", "label probability", "predicted probability"]


def save_model_summary(run: Any, text: str) -> None:
    """The network's layer table as a file of the run."""
    path = Path(run.dir) / MODEL_SUMMARY
    write_text(path, text + "\n")
    run.save(str(path), base_path=run.dir, policy="now")


def log_answers(run: Any, answers: Answers) -> None:
    """The worst misclassified images and the confusion matrix, as tables."""
    import wandb

    worst = [
        [
            guess.sample_id,
            wandb.Image(guess.image_HWC, caption=f"{guess.label}, taken for {guess.predicted}"),
            guess.label,
            guess.predicted,
            guess.label_probability,
            guess.predicted_probability,
        ]
        for guess in answers.worst
    ]
    run.summary[WORST] = wandb.Table(columns=_WORST_COLUMNS, data=worst)
    confusion = [list(row) for row in answers.confusion]
    run.summary[CONFUSION] = wandb.Table(columns=["label", "predicted", "images"], data=confusion)
    run.summary["predictions/checkpoint"] = answers.checkpoint


def log_checkpoints(run: Any, name: str, checkpoints: Sequence[CheckpointFolder]) -> None:
    """Each checkpoint as a version of one artifact, in order; they are uploaded until the run's end."""
    import wandb

    for folder in checkpoints:
        artifact = wandb.Artifact(_allowed(name), type="model", metadata=dict(folder.metadata))
        artifact.add_dir(str(folder.path))
        run.log_artifact(artifact, aliases=list(folder.aliases))


def _allowed(name: str) -> str:
    """Artifact names take letters, digits, - _ and dots."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)[:128]
