"""Parts of the dual-branch network: units of a branch, what joins the branches, transitions, pooling.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, create_act_layer
from torch import Tensor, nn

GROUP_NORM_CHANNELS = 16  # channels a group; best in table 3 (right) of Wu & He 2018, "Group Normalization"


class DepthwiseConv2d(nn.Module):
    """Depthwise separable convolution: 3×3 on each channel alone, then 1×1 over the channels, both with bias.

    (B, in_channels, H, W) -> (B, out_channels, H, W); height and width are kept (padding = dilation).
    Howard et al. 2017, "MobileNets", https://arxiv.org/abs/1704.04861.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        dilation: distance of the 3×3 kernel's taps, pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size=3, padding=dilation, dilation=dilation, groups=in_channels
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x_BCHW))


class Merge(nn.Sequential):
    """Both branches of a block in one: (B, C, H, W) twice -> (B, C, H, W) by sum, (B, 2 C, H, W) by concat.

    A module, which timm's feature extractors look for; an empty Sequential, which has no row in the summary.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        return one_BCHW + other_BCHW if self.how == "sum" else torch.cat((one_BCHW, other_BCHW), dim=1)


class AvgPool2d(nn.AvgPool2d):
    """Average over all pixels, whatever the size: (B, C, H, W) -> (B, C, 1, 1).

    The sums are `nn.AvgPool2d`'s to the bit, which those of an adaptive pooling are not. `kernel_size` is the usual
    height and width, for the receptive field; the class's name is its row in the summary.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(input, input.shape[-2:])


def branch_unit(
    in_channels: int, out_channels: int, *, dilation: int, norm: str, activation: str, dropout: float
) -> nn.Sequential:
    """One unit of a branch: (B, in_channels, H, W) -> (B, out_channels, H, W).

    Args:
        in_channels: channels in.
        out_channels: channels out.
        dilation: of the depthwise convolution; 1 in the depthwise branch.
        norm: batch, group, layer or none.
        activation: timm's name of it.
        dropout: probability that an activation is zeroed in training.
    """
    conv = DepthwiseConv2d(in_channels, out_channels, dilation=dilation)
    layers = OrderedDict[str, nn.Module](conv=conv, **_norm_and_activation(out_channels, norm, activation))
    layers["drop"] = nn.Dropout(dropout)
    return nn.Sequential(layers)


def branch(channels: int, widths: tuple[int, ...], dilations: tuple[int, ...], **style: Any) -> nn.Sequential:
    """Units one after another: (B, channels, H, W) -> (B, widths[-1], H, W). `style` is as in `branch_unit`."""
    units = []
    for width, dilation in zip(widths, dilations, strict=True):
        units.append(branch_unit(channels, width, dilation=dilation, **style))
        channels = width
    return nn.Sequential(*units)


def transition(channels: int, next_width: int | None) -> nn.Sequential:
    """Half the height and width, other channels; nothing after the last block."""
    if next_width is None:
        return nn.Sequential()
    conv = nn.Conv2d(channels, next_width, kernel_size=1)
    return nn.Sequential(OrderedDict[str, nn.Module](pool=nn.MaxPool2d(kernel_size=2, stride=2), conv=conv))


def conv_stem(in_channels: int, out_channels: int, *, norm: str, activation: str) -> nn.Sequential:
    """3×3 convolution, normalisation, activation: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    return nn.Sequential(OrderedDict[str, nn.Module](conv=conv, **_norm_and_activation(out_channels, norm, activation)))


def _norm_and_activation(channels: int, norm: str, activation: str) -> dict[str, nn.Module]:
    """No norm is no layer, rather than an identity that would show in the summary."""
    norms = {"batch": nn.BatchNorm2d, "group": _group_norm, "layer": LayerNorm2d}
    layers: dict[str, nn.Module] = {} if norm == "none" else {"norm": norms[norm](channels)}
    return {**layers, "act": create_act_layer(activation, inplace=False)}


def _group_norm(channels: int) -> nn.GroupNorm:
    """About GROUP_NORM_CHANNELS channels a group, whatever number of channels there is."""
    groups = max(1, channels // GROUP_NORM_CHANNELS)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)
