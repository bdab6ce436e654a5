"""The dual-branch network: in each block a depthwise and a dilated branch see the same input and are merged.

    stem -> [ depthwise branch ⊕ dilated branch -> transition ] for each block -> head -> logits

Importing this file registers `dual_branch` (the family) and `dual_branch_seed` with timm.

Legend of shape letters:
    B  images of a batch
    C  channels
    H  height, W  width, in pixels; halved by each transition
    K  classes
"""

# No annotations as texts: torch.fx copies those of `forward`, and TorchScript reads them.
from collections import OrderedDict
from typing import Any

import torch
from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import HarnessError
from harness.models.units import AvgPool2d, branch, conv_stem, transition
from harness.recipe.dual_branch_args import DualBranchArgs, parse_settings

__all__ = ["DualBranchArgs", "DualBranchNet"]

# Of CIFAR-10's training pixels in [0, 1]; they describe what the networks are made for and change no weight.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
_EXAMPLES = {"num_classes": 10, "in_chans": 3, "img_size": 32}
FIRST_UNITS = ("depthwise_branches.0.0.conv", "dilated_branches.0.0.conv")


class DualBranchNet(nn.Module):
    """The dual-branch family, with timm's interface. The defaults are the seed's network, 380,646 parameters.

    float (B, in_chans, H, W) -> logits (B, K) of the same dtype, for any H and W that the transitions can halve.
    PyTorch's default initialisation.

    Args:
        num_classes: classes K; 0 leaves the classifier out, and the head's hidden features are returned.
        in_chans: channels of the images.
        img_size: height and width of the images it is made for, pixels; one number for both or (height, width).
            Receptive fields are worked out for it; other sizes can be given.
        global_pool: avg, or an empty text for no pooling: the head then gives (B, K, h, w).
        drop_rate: share of the head's hidden features dropped in training, as timm's networks have it.
        device: where the parameters are made; torch's default device if None.
        dtype: of the parameters; torch's default if None.
        **settings: fields of `harness.recipe.dual_branch_args.DualBranchArgs`.

    Raises:
        HarnessError: settings that are unknown or out of range, or images too small for the transitions.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        args = parse_settings(settings)
        self.num_classes = _count("num_classes", num_classes, at_least=0)
        self.in_chans = _count("in_chans", in_chans, at_least=1)
        self.args, self.merge = args, args.merge
        self.final_size = _final_size(img_size, transitions=len(args.transition_widths))
        self.global_pool, self.drop_rate = _pooling(global_pool), _share("drop_rate", drop_rate)
        self.grad_checkpointing = False
        with torch.device(torch.get_default_device() if device is None else device):
            self._build(args)
        self.to(dtype=dtype)

    def _build(self, args: DualBranchArgs) -> None:
        style: dict[str, Any] = {"norm": args.norm, "activation": args.activation}

        # An empty Sequential where there is nothing to do: unlike an identity it has no row in the summary.
        self.stem = nn.Sequential() if args.stem is None else conv_stem(self.in_chans, args.stem, **style)
        self.depthwise_branches, self.dilated_branches = nn.ModuleList(), nn.ModuleList()
        self.transitions = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []  # what timm tells of each block's features
        channels = self.in_chans if args.stem is None else args.stem
        after: tuple[int | None, ...] = (*args.transition_widths, None)
        plan = zip(args.widths, args.unit_dilations(), after, strict=True)
        style["dropout"] = args.dropout
        for block, (widths, dilations, next_width) in enumerate(plan):
            self.depthwise_branches.append(branch(channels, widths, (1,) * len(widths), **style))
            self.dilated_branches.append(branch(channels, widths, dilations, **style))
            channels = widths[-1] * (2 if args.merge == "concat" else 1)
            # The merged branches are no module's output: they are what the transition is given.
            place = {"module": f"transitions.{block}", "hook_type": "forward_pre"}
            self.feature_info.append({"num_chs": channels, "reduction": 2**block, **place})
            self.transitions.append(transition(channels, next_width))
            channels = next_width or channels
        self.num_features = channels
        self.head_hidden_size = args.head_width
        self.head = nn.Sequential(
            OrderedDict[str, nn.Module](
                pool=self._pool(),
                hidden=nn.Conv2d(channels, args.head_width, kernel_size=1),
                classifier=self._classifier(),
            )
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Features before pooling: (B, C, H, W) -> (B, num_features, H / 2^t, W / 2^t), t transitions."""
        return self._blocks(x_BCHW, len(self.transitions) - 1)[-1]

    def _blocks(self, x: Tensor, last: int) -> list[Tensor]:
        """The merged branches of each block up to number `last`. No check of shapes: torch.fx traces it."""
        features: list[Tensor] = []
        x = self.stem(x)
        blocks = zip(self.depthwise_branches, self.dilated_branches, self.transitions)  # noqa: B905 - for TorchScript
        for block, (depthwise, dilated, between) in enumerate(blocks):
            if block <= last:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    one, other = checkpoint(depthwise, x), checkpoint(dilated, x)
                else:
                    one, other = depthwise(x), dilated(x)
                features.append(one + other if self.merge == "sum" else torch.cat((one, other), dim=1))
                x = between(features[-1])
        return features

    def forward_intermediates(
        self,
        x_BCHW: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last features and those of some blocks, before each transition: (B, C, H / 2^b, W / 2^b) of block b.

        Args:
            x_BCHW: images.
            indices: blocks by number from 0, or the last so many; all if None.
            norm: no effect: there is no norm after the blocks.
            stop_early: leave out what comes after the last block asked for.
            output_fmt: NCHW.
            intermediates_only: without the last features.
        """
        _assert(output_fmt == "NCHW", "features have the format NCHW alone")
        wanted, last = feature_take_indices(len(self.transitions), indices)
        features = self._blocks(x_BCHW, last if stop_early else len(self.transitions) - 1)
        intermediates = [features[i] for i in wanted]
        if intermediates_only:
            return intermediates
        return features[-1], intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these blocks; returns their numbers."""
        wanted, last = feature_take_indices(len(self.transitions), indices)
        for parts in (self.depthwise_branches, self.dilated_branches, self.transitions):
            del parts[last + 1 :]
        pruned = last < len(self.feature_info) - 1
        if pruned:
            self.transitions[-1] = transition(0, None)
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.head.hidden = nn.Identity()
            self.head_hidden_size = self.num_features
            self.reset_classifier(0, "")
        return wanted

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of the features, or with `pre_logits` the hidden features (B, head_width)."""
        x = self.head[1](self.head[0](x_BCHW))  # pool, then hidden; TorchScript cannot unpack them
        if self.drop_rate > 0:
            x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.head[2](x)
        return x.flatten(1) if self.global_pool == "avg" else x

    def get_classifier(self) -> nn.Module:
        """The last layer: a 1×1 convolution head_width -> K, or an identity with no classes."""
        return self.head[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised classifier for `num_classes`; 0 leaves it out. The pooling stays if None.

        Raises:
            HarnessError: a negative number of classes, or an unknown pooling.
        """
        self.num_classes = _count("num_classes", num_classes, at_least=0)
        if global_pool is not None:
            self.global_pool = _pooling(global_pool)
        like = next(self.parameters())
        with like.device:
            self.head.pool, self.head.classifier = self._pool(), self._classifier().to(like.dtype)
        self.head.train(self.training)

    def _pool(self) -> nn.Module:
        return AvgPool2d(self.final_size) if self.global_pool else nn.Identity()

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Conv2d(self.head_hidden_size, self.num_classes, kernel_size=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a branch's activations are worked out again in the backward pass rather than kept.

        As in timm's networks, batch norm's running statistics then take in each batch twice.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters make a layer, for timm's layer-wise rates: blocks, or units if not `coarse`."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^(?:\w+_branches|transitions)\.(\d+)"}
        units = (r"^\w+_branches\.(\d+)\.(\d+)", None)
        return {"stem": r"^stem", "blocks": [units, (r"^transitions\.(\d+)", MATCH_PREV_GROUP)]}

    def no_weight_decay(self) -> set[str]:
        """No parameter needs to be exempt by name; timm's optimizers exempt norms and biases anyway."""
        return set()


def _count(name: str, value: int, *, at_least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise HarnessError(
            f"{name}: must be a whole number ≥ {at_least}, got {value!r}",
            hint=f"Set {name} to a number such as {_EXAMPLES[name]}.",
        )
    return value


def _pooling(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        what = f'the dual-branch network has no global_pool "{global_pool}"'
        raise HarnessError(what, hint='It has avg, and "" for none.')
    return global_pool


def _share(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise HarnessError(f"{name}: must be a share from 0 to below 1, got {value!r}", hint=f"Set {name}=0.1 or so.")
    return float(value)


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
        # By these timm loads weights of images with other channels; `_adapt_channels` does it for what is before them.
        "first_conv": tuple(f"{unit}.pointwise" for unit in FIRST_UNITS),
        "classifier": "head.classifier",
    }


default_cfgs = generate_default_cfgs({"dual_branch": _cfg(), "dual_branch_seed": _cfg()})


def _adapt_channels(state: dict[str, Tensor], model: DualBranchNet) -> dict[str, Tensor]:
    """Depthwise kernels of the first units, of images with other channels: their mean for one, else in turn.

    It goes with timm's rule for the pointwise kernels after them: summed for one channel, else in turn and scaled.
    """
    for key in [f"{unit}.depthwise.{kind}" for unit in FIRST_UNITS for kind in ("weight", "bias")]:
        channels, given = model.get_parameter(key).shape[0], state.get(key)
        if given is not None and given.shape[0] != channels:
            turns = torch.arange(channels) % given.shape[0]
            state[key] = given.mean(0, keepdim=True) if channels == 1 else given[turns]
    return state


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DualBranchNet:
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    if kwargs.get("stem") is not None:
        overlay = {"first_conv": "stem.conv", **overlay}
    features = {"feature_cls": "getter", **(kwargs.pop("feature_cfg", None) or {})}
    if kwargs.get("features_only"):
        given = {key: value for key, value in kwargs.items() if key in DualBranchArgs.model_fields}
        features.setdefault("out_indices", tuple(range(len(parse_settings(given).widths))))
        features["feature_cls"] = kwargs.pop("feature_cls", features["feature_cls"])
        if features["feature_cls"] in ("list", "dict", "fx"):  # they take a module's output, and a merge is none
            what = f'{variant} has no features by feature_cls "{features["feature_cls"]}"'
            raise HarnessError(what, hint="It has getter and hook.")
    return build_model_with_cfg(
        DualBranchNet,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_adapt_channels,
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
