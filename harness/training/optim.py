"""timm's optimizers and their state in files, timm's schedules as functions of the step, mixing and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim.adafactor_bv import AdafactorBigVision
from timm.optim.kron import Kron
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from harness.errors import HarnessError, nearest

# A checkpoint of the optimizer is tensors, numbers and texts, nothing else.
_CANNOT_BE_SAVED = {
    AdafactorBigVision: "its settings hold a torch data type",
    Kron: "its state holds lists of matrices and a random generator of its own",
}
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")  # how a step is computed, not what it does


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

    timm's registry turns Nesterov momentum on for `sgd` and its kin; here `nesterov` decides, as in torch. HarnessError
    names what is unknown, what the optimizer refuses, and an optimizer that the training cannot step or save.
    """
    if name not in list_optimizers():
        raise HarnessError(f'unknown optimizer "{name}"', where="optimizer.name", hint=nearest(name, list_optimizers()))
    try:
        optimizer_class = get_optimizer_class(name, bind_defaults=False)
        parameters = inspect.signature(optimizer_class.__init__).parameters
        _refuse_unusable(name, optimizer_class)
        _refuse_unknown(name, parameters, args)
        return create_optimizer_v2(
            model,
            opt=name,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            filter_bias_and_bn=not decay_norm_and_bias,
            **_nesterov(name, nesterov),
            **_implementation(parameters, args, next(model.parameters()).device),
            **args,
        )
    except HarnessError:
        raise
    except Exception as error:  # whatever an optimizer thinks of its arguments
        where = "optimizer.args" if args else "optimizer.name"
        hint = "Try another optimizer, such as sgd or adamw." if not args else "See the optimizer in timm or torch."
        raise HarnessError(f"{name} cannot be built: {error}", where=where, hint=hint) from None


def _refuse_unusable(name: str, optimizer_class: Any) -> None:
    """Refuse, before any step is taken, an optimizer that fails at the first step or at the first checkpoint."""
    if get_optimizer_info(name).second_order:
        reason = "it needs second derivatives, which the training does not compute"
    elif optimizer_class in _CANNOT_BE_SAVED:
        reason = f"{_CANNOT_BE_SAVED[optimizer_class]}, which a checkpoint cannot hold"
    else:
        return
    hint = "Try another optimizer, such as sgd, adamw or muon."
    raise HarnessError(f"{name} cannot be used: {reason}", where="optimizer.name", hint=hint)


