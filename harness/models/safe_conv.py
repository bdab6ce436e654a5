"""Layers that compute the same function by another path, for machines where the library's own kernel is wrong.

A layer keeps its identity: `adopt_path` changes its class in place, so that parameters, names in the state dict, hooks
and optimizers that hold its parameters stay what they were.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from harness.models.kernels import depthwise

Route = Literal["direct", "compiled", "space_to_batch", "other_memory_format", "float32"]


def space_to_batch_conv2d(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: tuple[int, ...], groups: int
) -> Tensor:
    """A convolution of odd kernels k, stride 1, dilation d and padding d·(k - 1)/2 as plain ones on interleaved grids.

    An output pixel sees only the pixels whose distance from it is a multiple of the dilation, so the d_h·d_w
    sub-grids x[i::d_h, j::d_w] never mix. They are laid into the batch and convolved without dilation. The
    terms summed are those of `F.conv2d`, so the results agree up to rounding. It is the second way to compute
    an atrous convolution in section 3.1 of Chen et al. 2017, "DeepLab", https://arxiv.org/abs/1606.00915.
    """
    (height, width), (d_h, d_w) = x_BCHW.shape[-2:], dilation
    below, right = -height % d_h, -width % d_w
    if below or right:  # zeros there are what the convolution's own padding would have put
        x_BCHW = F.pad(x_BCHW, (0, right, 0, below))
    split = x_BCHW.unflatten(3, (-1, d_w)).unflatten(2, (-1, d_h))  # B, C, H / d_h, d_h, W / d_w, d_w
    grids = split.permute(0, 3, 5, 2, 4, 1).flatten(0, 2).permute(0, 3, 1, 2)  # one copy, channels_last
    padding = [(k - 1) // 2 for k in weight.shape[-2:]]
    y = F.conv2d(grids, weight, bias, padding=padding, groups=groups)
    split = y.permute(0, 2, 3, 1).unflatten(0, (-1, d_h, d_w)).permute(0, 3, 1, 4, 2, 5)
    y_BHWC = split.reshape(len(x_BCHW), height + below, width + right, -1)
    return y_BHWC[:, :height, :width].permute(0, 3, 1, 2)


def space_to_batch_applies(conv: nn.Conv2d) -> bool:
    """Whether `space_to_batch_conv2d` computes this layer: dilated, stride 1, odd kernel, size kept by zeros."""
    same = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (
        max(conv.dilation) > 1
        and set(conv.stride) == {1}
        and all(k % 2 == 1 for k in conv.kernel_size)
        and conv.padding_mode == "zeros"
        and conv.padding in ("same", same)
    )


class SafeConv2d(nn.Conv2d):
    """`nn.Conv2d` by the compiled kernels, by `space_to_batch_conv2d` or in the other memory format.

    The result has the dtype and memory format that `nn.Conv2d` would give.
    """

    path: Route = "direct"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, path={self.path}"

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels out, H', W')."""
        channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        formats = (torch.contiguous_format, torch.channels_last)
        same, other = formats[channels_last], formats[not channels_last]
        dtype = _compute_dtype(input)
        if self.path == "compiled" and depthwise.takes(self, input, dtype):
            y = depthwise.depthwise_conv2d(input.to(dtype), self.weight, self.bias, dilation=self.dilation[0])
        elif self.path == "space_to_batch":
            y = space_to_batch_conv2d(input, self.weight, self.bias, dilation=self.dilation, groups=self.groups)
        elif self.path == "other_memory_format":
            # The weight is cloned, not viewed: the library picks the kernel by the strides of both tensors.
            weight = self.weight.clone(memory_format=other)
            y = self._conv_forward(input.contiguous(memory_format=other), weight, self.bias)
        else:
            return super().forward(input)
        return y.contiguous(memory_format=same)


class Float32Layer(nn.Module):
    """Mixin that computes a layer in float32 whatever the autocast, and gives the dtype it would have given."""

    path: Route = "float32"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, path={self.path}"

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: the class is made at run time, so that no module has it by its name."""
        return _empty_float32_layer, (original_class(self),), self.__dict__

    def forward(self, input: Tensor) -> Tensor:
        dtype = _compute_dtype(input) if isinstance(self, _ConvNd | nn.Linear) else input.dtype
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).to(dtype)


def _float32_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Float32{original.__name__}", (Float32Layer, original), {"__module__": original.__module__})


def _empty_float32_layer(original: type[nn.Module]) -> nn.Module:
    cls = _float32_class(original)
    return cls.__new__(cls)


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer had before it was sent down another path."""
    if isinstance(layer, Float32Layer):
        return type(layer).__mro__[2]
    return nn.Conv2d if type(layer) is SafeConv2d else type(layer)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution or linear layer gives for `x` under the autocast in force."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def candidate_paths(layer: nn.Module, precision: str) -> list[Route]:
    """Other paths for a layer of one tensor in, one tensor out, the first to be tried first; may be empty."""
    current = getattr(layer, "path", "direct")
    paths: list[Route] = ["direct"] if current == "compiled" else []
    if original_class(layer) is nn.Conv2d:
        assert isinstance(layer, nn.Conv2d)
        paths += ["space_to_batch"] if space_to_batch_applies(layer) else []
        paths += ["other_memory_format"]
    if precision != "no":
        paths += ["float32"]
    return [path for path in paths if path != current]


def adopt_path(layer: nn.Module, path: Route) -> nn.Module:
    """Send a layer down `direct`, `compiled` or one of its `candidate_paths`, in place; returns the same object."""
    original = original_class(layer)
    if path == "direct":
        layer.__class__ = original
    else:
        layer.__class__ = _float32_class(original) if path == "float32" else SafeConv2d
    layer.__dict__["path"] = path
    return layer
