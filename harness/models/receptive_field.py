"""Which part of the image a layer of the dual-branch network sees: by arithmetic, and measured.

The arithmetic is that of Araujo, Norris & Sim 2019, "Computing Receptive Fields of Convolutional Neural
Networks", https://distill.pub/2019/computing-receptive-fields: with kernel k, stride s and dilation d of the
layers 1 … L on a path, along one axis and in pixels of the image,

    jump  j_L = s_1 · s_2 · … · s_L                 distance of neighbouring outputs
    field r_L = 1 + Σ_l (k_l − 1) · d_l · j_(l−1)   extent that one output depends on

Where branches merge the larger field counts; both are centred on the same pixel. The field is the extent
between the outermost pixels: a dilated branch leaves holes in it, which the measurement counts.
Normalisation is left out: in training, and with `norm: group` always, its statistics see the whole image.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.errors import HarnessError, nearest
from harness.models.dual_branch import DualBranchNet
from harness.models.threads import one_thread

Pair = tuple[int, int]  # along height and width

NOTE_OTHER_MODELS = "Receptive fields are worked out for dual-branch networks alone."
LARGEST_PROBE_PX = 1024  # side of the largest image tried: some 3 GB of activations for the seed's network


@dataclass(frozen=True)
class LayerField:
    """The receptive field of one convolution or pooling layer, along (height, width), in pixels of the image.

    `path` is stem, depthwise, dilated, transition or head; `block` counts from 1 and is 0 outside of blocks.
    """

    layer: str
    kind: str
    path: str
    block: int
    kernel_px: Pair
    stride_px: Pair
    dilation_px: Pair
    jump_px: Pair
    field_px: Pair


@dataclass(frozen=True)
class MeasuredField:
    """The support of the gradient of one central output unit with respect to the image.

    `field_px`: extent of the support along (height, width); `seen_px`: pixels in it that have an influence;
    `probe_px`: side of the image it was measured on.
    """

    field_px: Pair
    seen_px: int
    probe_px: int

    @property
    def coverage(self) -> float:
        """Share of the extent's pixels that have an influence, 0 to 1; < 1 where dilation leaves holes."""
        return self.seen_px / (self.field_px[0] * self.field_px[1])


def receptive_field(model: nn.Module) -> list[LayerField]:
    """The field of each convolution and pooling layer, in the order they are run.

    Empty for a network that is no `DualBranchNet`: NOTE_OTHER_MODELS says so.
    """
    if not isinstance(model, DualBranchNet):
        return []
    names = {module: name for name, module in model.named_modules()}
    state: tuple[Pair, Pair] = ((1, 1), (1, 1))
    rows = _along(names, model.stem, "stem", 0, state)
    state = _end(rows, state)
    blocks = zip(model.depthwise_branches, model.dilated_branches, model.transitions, strict=True)
    for number, (depthwise, dilated, transition) in enumerate(blocks, start=1):
        depthwise_rows = _along(names, depthwise, "depthwise", number, state)
        dilated_rows = _along(names, dilated, "dilated", number, state)
        state = _merged(_end(depthwise_rows, state), _end(dilated_rows, state))
        transition_rows = _along(names, transition, "transition", number, state)
        state = _end(transition_rows, state)
        rows += [*depthwise_rows, *dilated_rows, *transition_rows]
    return rows + _along(names, model.head, "head", 0, state)


