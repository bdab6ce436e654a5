"""What can be done with a finished run: evaluate it again, ask it about images, keep what it says of its test split.

Legend of shape letters: N images of the test split, in the order of their ids; B images; H and W pixels; K classes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from harness.data.augment import normalisation_table
from harness.data.images import read_images
from harness.data.prepare import PreparedDataset
from harness.distributed.runtime import distributed_context
from harness.errors import HarnessError
from harness.files import hex_digest, replacing
from harness.models.build import build_model
from harness.recipe import Recipe, load
from harness.recipe.loading import fingerprint
from harness.runs import CHECKPOINTS
from harness.training import checkpoint
from harness.training.build import MEMORY_FORMATS, build_evaluator, build_network, build_plan, open_data, open_loader
from harness.training.evaluate import Evaluator
from harness.training.resume import find_checkpoint

FOLDER = "predictions"


@dataclass(frozen=True)
class FinishedRun:
    """A run by a verified checkpoint, and its recipe with the normalisation of the training."""

    saved: checkpoint.Saved
    recipe: Recipe

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in self.saved.state["classes"]]

    @cached_property
    def data(self) -> PreparedDataset:
        """The recipe's data. Raises HarnessError: there is none."""
        return open_data(self.recipe)

    @property
    def has_its_images(self) -> bool:
        """Whether the images at hand are those that the run was trained and tested on."""
        return bool(self.saved.state["data_sha256"] == dict(self.data.manifest.sha256))

    def network(self, weights: str = "raw") -> nn.Module:
        """The network with "raw" or "ema" weights, in evaluation mode, float32, on the CPU."""
        tensors, settings = self.saved.weights(weights), self.recipe.model
        size_px = self.recipe.data.image_size_px
        with torch.random.fork_rng(devices=[]):
            model = build_model(settings.name, num_classes=len(self.classes), image_size_px=size_px, args=settings.args)
        checkpoint.load_weights(model, tensors, self.saved.path)
        return model.eval()

    def normalised(self, pixels_BHW3: np.ndarray) -> Tensor:
        """Images, uint8 (B, H, W, 3), as the network takes them: float32 (B, 3, H, W)."""
        table = normalisation_table(self.saved.state["mean"], self.saved.state["std"])
        return torch.from_numpy(np.stack([table[c][pixels_BHW3[..., c]] for c in range(3)], axis=1))


def open_finished_run(path: Path, *, which: str = "last") -> FinishedRun:
    """A run, by its directory or one of its checkpoints, with the checkpoint "last", "best" or "step_N".

    Raises HarnessError: no such run or checkpoint, or a broken one.
    """
    saved = checkpoint.load(find_checkpoint(path, which))
    recipe = load(saved.path.parent.parent / "recipe.yaml")
    # The normalisation of the training, whatever images are at hand now.
    normalisation = {"mean": tuple(saved.state["mean"]), "std": tuple(saved.state["std"])}
    return FinishedRun(saved, recipe.model_copy(update={"data": recipe.data.model_copy(update=normalisation)}))


@contextlib.contextmanager
def _evaluating(run: FinishedRun) -> Iterator[tuple[nn.Module, Evaluator]]:
    """The run's network as its training had it on this machine, with weights still to be loaded, and its evaluator."""
    recipe, precision = run.recipe, run.recipe.training.precision
    with distributed_context(precision=precision, seed=recipe.seed, recipe_sha256=fingerprint(recipe)) as runtime:
        classes = len(run.data.manifest.classes)
        network = build_network(recipe, classes, device=runtime.device, world_size=runtime.world_size)
        evaluator = build_evaluator(recipe, run.data, runtime)
        if runtime.is_main and not run.has_its_images:
            origin = run.data.manifest.origin
            print(f"WARNING these are not the images that the run was trained and tested on: {origin}", file=sys.stderr)
        with contextlib.closing(evaluator.loader):
            yield network.model, evaluator


