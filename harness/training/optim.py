"""Optimizers (timm's), the learning rate as a function of the step (timm's), mixing and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from harness.errors import HarnessError, nearest

# The optimizers for which timm's registry turns Nesterov momentum on by name alone.
_SGD_NAMES = {"sgd", "momentum"}


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decay_norm_and_bias: bool,
    args: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """One of timm's optimizers over all parameters of `model`.

    timm's `sgd` means Nesterov momentum; here `sgd` is classical unless `nesterov` is true, as in torch.

    Raises:
        HarnessError: unknown name or argument, or values that the optimizer refuses.
    """
    if name not in list_optimizers():
        raise HarnessError(f'unknown optimizer "{name}"', where="optimizer.name", hint=nearest(name, list_optimizers()))
    extra = dict(args)
    if name in _SGD_NAMES:
        extra["nesterov"] = nesterov
    elif nesterov:
        raise HarnessError(
            f"nesterov is a setting of sgd, not of {name}", where="optimizer.nesterov", hint=f'Try "n{name}".'
        )
    try:
        return create_optimizer_v2(
            model,
            opt=name,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            filter_bias_and_bn=not decay_norm_and_bias,
            **extra,
        )
    except (TypeError, ValueError, ModuleNotFoundError, RuntimeError, AssertionError) as error:
        known = inspect.signature(get_optimizer_class(name, bind_defaults=False).__init__).parameters
        wrong = [key for key in args if key not in known]
        hint = nearest(wrong[0], [k for k in known if k not in ("self", "params")]) if wrong else None
        raise HarnessError(f"{name} cannot be built: {error}", where="optimizer.args", hint=hint) from None


class Schedule:
    """The learning rate at each optimizer step: a pure function of the step's number, from timm.

    Nothing but the step decides the rate, so a resumed run or another number of ranks has the same trace.
    """

    def __init__(self, scheduler: Scheduler | None, optimizer: torch.optim.Optimizer) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer

    def apply(self, step: int) -> float:
        """Set the rate of step `step` (0 is the first) in the optimizer and return that of its first group."""
        if self._scheduler is not None:
            self._scheduler.step_update(step)
        return float(self._optimizer.param_groups[0]["lr"])


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    total_steps: int,
    steps_per_epoch: int,
    warmup_steps: int,
    warmup_lr: float,
    min_lr: float,
    decay_rate: float,
    decay_epochs: float,
    milestones_epochs: Sequence[int],
) -> Schedule:
    """timm's schedule of that name with every duration counted in optimizer steps.

    The warm-up is linear and part of `total_steps`; the shape behind it is the one without warm-up, cut off at
    the front (timm's `warmup_prefix=False`).
    """
    if name == "constant" and warmup_steps == 0:
        return Schedule(None, optimizer)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=max(1, total_steps),
        decay_epochs=max(1, round(decay_epochs * steps_per_epoch)),
        # timm's multistep looks one step ahead; a milestone means the first step with the new rate
        decay_milestones=[m * steps_per_epoch + 1 for m in milestones_epochs],
        decay_rate=decay_rate,
        min_lr=min_lr,
        warmup_lr=warmup_lr,
        warmup_epochs=warmup_steps,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return Schedule(scheduler, optimizer)


class Mix:
    """Mixup and CutMix by timm, a batch at a time, or hard labels where both are off.

    Draws come from numpy's global generator, which the loop keys by (seed, step, rank).
    """

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        probability: float,
        switch_probability: float,
        label_smoothing: float,
        num_classes: int,
    ) -> None:
        self._label_smoothing, self._num_classes = label_smoothing, num_classes
        self._mixup = None
        if mixup_alpha > 0 or cutmix_alpha > 0:
            self._mixup = Mixup(
                mixup_alpha=mixup_alpha,
                cutmix_alpha=cutmix_alpha,
                prob=probability,
                switch_prob=switch_probability,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images (mixed in place) and targets: labels (B,) int64, or probabilities (B, classes) float32."""
        if self._mixup is None:
            return images_BCHW, labels_B
        if len(images_BCHW) % 2:  # only a last, partial batch: timm pairs images, an odd one stays unmixed
            return images_BCHW, mixup_target(labels_B, self._num_classes, 1.0, self._label_smoothing)
        images, target = self._mixup(images_BCHW, labels_B)
        return images, target

    def loss_sum(self, logits_BK: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy summed over the batch (float32 scalar); smoothing is in the target once mixing is on."""
        smoothing = self._label_smoothing if self._mixup is None else 0.0
        return F.cross_entropy(logits_BK.float(), target, reduction="sum", label_smoothing=smoothing)
