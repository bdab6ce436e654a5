"""The dual-branch network: in each block a depthwise and a dilated branch see the same input and are merged.

    stem -> [ depthwise branch ⊕ dilated branch -> transition ] for each block -> head -> logits

Importing this file registers `dual_branch` (the family) and `dual_branch_seed` with timm.

Legend of shape letters:
    B  images of a batch
    C  channels
    H  height, W  width, in pixels; halved by each transition
    K  classes
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.units import branch_unit, conv_stem
from harness.recipe.dual_branch_args import DualBranchArgs, parse_settings

__all__ = ["DualBranchArgs", "DualBranchNet"]

# Of CIFAR-10's training pixels in [0, 1]; they describe what the networks are made for and change no weight.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
_EXAMPLES = {"num_classes": 10, "in_chans": 3, "img_size": 32}
FIRST_CONVS = ("depthwise_branches.0.0.conv.depthwise", "dilated_branches.0.0.conv.depthwise")


class DualBranchNet(nn.Module):
    """The dual-branch family, with timm's interface. The defaults are the seed's network, 380,646 parameters.

    float (B, in_chans, H, W) -> logits (B, K) of the same dtype. PyTorch's default initialisation.

    Args:
        num_classes: classes K; 0 leaves the classifier out, and the head's hidden features are returned.
        in_chans: channels of the images.
        img_size: height and width of the images, pixels; one number for both or (height, width).
        **settings: fields of `harness.recipe.dual_branch_args.DualBranchArgs`.

    Raises:
        HarnessError: settings that are unknown or out of range, or images too small for the transitions.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        **settings: Any,
    ) -> None:
        super().__init__()
        args = parse_settings(settings)
        self.num_classes = _count("num_classes", num_classes, at_least=0)
        self.in_chans = _count("in_chans", in_chans, at_least=1)
        self.args, self.merge = args, args.merge
        self.final_size = _final_size(img_size, transitions=len(args.transition_widths))
        style: dict[str, Any] = {"norm": args.norm, "activation": args.activation}

        # An empty Sequential where there is nothing to do: unlike an identity it has no row in the summary.
        self.stem = nn.Sequential() if args.stem is None else conv_stem(in_chans, args.stem, **style)
        self.depthwise_branches, self.dilated_branches = nn.ModuleList(), nn.ModuleList()
        self.transitions = nn.ModuleList()
        channels = in_chans if args.stem is None else args.stem
        after: tuple[int | None, ...] = (*args.transition_widths, None)
        for widths, dilations, next_width in zip(args.widths, args.unit_dilations(), after, strict=True):
            style["dropout"] = args.dropout
            self.depthwise_branches.append(_branch(channels, widths, (1,) * len(widths), **style))
            self.dilated_branches.append(_branch(channels, widths, dilations, **style))
            channels = widths[-1] * (2 if args.merge == "concat" else 1)
            self.transitions.append(_transition(channels, next_width))
            channels = next_width or channels
        self.num_features = channels
        self.head_hidden_size = args.head_width
        self.head = nn.Sequential(
            OrderedDict[str, nn.Module](
                pool=nn.AvgPool2d(self.final_size),
                hidden=nn.Conv2d(channels, args.head_width, kernel_size=1),
                classifier=self._classifier(num_classes),
            )
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Features before pooling: (B, C, H, W) -> (B, num_features, H / 2^t, W / 2^t), t transitions."""
        x = self.stem(x_BCHW)
        blocks = zip(self.depthwise_branches, self.dilated_branches, self.transitions, strict=True)
        for depthwise, dilated, transition in blocks:
            one, other = depthwise(x), dilated(x)
            x = transition(one + other if self.merge == "sum" else torch.cat((one, other), dim=1))
        return x

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of the features, or with `pre_logits` the hidden features (B, head_width).

        Raises:
            HarnessError: the images did not have the size that the network was built for.
        """
        if tuple(x_BCHW.shape[-2:]) != self.final_size:
            # Average pooling would silently leave out the pixels beyond its window.
            raise HarnessError(
                f"the head pools {self.final_size[0]}×{self.final_size[1]} features and got "
                f"{x_BCHW.shape[-2]}×{x_BCHW.shape[-1]}",
                hint="Build the model with the images' size as img_size.",
            )
        pool, hidden, classifier = self.head
        x = hidden(pool(x_BCHW))
        return (x if pre_logits else classifier(x)).flatten(1)

    def get_classifier(self) -> nn.Module:
        """The last layer: a 1×1 convolution head_width -> K, or an identity with no classes."""
        return self.head[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised classifier for `num_classes`; 0 leaves it out.

        Raises:
            HarnessError: a negative number of classes, or pooling other than the average.
        """
        if global_pool not in (None, "avg"):
            raise HarnessError(f'the dual-branch network has no global_pool "{global_pool}"', hint="It has avg alone.")
        self.num_classes = _count("num_classes", num_classes, at_least=0)
        like = next(self.parameters())
        self.head[-1] = self._classifier(num_classes).to(like)

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return nn.Conv2d(self.head_hidden_size, num_classes, kernel_size=1)


def _branch(channels: int, widths: tuple[int, ...], dilations: tuple[int, ...], **style: Any) -> nn.Sequential:
    units = []
    for width, dilation in zip(widths, dilations, strict=True):
        units.append(branch_unit(channels, width, dilation=dilation, **style))
        channels = width
    return nn.Sequential(*units)


def _transition(channels: int, next_width: int | None) -> nn.Sequential:
    """Half the height and width, other channels; nothing after the last block."""
    if next_width is None:
        return nn.Sequential()
    conv = nn.Conv2d(channels, next_width, kernel_size=1)
    return nn.Sequential(OrderedDict[str, nn.Module](pool=nn.MaxPool2d(kernel_size=2, stride=2), conv=conv))


def _count(name: str, value: int, *, at_least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise HarnessError(
            f"{name}: must be a whole number ≥ {at_least}, got {value!r}",
            hint=f"Set {name} to a number such as {_EXAMPLES[name]}.",
        )
    return value


def _final_size(img_size: int | tuple[int, int], *, transitions: int) -> tuple[int, int]:
    """Height and width of the last features: each transition halves, rounding down."""
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sizes) != 2:
        raise HarnessError(
            f"img_size: must be one number or (height, width), got {img_size!r}",
            hint="Give the images' size in pixels, as img_size=32 or img_size=(32, 48).",
        )
    height, width = (_count("img_size", size, at_least=1) // 2**transitions for size in sizes)
    if min(height, width) < 1:
        raise HarnessError(
            f"images of {sizes[0]}×{sizes[1]} px are too small for {transitions} transitions (each halves)",
            hint=f"Use at least {2**transitions} px, or fewer blocks in widths.",
        )
    return height, width


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": FIRST_CONVS,
        "classifier": "head.classifier",
    }


default_cfgs = generate_default_cfgs({"dual_branch": _cfg(), "dual_branch_seed": _cfg()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DualBranchNet:
    if pretrained:
        raise HarnessError(
            f"{variant} has no pretrained weights",
            hint="Leave pretrained out and train it, or load a checkpoint.",
        )
    if kwargs.pop("features_only", False):
        raise HarnessError(f"{variant} has no features_only form", hint="Call forward_features for the last features.")
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    if kwargs.get("stem") is not None:
        overlay = {"first_conv": "stem.conv", **overlay}
    return build_model_with_cfg(DualBranchNet, variant, pretrained=False, pretrained_cfg_overlay=overlay, **kwargs)


@register_model
def dual_branch(pretrained: bool = False, **kwargs: Any) -> DualBranchNet:
    """The dual-branch family; keyword arguments are those of `DualBranchNet`."""
    return _create("dual_branch", pretrained, **kwargs)


@register_model
def dual_branch_seed(pretrained: bool = False, **kwargs: Any) -> DualBranchNet:
    """The seed's network, layer for layer; keyword arguments change it, as with timm's own models."""
    seed = {
        "widths": ((32, 64, 128), (64, 128, 256), (128, 256, 256)),
        "dilations": 2,
        "transition_widths": (32, 64),
        "head_width": 64,
        "merge": "sum",
        "dropout": 0.25,
        "norm": "batch",
        "activation": "relu",
        "stem": None,
    }
    return _create("dual_branch_seed", pretrained, **{**seed, **kwargs})
