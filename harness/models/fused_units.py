"""Faster paths of the same function on a CPU: compiled kernels, fused units of a branch, dropout from bulk bits.

Layers change their class in place and keep their parameters, names and hooks. A fused unit runs its normalisation, ReLU
and dropout as one pass; wherever that does not apply (another dtype, a hook on one of the layers, gradients in
evaluation mode, a slice of a unit, other layers in it) the layers run one by one, which is the reference.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.models.kernels import KernelsUnavailable, available, call, close_kernels, depthwise, open_kernels
from harness.models.kernels.norm_relu_drop import LEVELS, NormReluDrop, check_fused_pass, moments, normalise_relu_drop
from harness.models.safe_conv import adopt_path
from harness.models.sync_batch_norm import next_momentum, over_ranks, several_ranks, synchronises

# Values of a tensor: with fewer, and no dropout, calling torch twice takes less time than calling us once.
FEW_VALUES = 1 << 17
_NAMES = ("norm", "act", "drop")  # as `dual_branch.py` calls them; `drop` may be missing


def adopt_compiled_kernels(model: nn.Module, cache_directory: Path) -> str:
    """Depthwise convolutions and branch units by the compiled kernels, in place; says in a phrase what was done.

    Ranks that train together have them all or none of them. Call it before `check_and_repair`, which checks the
    convolutions at their shapes, and before anything that wraps.
    """
    missing = None
    try:
        open_kernels(cache_directory)
        check_fused_pass()
    except KernelsUnavailable as error:
        missing = str(error)
    everywhere = torch.tensor(int(missing is None))
    if several_ranks():
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if not everywhere:
        close_kernels()
        return f"plain ({missing or 'another rank has no compiled ones'})"
    convolutions = [m for m in model.modules() if type(m) is nn.Conv2d and depthwise.applies(m)]
    units = [m for m in model.modules() if type(m) is nn.Sequential and _can_fuse(m)]
    for conv in convolutions:
        adopt_path(conv, "compiled")
    for unit in units:
        unit.__class__ = FusedUnit
    return f"compiled ({len(convolutions)} depthwise convolutions, {len(units)} units of norm, ReLU and dropout)"


class FusedUnit(nn.Sequential):
    """A Sequential that ends in `norm`, `act` and perhaps `drop`: the same function, fewer passes."""

    norm: nn.BatchNorm2d

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        if not _is_unit(self):  # a slice, or what somebody has made of it since it was adopted
            return super().forward(input)
        tail = [self._modules[name] for name in _NAMES if name in self._modules]
        x = input
        for layer in list(self)[: -len(tail)]:
            x = layer(x)
        if self._fuses(x, tail):
            return self._fused(x)
        for layer in tail:
            x = layer(x)
        return x

    def _fuses(self, x: Tensor, tail: list[Any]) -> bool:
        if x.device.type != "cpu" or not available(x.dtype) or x.dim() != 4 or x.numel() == 0:
            return False
        if any(_has_hooks(layer) for layer in tail) or not _fits(self.norm, x):
            return False
        threshold = self._threshold()
        if x.numel() < FEW_VALUES and not threshold:
            return False
        if not self.norm.training:
            return not torch.is_grad_enabled() and not threshold
        alone = x.numel() == x.shape[1] and not synchronises(self.norm)  # one value a channel, which the layer refuses
        return not alone and threshold < LEVELS

    def _threshold(self) -> int:
        """How many of LEVELS random numbers drop a value."""
        drop = self._modules.get("drop")
        return round(drop.p * LEVELS) if isinstance(drop, nn.Dropout) and drop.training else 0

    def _fused(self, x: Tensor) -> Tensor:
        norm, x = self.norm, x.contiguous(memory_format=torch.channels_last)
        running = (norm.running_mean, norm.running_var)
        if not norm.training:
            mean, variance = (value.double() for value in running if value is not None)
            return normalise_relu_drop(x, norm.weight, norm.bias, mean, variance, eps=norm.eps)
        synchronised = synchronises(norm)
        mean, variance = moments(x.detach())
        count = x.numel() / x.shape[1]
        if synchronised:
            mean, variance, count = over_ranks(mean, variance, count)
        call("take_moments", torch.float32, mean, variance, count, next_momentum(norm), *running, norm.num_features)
        arguments = (norm.weight, norm.bias, mean, variance, count, norm.eps, self._threshold(), synchronised)
        result: Tensor = NormReluDrop.apply(x, *arguments)
        return result


def _has_hooks(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(map(bool, hooks))


def _fits(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """The kernels trust what they are given."""
    buffers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return x.shape[1] == norm.num_features and all(
        value is not None and value.dtype is torch.float32 and value.device.type == "cpu" and value.is_contiguous()
        for value in buffers
    )


def _can_fuse(unit: nn.Sequential) -> bool:
    norm = unit._modules.get("norm")
    return _is_unit(unit) and type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats


def _is_unit(unit: nn.Sequential) -> bool:
    """Whether it ends in the layers that the fused pass stands for; other ones may be there the next time."""
    layers = unit._modules
    names = tuple(layers)
    return (
        (names[-2:] == _NAMES[:2] or names[-3:] == _NAMES)
        and "drop" not in names[:-1]
        and isinstance(layers["norm"], nn.BatchNorm2d)
        and type(layers["act"]) is nn.ReLU
        and type(layers.get("drop", nn.Dropout())) in (nn.Dropout, MaskDropout)
    )


class MaskDropout(nn.Dropout):
    """`nn.Dropout` on the CPU that is not the slowest part of the step.

    torch draws one Bernoulli number an activation from a serial generator. Here 16 random bits decide an activation,
    taken from 64-bit words that the same generator fills in bulk: the share dropped is the nearest multiple of 2^-16,
    and what is kept is scaled by the inverse of exactly that share.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape, float; the output has its shape, dtype and layout."""
        threshold = round(self.p * LEVELS)
        if not self.training or threshold == 0 or input.numel() == 0:
            return input
        if threshold >= LEVELS:
            return input * 0.0
        dense = input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
        x = input if dense else input.contiguous()
        return x * keep_mask(x, threshold) * (LEVELS / (LEVELS - threshold))


def keep_mask(x: Tensor, threshold: int) -> Tensor:
    """bool of the shape and layout of x, which is dense: true with probability 1 - threshold / 2^16, independently."""
    # From the lowest number on, `random_` sets all 64 bits; its usual range leaves the top bit 0.
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    # Read as signed numbers: those from the lowest on, `threshold` of them, are dropped.
    kept = words.view(torch.int16)[: x.numel()] >= threshold - LEVELS // 2
    return kept.as_strided(x.shape, x.stride())


def adopt_mask_dropout(model: nn.Module) -> int:
    """Turn every `nn.Dropout` of a model into a `MaskDropout`, in place; returns how many there were."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Dropout]
    for layer in layers:
        layer.__class__ = MaskDropout
    return len(layers)
