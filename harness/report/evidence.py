"""What a run's checkpoint is and says, each part made when it is first asked for; what failed once fails alike again.

Legend of shape letters: N images of the test split, B some of them, H and W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from harness.data.augment import normalisation_table
from harness.data.store import DataStore
from harness.errors import HarnessError
from harness.models.build import build_model
from harness.recipe import Recipe, load
from harness.run_directory import CHECKPOINTS
from harness.runs import Run
from harness.training import checkpoint
from harness.training.build import open_data
from harness.training.inference import Predictions, predict_test_split
from harness.training.resume import find_checkpoint

T = TypeVar("T")


class NoCheckpoint(HarnessError):
    """The run has not written one yet."""


def _once(make: Callable[[Any], T]) -> Callable[[Any], T]:
    """A method whose answer, or error, is kept: a download that failed is not tried again for the next section."""

    def get(self: Any) -> T:
        if make not in self._made:
            try:
                self._made[make] = make(self)
            except HarnessError as error:
                self._made[make] = error
        if isinstance(self._made[make], HarnessError):
            raise self._made[make]
        return self._made[make]

    return get


class Evidence:
    """A checkpoint with its network, its test images and what it says of them.

    Every method raises HarnessError where its part cannot be had, or OSError where it is gone: a running training
    removes old checkpoints.

    Args:
        which: "last", "best" or "step_N".
        weights: "raw" or "ema".
        keep: keep predictions in the run directory.
    """

    def __init__(self, run: Run, *, which: str, weights: str, keep: bool) -> None:
        self.run, self.which, self.weights, self._keep = run, which, weights, keep
        self._made: dict[Callable[[Any], Any], Any] = {}

    @_once
    def path(self) -> Path:
        """The checkpoint's folder."""
        if self.which in ("last", "best") and not checkpoint.list_checkpoints(self.run.path / CHECKPOINTS):
            raise NoCheckpoint("there is no checkpoint yet", hint="Make the report again when there is one.")
        return find_checkpoint(self.run.path, self.which)

    @_once
    def saved(self) -> checkpoint.Saved:
        """The checkpoint, verified."""
        return checkpoint.load(self.path())

    @_once
    def recipe(self) -> Recipe:
        """The run's recipe, checked."""
        return load(self.run.path / "recipe.yaml")

    @_once
    def store(self) -> DataStore:
        """The run's data."""
        return open_data(self.recipe())

    def classes(self) -> list[str]:
        """Names of the classes."""
        return [str(name) for name in self.saved().state["classes"]]

    @_once
    def bare_network(self) -> nn.Module:
        """The network as the recipe builds it, in evaluation mode, float32, on the CPU, with any weights."""
        recipe = self.recipe()
        try:
            classes = len(self.classes())
        except NoCheckpoint:
            classes = len(self.store().manifest.classes)
        with torch.random.fork_rng(devices=[]):
            size = recipe.data.image_size_px
            model = build_model(recipe.model.name, num_classes=classes, image_size_px=size, args=recipe.model.args)
        return model.eval()

    @_once
    def network(self) -> nn.Module:
        """The same with the checkpoint's weights."""
        saved, model = self.saved(), self.bare_network()
        tensors = saved.ema if self.weights == "ema" else saved.model
        if tensors is None:
            raise HarnessError("the run has no averaged weights", where=str(saved.path), hint="Use --weights raw.")
        checkpoint.load_weights(model, tensors, saved.path)
        return model

    @_once
    def predictions(self) -> Predictions:
        """What the checkpoint says of each image of the test split."""
        found = predict_test_split(self.path(), which=self.which, weights=self.weights, keep=self._keep)
        broken = int((~torch.isfinite(found.probabilities_NK).all(dim=1)).sum())
        if broken:  # the class of the largest would be the first one, and its calibration perfect
            raise HarnessError(
                f"the network's outputs are not finite for {broken:,} of {len(found.labels_N):,} test images",
                where=str(self.path()),
                hint="The training has diverged; give an earlier checkpoint by --checkpoint step_N.",
            )
        return found

    @_once
    def images(self) -> np.ndarray:
        """The test images, uint8 (N, H, W, 3), mapped from their file."""
        images_NHW3 = self.store().split("test").images_BHWC
        if len(images_NHW3) != len(self.predictions().labels_N):
            raise HarnessError(
                "the images at hand are not those that the run was tested on",
                where=str(self.store().directory),
                hint="Set HARNESS_DATA or data.path to the run's own images.",
            )
        return images_NHW3

    def some_image(self) -> np.ndarray:
        """The first test image, uint8 (H, W, 3); a grey one where the images are not at hand."""
        try:
            return self.store().split("test").images_BHWC[0]
        except HarnessError:
            size = self.recipe().data.image_size_px
            return np.full((size, size, 3), 128, np.uint8)

    @_once
    def has_its_images(self) -> bool:
        """Whether the images at hand are those that the run was trained and tested on."""
        return bool(self.saved().state["data_sha256"] == dict(self.store().manifest.sha256))

    def normalised(self, ids_B: np.ndarray) -> Tensor:
        """Some test images as the network takes them, float32 (B, 3, H, W)."""
        state = self.saved().state
        table = normalisation_table(state["mean"], state["std"])
        pixels_BHW3 = self.images()[ids_B]
        return torch.from_numpy(np.stack([table[c][pixels_BHW3[..., c]] for c in range(3)], axis=1))
