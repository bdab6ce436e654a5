"""The dual-branch network: in each block a depthwise and a dilated branch see the same input and are merged.

    stem -> [ depthwise branch ⊕ dilated branch -> transition ] for each block -> head -> logits

Importing this file registers `dual_branch` (the family) and `dual_branch_seed` with timm.

Legend of shape letters:
    B  images of a batch
    C  channels
    H  height, W  width, in pixels; halved by each transition
    K  classes
"""

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from harness.errors import HarnessError, nearest
from harness.models.units import AvgPool2d, Merge, branch, conv_stem, transition
from harness.recipe.schema import DualBranchArgs, parse_settings

# Not `from __future__ import annotations`: torch.fx writes forward's annotations into its code, as text they break it.

__all__ = ["DualBranchArgs", "DualBranchNet"]

# Of CIFAR-10's training pixels in [0, 1]; they describe what the networks are made for and change no weight.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
IMAGE_SIZE_PX = 32
_EXAMPLES = {"num_classes": 10, "in_chans": 3, "img_size": IMAGE_SIZE_PX}
_POOLS = ("avg", "max", "avgmax", "")
BRANCHES = ("depthwise_branches", "dilated_branches")


class RefusedPool(HarnessError, AssertionError):
    """A pooling that the head does not have; timm's own models refuse it by an AssertionError."""


class DualBranchNet(nn.Module):
    """The dual-branch family, with timm's interface. The defaults are the seed's network, 380,646 parameters.

    float (B, in_chans, H, W), any H and W that the transitions can halve -> logits (B, K) of the same dtype.
    PyTorch's default initialisation.

    Args:
        num_classes: classes K; 0 leaves the classifier out, and the head's hidden features are returned.
        in_chans: channels of the images.
        img_size: usual height and width of the images, pixels; one number for both or (height, width).
        global_pool: avg, max, avgmax (their mean), or "" for logits or features of each pixel (B, …, H, W).
        drop_rate: share of the hidden features dropped before the classifier.
        device: where the weights are made; "meta" for none.
        dtype: of the weights.
        **settings: fields of `harness.recipe.schema.DualBranchArgs`.

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
        self.num_classes = _count("num_classes", num_classes, at_least=0)
        self.in_chans = _count("in_chans", in_chans, at_least=1)
        self.final_size = _final_size(img_size, transitions=len(self.args.transition_widths))
        if not 0 <= drop_rate < 1:
            raise HarnessError(f"drop_rate: must be at least 0 and less than 1, got {drop_rate!r}", hint="Such as 0.2.")
        self.drop_rate = float(drop_rate)
        self.grad_checkpointing = False
        with nullcontext() if device is None else torch.device(device):
            self._build(self.args, global_pool)
        self.to(dtype=dtype)

    def _build(self, args: DualBranchArgs, global_pool: str) -> None:
        style: dict[str, Any] = {"norm": args.norm, "activation": args.activation}
        features: list[dict[str, Any]] = []
        # An empty Sequential where there is nothing to do: unlike an identity it has no row in the summary.
        self.stem = nn.Sequential() if args.stem is None else conv_stem(self.in_chans, args.stem, **style)
        self.depthwise_branches, self.dilated_branches = nn.ModuleList(), nn.ModuleList()
        self.merges, self.transitions = nn.ModuleList(), nn.ModuleList()
        channels = self.in_chans if args.stem is None else args.stem
        after: tuple[int | None, ...] = (*args.transition_widths, None)
        for block, (widths, dilations) in enumerate(zip(args.widths, args.unit_dilations(), strict=True)):
            style["dropout"] = args.dropout
            self.depthwise_branches.append(branch(channels, widths, (1,) * len(widths), **style))
            self.dilated_branches.append(branch(channels, widths, dilations, **style))
            self.merges.append(Merge(args.merge))
            channels = widths[-1] * (2 if args.merge == "concat" else 1)
            features.append({"num_chs": channels, "reduction": 2**block, "module": f"merges.{block}"})
            self.transitions.append(transition(channels, after[block]))
            channels = after[block] or channels
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

        Args:
            x_BCHW: images.
            indices: blocks, counted from 0; a number for so many last ones, None for all.
            norm: without effect, as there is no norm after the blocks.
            stop_early: do not run the blocks after the last of `indices`.
            output_fmt: NCHW.
            intermediates_only: return the list alone.
        """
        assert output_fmt == "NCHW", "The features are NCHW."
        take, last = feature_take_indices(len(self.merges), indices)
        x, taken = self._blocks(x_BCHW, take, last if stop_early else len(self.merges) - 1)
        if intermediates_only:
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
            HarnessError: a negative number of classes, or a pooling that there is not (an AssertionError too).
        """
        self.num_classes = _count("num_classes", num_classes, at_least=0)
        if global_pool is not None:
            self.head[0] = self._pool(global_pool).train(self.training)
        like = next(self.parameters())
        self.head[-1] = self._classifier(num_classes).to(like).train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`, and the head if it has nothing to stand on; returns the blocks.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: without effect, as there is no norm after the blocks.
            prune_head: drop the head in any case.
        """
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
        if name not in _POOLS:
            hint = nearest(name, [pool for pool in _POOLS if pool])
            raise RefusedPool(f'the dual-branch network has no global_pool "{name}"', hint=hint)
        self.global_pool = name
        return AvgPool2d(self.final_size) if name == "avg" else SelectAdaptivePool2d(pool_type=name)

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return nn.Conv2d(self.head_hidden_size, num_classes, kernel_size=1)


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
                mean = given.mean(0, keepdim=True)
                state[name] = mean if wanted == 1 else given[torch.arange(wanted) % given.shape[0]]
    return state


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": tuple(f"{part}.0.0.conv.pointwise" for part in BRANCHES),
        "classifier": "head.classifier",
    }


default_cfgs = generate_default_cfgs({"dual_branch": _cfg(), "dual_branch_seed": _cfg()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DualBranchNet:
    args = parse_settings({name: value for name, value in kwargs.items() if name in DualBranchArgs.model_fields})
    overlay: dict[str, Any] = {}
    if not kwargs.get("pretrained_cfg"):  # a saved one describes the network that was saved
        overlay["pool_size"] = (IMAGE_SIZE_PX // 2 ** len(args.transition_widths),) * 2
        overlay |= {} if args.stem is None else {"first_conv": "stem.conv"}
    overlay |= kwargs.pop("pretrained_cfg_overlay", None) or {}
    features = {"out_indices": tuple(range(len(args.widths))), "feature_cls": _Features}
    features |= kwargs.pop("feature_cfg", None) or {}
    return build_model_with_cfg(
        DualBranchNet,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_fit_channels,
        feature_cfg=features,
        **kwargs,
    )


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
