"""What W&B is given beside curves: the network's table, checkpoints, and what the trained network gets wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.errors import EXIT_DONE, HarnessError, print_error
from harness.models.build import build_model
from harness.models.inspect import summarise
from harness.recipe import Recipe
from harness.run_directory import CHECKPOINTS
from harness.tracking.extras import Answers, CheckpointFolder, Extras, Guess
from harness.training import checkpoint
from harness.training.build import open_data
from harness.training.inference import predict_test_split, worst_mistakes

WORST_IMAGES = 100
_LIMIT_SECONDS = 90
# Of launchers and schedulers: a process without them is alone.
_OF_RANKS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "SLURM_", "HARNESS_EXIT")


def extras_of(recipe: Recipe, path: Path, *, num_classes: int | None = None) -> Extras:
    """The extras that a recipe asks for, of the run in `path`; they are made when they are asked for.

    Args:
        num_classes: of the network whose layer table is wanted; None wants no table.
    """
    tracking = recipe.tracking
    return Extras(
        model_summary=partial(_model_summary, recipe, num_classes) if num_classes is not None else None,
        checkpoints=partial(_checkpoints, recipe, path) if tracking.artifacts != "none" else None,
        answers=partial(_answers, recipe, path) if tracking.predictions_table else None,
    )


def _model_summary(recipe: Recipe, num_classes: int) -> str:
    """The layer table of a network built like the trained one; the generators stay as they are."""
    size = recipe.data.image_size_px
    with torch.random.fork_rng(devices=[]):
        model = build_model(
            recipe.model.name,
            num_classes=num_classes,
            image_size_px=size,
            args=recipe.model.args,
        )
        return summarise(model, (3, size, size)).render()


def _checkpoints(recipe: Recipe, path: Path) -> list[CheckpointFolder]:
    """The checkpoints to upload, oldest first, by the aliases last, best and step_N."""
    result = json.loads((path / "result.json").read_text())
    found = checkpoint.list_checkpoints(path / CHECKPOINTS)
    best = f"step_{result['best']['step']}"
    folders = []
    for folder in found:
        if recipe.tracking.artifacts == "best" and folder.name != best:
            continue
        aliases = [folder.name, *(["last"] if folder == found[-1] else []), *(["best"] if folder.name == best else [])]
        facts: dict[str, Any] = {"recipe": recipe.name, "run": path.name, "step": checkpoint.step_of(folder)}
        if folder.name == best:
            facts |= {"test_accuracy": result["best"]["accuracy"], "epoch": result["best"]["epoch"]}
        folders.append(CheckpointFolder(folder, aliases, facts))
    return folders


def _answers(recipe: Recipe, path: Path) -> Answers:
    """What the best checkpoint (else the last) gets wrong.

    A process of its own classifies the test split: this one may have ranks beside it, and its network stays untouched.

    Raises:
        HarnessError: it could not.
        subprocess.TimeoutExpired: it took too long.
    """
    which = "best" if recipe.checkpoint.keep_best else "last"
    weights = recipe.checkpoint.best_by
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
    command = [sys.executable, "-m", "harness.training.showing", str(path), which, weights]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_SECONDS
    )
    if done.returncode != EXIT_DONE:
        raise HarnessError(
            f"the test split could not be classified: {done.stderr.strip()[-300:]}",
            where=str(path),
            hint="`harness eval RUN` shows what is wrong; `harness track sync RUN` uploads the table later.",
        )
    found = predict_test_split(path, which=which, weights=weights)  # as that process left it
    store = open_data(recipe)
    classes, images_BHWC = store.manifest.classes, store.split("test").images_BHWC
    probabilities_NK, labels_N = found.probabilities_NK.numpy(), found.labels_N.numpy()
    labels, predicted = found.labels_N.tolist(), found.predicted_N.tolist()
    worst = [
        Guess(
            i,
            images_BHWC[i],
            classes[labels[i]],
            classes[predicted[i]],
            float(probabilities_NK[i, labels[i]]),
            float(probabilities_NK[i, predicted[i]]),
        )
        for i in worst_mistakes(probabilities_NK, labels_N, most=WORST_IMAGES).tolist()
    ]
    pairs = Counter(zip(labels, predicted, strict=True))
    confusion = [(classes[label], classes[taken], count) for (label, taken), count in sorted(pairs.items())]
    return Answers(found.checkpoint.name, worst, confusion)


def main(argv: list[str]) -> int:
    """Classify the test split of `RUN` by its checkpoint `WHICH` and its weights, and leave the answer in the run."""
    path, which, weights = Path(argv[0]), argv[1], argv[2]
    try:
        predict_test_split(path, which=which, weights=weights)
    except HarnessError as error:
        print_error(error)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
