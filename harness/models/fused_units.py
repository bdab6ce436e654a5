"""Units of a branch whose normalisation, ReLU and dropout run as one pass on a CPU.

Legend of shape letters: B images, C channels, H height and W width in pixels.

A unit keeps its layers, parameters and names: `adopt_fused_units` changes the class of the Sequential that holds them.
Wherever the fused pass does not apply (another dtype, a hook on one of the layers, gradients in evaluation mode, a
slice of a unit, other layers in it) the layers run one by one, which is the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.models.kernels.compiled import available, call
from harness.models.kernels.norm_relu_drop import LEVELS, NormReluDrop, moments, normalise_relu_drop
from harness.models.mask_dropout import MaskDropout
from harness.models.sync_batch_norm import next_momentum, over_ranks, several_ranks

# Values of a tensor: with fewer, and no dropout, calling torch twice takes less time than calling us once.
FEW_VALUES = 1 << 17
_NAMES = ("norm", "act", "drop")  # as `units.py` calls them; `drop` may be missing


class FusedUnit(nn.Sequential):
    """A Sequential that ends in `norm`, `act` and perhaps `drop`: the same function, fewer passes."""

    norm: nn.BatchNorm2d

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        if not _is_unit(self):  # a slice, or what somebody has made of it since it was adopted
            return super().forward(input)
        x = input
        for name, layer in self._modules.items():
            if name == "norm":
                break
            assert layer is not None
            x = layer(x)
        tail = [self._modules[name] for name in _NAMES if name in self._modules]
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
        if x.numel() < FEW_VALUES and not self._threshold():
            return False
        if not self.norm.training:
            return not torch.is_grad_enabled() and not self._threshold()
        alone = x.numel() == x.shape[1] and not self._synchronised()  # one value a channel, which the layer refuses
        return not alone and self._threshold() < LEVELS

    def _synchronised(self) -> bool:
        return getattr(self.norm, "synchronises_ranks", False) and several_ranks()

    def _threshold(self) -> int:
        """How many of LEVELS random numbers drop a value."""
        drop = self._modules.get("drop")
        return round(drop.p * LEVELS) if isinstance(drop, nn.Dropout) and drop.training else 0

    def _fused(self, x: Tensor) -> Tensor:
        norm, x = self.norm, x.contiguous(memory_format=torch.channels_last)
        if not norm.training:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            statistics = (norm.running_mean.double(), norm.running_var.double())
            return normalise_relu_drop(x, norm.weight, norm.bias, *statistics, eps=norm.eps)
        synchronised = self._synchronised()
        mean, variance = moments(x.detach())
        count = x.numel() / x.shape[1]
        if synchronised:
            mean, variance, count = over_ranks(mean, variance, count)
        running = (norm.running_mean, norm.running_var)
        call("take_moments", torch.float32, mean, variance, count, next_momentum(norm), *running, norm.num_features)
        arguments = (norm.weight, norm.bias, mean, variance, count, norm.eps, self._threshold(), synchronised)
        result: Tensor = NormReluDrop.apply(x, *arguments)
        return result


def adopt_fused_units(model: nn.Module) -> int:
    """Fuse every Sequential of a model that ends so, in place; returns how many there are."""
    units = [module for module in model.modules() if type(module) is nn.Sequential and _can_fuse(module)]
    for unit in units:
        unit.__class__ = FusedUnit
    return len(units)


def _has_hooks(layer: nn.Module) -> bool:
    forward, backward = (
        (layer._forward_hooks, layer._forward_pre_hooks),
        (layer._backward_hooks, layer._backward_pre_hooks),
    )
    return any(forward) or any(backward)


def _fits(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """The kernels trust what they are given."""
    buffers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return x.shape[1] == norm.num_features and all(
        value is not None and value.dtype is torch.float32 and value.device.type == "cpu" and value.is_contiguous()
        for value in buffers
    )


def _can_fuse(unit: nn.Sequential) -> bool:
    if not _is_unit(unit):
        return False
    norm = unit.get_submodule("norm")
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats


def _is_unit(unit: nn.Sequential) -> bool:
    """Whether it ends in the layers that the fused pass stands for; other ones may be there the next time."""
    layers = unit._modules
    names = tuple(layers)
    if "drop" in names[:-1] or (names[-2:] != _NAMES[:2] and names[-3:] != _NAMES):
        return False
    return (
        isinstance(layers["norm"], nn.BatchNorm2d)
        and type(layers["act"]) is nn.ReLU
        and ("drop" not in layers or type(layers["drop"]) in (nn.Dropout, MaskDropout))
    )
