"""Evaluation: every image of a split counted exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.data.loaders import Batch, Loader
from harness.errors import HarnessError
from harness.training.network import MEMORY_FORMATS
from harness.training.state import Meter, Score


def evaluate(
    model: nn.Module,
    loader: Loader,
    ids_per_batch: Sequence[np.ndarray],
    *,
    autocast: Callable[[], Any],
    device: torch.device,
    memory_format: str,
    expected_total: int,
    tick: Callable[[], None] = lambda: None,
) -> Score:
    """Loss and accuracy of `model` over the batches of all ranks together.

    Args:
        model: not wrapped for DDP; left in the mode it was in.
        ids_per_batch: this rank's share of the split, from `order.evaluation_batches`.
        autocast: makes a context manager that sets the precision.
        expected_total: images in the split; anything else counted is a defect and raises.
        tick: called for each batch.
    """
    meter = Meter(device)
    for batch, logits_BK in classified(model, loader, ids_per_batch, autocast=autocast, memory_format=memory_format):
        tick()
        loss = nn.functional.cross_entropy(logits_BK, batch.labels_B, reduction="sum")
        meter.add(loss, logits_BK, batch.labels_B)
    score = meter.read()
    if score.total != expected_total:
        raise HarnessError(f"evaluation counted {score.total} images of {expected_total}", exit_code=1)
    return score


def classified(
    model: nn.Module,
    loader: Loader,
    ids_per_batch: Sequence[np.ndarray],
    *,
    autocast: Callable[[], Any],
    memory_format: str,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with its logits (B, K) float32, in evaluation mode and without gradients; arguments as `evaluate`."""
    # Not compiled, so that an evaluation of the saved weights gives the same bits as the one while training.
    with eval_mode(model), torch.compiler.set_stance("force_eager"):
        for batch in loader.batches(ids_per_batch, epoch=0):
            images = batch.images_BCHW.contiguous(memory_format=MEMORY_FORMATS[memory_format])
            with torch.no_grad(), autocast():
                logits_BK = model(images).float()
            yield batch, logits_BK


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the former mode of every module behind it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Batch], *, autocast: Callable[[], Any], memory_format: str
) -> None:
    """Take BatchNorm's running statistics anew as the average over `batches`, with dropout off.

    Dropout before a normalisation shifts the variance it sees in training; statistics without dropout are those
    that evaluation meets (Li et al. 2019, https://arxiv.org/abs/1801.05134). Averages over ranks too.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model), torch.compiler.set_stance("force_eager"):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        for batch in batches:
            images = batch.images_BCHW.contiguous(memory_format=MEMORY_FORMATS[memory_format])
            with autocast():
                model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    average_buffers(model)


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Average floating-point buffers (BatchNorm's running statistics) over the ranks.

    Without SyncBN each rank has its own: what is evaluated must be what is saved.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


@torch.no_grad()
def take_buffers_of_first_rank(model: nn.Module) -> None:
    """The first rank's buffers on every rank: a checkpoint holds those alone, and a resumed run must go on alike.

    The averaged weights' statistics are averages over steps of what each rank had; DDP gives all ranks the first
    one's statistics before each step, so that these are worth as much as any.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
