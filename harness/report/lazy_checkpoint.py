"""A run's checkpoint with its network, test images and predictions, each opened when it is first asked for.

Legend of shape letters: N images of the test split, H and W height and width in pixels.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from harness.data.prepare import PreparedDataset
from harness.errors import HarnessError
from harness.models.build import build_model
from harness.recipe import Recipe, load
from harness.runs import CHECKPOINTS, Run
from harness.training import checkpoint
from harness.training.build import open_data
from harness.training.inference import Predictions, predict_test_split
from harness.training.resume import find_checkpoint

T = TypeVar("T")


class NoCheckpoint(HarnessError):
    """The run has not written one yet."""


class _once(cached_property[T]):  # noqa: N801 - a decorator
    """Keeps an error too: a download that failed is not tried again for the next section."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        try:
            if error := instance.errors.get(self.attrname):
                raise error
            return super().__get__(instance, owner)
        except HarnessError as error:
            instance.errors[self.attrname] = error
            raise


class LazyCheckpoint:
    """A checkpoint ("last", "best" or "step_N") of a run with "raw" or "ema" weights; `keep` writes predictions down.

    A part raises HarnessError where it cannot be had, or OSError where it is gone: a training removes old checkpoints.
    """

    def __init__(self, run: Run, *, which: str, weights: str, keep: bool) -> None:
        self.run, self.which, self.weights, self._keep = run, which, weights, keep
        self.errors: dict[str | None, HarnessError] = {}

    @_once
    def path(self) -> Path:
        if self.which in ("last", "best") and not checkpoint.list_checkpoints(self.run.path / CHECKPOINTS):
            raise NoCheckpoint("there is no checkpoint yet", hint="Make the report again when there is one.")
        return find_checkpoint(self.run.path, self.which)

    @_once
    def saved(self) -> checkpoint.Saved:
        return checkpoint.load(self.path)

    @_once
    def recipe(self) -> Recipe:
        return load(self.run.path / "recipe.yaml")

    @_once
    def store(self) -> PreparedDataset:
        return open_data(self.recipe)

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in self.saved.state["classes"]]

    @_once
    def untrained_model(self) -> nn.Module:
        """The network of the recipe in evaluation mode, float32, on the CPU, with any weights."""
        recipe = self.recipe
        try:
            classes = len(self.classes)
        except NoCheckpoint:
            classes = len(self.store.manifest.classes)
        size = recipe.data.image_size_px
        return build_model(recipe.model.name, num_classes=classes, image_size_px=size, args=recipe.model.args).eval()

    def tensors(self) -> dict[str, Tensor]:
        """The weights asked for, by name."""
        tensors = self.saved.ema if self.weights == "ema" else self.saved.model
        if tensors is None:
            raise HarnessError("the run has no averaged weights", where=str(self.run.path), hint="Use --weights raw.")
        return tensors

    @_once
    def model(self) -> nn.Module:
        """The same network with the checkpoint's weights."""
        checkpoint.load_weights(self.untrained_model, self.tensors(), self.path)
        return self.untrained_model

    @_once
    def predictions(self) -> Predictions:
        """What the checkpoint says of each image of the test split."""
        found = predict_test_split(self.path, which=self.which, weights=self.weights, keep=self._keep)
        broken = int((~torch.isfinite(found.probabilities_NK).all(dim=1)).sum())
        if broken:  # the class of the largest would be the first one, and its calibration perfect
            raise HarnessError(
                f"the network's outputs are not finite for {broken:,} of {len(found.labels_N):,} test images",
                where=str(self.path),
                hint="The training has diverged; give an earlier checkpoint by --checkpoint step_N.",
            )
        return found

    @_once
    def images(self) -> np.ndarray:
        """The test images, uint8 (N, H, W, 3), mapped from their file."""
        images_NHW3 = self.store.split("test").images_BHWC
        if len(images_NHW3) != len(self.predictions.labels_N):
            raise HarnessError(
                "the images at hand are not those that the run was tested on",
                where=str(self.store.directory),
                hint="Set HARNESS_DATA or data.path to the run's own images.",
            )
        return images_NHW3

    @property
    def has_its_images(self) -> bool:
        """Whether the images at hand are those that the run was trained and tested on."""
        return bool(self.saved.state["data_sha256"] == dict(self.store.manifest.sha256))
