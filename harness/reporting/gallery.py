"""The mistakes of a network that are worth a look, and the pictures of them.

Legend of shape letters: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from harness.reporting.axes import percent
from harness.reporting.pictures import picture


def caption_of(probabilities_K: np.ndarray, label: int, classes: Sequence[str]) -> tuple[str, str, str]:
    """True class, predicted class and its probability, and the probability of the true class, in words."""
    predicted = int(probabilities_K.argmax())
    return (
        name_of(classes, label),
        f"{name_of(classes, predicted)} ({percent(float(probabilities_K[predicted]))})",
        percent(float(probabilities_K[label])),
    )


def name_of(classes: Sequence[str], label: int) -> str:
    """A class by its name, or its number where it has none."""
    return classes[label] if 0 <= label < len(classes) else f"class {label}"


def gallery(
    images_NHW3: np.ndarray,
    probabilities_NK: np.ndarray,
    labels_N: np.ndarray,
    ids: np.ndarray,
    classes: Sequence[str],
) -> Markup:
    """Pictures of some test images with their true and predicted classes."""
    tiles = []
    for number in ids.tolist():
        true, predicted, of_true = caption_of(probabilities_NK[number], int(labels_N[number]), classes)
        alt = f"Test image {number}: {true}, taken for {predicted}"
        words = Markup(
            '<span class="true">{}</span><span>taken for <strong>{}</strong></span>'
            '<span class="muted">true class {}</span>'
        ).format(true, predicted, of_true)
        tiles.append(Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(
            picture(images_NHW3[number], alt), words))  # fmt: skip
    return Markup('<div class="gallery">{}</div>').format(Markup("").join(tiles))
