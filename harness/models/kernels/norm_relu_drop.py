"""Batch normalisation, ReLU and dropout in one pass forward and two backward, by the compiled kernels.

Apart, they read and write each activation about a dozen times, and dropout's serial generator takes longer than all
arithmetic. Here random bits come from a counter-based hash of (key, position), and no mask is kept: the gradient
passes exactly where the output is not 0.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from harness.models.kernels import DEFINES, KernelsUnavailable, call

LEVELS = 1 << 16  # random bits decide a value by 16: the share dropped is a multiple of 2^-16

# For the check: part of a block of channels, a whole one, both; rows beyond one chunk.
CHECKED_SHAPES = ((2, 3, 13, 17), (3, 32, 10, 10), (1, 40, 20, 21))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # of each element, relative to the largest: two roundings


def moments(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) in float64 over images and pixels of a channels_last tensor."""
    channels = x_BCHW.shape[1]
    mean, variance = (torch.empty(channels, dtype=torch.float64) for _ in range(2))
    call("moments", x_BCHW.dtype, x_BCHW, x_BCHW.numel() // channels, channels, mean, variance)
    return mean, variance


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

    x is float32 or bfloat16 and channels_last, weight and bias (C,) float32, mean and variance (C,) float64. A value is
    dropped with probability threshold / 2^16, threshold < 2^16; the 64-bit key decides which.
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
        # From torch's generator; its usual range leaves the top bit 0.
        key = int(torch.empty((), dtype=torch.int64).random_(-(1 << 63), None)) & (1 << 64) - 1 if threshold else 0
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


def check_fused_pass() -> None:
    """Compare the pass, forward and backward, with float64 in some milliseconds: the numerics check does not see it.

    Raises:
        KernelsUnavailable: a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        for dtype in DEFINES:
            for shape in CHECKED_SHAPES:
                for what, result, exact in _results(shape, dtype, generator):
                    error = float((result.double() - exact).abs().max() / exact.abs().max())
                    if not error <= TOLERANCE[dtype]:
                        raise KernelsUnavailable(f"the compiled {what} is wrong in {dtype} by {error:.2g}")


def _results(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, result and right result of each output of the pass."""
    eps, threshold = 1e-5, LEVELS // 4
    x, gradient = (
        (mean + torch.randn(shape, generator=generator)).to(dtype).contiguous(memory_format=torch.channels_last)
        for mean in (3, 0)
    )
    weight, bias = 1 + 0.1 * torch.randn(2, shape[1], generator=generator)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weight, bias)]
    mean, variance = moments(x)
    y = NormReluDrop.apply(*leaves, mean, variance, x.numel() / shape[1], eps, threshold, False)
    y.backward(gradient)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_variance, exact_mean = torch.var_mean(exact[0].detach(), dim=(0, 2, 3), correction=0)
    positive = F.batch_norm(exact[0], None, None, exact[1], exact[2], training=True, eps=eps).relu()
    kept, scale = (y != 0).double(), LEVELS / (LEVELS - threshold)
    exact_y = positive * kept * scale
    exact_y.backward(gradient.double())
    yield "mean", mean, exact_mean
    yield "variance", variance, exact_variance
    yield "output", y.detach(), exact_y.detach()
    for name, leaf, right in zip(("input", "weight", "bias"), leaves, exact, strict=True):
        assert leaf.grad is not None
        assert right.grad is not None
        yield f"{name} gradient", leaf.grad, right.grad
    share = float(kept.sum() / (positive > 0).sum())
    if not abs(share - 1 / scale) < 0.1:  # some six standard deviations
        raise KernelsUnavailable(f"the compiled dropout is wrong in {dtype}: it keeps {share:.0%}")
