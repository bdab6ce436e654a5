"""Optimizers (timm's), the learning rate as a function of the step (timm's), mixing and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim.adafactor_bv import AdafactorBigVision
from timm.optim.kron import Kron
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from harness.errors import HarnessError, nearest

# A checkpoint of the optimizer is tensors, numbers and texts, nothing else.
_CANNOT_BE_SAVED = {
    AdafactorBigVision: "its settings hold a torch data type",
    Kron: "its state holds lists of matrices and a random generator of its own",
}


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

    timm's registry turns Nesterov momentum on for `sgd` and its kin; here `nesterov` decides, as in torch.

    Raises:
        HarnessError: unknown name or argument, values that the optimizer refuses, or an optimizer that the training
            cannot step or save.
    """
    if name not in list_optimizers():
        raise HarnessError(f'unknown optimizer "{name}"', where="optimizer.name", hint=nearest(name, list_optimizers()))
    try:
        optimizer_class = get_optimizer_class(name, bind_defaults=False)
        _refuse_unusable(name, optimizer_class)
        _refuse_unknown(name, optimizer_class, args)
        return create_optimizer_v2(
            model,
            opt=name,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            filter_bias_and_bn=not decay_norm_and_bias,
            **_nesterov(name, nesterov),
            **_together(optimizer_class, args, next(model.parameters()).device),
            **args,
        )
    except HarnessError:
        raise
    except Exception as error:  # whatever an optimizer thinks of its arguments
        where = "optimizer.args" if args else "optimizer.name"
        hint = "Try another optimizer, such as sgd or adamw." if not args else "See the optimizer in timm or torch."
        raise HarnessError(f"{name} cannot be built: {error}", where=where, hint=hint) from None


def _together(optimizer_class: Any, args: Mapping[str, Any], device: torch.device) -> dict[str, bool]:
    """All tensors in one call where torch has that, rather than one by one, which a small network waits for.

    On a GPU by fused kernels, which are faster still; on a CPU by those that keep every bit of SGD's and AdamW's loops.
    """
    known = inspect.signature(optimizer_class.__init__).parameters
    if {"fused", "foreach", "capturable", "differentiable"} & set(args):
        return {}
    wanted = "fused" if device.type == "cuda" and "fused" in known else "foreach"
    return {wanted: True} if wanted in known else {}


def _nesterov(name: str, nesterov: bool) -> dict[str, bool]:
    """The argument that makes the setting hold, where timm's registry has one for this optimizer."""
    defaults = get_optimizer_info(name).defaults or {}
    if name.startswith("n") and defaults.get("nesterov") and not nesterov:
        raise HarnessError(
            f"{name} means Nesterov momentum", where="optimizer.nesterov", hint="Set optimizer.nesterov=true."
        )
    if "nesterov" in defaults:
        return {"nesterov": nesterov}
    if nesterov:
        hint = f'Try "n{name}".' if f"n{name}" in list_optimizers() else "Set optimizer.nesterov=false."
        raise HarnessError(f"nesterov is not a setting of {name}", where="optimizer.nesterov", hint=hint)
    return {}


def _refuse_unknown(name: str, optimizer_class: Any, args: Mapping[str, Any]) -> None:
    """Arguments that are settings of their own, or not the optimizer's: timm would take some of its own, such as
    layer_decay."""
    own = {"lr", "momentum", "weight_decay", *(get_optimizer_info(name).defaults or {}).keys() & {"nesterov"}}
    for key in [key for key in args if key in own]:
        what = f"{key} must not be set in optimizer.args: optimizer.{key} decides it"
        raise HarnessError(what, where=f"optimizer.args.{key}", hint=f"Set optimizer.{key}.")
    parameters = inspect.signature(optimizer_class.__init__).parameters
    known = [k for k in parameters if k not in ("self", "params", *own)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in args:
        if key not in known:
            raise HarnessError(
                f'{name} has no argument "{key}"', where=f"optimizer.args.{key}", hint=nearest(key, known)
            )


def _refuse_unusable(name: str, optimizer_class: Any) -> None:
    """Refuse, before any step is taken, an optimizer that fails at the first step or at the first checkpoint."""
    reason = None
    if get_optimizer_info(name).second_order:
        reason = "it needs second derivatives, which the training does not compute"
    elif optimizer_class in _CANNOT_BE_SAVED:
        reason = f"{_CANNOT_BE_SAVED[optimizer_class]}, which a checkpoint cannot hold"
    if reason is not None:
        hint = "Try another optimizer, such as sgd, adamw or muon."
        raise HarnessError(f"{name} cannot be used: {reason}", where="optimizer.name", hint=hint)


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

    Raises:
        HarnessError: the warm-up is longer than the training, or timm refuses the settings.
    """
    if total_steps == 0 or (name == "constant" and warmup_steps == 0):
        return Schedule(None, optimizer)
    if warmup_steps > total_steps:
        raise HarnessError(
            f"the warm-up of {warmup_steps} steps is longer than the training of {total_steps} steps",
            where="schedule",
            hint="Shorten schedule.warmup_epochs or schedule.warmup_steps, or train longer.",
        )
    decay_steps = max(1, round(decay_epochs * steps_per_epoch))
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=total_steps,
            decay_epochs=decay_steps,
            # timm's multistep looks one step ahead; a milestone means the first step with the new rate
            decay_milestones=[m * steps_per_epoch + 1 for m in milestones_epochs],
            decay_rate=decay_rate,
            min_lr=min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=warmup_steps,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
    except Exception as error:  # timm checks by assertions and others; all of them are about these settings
        raise HarnessError(
            f"{name} cannot be built: {str(error) or type(error).__name__}",
            where="schedule",
            hint=f"The training has {total_steps} steps, {warmup_steps} of them warm-up; a decay of "
            f"{decay_epochs:g} epochs (schedule.decay_epochs) is {decay_steps} steps.",
        ) from None
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
        # What timm's `__call__` does, but for its refusal of odd batches: image i is paired with image B - 1 - i, so
        # that the middle one of an odd batch meets itself.
        share = self._mixup._mix_batch(images_BCHW)
        return images_BCHW, mixup_target(labels_B, self._num_classes, share, self._label_smoothing)

    def loss_sum(self, logits_BK: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy summed over the batch (float32 scalar); smoothing is in the target once mixing is on."""
        smoothing = self._label_smoothing if self._mixup is None else 0.0
        return F.cross_entropy(logits_BK.float(), target, reduction="sum", label_smoothing=smoothing)
