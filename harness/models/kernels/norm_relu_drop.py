"""Batch normalisation, ReLU and dropout in one pass forward and two backward, by the compiled kernels.

Apart, they read and write each activation about a dozen times, and dropout's serial generator takes longer than all
arithmetic. Here random bits come from a counter-based hash of (key, position), and no mask is kept: the gradient
passes exactly where the output is not 0.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from harness.models.kernels.library import call

LEVELS = 1 << 16  # random bits decide a value by 16: the share dropped is a multiple of 2^-16


def moments(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) in float64 over images and pixels of a channels_last tensor."""
    channels = x_BCHW.shape[1]
    mean, variance = (torch.empty(channels, dtype=torch.float64) for _ in range(2))
    call("moments", x_BCHW.dtype, x_BCHW, x_BCHW.numel() // channels, channels, mean, variance)
    return mean, variance


def draw_key() -> int:
    """A 64-bit key for the dropout of one call, from torch's generator."""
    return int(torch.empty((), dtype=torch.int64).random_(-(1 << 63), None)) & (1 << 64) - 1


def normalise_relu_drop(x_BCHW: Tensor, slope: Tensor, offset: Tensor, *, threshold: int = 0, key: int = 0) -> Tensor:
    """keep · max(0, x · slope + offset) / (1 - threshold / 2^16), of x's dtype and layout.

    Args:
        x_BCHW: float32 or bfloat16, channels_last.
        slope: (C,) float32.
        offset: (C,) float32.
        threshold: 0 to 2^16 - 1; a value is dropped with probability threshold / 2^16.
        key: decides which.
    """
    y_BCHW = torch.empty_like(x_BCHW)
    channels = x_BCHW.shape[1]
    rows = x_BCHW.numel() // channels
    call("norm_relu_drop", x_BCHW.dtype, x_BCHW, y_BCHW, slope, offset, rows, channels, key, threshold)
    return y_BCHW


class NormReluDrop(torch.autograd.Function):
    """By given statistics, which are those of x (over all ranks): the gradient goes through them too.

    Ioffe & Szegedy 2015, "Batch Normalization", section 3 gives the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
        threshold: int,
        over_ranks: bool,
    ) -> Tensor:
        """Mean, variance (C,) and count (1,) are float64; with `over_ranks`, backward sums over the ranks too."""
        deviation = (variance + eps).rsqrt()
        slope = weight.double() * deviation
        offset = bias.double() - mean * slope
        key = draw_key() if threshold else 0
        y_BCHW = normalise_relu_drop(x_BCHW, slope.float(), offset.float(), threshold=threshold, key=key)
        ctx.save_for_backward(x_BCHW, y_BCHW, slope, deviation, mean, count)
        ctx.scale, ctx.over_ranks, ctx.weight_dtype = LEVELS / (LEVELS - threshold), over_ranks, weight.dtype
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's x, and this rank's share of those of weight and bias."""
        x_BCHW, y_BCHW, slope, deviation, mean, count = ctx.saved_tensors
        gradient_BCHW = gradient_BCHW.contiguous(memory_format=torch.channels_last)
        dtype, channels = x_BCHW.dtype, x_BCHW.shape[1]
        rows = x_BCHW.numel() // channels
        sums = torch.empty(2, channels, dtype=torch.float64)
        tensors = (gradient_BCHW, y_BCHW, x_BCHW)
        call("norm_relu_drop_sums", dtype, *tensors, mean.float(), rows, channels, ctx.scale, sums)
        sums[1] *= deviation  # Σg and Σg · x̂, as the plain synchronised layer has them
        bias_gradient, weight_gradient = sums.to(ctx.weight_dtype)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            if ctx.over_ranks:
                dist.all_reduce(sums)
            factor = -slope * deviation * sums[1] / count
            constant = -slope * sums[0] / count - factor * mean
            x_gradient = torch.empty_like(x_BCHW)
            coefficients = (slope.float(), factor.float(), constant.float())
            call("norm_relu_drop_backward", dtype, *tensors, x_gradient, *coefficients, rows, channels, ctx.scale)
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None, None, None
