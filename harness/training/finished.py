"""What can be done with a run's checkpoint: evaluate it again, or ask it about images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.data.augment import normalisation_table
from harness.data.images import read_image
from harness.data.store import DataStore
from harness.errors import HarnessError, ManyErrors
from harness.models.build import build_model
from harness.recipe import Recipe, load
from harness.recipe.loading import fingerprint
from harness.runtime import Runtime, joined
from harness.training import checkpoint
from harness.training.evaluate import evaluate, recalibrate_batch_norm
from harness.training.network import MEMORY_FORMATS, open_network
from harness.training.parts import open_data, open_loader, plan_batches, share_of_test
from harness.training.resuming import find_checkpoint


@dataclass(frozen=True)
class Prediction:
    """Class names with their probabilities, the likeliest first."""

    image: str
    classes: tuple[tuple[str, float], ...]


def evaluate_run(path: Path, *, which: str, recalibrate_batches: int = 0) -> dict[str, Any]:
    """Evaluate a run's checkpoint on its test split, with the run's own precision and layout.

    Args:
        path: a run directory or one of its checkpoints.
        which: "last", "best" or "step_N".
        recalibrate_batches: take BatchNorm statistics anew over this many training batches first, with dropout off.

    Returns:
        `is_main` (whether this rank should print), `test` and, where the run has averaged weights, `test_ema`:
        loss, accuracy, correct, total.

    Raises:
        HarnessError: no such run or checkpoint, a broken one, or no data.
    """
    saved, recipe = _open(path, which)
    with ExitStack() as stack:
        runtime = stack.enter_context(
            joined(precision=recipe.training.precision, seed=recipe.seed, recipe_sha256=fingerprint(recipe))
        )
        store = open_data(recipe)
        _warn_of_other_images(saved, store, runtime)
        model = open_network(
            recipe, num_classes=len(store.manifest.classes), device=runtime.device, world_size=runtime.world_size
        ).model
        loader = open_loader(recipe, store, "test", runtime.device)
        stack.callback(loader.close)
        result: dict[str, Any] = {
            "checkpoint": str(saved.path),
            "step": saved.state["progress"]["step"],
            "is_main": runtime.is_main,
        }
        for name, weights in (("test", saved.model), ("test_ema", saved.ema)):
            if weights is None:
                continue
            checkpoint.load_weights(model, weights, saved.path)
            if recalibrate_batches:
                _recalibrate(model, recipe, store, runtime, recalibrate_batches)
            score = evaluate(
                model,
                loader,
                share_of_test(recipe, store, runtime),
                autocast=runtime.accelerator.autocast,
                device=runtime.device,
                memory_format=recipe.training.memory_format,
                expected_total=store.split("test").count,
                tick=runtime.tick,
            )
            result[name] = score.to_json()
    return result


def _warn_of_other_images(saved: checkpoint.Saved, store: DataStore, runtime: Runtime) -> None:
    if runtime.is_main and saved.state["data_sha256"] != dict(store.manifest.sha256):
        origin = store.manifest.origin
        print(f"WARNING these are not the images that the run was trained and tested on: {origin}", file=sys.stderr)


def _recalibrate(model: nn.Module, recipe: Recipe, store: DataStore, runtime: Runtime, batches: int) -> None:
    plan = plan_batches(recipe, store, runtime)
    loader = open_loader(recipe, store, "train", runtime.device)
    try:
        ids = list(chain.from_iterable(plan.micro_batches(0)))[:batches]
        recalibrate_batch_norm(
            model,
            loader.batches(ids, epoch=0),
            autocast=runtime.accelerator.autocast,
            memory_format=recipe.training.memory_format,
        )
    finally:
        loader.close()


@torch.no_grad()
def predict(path: Path, images: Sequence[Path], *, which: str, weights: str, top: int) -> list[Prediction]:
    """Classify image files, in float32 on the CPU.

    Args:
        path: a run directory or one of its checkpoints.
        images: files that PIL can read, of any size; brought to the network's size as `imagefolder` does.
        which: "last", "best" or "step_N".
        weights: "raw" or "ema".
        top: classes to name for each image.

    Raises:
        HarnessError: a file that is no image, no such run, or a broken checkpoint.
    """
    saved, recipe = _open(path, which)
    pixels_BHWC = _read_images(images, recipe.data.image_size_px)
    tensors = saved.ema if weights == "ema" else saved.model
    if tensors is None:
        raise HarnessError("the run has no averaged weights", where=str(saved.path), hint="Use --weights raw.")
    classes: list[str] = saved.state["classes"]
    model = build_model(
        recipe.model.name,
        num_classes=len(classes),
        image_size_px=recipe.data.image_size_px,
        args=recipe.model.args,
    )
    checkpoint.load_weights(model, tensors, saved.path)
    model.eval().to(memory_format=MEMORY_FORMATS[recipe.training.memory_format])
    table = normalisation_table(saved.state["mean"], saved.state["std"])
    normalised_BCHW = np.stack([table[c][pixels_BHWC[..., c]] for c in range(3)], axis=1)
    probabilities_BK = torch.softmax(model(torch.from_numpy(normalised_BCHW)), dim=1)
    best = torch.topk(probabilities_BK, min(top, len(classes)), dim=1)
    return [
        Prediction(str(image), tuple((classes[i], float(p)) for p, i in zip(values, indices, strict=True)))
        for image, values, indices in zip(images, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _read_images(images: Sequence[Path], size_px: int) -> np.ndarray:
    """(B, H, W, 3) uint8; all unreadable files are named in one error."""
    found, errors = [], []
    for image in images:
        try:
            found.append(read_image(image, image_size_px=size_px))
        except HarnessError as error:
            errors.append(error)
    if errors:
        raise ManyErrors("predict", errors)
    return np.stack(found)


def _open(path: Path, which: str) -> tuple[checkpoint.Saved, Recipe]:
    saved = checkpoint.load(find_checkpoint(path, which))
    recipe = load(saved.path.parent.parent / "recipe.yaml")
    # The normalisation of the training, whatever images are at hand now.
    normalisation = {"mean": tuple(saved.state["mean"]), "std": tuple(saved.state["std"])}
    return saved, recipe.model_copy(update={"data": recipe.data.model_copy(update=normalisation)})
