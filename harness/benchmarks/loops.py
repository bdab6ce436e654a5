"""The contestants of the step and overhead benchmarks: one network, one batch in memory, several training loops.

Each function warms up and returns a round, see `contest`. All train a network of ours with SGD and momentum on the
same random batch. Theirs are the plain loops of each library's documentation; ours is the epoch of `harness train`
with its logging, signals and checks, and a loader that gives the batch.
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from harness.data.batches import Batch
from harness.models.build import build_model
from harness.recipe import Recipe, load
from harness.runtime import joined
from harness.training.loop import Cadence, run_epoch
from harness.training.parts import Parts, assemble
from harness.training.startup import Startup
from harness.training.state import Progress

LR, MOMENTUM, CLASSES = 0.008, 0.95, 10
WARMUP_STEPS = 2

Round = Callable[[], tuple[float, int]]


@dataclass(frozen=True)
class Task:
    """What all contestants train.

    Attributes:
        model, args: the network's name and the arguments of its constructor.
        size_px: height and width of the images.
        batch_size: images a step, on each rank.
        steps: of a round.
        channels_last: layout of images and weights, rather than contiguous.
        bf16: autocast, rather than float32.
    """

    model: str
    args: dict[str, Any]
    size_px: int
    batch_size: int
    steps: int
    channels_last: bool = False
    bf16: bool = False

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        net = build_model(self.model, num_classes=CLASSES, image_size_px=self.size_px, args=self.args)
        return net.to(memory_format=self._layout)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random images (batch_size, 3, size_px, size_px) float32 and labels int64, always the same."""
        generator = torch.Generator().manual_seed(0)
        images_BCHW = torch.randn(self.batch_size, 3, self.size_px, self.size_px, generator=generator)
        labels_B = torch.randint(CLASSES, (self.batch_size,), generator=generator)
        return images_BCHW.contiguous(memory_format=self._layout), labels_B

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()

    def round_of(self, step: Callable[[], object]) -> Round:
        """Warm up, then time `steps` steps a round."""
        for _ in range(WARMUP_STEPS):
            step()

        def one_round() -> tuple[float, int]:
            start = time.perf_counter()
            for _ in range(self.steps):
                step()
            return time.perf_counter() - start, self.steps * self.batch_size

        return one_round

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def pytorch(**settings: Any) -> Round:
    """A loop as short as it can be."""
    task = Task(**settings)
    return _plain(task, task.network())


def ddp(**settings: Any) -> Round:
    """The same on several ranks, as PyTorch's tutorial of DDP has it."""
    task = Task(**settings)
    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)
    return _plain(task, DistributedDataParallel(task.network()))


def _plain(task: Task, net: nn.Module) -> Round:
    criterion, (images_BCHW, labels_B) = nn.CrossEntropyLoss(), task.batch()
    optimizer = _sgd(net)

    def step() -> None:
        optimizer.zero_grad()
        with task.autocast():
            loss = criterion(net(images_BCHW), labels_B)
        loss.backward()
        optimizer.step()

    return task.round_of(step)


def accelerate(**settings: Any) -> Round:
    """The loop of Accelerate's quick tour."""
    from accelerate import Accelerator

    task = Task(**settings)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if task.bf16 else "no")
    net, criterion, (images_BCHW, labels_B) = task.network(), nn.CrossEntropyLoss(), task.batch()
    net, optimizer = accelerator.prepare(net, _sgd(net))

    def step() -> None:
        with accelerator.accumulate(net):
            loss = criterion(net(images_BCHW), labels_B)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    return task.round_of(step)


def timm(**settings: Any) -> Round:
    """The update of timm's train.py: its optimizer, loss and average meter, which reads the loss at each step."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter

    task = Task(**settings)
    net, criterion, (images_BCHW, labels_B) = task.network(), LabelSmoothingCrossEntropy(0.1), task.batch()
    optimizer, losses = create_optimizer_v2(net, opt="sgd", lr=LR, momentum=MOMENTUM), AverageMeter()

    def step() -> None:
        with task.autocast():
            loss = criterion(net(images_BCHW), labels_B)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), task.batch_size)
        optimizer.zero_grad()

    return task.round_of(step)


def lightning(**settings: Any) -> Round:
    """`Trainer.fit` without validation, checkpoints and progress bar; its clock runs from batch to batch."""
    import lightning as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = Task(**settings)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = task.network(), nn.CrossEntropyLoss()
            self.times: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            self.times.append(time.perf_counter())
            loss: Tensor = self.criterion(self.net(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _sgd(self)

    module, steps = Module(), WARMUP_STEPS + task.steps + 1
    batches = DataLoader(_Batches(task.batch(), steps), batch_size=None)

    def one_round() -> tuple[float, int]:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed" if task.bf16 else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module.times.clear()
        trainer.fit(module, batches)
        return module.times[-1] - module.times[WARMUP_STEPS], task.steps * task.batch_size

    return one_round


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batch a number of times, as torch's DataLoader wants it."""

    def __init__(self, batch: tuple[Tensor, Tensor], count: int) -> None:
        self._batch, self._count = batch, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._batch


class _OneBatch:
    """A loader of a batch that is there already."""

    def __init__(self, images_BCHW: Tensor, labels_B: Tensor) -> None:
        self._batch = Batch(images_BCHW, labels_B, np.arange(len(labels_B)))

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        return (self._batch for _ in ids_per_batch)

    def close(self) -> None:
        """Nothing is open."""


def harness(*, recipe: str, overrides: list[str], **settings: Any) -> Round:
    """An epoch of `harness train` of a recipe: `steps` steps with what the loop does around them."""
    task = Task(**settings)
    global_batch_size = task.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    images = task.steps * global_batch_size
    data = f"{{train_images: {images}, test_images: {CLASSES}, num_classes: {CLASSES}}}"
    own = (
        f"data.synthetic={data}",
        "data.source=synthetic",
        f"data.image_size_px={task.size_px}",
        "data.loader=device",
    )
    batch = (f"training.global_batch_size={global_batch_size}", f"optimizer.lr={LR}", f"optimizer.momentum={MOMENTUM}")
    loaded = load(recipe, [*own, *batch, *overrides])
    parts = replace(assembled(loaded), train_loader=_OneBatch(*task.batch()))
    cadence, progress = epochs_alone(loaded), Progress()

    def one_round() -> tuple[float, int]:
        start = time.perf_counter()
        run_epoch(parts, cadence, progress)
        return time.perf_counter() - start, images

    one_round()
    return one_round


def assembled(recipe: Recipe) -> Parts:
    """All parts of a recipe's training, as `harness train` builds them; they stay open until the process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-bench-")))
    runtime = stack.enter_context(joined(precision=recipe.training.precision, seed=recipe.seed))
    parts = assemble(recipe, runtime, directory, Startup())
    stack.callback(parts.close)
    return parts


def epochs_alone(recipe: Recipe) -> Cadence:
    """A cadence by which `run_epoch` trains and logs, and neither evaluates nor saves."""
    never = 1 << 60
    return Cadence(never, recipe.tracking.log_every_steps, never, checkpoint_steps=())
