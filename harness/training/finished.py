"""What can be done with a run's checkpoint: evaluate it again, or ask it about images."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.data.augment import normalisation_table
from harness.data.images import read_images
from harness.data.loaders import Loader
from harness.data.prepare import PreparedDataset
from harness.errors import HarnessError
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


@dataclass(frozen=True)
class Opened:
    """A checkpoint with what it takes to ask it about the test split.

    Attributes:
        saved, recipe, store: the checkpoint, its run's recipe and data.
        model: the network on its device, without the checkpoint's weights so far.
        loader: of the test split.
    """

    runtime: Runtime
    saved: checkpoint.Saved
    recipe: Recipe
    store: PreparedDataset
    model: nn.Module
    loader: Loader

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The checkpoint's tensors under "raw" and, where the run has averaged weights, "ema"."""
        found = {"raw": self.saved.model, "ema": self.saved.ema}
        return {name: tensors for name, tensors in found.items() if tensors is not None}

    def has_its_images(self) -> bool:
        """Whether the images at hand are those that the run was trained and tested on."""
        return bool(self.saved.state["data_sha256"] == dict(self.store.manifest.sha256))

    def evaluation(self) -> dict[str, Any]:
        """The arguments that `evaluate` and `classified` have in common, by this rank's share of the split."""
        return {
            "loader": self.loader,
            "ids_per_batch": share_of_test(self.recipe, self.store, self.runtime),
            "autocast": self.runtime.accelerator.autocast,
            "memory_format": self.recipe.training.memory_format,
        }


@contextmanager
def opened(path: Path, *, which: str) -> Iterator[Opened]:
    """A run's checkpoint, with the run's own precision and layout.

    Args:
        path: a run directory or one of its checkpoints.
        which: "last", "best" or "step_N".

    Raises:
        HarnessError: no such run or checkpoint, a broken one, or no data.
    """
    saved, recipe = _open(path, which)
    with ExitStack() as stack:
        runtime = stack.enter_context(
            joined(precision=recipe.training.precision, seed=recipe.seed, recipe_sha256=fingerprint(recipe))
        )
        store = open_data(recipe)
        classes = len(store.manifest.classes)
        network = open_network(recipe, num_classes=classes, device=runtime.device, world_size=runtime.world_size)
        loader = open_loader(recipe, store, "test", runtime.device)
        stack.callback(loader.close)
        run = Opened(runtime, saved, recipe, store, network.model, loader)
        if runtime.is_main and not run.has_its_images():
            origin = store.manifest.origin
            print(f"WARNING these are not the images that the run was trained and tested on: {origin}", file=sys.stderr)
        yield run


def evaluate_run(path: Path, *, which: str, recalibrate_batches: int = 0) -> dict[str, Any]:
    """Evaluate a run's checkpoint on its test split.

    Args:
        path, which: as `opened` takes them.
        recalibrate_batches: take BatchNorm statistics anew over this many training batches first, with dropout off.

    Returns:
        `is_main` (whether this rank should print), `test` and, where the run has averaged weights, `test_ema`:
        loss, accuracy, correct, total.

    Raises:
        HarnessError: as `opened`.
    """
    with opened(path, which=which) as run:
        result: dict[str, Any] = {
            "checkpoint": str(run.saved.path),
            "step": run.saved.state["progress"]["step"],
            "is_main": run.runtime.is_main,
        }
        for name, tensors in run.weights().items():
            checkpoint.load_weights(run.model, tensors, run.saved.path)
            if recalibrate_batches:
                _recalibrate(run, recalibrate_batches)
            score = evaluate(
                run.model,
                **run.evaluation(),
                device=run.runtime.device,
                expected_total=run.store.split("test").count,
                tick=run.runtime.tick,
            )
            result["test" if name == "raw" else "test_ema"] = score.to_json()
    return result


def _recalibrate(run: Opened, batches: int) -> None:
    plan = plan_batches(run.recipe, run.store, run.runtime)
    loader = open_loader(run.recipe, run.store, "train", run.runtime.device)
    try:
        ids = list(chain.from_iterable(plan.micro_batches(0)))[:batches]
        recalibrate_batch_norm(
            run.model,
            loader.batches(ids, epoch=0),
            autocast=run.runtime.accelerator.autocast,
            memory_format=run.recipe.training.memory_format,
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
    size_px = recipe.data.image_size_px
    pixels_BHWC = read_images(images, size_px, lambda index: str(images[index]))
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


def _open(path: Path, which: str) -> tuple[checkpoint.Saved, Recipe]:
    saved = checkpoint.load(find_checkpoint(path, which))
    recipe = load(saved.path.parent.parent / "recipe.yaml")
    # The normalisation of the training, whatever images are at hand now.
    normalisation = {"mean": tuple(saved.state["mean"]), "std": tuple(saved.state["std"])}
    return saved, recipe.model_copy(update={"data": recipe.data.model_copy(update=normalisation)})
