"""Where in an image a network finds its class: Grad-CAM.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
https://arxiv.org/abs/1610.02391, equations 1 and 2: with the features A of a layer and the logit y of a class,

    α_c = mean over pixels of ∂y / ∂A_c          L = ReLU(Σ_c α_c · A_c)

Legend of shape letters: B images, C channels, H and W height and width (h and w: of the layer's features).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet

_HINT = "The other sections of the report need no feature map."


def grad_cam(
    model: nn.Module, layers: Mapping[str, str], images_BCHW: Tensor, classes_B: Tensor
) -> dict[str, np.ndarray]:
    """Grad-CAM of some layers in one forward and backward pass.

    The model is run in the mode it is in (evaluation, if the images are not to influence one another) and its
    parameters get no gradient.

    Args:
        model: maps images to logits (B, K).
        layers: what to call each and its dotted name in the model; their outputs are (B, C, h, w).
        images_BCHW: normalised, float32, on the model's device.
        classes_B: int64, the class whose logit is explained.

    Returns:
        float32 (B, h, w) for each layer, each image's largest value 1, or all 0 where no feature speaks for the class.

    Raises:
        HarnessError: a layer that gave no features of this form, or whose gradient cannot be had.
    """
    features: dict[str, Tensor] = {}
    hooks = [model.get_submodule(path).register_forward_hook(_keeping(features, name)) for name, path in layers.items()]
    try:
        with torch.enable_grad():
            # So that features have a gradient even where no parameter before them has one.
            logits_BK = model(images_BCHW.detach().clone().requires_grad_())
            score = logits_BK.gather(1, classes_B[:, None]).sum()
            gradients = torch.autograd.grad(score, [features[name] for name in layers])
    except (RuntimeError, KeyError, TypeError) as error:
        raise HarnessError(f"Grad-CAM cannot be worked out for this network: {error}", hint=_HINT) from error
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _map(features[name], gradient) for name, gradient in zip(layers, gradients, strict=True)}


def layers_to_explain(model: nn.Module, images_BCHW: Tensor) -> dict[str, str]:
    """What Grad-CAM looks at: both branches of the last block, or any other network's last feature map.

    Raises:
        HarnessError: the network has no features with a height and width near its end.
    """
    if isinstance(model, DualBranchNet):
        last = len(model.depthwise_branches) - 1
        return {"depthwise branch": f"depthwise_branches.{last}", "dilated branch": f"dilated_branches.{last}"}
    found = _last_feature_map(model, images_BCHW[:1])
    if found is None:
        raise HarnessError(
            "This network has no features of channels, height and width near its end, which Grad-CAM needs "
            "(networks on tokens, as vision transformers are, have none)",
            hint=_HINT,
        )
    return {"last feature map": found}


def _map(features_BCHW: Tensor, gradient_BCHW: Tensor) -> np.ndarray:
    weights_BC11 = gradient_BCHW.mean(dim=(2, 3), keepdim=True)
    map_BHW = (weights_BC11 * features_BCHW.detach()).sum(1).clamp_min(0)
    largest_B11 = map_BHW.amax(dim=(1, 2), keepdim=True)
    return np.asarray((map_BHW / largest_B11.clamp_min(torch.finfo(torch.float32).tiny)).float().cpu())


def _keeping(features: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and output.dim() == 4:
            # A view of its own: what the next layer does in place then changes neither it nor its gradient.
            features[name] = output
            return output.clone()
        return None

    return keep


def _is_map(output: Tensor, height: int, width: int) -> bool:
    """Whether an output has the image's proportions; attention's (1, heads, tokens, channels) has four sizes too."""
    if output.dim() != 4:
        return False
    h, w = output.shape[2:]
    return 1 < h <= height and 1 < w <= width and abs(h / height - w / width) < 1 / min(height, width)


@torch.no_grad()
def _last_feature_map(model: nn.Module, image_1CHW: Tensor) -> str | None:
    """The last module whose output is (1, C, h, w) with more than one pixel, if most of the network lies before it."""
    if getattr(model, "output_fmt", "NCHW") != "NCHW":  # timm's networks whose channels come last
        return None
    calls: list[tuple[str, bool]] = []

    def noting(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            calls.append((name, isinstance(output, Tensor) and _is_map(output, *image_1CHW.shape[2:])))

        return note

    hooks = [module.register_forward_hook(noting(name)) for name, module in model.named_modules() if name]
    try:
        model(image_1CHW)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [i for i, (_, is_map) in enumerate(calls) if is_map]
    return calls[maps[-1]][0] if maps and maps[-1] >= len(calls) // 2 else None
