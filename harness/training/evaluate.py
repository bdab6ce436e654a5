"""Evaluation: every image of a split counted exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from harness.data.loaders import Batch, Loader
from harness.distributed.runtime import Runtime
from harness.errors import EXIT_FAILED, HarnessError
from harness.training.state import Meter, Score


@dataclass(frozen=True)
class Evaluator:
    """Asks networks, not wrapped for DDP, about the test split in the training's precision and layout.

    `ids_per_batch` is this rank's share of the split, from `order.evaluation_batches`; `total` counts the whole split.
    """

    runtime: Runtime
    loader: Loader
    ids_per_batch: Sequence[np.ndarray]
    total: int
    memory_format: torch.memory_format

    def score(self, model: nn.Module) -> Score:
        """Loss and accuracy over the batches of all ranks together."""
        meter = Meter(self.runtime.device)
        for batch, logits_BK in self.classify(model):
            self.runtime.tick()
            meter.add(
                nn.functional.cross_entropy(logits_BK, batch.labels_B, reduction="sum"), logits_BK, batch.labels_B
            )
        score = meter.take()
        if score.total != self.total:
            raise HarnessError(f"evaluation counted {score.total} images of {self.total}", exit_code=EXIT_FAILED)
        return score

    def classify(self, model: nn.Module) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch of this rank with its logits (B, classes) float32, without gradients."""
        with _as_saved(model):
            for batch in self.loader.batches(self.ids_per_batch, epoch=0):
                with torch.no_grad():
                    logits_BK = self._forward(model, batch).float()
                yield batch, logits_BK

    @torch.no_grad()
    def recalibrate_batch_norm(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Replace BatchNorm's running statistics by their average over `batches` and ranks, with dropout off.

        Dropout before a normalisation shifts the variance it sees in training; statistics without dropout are those
        that evaluation meets (Li et al. 2019, https://arxiv.org/abs/1801.05134).
        """
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        with _as_saved(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.train()
            for batch in batches:
                self._forward(model, batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.share_statistics(model, average=True)

    def share_statistics(self, model: nn.Module, *, average: bool) -> None:
        """Give BatchNorm's running statistics all ranks' average, or the first rank's, on every rank.

        Without SyncBN each rank has its own, and a checkpoint holds the first one's: what is evaluated must be what is
        saved, and a resumed run must continue alike. Averaged weights take the first rank's: DDP gives all ranks those
        before each step, so that they are worth as much as any.
        """
        if self.runtime.world_size > 1:
            distribute_bn(model, self.runtime.world_size, reduce=average)

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        with self.runtime.accelerator.autocast():
            logits_BK: Tensor = model(batch.images_BCHW.contiguous(memory_format=self.memory_format))
        return logits_BK


@contextmanager
def _as_saved(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and not compiled: the saved weights evaluate to the same bits as while training."""
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
