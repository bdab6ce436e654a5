"""The dual-branch network: in each block a depthwise and a dilated branch see the same input and are merged.

    stem -> [ depthwise branch ⊕ dilated branch -> transition ] for each block -> head -> logits

Importing this file registers `dual_branch` (the family) and `dual_branch_seed` with timm.

Legend of shape letters: B images, C channels, H height and W width in pixels (halved by each transition), K classes.
"""

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, SelectAdaptivePool2d, create_act_layer
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from harness.errors import HarnessError, nearest
from harness.recipe.schema import DualBranchArgs, parse_settings

# Not `from __future__ import annotations`: torch.fx writes forward's annotations into its code, as text they break it.

IMAGE_SIZE_PX = 32
GROUP_NORM_CHANNELS = 16  # channels a group; best in table 3 (right) of Wu & He 2018, "Group Normalization"
BRANCHES = ("depthwise_branches", "dilated_branches")
POOLS = ("avg", "max", "avgmax", "")


class RefusedPool(HarnessError, AssertionError):
    """A pooling that the head does not have; timm's own models refuse it by an AssertionError."""


class DepthwiseConv2d(nn.Module):
    """Depthwise separable convolution: 3×3 on each channel alone, then 1×1 over the channels, both with bias.

    (B, in_channels, H, W) -> (B, out_channels, H, W). Howard et al. 2017, https://arxiv.org/abs/1704.04861.
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


class DualBranchNet(nn.Module):
    """The dual-branch family, with timm's interface. The defaults are the seed's network, 380,646 parameters.

    float (B, in_chans, H, W), any H and W that the transitions can halve -> logits (B, K) of the same dtype.
    `img_size` is the images' usual size in pixels, one number or (height, width); `global_pool` is avg, max, avgmax
    (their mean), or "" for the logits of each pixel; `drop_rate` drops hidden features before the classifier, which
    `num_classes` = 0 leaves out. `settings` are fields of `DualBranchArgs`. PyTorch's default initialisation.

    Raises:
        HarnessError: settings that are unknown (a TypeError too) or out of range, or images too small for the
            transitions.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = IMAGE_SIZE_PX,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.args = parse_settings(settings)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.final_size = _final_size(img_size, transitions=len(self.args.transition_widths))
        if not 0 <= drop_rate < 1:
            raise HarnessError(f"drop_rate: must be at least 0 and less than 1, got {drop_rate!r}", hint="Such as 0.2.")
        self.drop_rate = float(drop_rate)
        self.grad_checkpointing = False
        with nullcontext() if device is None else torch.device(device):
            self._build(self.args, global_pool)
        self.to(dtype=dtype)

    def _build(self, args: DualBranchArgs, global_pool: str) -> None:
        features: list[dict[str, Any]] = []
        channels = self.in_chans if args.stem is None else args.stem
        # An empty Sequential where there is nothing to do: unlike an identity it has no row in the summary.
        self.stem = nn.Sequential()
        if args.stem is not None:
            self.stem = nn.Sequential(_normed(nn.Conv2d(self.in_chans, channels, 3, padding=1), channels, args))
        self.depthwise_branches, self.dilated_branches = nn.ModuleList(), nn.ModuleList()
        self.merges, self.transitions = nn.ModuleList(), nn.ModuleList()
        after = (*args.transition_widths, None)
        for block, (widths, dilations) in enumerate(zip(args.widths, args.unit_dilations(), strict=True)):
            self.depthwise_branches.append(_branch(channels, widths, (1,) * len(widths), args))
            self.dilated_branches.append(_branch(channels, widths, dilations, args))
            self.merges.append(Merge(args.merge))
            channels = widths[-1] * (2 if args.merge == "concat" else 1)
            features.append({"num_chs": channels, "reduction": 2**block, "module": f"merges.{block}"})
            self.transitions.append(nn.Sequential())
            if (width := after[block]) is not None:
                pool, conv = nn.MaxPool2d(kernel_size=2, stride=2), nn.Conv2d(channels, width, kernel_size=1)
                self.transitions[block] = nn.Sequential(OrderedDict[str, nn.Module](pool=pool, conv=conv))
                channels = width
        self.feature_info, self.num_features = features, channels
        self.head_hidden_size = args.head_width
        self.head = nn.Sequential(
            OrderedDict[str, nn.Module](
                pool=self._pool(global_pool),
                hidden=nn.Conv2d(channels, args.head_width, kernel_size=1),
                classifier=self._classifier(self.num_classes),
            )
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Features before pooling: (B, C, H, W) -> (B, num_features, H / 2^t, W / 2^t), t transitions."""
        return self._blocks(x_BCHW, [], len(self.merges) - 1)[0]

    def forward_intermediates(
        self,
        x_BCHW: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What the branches of each block merge to, described by `feature_info`, and the features before pooling.

        `indices` counts blocks from 0, or is a number of last ones, or None for all; with `stop_early` the blocks after
        the last of them are not run. There is no norm after the blocks.
        """
        assert output_fmt == "NCHW", "The features are NCHW."
        take, last = feature_take_indices(len(self.merges), indices)
        x, taken = self._blocks(x_BCHW, take, last if stop_early else len(self.merges) - 1)
        if intermediates_only:  # not one conditional expression: TorchScript gives that one type
            return taken
        return x, taken

    def _blocks(self, x: Tensor, take: list[int], last: int) -> tuple[Tensor, list[Tensor]]:
        """The blocks up to `last`: what comes out, and what the branches of the blocks in `take` merge to."""
        taken: list[Tensor] = []
        x = self.stem(x)
        for i, (depthwise, dilated, merge, after) in enumerate(
            zip(self.depthwise_branches, self.dilated_branches, self.merges, self.transitions)  # noqa: B905
        ):
            if i <= last:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = merge(checkpoint(depthwise, x), checkpoint(dilated, x))
                else:
                    x = merge(depthwise(x), dilated(x))
                if i in take:
                    taken.append(x)
                x = after(x)
        return x, taken

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of the features, or with `pre_logits` the hidden features (B, head_hidden_size)."""
        x = self.head[1](self.head[0](x_BCHW))
        if self.drop_rate > 0:
            x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.head[2](x)
        return x.flatten(1) if self.global_pool != "" else x

    def get_classifier(self) -> nn.Module:
        """The last layer: a 1×1 convolution head_hidden_size -> K, or an identity with no classes."""
        return self.head[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised classifier for `num_classes`; 0 leaves it out. The pooling stays if None.

        Raises:
            HarnessError: a pooling that there is not (an AssertionError too).
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.head[0] = self._pool(global_pool).train(self.training)
        like = next(self.parameters())
        self.head[-1] = self._classifier(num_classes).to(like).train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`, and the head if it has nothing to stand on or is not wanted."""
        take, last = feature_take_indices(len(self.merges), indices)
        shortened = last < len(self.merges) - 1
        for parts in (*BRANCHES, "merges", "transitions"):
            setattr(self, parts, getattr(self, parts)[: last + 1])
        if shortened:
            self.transitions[last] = nn.Sequential()
            self.num_features = self.feature_info[last]["num_chs"]
        if shortened or prune_head:
            self.head[1] = nn.Identity().train(self.training)
            self.head_hidden_size = self.num_features
            self.reset_classifier(0, "")
        return list(take)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether each branch's activations are computed again in the backward pass rather than kept."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for timm's layer-wise learning rates: by unit of both branches, or by block."""
        units = [(r"^(?:depthwise|dilated)_branches\.(\d+)\.(\d+)", None), (r"^transitions\.(\d+)", (99999,))]
        blocks = r"^(?:depthwise_branches|dilated_branches|transitions)\.(\d+)"
        return {"stem": r"^stem", "blocks": blocks if coarse else units}

    def no_weight_decay(self) -> set[str]:
        """Parameters that must not decay, apart from biases and norms."""
        return set()

    def _pool(self, name: str) -> nn.Module:
        if name not in POOLS:
            what = f'the dual-branch network has no global_pool "{name}"'
            raise RefusedPool(what, hint=nearest(name, [pool for pool in POOLS if pool]))
        self.global_pool = name
        return AvgPool2d(self.final_size) if name == "avg" else SelectAdaptivePool2d(pool_type=name)

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Conv2d(self.head_hidden_size, num_classes, kernel_size=1) if num_classes else nn.Identity()


def _branch(channels: int, widths: tuple[int, ...], dilations: tuple[int, ...], args: DualBranchArgs) -> nn.Sequential:
    """Units one after another: (B, channels, H, W) -> (B, widths[-1], H, W)."""
    units = []
    for width, dilation in zip(widths, dilations, strict=True):
        layers = _normed(DepthwiseConv2d(channels, width, dilation=dilation), width, args)
        layers["drop"] = nn.Dropout(args.dropout)
        units.append(nn.Sequential(layers))
        channels = width
    return nn.Sequential(*units)


def _normed(conv: nn.Module, channels: int, args: DualBranchArgs) -> OrderedDict[str, nn.Module]:
    """A convolution, normalisation, activation; no norm is no layer, rather than an identity in the summary."""
    layers = OrderedDict[str, nn.Module](conv=conv)
    if args.norm == "group":  # about GROUP_NORM_CHANNELS channels a group, whatever number of channels there is
        most = max(1, channels // GROUP_NORM_CHANNELS)
        layers["norm"] = nn.GroupNorm(next(n for n in range(most, 0, -1) if channels % n == 0), channels)
    elif args.norm != "none":
        layers["norm"] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}[args.norm](channels)
    layers["act"] = create_act_layer(args.activation, inplace=False)
    return layers


def _final_size(img_size: int | tuple[int, int], *, transitions: int) -> tuple[int, int]:
    """Height and width of the last features: each transition halves, rounding down."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    least = 2**transitions
    if min(height, width) < least:
        what = f"images of {height}×{width} px are too small for {transitions} transitions (each halves)"
        raise HarnessError(what, hint=f"Use at least {least} px, or fewer blocks in widths.")
    return height // least, width // least


class _Features(FeatureGetterNet):
    """The features of chosen blocks; timm's own class lacks what its other extractors have."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def _fit_channels(state: dict[str, Tensor], model: DualBranchNet) -> dict[str, Tensor]:
    """Weights for images of another number of channels, as timm does it: repeated, for one channel the mean.

    Here the first depthwise convolutions; timm itself fits and scales what `first_conv` names.
    """
    for part in BRANCHES:
        for name in (f"{part}.0.0.conv.depthwise.{kind}" for kind in ("weight", "bias")):
            wanted = model.get_parameter(name).shape[0]
            if name in state and state[name].shape[0] != wanted:
                given = state[name]
                state[name] = given.mean(0, keepdim=True) if wanted == 1 else given[torch.arange(wanted) % len(given)]
    return state


_CONFIG = {
    "num_classes": 10,
    "input_size": (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.4914, 0.4822, 0.4465),  # of CIFAR-10's training pixels in [0, 1]
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": tuple(f"{part}.0.0.conv.pointwise" for part in BRANCHES),
    "classifier": "head.classifier",
}
default_cfgs = generate_default_cfgs({"dual_branch": _CONFIG, "dual_branch_seed": _CONFIG})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DualBranchNet:
    args = parse_settings({name: value for name, value in kwargs.items() if name in DualBranchArgs.model_fields})
    overlay: dict[str, Any] = {}
    if not kwargs.get("pretrained_cfg"):  # a saved one describes the network that was saved
        overlay["pool_size"] = (IMAGE_SIZE_PX // 2 ** len(args.transition_widths),) * 2
        overlay |= {} if args.stem is None else {"first_conv": "stem.conv"}
    overlay |= kwargs.pop("pretrained_cfg_overlay", None) or {}
    features = {"out_indices": tuple(range(len(args.widths))), "feature_cls": _Features}
    features |= kwargs.pop("feature_cfg", None) or {}
    given = {"pretrained_cfg_overlay": overlay, "pretrained_filter_fn": _fit_channels, "feature_cfg": features}
    return build_model_with_cfg(DualBranchNet, variant, pretrained, **given, **kwargs)


@register_model
def dual_branch(pretrained: bool = False, **kwargs: Any) -> DualBranchNet:
    """The dual-branch family; keyword arguments are those of `DualBranchNet`."""
    return _create("dual_branch", pretrained, **kwargs)


@register_model
def dual_branch_seed(pretrained: bool = False, **kwargs: Any) -> DualBranchNet:
    """The seed's network, layer for layer: the family's defaults; keyword arguments change it as in timm's models."""
    return _create("dual_branch_seed", pretrained, **kwargs)
