"""What W&B is given besides curves: the network's layer table, checkpoints, and what the trained network gets wrong.

Each is made when it is sent, and may fail without harm to the run. Tables are summary values, so that the history
holds metrics alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.errors import EXIT_DONE, HarnessError, print_error
from harness.files import write_text
from harness.models.build import build_model
from harness.models.summary import summarise
from harness.recipe import Recipe
from harness.runs import CHECKPOINTS
from harness.tracking.wandb_run import CONFUSION_TABLE, WORST_TABLE, Artifacts
from harness.training import checkpoint
from harness.training.build import open_data
from harness.training.inference import predict_test_split, worst_mistakes

WORST_IMAGES = 100
_LIMIT_SECONDS = 90
# Of launchers and schedulers: a process without them is alone.
_OF_RANKS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "SLURM_", "HARNESS_EXIT")


def artifacts_at_start(recipe: Recipe, *, num_classes: int) -> Artifacts:
    """The layer table of the recipe's network."""
    return {"the network's summary": partial(_send_model_summary, recipe, num_classes)}


def artifacts_at_finish(recipe: Recipe, path: Path) -> Artifacts:
    """What the recipe asks for of the finished run in `path`."""
    wanted: dict[str, Callable[[Any], None]] = {}
    if recipe.tracking.predictions_table:
        wanted["the predictions table"] = partial(_send_predictions, recipe, path)
    if recipe.tracking.artifacts != "none":
        wanted["the checkpoints"] = partial(_send_checkpoints, recipe, path)
    return wanted


def _send_model_summary(recipe: Recipe, num_classes: int, run: Any) -> None:
    size, network = recipe.data.image_size_px, recipe.model
    with torch.random.fork_rng(devices=[]):  # the training's generators stay as they are
        model = build_model(network.name, num_classes=num_classes, image_size_px=size, args=network.args)
        text = summarise(model, (3, size, size)).render()
    file = Path(run.dir) / "model_summary.txt"
    write_text(file, text + "\n")
    run.save(str(file), base_path=run.dir, policy="now")


def _send_checkpoints(recipe: Recipe, path: Path, run: Any) -> None:
    """Each checkpoint as a version of one artifact, oldest first, with the aliases last, best and step_N."""
    import wandb

    best = json.loads((path / "result.json").read_text())["best"]
    folders = checkpoint.list_checkpoints(path / CHECKPOINTS)
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in run.name)[:128]  # W&B's rule
    for folder in folders:
        is_best = folder.name == f"step_{best['step']}"
        if recipe.tracking.artifacts == "best" and not is_best:
            continue
        facts = {"recipe": recipe.name, "run": path.name, "step": checkpoint.step_of(folder)}
        facts |= {"test_accuracy": best["accuracy"], "epoch": best["epoch"]} if is_best else {}
        artifact = wandb.Artifact(name, type="model", metadata=facts)
        artifact.add_dir(str(folder))
        given = {folder.name: True, "last": folder == folders[-1], "best": is_best}
        run.log_artifact(artifact, aliases=[alias for alias, is_given in given.items() if is_given])


def _send_predictions(recipe: Recipe, path: Path, run: Any) -> None:
    """The worst misclassified images and the confusion matrix of the best checkpoint, else the last."""
    import wandb

    which, weights = "best" if recipe.checkpoint.keep_best else "last", recipe.checkpoint.best_by
    _predict_in_a_process(path, which, weights)
    found = predict_test_split(path, which=which, weights=weights)  # as that process left it
    store = open_data(recipe)
    classes, images_BHWC = store.manifest.classes, store.split("test").images_BHWC
    labels, predicted, probabilities_NK = found.labels_N.tolist(), found.predicted_N.tolist(), found.probabilities_NK
    worst = []
    for i in worst_mistakes(probabilities_NK.numpy(), found.labels_N.numpy(), most=WORST_IMAGES).tolist():
        label, taken = classes[labels[i]], classes[predicted[i]]
        image = wandb.Image(images_BHWC[i], caption=f"{label}, taken for {taken}")
        probabilities = [float(probabilities_NK[i, labels[i]]), float(probabilities_NK[i, predicted[i]])]
        worst.append([i, image, label, taken, *probabilities])
    columns = ["id", "image", "label", "predicted", "label probability", "predicted probability"]
    run.summary[WORST_TABLE] = wandb.Table(columns=columns, data=worst)
    pairs = sorted(Counter(zip(labels, predicted, strict=True)).items())
    confusion = [[classes[label], classes[taken], count] for (label, taken), count in pairs]
    run.summary[CONFUSION_TABLE] = wandb.Table(columns=["label", "predicted", "images"], data=confusion)
    run.summary["predictions/checkpoint"] = found.checkpoint.name


def _predict_in_a_process(path: Path, which: str, weights: str) -> None:
    """Classify the test split apart: this process may have ranks next to it, and its network stays untouched."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
    command = [sys.executable, "-m", "harness.tracking.wandb_artifacts", str(path), which, weights]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_SECONDS
    )
    if done.returncode != EXIT_DONE:
        hint = "`harness eval RUN` shows what is wrong; `harness track sync RUN` uploads the table later."
        what = f"the test split could not be classified: {done.stderr.strip()[-300:]}"
        raise HarnessError(what, where=str(path), hint=hint)


if __name__ == "__main__":
    try:
        predict_test_split(Path(sys.argv[1]), which=sys.argv[2], weights=sys.argv[3])
    except HarnessError as error:
        print_error(error)
        sys.exit(error.exit_code)
