"""The sections of a report on the answers to the test images: confusion, accuracy by class, calibration, the worst
mistakes, and where in an image the network finds its class.

Calibration: Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equation 3:
images are sorted by the probability of their predicted class into M bins of equal width, ((m - 1)/M, m/M], and

    ECE = Σ_m |B_m|/N · |accuracy(B_m) - confidence(B_m)|

Grad-CAM: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
https://arxiv.org/abs/1610.02391, equations 1 and 2: with the features A of a layer and the logit y of a class,

    α_c = mean over pixels of ∂y / ∂A_c          L = ReLU(Σ_c α_c · A_c)

Legend of shape letters: N test images, B some of them, K classes, M bins, C channels, H and W height and width in
pixels (h and w: of a layer's features), 3 channels red, green, blue; in a matrix rows are true classes and columns
predicted ones.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn

from harness.data.augment import normalisation_table
from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet
from harness.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, bar_chart, drawing, percent, shortened
from harness.report.lazy_checkpoint import LazyCheckpoint
from harness.report.page import missing, render
from harness.training.inference import worst_mistakes

MOST_CLASSES_DRAWN = 30
BINS = 15  # as in the paper's tables
MISTAKES = 24  # in the gallery
EXPLAINED = 8  # images with Grad-CAM
PICTURE_PX = 96
HEAT_SHARE = 0.55  # of the heat laid over a picture
LARGEST_PX = 128  # of a picture's longer side; larger images are made smaller
LOSSLESS_UP_TO_PX = 48
# From dark blue over magenta to yellow, rising in lightness, so that it reads in greyscale and by colour-blind eyes
# (after matplotlib's "plasma", https://bids.github.io/colormap).
_HEAT = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float64)
_NINTHS = (
    *("upper left", "upper middle", "upper right"),
    *("left", "centre", "right"),
    *("lower left", "lower middle", "lower right"),
)
_HINT = "The other sections of the report need no feature map."


# --- confusion and accuracy by class


def confusion_body(checkpoint: LazyCheckpoint) -> Markup:
    """The matrix, and the mistakes that are made most often."""
    found, names = checkpoint.predictions, checkpoint.classes
    matrix_KK = confusion_matrix(found.labels_N.numpy(), found.predicted_N.numpy(), labels=range(len(names)))
    mistakes = [
        [names[true], names[predicted], f"{count:,}", percent(count / matrix_KK[true].sum())]
        for true, predicted, count in most_confused(matrix_KK, most=10)
    ]
    chart = confusion_chart(matrix_KK, names) if len(names) <= MOST_CLASSES_DRAWN else None
    return render("section_confusion.html", chart=chart, mistakes=mistakes, classes=len(names))


def most_confused(matrix_KK: np.ndarray, *, most: int) -> list[tuple[int, int, int]]:
    """The commonest mistakes: (true class, predicted class, images), most images first, none without an image."""
    wrong_KK = matrix_KK - np.diag(np.diag(matrix_KK))
    pairs = np.stack(np.unravel_index(np.argsort(-wrong_KK, axis=None, kind="stable"), wrong_KK.shape), axis=1)
    return [(i, j, int(wrong_KK[i, j])) for i, j in pairs[:most].tolist() if wrong_KK[i, j]]


def confusion_chart(matrix_KK: np.ndarray, names: Sequence[str]) -> Markup:
    short = [shortened(name, 11) for name in names]
    return drawing("confusion.html", counts=matrix_KK.tolist(), names_of_classes=names, short=short)


def class_body(checkpoint: LazyCheckpoint) -> Markup:
    """Accuracy (recall) and precision of each class."""
    found, names = checkpoint.predictions, checkpoint.classes
    classes, undefined = range(len(names)), np.nan  # of a class without images or predictions
    precision_K, recall_K, _, images_K = precision_recall_fscore_support(
        found.labels_N.numpy(), found.predicted_N.numpy(), labels=classes, zero_division=undefined
    )
    shares = [
        [percent(share[k]) if np.isfinite(share[k]) else "–" for share in (recall_K, precision_K)] for k in classes
    ]
    rows = [[names[k], f"{images_K[k]:,}", *shares[k]] for k in classes]
    few, title = len(names) <= MOST_CLASSES_DRAWN, "Accuracy by class"
    known = [k for k in classes if images_K[k]]
    if not few:
        known = sorted(known, key=lambda k: float(recall_K[k]))[:MOST_CLASSES_DRAWN]
        title = f"The {len(known)} classes of lowest accuracy"
    description = "The share of each class's test images that are classified rightly."
    chart = bar_chart([names[k] for k in known], recall_K[known].tolist(), title=title, description=description)
    return render("section_classes.html", chart=chart, rows=rows, few=few)


# --- calibration


class Calibration(NamedTuple):
    """Images in each bin, their mean probability and accuracy (NaN without an image), and the error, 0 to 1."""

    counts_M: np.ndarray  # noqa: N815
    confidence_M: np.ndarray  # noqa: N815
    accuracy_M: np.ndarray  # noqa: N815
    ece: float


def calibration(probabilities_NK: np.ndarray, labels_N: np.ndarray, *, bins: int = BINS) -> Calibration:
    """Sort predictions into bins, in float64; the predicted class is the first of the largest."""
    confidence_N = probabilities_NK.max(1).astype(np.float64)
    correct_N = probabilities_NK.argmax(1) == labels_N
    # The smallest m with confidence <= m / M; sums of rounded probabilities may pass 1 by a bit.
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    counts_M = np.bincount(bin_N, minlength=bins)
    filled_M = np.where(counts_M, counts_M, np.nan)
    confidence_M = np.bincount(bin_N, confidence_N, bins) / filled_M
    accuracy_M = np.bincount(bin_N, correct_N, bins) / filled_M
    gaps_M = np.nan_to_num(np.abs(accuracy_M - confidence_M))
    return Calibration(counts_M, confidence_M, accuracy_M, float((counts_M * gaps_M).sum() / len(labels_N)))


def calibration_body(checkpoint: LazyCheckpoint) -> Markup:
    """Reliability diagram and expected calibration error."""
    found = checkpoint.predictions
    binned = calibration(found.probabilities_NK.numpy(), found.labels_N.numpy())
    confidence = float(found.probabilities_NK.max(1).values.double().mean())
    accuracy = float(found.correct_N.double().mean())
    values = {"bins": BINS, "ece": binned.ece, "confidence": percent(confidence), "accuracy": percent(accuracy)}
    chart = reliability_diagram(binned)
    return render("section_calibration.html", chart=chart, sureness=sureness(confidence, accuracy), **values)


def sureness(confidence: float, accuracy: float) -> str:
    """How a mean probability compares with the accuracy, both shares; alike is what differs by no 0.05 points."""
    if abs(confidence - accuracy) < 5e-4:
        return "as sure as it is right"
    return "too sure" if confidence > accuracy else "not sure enough"


def reliability_diagram(found: Calibration) -> Markup:
    bins, count = [], len(found.counts_M)
    for m in np.flatnonzero(found.counts_M).tolist():
        accuracy, confidence = float(found.accuracy_M[m]), float(found.confidence_M[m])
        words = (
            f"{percent(m / count)} to {percent((m + 1) / count)}: {found.counts_M[m]:,} images, "
            f"mean probability {percent(confidence)}, accuracy {percent(accuracy)}"
        )
        bins.append((m, confidence, accuracy, words))
    axes = {"x_ticks": Axis(0, 1, LEFT, RIGHT).written(percent), "y_ticks": Axis(0, 1, BOTTOM, TOP).written(percent)}
    return drawing("reliability.html", bins=bins, count=count, ece=percent(found.ece), **axes)


# --- worst mistakes and Grad-CAM


def gallery_body(checkpoint: LazyCheckpoint) -> Markup:
    """Pictures of the misclassified test images whose true class got the lowest probability."""
    found = checkpoint.predictions
    ids = worst_mistakes(found.probabilities_NK.numpy(), found.labels_N.numpy(), most=MISTAKES)
    if not len(ids):
        return missing("No test image is misclassified.")
    return render("gallery.html", tiles=_tiles(checkpoint, ids))


def grad_cam_body(checkpoint: LazyCheckpoint) -> Markup:
    """Grad-CAM of the predicted class, for the worst mistakes (or any images, where there are none)."""
    found = checkpoint.predictions
    wrong = worst_mistakes(found.probabilities_NK.numpy(), found.labels_N.numpy(), most=EXPLAINED)
    ids = wrong if len(wrong) else np.arange(min(EXPLAINED, len(found.labels_N)))
    state, images_BHW3 = checkpoint.saved.state, checkpoint.images[ids]
    channels = normalisation_table(state["mean"], state["std"])
    images_BCHW = torch.from_numpy(np.stack([channels[c][images_BHW3[..., c]] for c in range(3)], axis=1))
    layers = layers_to_explain(checkpoint.model, images_BCHW)
    maps = grad_cam(checkpoint.model, layers, images_BCHW, found.predicted_N[ids])
    tiles = _tiles(checkpoint, ids)
    for i, tile in enumerate(tiles):
        tile["maps"] = []
        for name, map_Bhw in maps.items():
            heated = overlaid(resized(images_BHW3[i], PICTURE_PX), resized(map_Bhw[i], PICTURE_PX))
            tile["maps"].append((name, data_uri(heated), where_strongest(map_Bhw[i])))
    return render("grad_cam.html", tiles=tiles, layers=layers, mistakes=len(wrong) > 0, size=PICTURE_PX)


def _tiles(checkpoint: LazyCheckpoint, ids: np.ndarray) -> list[dict[str, Any]]:
    """Some test images with their true class, and the predicted one with its probability."""
    found, names, tiles = checkpoint.predictions, checkpoint.classes, []
    for number in ids.tolist():
        image_HW3, true, predicted = (
            checkpoint.images[number],
            int(found.labels_N[number]),
            int(found.predicted_N[number]),
        )
        of_true, of_predicted = (percent(float(found.probabilities_NK[number, k])) for k in (true, predicted))
        tile = {"number": number, "true": names[true], "of_true": of_true, "right": true == predicted}
        tile |= {"uri": data_uri(image_HW3), "height": image_HW3.shape[0], "width": image_HW3.shape[1]}
        tiles.append(tile | {"predicted": f"{names[predicted]} ({of_predicted})"})
    return tiles


def where_strongest(map_hw: np.ndarray) -> str:
    """In words, the third of the height and of the width that the strongest pixel lies in."""
    if not map_hw.any():
        return "nothing speaks for the class"
    place = np.unravel_index(int(map_hw.argmax()), map_hw.shape)
    down, across = (min(2, int(3 * (at + 0.5) / size)) for at, size in zip(place, map_hw.shape, strict=True))
    return f"strongest in the {_NINTHS[3 * down + across]}"


def grad_cam(
    model: nn.Module, layers: Mapping[str, str], images_BCHW: Tensor, classes_B: Tensor
) -> dict[str, np.ndarray]:
    """Grad-CAM of some layers in one forward and backward pass; the model's parameters get no gradient.

    Args:
        model: maps images to logits (B, K), in evaluation mode if images are not to influence one another.
        layers: what to call each, and its dotted name in the model.
        images_BCHW: normalised, float32, on the model's device.
        classes_B: int64, the class whose logit is explained.

    Returns:
        float32 (B, h, w) for each layer, each image's largest value 1, or all 0 where no feature speaks for the class.
    """
    features: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and output.dim() == 4:
            features[name] = output
            return output.clone()  # what the next layer does in place then changes neither it nor its gradient
        return None

    try:
        with torch.enable_grad(), ExitStack() as stack:
            for name, path in layers.items():
                stack.enter_context(model.get_submodule(path).register_forward_hook(partial(keep, name)))
            # So that features have a gradient even where no parameter before them has one.
            logits_BK = model(images_BCHW.detach().clone().requires_grad_())
            score = logits_BK.gather(1, classes_B[:, None]).sum()
            gradients = torch.autograd.grad(score, [features[name] for name in layers])
    except (RuntimeError, KeyError, TypeError) as error:
        raise HarnessError(f"Grad-CAM cannot be worked out for this network: {error}", hint=_HINT) from error
    maps = {}
    for name, gradient_BChw in zip(layers, gradients, strict=True):
        weights_BC11 = gradient_BChw.mean(dim=(2, 3), keepdim=True)
        map_Bhw = (weights_BC11 * features[name].detach()).sum(1).clamp_min(0)
        largest_B11 = map_Bhw.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        maps[name] = np.asarray((map_Bhw / largest_B11).float().cpu())
    return maps


def layers_to_explain(model: nn.Module, images_BCHW: Tensor) -> dict[str, str]:
    """What Grad-CAM looks at: both branches of the last block, or any other network's last feature map; HarnessError
    where it has none near its end."""
    if isinstance(model, DualBranchNet):
        last = len(model.depthwise_branches) - 1
        return {f"{branch} branch": f"{branch}_branches.{last}" for branch in ("depthwise", "dilated")}
    found = _last_feature_map(model, images_BCHW[:1])
    if found is None:
        raise HarnessError(
            "This network has no features of channels, height and width near its end, which Grad-CAM needs "
            "(networks on tokens, as vision transformers are, have none)",
            hint=_HINT,
        )
    return {"last feature map": found}


@torch.no_grad()
def _last_feature_map(model: nn.Module, image_1CHW: Tensor) -> str | None:
    """The last module whose output is (1, C, h, w) with more than one pixel, if most of the network lies before it."""
    if getattr(model, "output_fmt", "NCHW") != "NCHW":  # timm's networks whose channels come last
        return None
    height, width = image_1CHW.shape[2:]
    calls: list[tuple[str, bool]] = []

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        h, w = output.shape[2:] if isinstance(output, Tensor) and output.dim() == 4 else (0, 0)
        # Attention's (1, heads, tokens, channels) has four sizes too, but not the image's proportions.
        in_proportion = abs(h / height - w / width) < 1 / min(height, width)
        calls.append((name, 1 < h <= height and 1 < w <= width and in_proportion))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_hook(partial(note, name)))
        model(image_1CHW)
    calls.pop()  # the network itself
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
