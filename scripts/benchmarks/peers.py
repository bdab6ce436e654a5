"""The loops of other libraries, as each one's documentation has them, for the contests of `harness.bench.step`."""

from __future__ import annotations

import atexit
import logging
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from harness.bench import Round
from harness.bench.step import LR, MOMENTUM, WARMUP_STEPS, Task, plain_loop, sgd


def ddp(**settings: Any) -> Round:
    """The plain loop on several ranks, as PyTorch's tutorial of DDP has it."""
    task = Task(**settings)
    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)
    return plain_loop(task, DistributedDataParallel(task.network()))


def accelerate(**settings: Any) -> Round:
    """The loop of Accelerate's quick tour."""
    from accelerate import Accelerator

    task = Task(**settings)
    accelerator = Accelerator(cpu=task.device == "cpu", mixed_precision="bf16" if task.bf16 else "no")
    net, criterion, (images_BCHW, labels_B) = task.network(), nn.CrossEntropyLoss(), task.batch()
    net, optimizer = accelerator.prepare(net, sgd(net))

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
            if index in (WARMUP_STEPS, WARMUP_STEPS + task.steps) and task.device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            loss: Tensor = self.criterion(self.net(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    module, steps = Module(), WARMUP_STEPS + task.steps + 1
    batches: DataLoader[Any] = DataLoader([task.batch()] * steps, batch_size=None)  # type: ignore[arg-type]

    how: dict[str, Any] = {"max_steps": steps, "accelerator": "gpu" if task.device == "cuda" else "cpu", "devices": 1}
    how |= {"precision": "bf16-mixed" if task.bf16 else "32-true", "logger": False, "enable_checkpointing": False}
    how |= {"enable_progress_bar": False, "enable_model_summary": False}

    def one_round() -> tuple[float, int]:
        module.times.clear()
        pl.Trainer(**how).fit(module, batches)
        return module.times[-1] - module.times[WARMUP_STEPS], task.steps * task.batch_size

    return one_round
