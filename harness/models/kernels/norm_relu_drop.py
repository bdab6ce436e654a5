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

from harness.models.kernels.compiled import call

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


def normalise_relu_drop(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    eps: float,
    threshold: int = 0,
    key: int = 0,
) -> Tensor:
    """keep · max(0, (x - mean) / √(variance + eps) · weight + bias) / (1 - threshold / 2^16), of x's dtype and layout.

    Args:
        x_BCHW: float32 or bfloat16, channels_last.
        weight, bias: (C,) float32.
        mean, variance: (C,) float64.
        eps: added to the variance.
        threshold: 0 to 2^16 - 1; a value is dropped with probability threshold / 2^16.
        key: decides which.
    """
    y_BCHW = torch.empty_like(x_BCHW)
    channels = x_BCHW.shape[1]
    sizes = (x_BCHW.numel() // channels, channels)
    call("norm_relu_drop", x_BCHW.dtype, x_BCHW, y_BCHW, weight, bias, mean, variance, eps, *sizes, key, threshold)
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
        count: float,
        eps: float,
        threshold: int,
        over_ranks: bool,
    ) -> Tensor:
        """Statistics (C,) float64 of `count` values a channel; with `over_ranks`, backward sums over the ranks too."""
        key = draw_key() if threshold else 0
        y_BCHW = normalise_relu_drop(x_BCHW, weight, bias, mean, variance, eps=eps, threshold=threshold, key=key)
        ctx.save_for_backward(x_BCHW, y_BCHW, weight, mean, variance)
        ctx.count, ctx.eps, ctx.over_ranks = count, eps, over_ranks
        ctx.scale = LEVELS / (LEVELS - threshold)
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's x, and this rank's share of those of weight and bias."""
        x_BCHW, y_BCHW, weight, mean, variance = ctx.saved_tensors
        dtype, channels = x_BCHW.dtype, x_BCHW.shape[1]
        tensors = (gradient_BCHW.contiguous(memory_format=torch.channels_last), y_BCHW, x_BCHW)
        statistics, sizes = (mean, variance, ctx.eps), (x_BCHW.numel() // channels, channels, ctx.scale)
        sums = torch.empty(2, channels, dtype=torch.float64)  # Σg and Σg · x̂, as the plain synchronised layer has them
        call("norm_relu_drop_sums", dtype, *tensors, *statistics, *sizes, sums)
        bias_gradient, weight_gradient = sums.to(weight.dtype)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            if ctx.over_ranks:
                dist.all_reduce(sums)
            x_gradient = torch.empty_like(x_BCHW)
            call("norm_relu_drop_backward", dtype, *tensors, x_gradient, weight, *statistics, sums, ctx.count, *sizes)
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None, None, None