def _refuse_unknown(name: str, parameters: Mapping[str, inspect.Parameter], args: Mapping[str, Any]) -> None:
    """timm would take arguments of its own too, such as layer_decay."""
    own = {"lr", "momentum", "weight_decay", *(get_optimizer_info(name).defaults or {}).keys() & {"nesterov"}}
    known = [k for k in parameters if k not in ("self", "params", *own)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in args:
        if key in own:
            what = f"{key} must not be set in optimizer.args: optimizer.{key} decides it"
            raise HarnessError(what, where=f"optimizer.args.{key}", hint=f"Set optimizer.{key}.")
        if key not in known and not takes_any:
            hint = nearest(key, known)
            raise HarnessError(f'{name} has no argument "{key}"', where=f"optimizer.args.{key}", hint=hint)


def _nesterov(name: str, nesterov: bool) -> dict[str, bool]:
    """The argument that makes the setting hold, where timm's registry has one for this optimizer."""
    defaults = get_optimizer_info(name).defaults or {}
    if name.startswith("n") and defaults.get("nesterov") and not nesterov:
        what, hint = f"{name} means Nesterov momentum", "Set optimizer.nesterov=true."
    elif nesterov and "nesterov" not in defaults:
        what = f"nesterov is not a setting of {name}"
        hint = f'Try "n{name}".' if f"n{name}" in list_optimizers() else "Set optimizer.nesterov=false."
    else:
        return {"nesterov": nesterov} if "nesterov" in defaults else {}
    raise HarnessError(what, where="optimizer.nesterov", hint=hint)


def _implementation(parameters: Mapping[str, Any], args: Mapping[str, Any], device: torch.device) -> dict[str, bool]:
    """All tensors in one call where torch has that, rather than one by one, which a small network waits for.

    On a GPU by fused kernels, which are faster still; on a CPU by those that keep every bit of SGD's and AdamW's loops.
    """
    wanted = "fused" if device.type == "cuda" and "fused" in parameters else "foreach"
    return {wanted: True} if wanted in parameters and not set(_IMPLEMENTATION) & set(args) else {}


def split_state(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict()` as tensors by name, and all the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    scalars, groups = {}, []
    for index, entries in optimizer["state"].items():
        tensors |= {f"parameter.{index}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
        scalars[str(index)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
    for index, group in enumerate(optimizer["param_groups"]):
        tensors |= {f"group.{index}.{k}": v for k, v in group.items() if isinstance(v, Tensor)}
        groups.append({k: v for k, v in group.items() if not isinstance(v, Tensor)})
    return tensors, {"scalars": scalars, "groups": groups}


def load_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], where: Path
) -> None:
    """Put a state, as `split_state` gave it, into an optimizer over parameters of the same shapes.

    Raises HarnessError with `where` it came from: it is another optimizer's.
    """
    try:
        state = _join(tensors, rest)
        _check_groups(state["param_groups"], optimizer.state_dict()["param_groups"])
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        hint = "Resume with the optimizer settings it was trained with."
        raise HarnessError(f"the checkpoint's optimizer is another one: {error}", where=str(where), hint=hint) from None
    for parameter, entries in optimizer.state.items():  # back to the layout of the weights: sums round by it
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _join(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    per_parameter: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in rest["scalars"].items()}
    groups: list[dict[str, Any]] = [dict(group) for group in rest["groups"]]
    for name, tensor in tensors.items():
        kind, index, key = name.split(".", 2)
        owner = groups[int(index)] if kind == "group" else per_parameter.setdefault(int(index), {})
        owner[key] = tensor
    for group in groups:  # JSON knows no tuples; betas and the like are tuples
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, list) and k != "params"})
    return {"state": per_parameter, "param_groups": groups}


def _check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Refuse by ValueError settings of other kinds than the optimizer's own: they would fail later, or train otherwise.

    A checkpoint of another device, or of an earlier version, has another implementation of the same steps: ours stays.
    """
    if len(saved) != len(own):
        raise ValueError(f"it has {len(saved)} parameter groups, not {len(own)}")
    for group, wanted in zip(saved, own, strict=True):
        group.update({name: wanted[name] for name in _IMPLEMENTATION if name in wanted})
        if group.get("params") != wanted["params"] or not wanted.keys() <= group.keys():
            raise ValueError("its parameter groups hold other parameters or settings")
        for name, value in wanted.items():
            numbers = isinstance(value, int | float) and isinstance(group[name], int | float)
            if not numbers and type(group[name]) is not type(value):
                raise ValueError(f"its {name} is {group[name]!r}")


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    total_steps: int,
    steps_per_epoch: int,
    warmup_steps: int,
    decay_epochs: float,
    milestones_epochs: Sequence[int],
    **settings: float,
) -> Callable[[int], float]:
    """timm's schedule as a function that sets the rate of a step (0 is the first) in the optimizer, and returns it.

    Nothing but the step decides the rate, so a resumed run or another number of ranks has the same trace. The warm-up
    is linear and part of `total_steps`; the shape after it is cut off at the front (timm's `warmup_prefix=False`).
    `settings` are timm's own: warmup_lr, min_lr and decay_rate.
    """
    if total_steps == 0 or (name == "constant" and warmup_steps == 0):
        return lambda step: float(optimizer.param_groups[0]["lr"])
    if warmup_steps > total_steps:
        what = f"the warm-up of {warmup_steps} steps is longer than the training of {total_steps} steps"
        hint = "Shorten schedule.warmup_epochs or schedule.warmup_steps, or train longer."
        raise HarnessError(what, where="schedule", hint=hint)
    decay_steps = max(1, round(decay_epochs * steps_per_epoch))
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=total_steps,
            decay_epochs=decay_steps,
            # timm's multistep looks one step ahead; a milestone means the first step with the new rate
            decay_milestones=[m * steps_per_epoch + 1 for m in milestones_epochs],
            warmup_epochs=warmup_steps,
            step_on_epochs=False,
            updates_per_epoch=1,
            **settings,
        )
    except Exception as error:  # timm checks by assertions and others; all of them are about these settings
        what = f"{name} cannot be built: {str(error) or type(error).__name__}"
        hint = f"The training has {total_steps} steps, {warmup_steps} of them warm-up; a decay of {decay_epochs:g} "
        hint += f"epochs (schedule.decay_epochs) is {decay_steps} steps."
        raise HarnessError(what, where="schedule", hint=hint) from None

    def apply(step: int) -> float:
        scheduler.step_update(step)
        return float(optimizer.param_groups[0]["lr"])

    return apply


class Mix:
    """Mixup and CutMix by timm, a batch at a time, or hard labels where both are off.

    Draws come from numpy's global generator, which the step keys by (seed, step, rank).
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
            self._mixup = Mixup(mixup_alpha, cutmix_alpha, prob=probability, switch_prob=switch_probability)

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images (mixed in place) and targets: labels (B,) int64, or probabilities (B, classes) float32."""
        if self._mixup is None:
            return images_BCHW, labels_B
        # What timm's `__call__` does, except for its refusal of odd batches: image i is paired with image B - 1 - i, so
        # that the middle one of an odd batch meets itself.
        share = self._mixup._mix_batch(images_BCHW)
        return images_BCHW, mixup_target(labels_B, self._num_classes, share, self._label_smoothing)

    def loss_sum(self, logits_BK: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy summed over the batch (float32 scalar); smoothing is in the target once mixing is on."""
        smoothing = self._label_smoothing if self._mixup is None else 0.0
        return F.cross_entropy(logits_BK.float(), target, reduction="sum", label_smoothing=smoothing)