def evaluate_run(path: Path, *, which: str, recalibrate_batches: int = 0) -> dict[str, Any]:
    """Evaluate a run's checkpoint on its test split, after taking BatchNorm statistics over so many training batches.

    Returns `checkpoint`, `step`, `is_main` (whether this rank should print), `test` and, where the run has averaged
    weights, `test_ema`: loss, accuracy, correct, total.
    """
    run = open_finished_run(path, which=which)
    with _evaluating(run) as (model, evaluator):
        runtime = evaluator.runtime
        result: dict[str, Any] = {"checkpoint": str(run.saved.path), "step": run.saved.progress.step}
        result["is_main"] = runtime.is_main
        for split, weights in (("test", run.saved.model), ("test_ema", run.saved.ema)):
            if weights is None:
                continue
            checkpoint.load_weights(model, weights, run.saved.path)
            if recalibrate_batches:
                ids = list(chain.from_iterable(build_plan(run.recipe, run.data, runtime).micro_batches(0)))
                with contextlib.closing(open_loader(run.recipe, run.data, "train", runtime.device)) as loader:
                    evaluator.recalibrate_batch_norm(model, loader.batches(ids[:recalibrate_batches], epoch=0))
            result[split] = evaluator.score(model).to_json()
    return result


@torch.no_grad()
def predict(path: Path, images: Sequence[Path], *, which: str, weights: str, top: int) -> list[dict[str, Any]]:
    """Classify image files that PIL can read, of any size, in float32 on the CPU.

    Returns `image` and `classes`, the names and probabilities of the `top` likeliest ones in order, of each.
    """
    run = open_finished_run(path, which=which)
    size_px = run.recipe.data.image_size_px
    pixels_BHW3 = read_images(images, size_px, lambda index: str(images[index]))
    model = run.network(weights).to(memory_format=MEMORY_FORMATS[run.recipe.training.memory_format])
    probabilities_BK = torch.softmax(model(run.normalised(pixels_BHW3)), dim=1)
    best = torch.topk(probabilities_BK, min(top, len(run.classes)), dim=1)
    return [
        {"image": str(image), "classes": {run.classes[i]: p for p, i in zip(values, indices, strict=True)}}
        for image, values, indices in zip(images, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Predictions:
    """Logits float32 and true classes int64 of the whole test split, by the "raw" or "ema" weights of a checkpoint."""

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
    """
    found = find_checkpoint(path, which)
    digest = hex_digest(found / checkpoint.MANIFEST)
    kept = found.parent.parent / FOLDER / f"{found.name}_{weights}.safetensors"
    with contextlib.suppress(OSError, SafetensorError), safe_open(kept, framework="pt") as file:
        if (file.metadata() or {}).get("checkpoint_sha256") == digest:
            return Predictions(found, weights, file.get_tensor("labels"), file.get_tensor("logits"))
    run = open_finished_run(found, which=which)
    made = _classify(run, weights)
    if keep and found.parent.name == CHECKPOINTS and run.has_its_images:
        tensors = {"labels": made.labels_N, "logits": made.logits_NK}
        with contextlib.suppress(OSError, HarnessError):
            kept.parent.mkdir(exist_ok=True)
            with replacing(kept) as file:
                file.write(save(tensors, metadata={"checkpoint_sha256": digest}))
    return made


def _classify(run: FinishedRun, weights: str) -> Predictions:
    tensors = run.saved.weights(weights)
    with _evaluating(run) as (model, evaluator):
        if evaluator.runtime.world_size > 1:
            raise HarnessError("predictions are made by one process", hint="Run it without a launcher of ranks.")
        checkpoint.load_weights(model, tensors, run.saved.path)
        labels_N = torch.full((evaluator.total,), -1)
        logits_NK = torch.empty(evaluator.total, len(run.data.manifest.classes))
        for batch, logits_BK in evaluator.classify(model):
            ids_B = torch.from_numpy(batch.ids_B)
            labels_N[ids_B], logits_NK[ids_B] = batch.labels_B.cpu(), logits_BK.cpu()
    return Predictions(run.saved.path, weights, labels_N, logits_NK)


def worst_mistakes(probabilities_NK: np.ndarray, labels_N: np.ndarray, *, most: int) -> np.ndarray:
    """Ids int64 of the misclassified images of the highest cross-entropy, that one first, equal ones by their ids."""
    wrong = np.flatnonzero(probabilities_NK.argmax(1) != labels_N)
    true_probability = probabilities_NK[wrong, labels_N[wrong]]
    return wrong[np.argsort(true_probability, kind="stable")][:most]
