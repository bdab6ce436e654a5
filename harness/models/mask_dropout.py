"""Dropout for CPUs that is not the slowest part of the step.

torch draws one Bernoulli number an activation from a serial generator, which takes a large part of a step. Here 16
random bits decide an activation, taken from 64-bit words that the same generator fills in bulk.
The function and its statistics are those of `nn.Dropout`: the share dropped is the nearest multiple of 2**-16, and
what is kept is scaled by the inverse of exactly that share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LEVELS = 1 << 16
_LOWEST_INT64 = -(1 << 63)  # from here `random_` sets all 64 bits; its default range leaves the top bit 0


def keep_mask(x: Tensor, threshold: int) -> Tensor:
    """A bool mask of x's shape and memory layout, true with probability 1 - threshold / 2**16, independently.

    Args:
        x: dense in some order of its dimensions (contiguous or channels_last).
        threshold: 0 to 2**16.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(_LOWEST_INT64, None)
    # Read as signed numbers: those from the lowest on, `threshold` of them, are dropped.
    kept = words.view(torch.int16)[: x.numel()] >= threshold - (1 << 15)
    return kept.as_strided(x.shape, x.stride())


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return torch.ops.aten.native_dropout_backward(x, mask, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grads[0], mask, ctx.scale), None, None


class MaskDropout(nn.Dropout):
    """`nn.Dropout` on the CPU from bulk random bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape, float; the output has its shape, dtype and layout."""
        threshold = round(self.p * _LEVELS)
        if not self.training or threshold == 0 or input.numel() == 0:
            return input
        if threshold >= _LEVELS:
            return input * 0.0
        dense = input if _is_dense(input) else input.contiguous()
        return _Masked.apply(dense, keep_mask(dense, threshold), _LEVELS / (_LEVELS - threshold))


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def adopt_mask_dropout(model: nn.Module) -> int:
    """Turn every `nn.Dropout` of a model into a `MaskDropout`, in place; returns how many there were."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Dropout]
    for layer in layers:
        layer.__class__ = MaskDropout
    return len(layers)
