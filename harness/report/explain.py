"""The sections of a report with pictures: the worst mistakes, and where in an image the network finds its class.

Grad-CAM: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
https://arxiv.org/abs/1610.02391, equations 1 and 2: with the features A of a layer and the logit y of a class,

    α_c = mean over pixels of ∂y / ∂A_c          L = ReLU(Σ_c α_c · A_c)

Legend of shape letters: N test images, B images, K classes, C channels, H and W height and width in pixels (h and w: of
the layer's features), 3 channels red, green, blue.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet
from harness.report.axes import percent
from harness.report.evidence import Evidence
from harness.report.page import missing
from harness.training.inference import worst_mistakes

MISTAKES = 24  # in the gallery
EXPLAINED = 8  # images with Grad-CAM
PICTURE_PX = 96
HEAT_SHARE = 0.55  # of the heat laid over a picture
LARGEST_PX = 128  # of a picture's longer side; larger images are made smaller
LOSSLESS_UP_TO_PX = 48
_HINT = "The other sections of the report need no feature map."
_THIRDS = (
    ("upper left", "upper middle", "upper right"),
    ("left", "centre", "right"),
    ("lower left", "lower middle", "lower right"),
)
# From dark blue over magenta to yellow, rising in lightness, so that it reads in greyscale and by colour-blind eyes
# (after matplotlib's "plasma", https://bids.github.io/colormap).
_HEAT = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float64)


def gallery_body(evidence: Evidence) -> Markup:
    """Pictures of the misclassified test images whose true class got the lowest probability."""
    found = evidence.predictions()
    probabilities_NK, labels_N = found.probabilities_NK.numpy(), found.labels_N.numpy()
    ids = worst_mistakes(probabilities_NK, labels_N, most=MISTAKES)
    if not len(ids):
        return missing("No test image is misclassified.")
    tiles = []
    for number in ids.tolist():
        true, predicted = _true_and_predicted(evidence, number)
        of_true = percent(float(probabilities_NK[number, labels_N[number]]))
        words = Markup(
            '<span class="true">{}</span><span>taken for <strong>{}</strong></span>'
            '<span class="muted">true class {}</span>'
        ).format(true, predicted, of_true)
        image = picture(evidence.images()[number], f"Test image {number}: {true}, taken for {predicted}")
        tiles.append(Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(image, words))
    return Markup('<div class="gallery">{}</div>').format(Markup("").join(tiles))


def grad_cam_body(evidence: Evidence) -> Markup:
    """Grad-CAM of the predicted class, for the worst mistakes (or any images, where there are none)."""
    found = evidence.predictions()
    probabilities_NK, labels_N = found.probabilities_NK.numpy(), found.labels_N.numpy()
    ids = worst_mistakes(probabilities_NK, labels_N, most=EXPLAINED)
    which = "the worst mistakes" if len(ids) else "the first test images, since none is misclassified"
    ids = ids if len(ids) else np.arange(min(EXPLAINED, len(labels_N)))
    model, images_BCHW = evidence.network(), evidence.normalised(ids)
    layers = layers_to_explain(model, images_BCHW)
    maps = grad_cam(model, layers, images_BCHW, found.predicted_N[ids])
    tiles = []
    for i, number in enumerate(ids.tolist()):
        true, predicted = _true_and_predicted(evidence, number)
        image = evidence.images()[number]
        shown = [_column("image", picture(image, f"Test image {number}: {true}"))]
        for name, map_Bhw in maps.items():
            alt = f"Grad-CAM of the {name} for test image {number} as {predicted}: {where_strongest(map_Bhw[i])}"
            heated = overlaid(resized(image, PICTURE_PX), resized(map_Bhw[i], PICTURE_PX))
            shown.append(_column(name.removesuffix(" branch"), picture(heated, alt)))
        said = "rightly taken for" if found.correct_N[number] else "taken for"
        words = Markup("{}, {} <strong>{}</strong>").format(true, said, predicted)
        tile = Markup('<figure class="cam"><div>{}</div><figcaption>{}</figcaption></figure>')
        tiles.append(tile.format(Markup("").join(shown), words))
    where = " and ".join(f"{name} ({path})" for name, path in layers.items())
    branches = "Both branches of the last block see the same input. " if len(layers) > 1 else ""
    lead = Markup(
        '<p class="lead">Of {}: {}. {}Yellow speaks most for the predicted class, dark blue not at all; each picture '
        "has its own scale, so brightness says where, not how much.</p>"
    ).format(which, where, branches)
    return lead + Markup('<div class="cams">{}</div>').format(Markup("").join(tiles))


def _true_and_predicted(evidence: Evidence, number: int) -> tuple[str, str]:
    """The true class of a test image, and the predicted one with its probability, in words."""
    found, names = evidence.predictions(), evidence.classes()
    predicted = int(found.predicted_N[number])
    probability = percent(float(found.probabilities_NK[number, predicted]))
    return names[int(found.labels_N[number])], f"{names[predicted]} ({probability})"


def _column(name: str, image: Markup) -> Markup:
    return Markup('<span class="column">{}<span>{}</span></span>').format(image, name)


def where_strongest(map_hw: np.ndarray) -> str:
    """In words, the third of the height and of the width that the strongest pixel lies in."""
    if not map_hw.any():
        return "nothing speaks for the class"
    row, column = np.unravel_index(int(map_hw.argmax()), map_hw.shape)
    down, across = (min(2, int(3 * (at + 0.5) / size)) for at, size in zip((row, column), map_hw.shape, strict=True))
    return f"strongest in the {_THIRDS[down][across]}"


# --- Grad-CAM


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


def _map(features_BChw: Tensor, gradient_BChw: Tensor) -> np.ndarray:
    weights_BC11 = gradient_BChw.mean(dim=(2, 3), keepdim=True)
    map_Bhw = (weights_BC11 * features_BChw.detach()).sum(1).clamp_min(0)
    largest_B11 = map_Bhw.amax(dim=(1, 2), keepdim=True)
    return np.asarray((map_Bhw / largest_B11.clamp_min(torch.finfo(torch.float32).tiny)).float().cpu())


def _keeping(features: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and output.dim() == 4:
            # A view of its own: what the next layer does in place then changes neither it nor its gradient.
            features[name] = output
            return output.clone()
        return None

    return keep


@torch.no_grad()
def _last_feature_map(model: nn.Module, image_1CHW: Tensor) -> str | None:
    """The last module whose output is (1, C, h, w) with more than one pixel, if most of the network lies before it."""
    if getattr(model, "output_fmt", "NCHW") != "NCHW":  # timm's networks whose channels come last
        return None
    height, width = image_1CHW.shape[2:]
    calls: list[tuple[str, bool]] = []

    def noting(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            h, w = output.shape[2:] if isinstance(output, Tensor) and output.dim() == 4 else (0, 0)
            # Attention's (1, heads, tokens, channels) has four sizes too, but not the image's proportions.
            in_proportion = abs(h / height - w / width) < 1 / min(height, width)
            calls.append((name, 1 < h <= height and 1 < w <= width and in_proportion))

        return note

    hooks = [module.register_forward_hook(noting(name)) for name, module in model.named_modules() if name]
    try:
        model(image_1CHW)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [i for i, (_, is_map) in enumerate(calls) if is_map]
    return calls[maps[-1]][0] if maps and maps[-1] >= len(calls) // 2 else None


# --- pictures


def data_uri(image_HW3: np.ndarray) -> str:
    """A uint8 (H, W, 3) image as WebP, small ones without loss, large ones made smaller."""
    image = Image.fromarray(np.ascontiguousarray(image_HW3))
    image.thumbnail((LARGEST_PX, LARGEST_PX))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=max(image.size) <= LOSSLESS_UP_TO_PX, quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def picture(image_HW3: np.ndarray, alt: str) -> Markup:
    """An `<img>` of a uint8 (H, W, 3) image; `alt` says in words what it shows."""
    height, width = image_HW3.shape[:2]
    return Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(data_uri(image_HW3), width, height, alt)


def overlaid(image_HW3: np.ndarray, heat_HW: np.ndarray) -> np.ndarray:
    """A uint8 image with heat from 0 (dark blue) to 1 (yellow) laid over it, uint8 (H, W, 3)."""
    at = np.clip(heat_HW, 0, 1) * (len(_HEAT) - 1)
    heat_HW3 = np.stack([np.interp(at, np.arange(len(_HEAT)), _HEAT[:, c]) for c in range(3)], axis=-1).round()
    return ((1 - HEAT_SHARE) * image_HW3 + HEAT_SHARE * heat_HW3).round().astype(np.uint8)


def resized(image: np.ndarray, size_px: int) -> np.ndarray:
    """A uint8 (H, W, 3) or float32 (H, W) image of size_px × size_px; float values smoothly, pixels as squares."""
    if image.dtype == np.uint8:
        method = Image.Resampling.NEAREST if max(image.shape[:2]) <= size_px else Image.Resampling.BOX
    else:
        method = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size_px, size_px), method))
