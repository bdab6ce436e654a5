"""Layers that reach the same result by another path, for machines where the library's own kernel is wrong.

Legend of shape letters: B images, C channels, H height and W width in pixels.

The layer keeps its identity: `SafeConv2d.adopt` changes the class of a layer in place, so parameters, names in
the state dict, hooks and optimizers that hold its parameters stay what they were.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.kernels import depthwise

Path = Literal["direct", "compiled", "space_to_batch", "other_memory_format", "float32"]


def space_to_batch_conv2d(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: tuple[int, int], groups: int
) -> Tensor:
    """A dilated convolution of stride 1 as plain convolutions on interleaved sub-grids.

    An output pixel sees only the pixels whose distance from it is a multiple of the dilation, so the d_h·d_w
    sub-grids x[i::d_h, j::d_w] never mix. They are laid into the batch and convolved without dilation. The
    terms summed are those of `F.conv2d`, so the results agree up to rounding. It is the second way to compute
    an atrous convolution in section 3.1 of Chen et al. 2017, "DeepLab", https://arxiv.org/abs/1606.00915.

    Args:
        x_BCHW: floating (B, C, H, W), any H and W; the result has its memory format.
        weight: (channels out, C / groups, k_h, k_w), k_h and k_w odd.
        bias: (channels out,) or None.
        dilation: (d_h, d_w), pixels.
        groups: of the convolution.

    Returns:
        (B, channels out, H, W): the result with padding d·(k - 1)/2, which keeps height and width.
    """
    height, width = x_BCHW.shape[-2:]
    below, right = -height % dilation[0], -width % dilation[1]
    if below or right:  # zeros there are what the convolution's own padding would have put
        x_BCHW = F.pad(x_BCHW, (0, right, 0, below))
    channels_last = _is_channels_last(x_BCHW)
    grids = _to_sub_grids(x_BCHW, dilation, channels_last)
    padding = ((weight.shape[-2] - 1) // 2, (weight.shape[-1] - 1) // 2)
    y_BCHW = _from_sub_grids(F.conv2d(grids, weight, bias, padding=padding, groups=groups), dilation, channels_last)
    return y_BCHW[..., :height, :width].contiguous(memory_format=_format(channels_last))


def _is_channels_last(x_BCHW: Tensor) -> bool:
    return x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous()


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _to_sub_grids(x_BCHW: Tensor, dilation: tuple[int, int], channels_last: bool) -> Tensor:
    """(B, C, H, W) -> (B·d_h·d_w, C, H / d_h, W / d_w), one copy, in the memory format asked for."""
    batch, channels, height, width = x_BCHW.shape
    rows, columns = height // dilation[0], width // dilation[1]
    if channels_last:
        split = x_BCHW.permute(0, 2, 3, 1).reshape(batch, rows, dilation[0], columns, dilation[1], channels)
        grids = split.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels)
        return grids.permute(0, 3, 1, 2)
    split = x_BCHW.reshape(batch, channels, rows, dilation[0], columns, dilation[1])
    return split.permute(0, 3, 5, 1, 2, 4).reshape(-1, channels, rows, columns)


def _from_sub_grids(y_BCHW: Tensor, dilation: tuple[int, int], channels_last: bool) -> Tensor:
    """The inverse of `_to_sub_grids`."""
    count, channels, rows, columns = y_BCHW.shape
    batch = count // (dilation[0] * dilation[1])
    height, width = rows * dilation[0], columns * dilation[1]
    if channels_last:
        split = y_BCHW.permute(0, 2, 3, 1).reshape(batch, *dilation, rows, columns, channels)
        return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    split = y_BCHW.reshape(batch, *dilation, channels, rows, columns)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, height, width)


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
    """`nn.Conv2d` by a chosen `path`: the same function, parameters and state dict keys.

    Paths: `direct` (the library's kernel for the tensor as it comes), `compiled` (see `kernels.depthwise`),
    `space_to_batch` (see `space_to_batch_conv2d`), `other_memory_format` (contiguous for a channels_last input and the
    reverse), `float32` (no reduced precision in this layer). The result has the dtype and memory format of `direct`.
    """

    path: Path = "direct"

    @classmethod
    def adopt(cls, conv: nn.Conv2d, path: Path) -> SafeConv2d:
        """Send a plain `nn.Conv2d` (or a `SafeConv2d`) down another path, in place; returns the same object.

        Raises:
            ValueError: `space_to_batch` for a layer it cannot compute, or a layer of another class.
        """
        if type(conv) not in (nn.Conv2d, SafeConv2d):
            raise ValueError(f"{type(conv).__name__} is no plain Conv2d")
        applies = {"compiled": depthwise.applies, "space_to_batch": space_to_batch_applies}
        if path in applies and not applies[path](conv):
            raise ValueError(f"{path} cannot compute {conv}")
        conv.__class__ = cls
        assert isinstance(conv, SafeConv2d)
        conv.path = path
        return conv

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, path={self.path}"

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels out, H', W'), as `nn.Conv2d`."""
        if self.path == "compiled" and depthwise.takes(self, input, _compute_dtype(input)):
            x_BCHW = input.to(_compute_dtype(input))
            y_BCHW = depthwise.depthwise_conv2d(x_BCHW, self.weight, self.bias, dilation=self.dilation[0])
            return y_BCHW.contiguous(memory_format=_format(_is_channels_last(input)))
        if self.path == "space_to_batch":
            height, width = self.dilation
            return space_to_batch_conv2d(input, self.weight, self.bias, dilation=(height, width), groups=self.groups)
        if self.path == "other_memory_format":
            return self._in_other_memory_format(input)
        if self.path == "float32":
            with torch.autocast(input.device.type, enabled=False):
                y = self._conv_forward(input.float(), self.weight, self.bias)
            return y.to(_compute_dtype(input))
        return super().forward(input)

    def _in_other_memory_format(self, x_BCHW: Tensor) -> Tensor:
        channels_last = _is_channels_last(x_BCHW)
        other = _format(not channels_last)
        # The weight is cloned, not viewed: the library picks the kernel by the strides of both tensors.
        y = self._conv_forward(
            x_BCHW.contiguous(memory_format=other), self.weight.clone(memory_format=other), self.bias
        )
        return y.contiguous(memory_format=_format(channels_last))


class Float32Layer(nn.Module):
    """Mixin that computes a layer in float32 whatever the autocast, and gives the dtype it would have given."""

    path: Path = "direct"

    @staticmethod
    def adopt(layer: nn.Module, path: Path) -> nn.Module:
        """Send a layer of one tensor in, one tensor out down `float32` or `direct`, in place; the same object.

        Raises:
            ValueError: another path.
        """
        if path not in ("direct", "float32"):
            raise ValueError(f"{type(layer).__name__} has no path {path}")
        if not isinstance(layer, Float32Layer):
            cls = type(layer)
            layer.__class__ = type(f"Float32{cls.__name__}", (Float32Layer, cls), {"__module__": cls.__module__})
        assert isinstance(layer, Float32Layer)
        layer.path = path
        return layer

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, path={self.path}"

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: the class is made at run time, so that no module has it by its name."""
        return _empty_float32_layer, (original_class(self),), self.__dict__

    def forward(self, input: Tensor) -> Tensor:
        if self.path == "direct":
            return super().forward(input)
        reduced = isinstance(self, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear)
        dtype = _compute_dtype(input) if reduced else input.dtype
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).to(dtype)


def _empty_float32_layer(cls: type[nn.Module]) -> nn.Module:
    layer = cls.__new__(cls)
    return Float32Layer.adopt(layer, "float32")


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer had before it was sent down another path."""
    if isinstance(layer, Float32Layer):
        return type(layer).__mro__[2]
    return nn.Conv2d if type(layer) is SafeConv2d else type(layer)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution or linear layer gives for `x` under the autocast in force."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def candidate_paths(layer: nn.Module, precision: str) -> list[Path]:
    """Other paths for a layer, the first to be tried first; empty where there is none.

    Args:
        layer: any layer of one tensor in, one tensor out.
        precision: the recipe's: no, bf16 or fp16.
    """
    paths: list[Path] = ["direct"] if getattr(layer, "path", "direct") == "compiled" else []
    if type(layer) in (nn.Conv2d, SafeConv2d):
        assert isinstance(layer, nn.Conv2d)
        paths += ["space_to_batch"] if space_to_batch_applies(layer) else []
        paths += ["other_memory_format"]
    if precision != "no":
        paths += ["float32"]
    return [path for path in paths if path != getattr(layer, "path", "direct")]


def adopt_path(layer: nn.Module, path: Path) -> Any:
    """Send a layer down one of its `candidate_paths` or back to `direct`, in place; returns the same object."""
    if type(layer) in (nn.Conv2d, SafeConv2d):
        assert isinstance(layer, nn.Conv2d)
        return SafeConv2d.adopt(layer, path)
    return Float32Layer.adopt(layer, path)
