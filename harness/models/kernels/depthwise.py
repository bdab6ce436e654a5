"""Depthwise 3×3 convolution of any dilation by the compiled kernels.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from harness.models.kernels import available, call


def applies(conv: nn.Conv2d) -> bool:
    """Whether the kernels compute this layer: depthwise, 3×3, stride 1, size kept by zeros."""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation[0] == conv.dilation[1]
        and conv.padding in ("same", conv.dilation)
        and conv.padding_mode == "zeros"
    )


def takes(conv: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels compute this layer for this input in this dtype; they trust what they are given."""
    return (
        available(dtype)
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and x.numel() > 0
        and conv.weight.dtype is torch.float32
    )


def depthwise_conv2d(x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: int) -> Tensor:
    """What `F.conv2d` gives with padding = dilation and a group for each channel; channels_last, of x's dtype.

    x is float32 or bfloat16 on the CPU. The weight (C, 1, 3, 3) and bias (C,) are float32 and not rounded to x's dtype:
    products and sums are in float32.
    """
    result: Tensor = _Depthwise.apply(x_BCHW.contiguous(memory_format=torch.channels_last), weight, bias, dilation)
    return result


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        ctx.save_for_backward(x_BCHW, weight)
        ctx.dilation = dilation
        y_BCHW = torch.empty_like(x_BCHW)
        call("depthwise", x_BCHW.dtype, x_BCHW, weight, bias, y_BCHW, *_sizes(x_BCHW), dilation, 0)
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight = ctx.saved_tensors
        gradient_BCHW = gradient_BCHW.contiguous(memory_format=torch.channels_last)
        dtype, sizes = x_BCHW.dtype, (*_sizes(x_BCHW), ctx.dilation)
        x_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = torch.empty_like(x_BCHW)
            call("depthwise", dtype, gradient_BCHW, weight, None, x_gradient, *sizes, 1)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            weight_gradient, bias_gradient = torch.empty_like(weight), weight.new_empty(len(weight))
            call("depthwise_weight", dtype, x_BCHW, gradient_BCHW, weight_gradient, bias_gradient, *sizes)
        return x_gradient, weight_gradient, bias_gradient if ctx.needs_input_grad[2] else None, None


def _sizes(x_BCHW: Tensor) -> tuple[int, int, int, int]:
    """Images, height, width, channels, as the kernels take them."""
    images, channels, height, width = x_BCHW.shape
    return images, height, width, channels