def measured_receptive_field(model: DualBranchNet, layer: str) -> MeasuredField:
    """The extent of the pixels that one central output unit of `layer` depends on, on the network itself.

    A copy of the network is run, on the CPU, in float32, in which nothing can hide a dependence: weights are
    positive and biases zero, normalisation, activation and dropout pass their input on, and max-pooling takes
    the mean instead of one element. What is left is the wiring. The image is large enough that no field is
    cut off by its border. The model is not changed.

    Args:
        model: the network.
        layer: a layer's dotted name, such as `LayerField.layer`.

    Raises:
        HarnessError: no such layer, or a field too large to be measured.
    """
    expected = {row.layer: row for row in receptive_field(model)}
    if layer not in expected:
        raise HarnessError(f'there is no convolution or pooling layer "{layer}"', hint=nearest(layer, expected))
    wiring = _wiring(model)
    jump, field = max(expected[layer].jump_px), max(expected[layer].field_px)
    # The arithmetic is only a first guess of the size; that the support keeps clear of the border is what
    # makes the measurement independent of it. An odd number of units has one in the middle of the image.
    units = max(3, -(-(field + 2) // jump)) | 1
    while units * jump <= LARGEST_PROBE_PX:
        support_HW = _support(wiring, layer, units * jump)
        rows, columns = support_HW.any(1).nonzero(), support_HW.any(0).nonzero()
        top, bottom, left, right = (int(i) for i in (rows[0], rows[-1], columns[0], columns[-1]))
        if min(top, left) > 0 and max(bottom, right) < units * jump - 1:
            return MeasuredField((bottom - top + 1, right - left + 1), int(support_HW.sum()), units * jump)
        units = (units + units // 2) | 1
    raise HarnessError(
        f"the field of {layer} is too large to be measured ({LARGEST_PROBE_PX} px and more)",
        hint="Measure an earlier layer, or use smaller dilations or fewer blocks.",
    )


def _along(
    names: dict[nn.Module, str], part: nn.Module, path: str, block: int, start: tuple[Pair, Pair]
) -> list[LayerField]:
    """The layers of a sequential part of the network, from the (field, jump) before it."""
    rows: list[LayerField] = []
    (field_h, field_w), (jump_h, jump_w) = start
    for module in part.modules():
        if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            continue
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        dilation = _pair(getattr(module, "dilation", 1))
        field_h += (kernel[0] - 1) * dilation[0] * jump_h
        field_w += (kernel[1] - 1) * dilation[1] * jump_w
        jump_h, jump_w = jump_h * stride[0], jump_w * stride[1]
        place = (names[module], type(module).__name__, path, block)
        rows.append(LayerField(*place, kernel, stride, dilation, (jump_h, jump_w), (field_h, field_w)))
    return rows


def _end(rows: list[LayerField], start: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
    return (rows[-1].field_px, rows[-1].jump_px) if rows else start


def _merged(one: tuple[Pair, Pair], other: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
    """The larger field; the jump is the same on both branches, since neither has a stride."""
    (one_h, one_w), (other_h, other_w) = one[0], other[0]
    return (max(one_h, other_h), max(one_w, other_w)), one[1]


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _wiring(model: DualBranchNet) -> DualBranchNet:
    """A copy in which every gradient is positive where there is a dependence and zero where there is none."""
    wiring = copy.deepcopy(model).cpu().float().requires_grad_(False)
    for name, module in list(wiring.named_modules()):
        if not name or next(module.children(), None) is not None:
            continue
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            # 1 / √taps keeps the centre of the field from overflow and its corners from underflow.
            nn.init.constant_(module.weight, 1 / (module.weight.shape[1] * math.sqrt(height * width)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):  # one that takes any size has its kernel again
            wiring.set_submodule(name, nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
        elif not isinstance(module, nn.Sequential):
            wiring.set_submodule(name, nn.Identity())
    return wiring


@torch.enable_grad()
@one_thread()
def _support(wiring: DualBranchNet, layer: str, side_px: int) -> Tensor:
    """bool (H, W): the pixels that the central output of `layer` depends on, in an image of side_px."""
    reached: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...], output_BCHW: Tensor) -> None:
        reached.append(output_BCHW)
        raise _Reached

    image_BCHW = torch.ones(1, wiring.in_chans, side_px, side_px, requires_grad=True)
    hook = wiring.get_submodule(layer).register_forward_hook(stop)
    try:
        wiring.head(wiring.forward_features(image_BCHW))
    except _Reached:
        pass
    finally:
        hook.remove()
    output_BCHW = reached[0]
    height, width = output_BCHW.shape[-2:]
    (gradient_BCHW,) = torch.autograd.grad(output_BCHW[0, :, height // 2, width // 2].sum(), image_BCHW)
    return gradient_BCHW[0].abs().sum(0) > 0


class _Reached(Exception):  # no error: the layer's output is there and the rest need not be run
    pass
