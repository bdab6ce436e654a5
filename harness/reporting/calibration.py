"""How far a network's probabilities can be believed: reliability diagram and expected calibration error.

Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equation 3: images are
sorted by the probability of their predicted class into M bins of equal width, ((m - 1)/M, m/M], and

    ECE = Σ_m |B_m|/N · |accuracy(B_m) - confidence(B_m)|

Legend of shape letters: N images, K classes, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from harness.reporting.axes import Axis, percent
from harness.reporting.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, figure, frame, svg

BINS = 15  # as in the paper's tables


@dataclass(frozen=True)
class Calibration:
    """Bins of equal width over the probability of the predicted class.

    Attributes:
        counts_M: images in each bin, int64.
        confidence_M: their mean probability of the predicted class; NaN where there is no image.
        accuracy_M: the share of them that are classified rightly; NaN where there is no image.
        ece: expected calibration error, 0 to 1; 0 is perfect.
    """

    counts_M: np.ndarray  # noqa: N815
    confidence_M: np.ndarray  # noqa: N815
    accuracy_M: np.ndarray  # noqa: N815
    ece: float


def calibration(probabilities_NK: np.ndarray, labels_N: np.ndarray, *, bins: int = BINS) -> Calibration:
    """Sort predictions into bins, in float64.

    Args:
        probabilities_NK: rows of sum 1; the predicted class is the first of the largest.
        labels_N: true classes.
        bins: M, ≥ 1.
    """
    confidence_N = probabilities_NK.max(1).astype(np.float64)
    correct_N = probabilities_NK.argmax(1) == labels_N
    # The smallest m with confidence <= m / M; sums of rounded probabilities may pass 1 by a bit.
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    counts_M = np.bincount(bin_N, minlength=bins)
    filled_M = np.where(counts_M, counts_M, np.nan)
    confidence_M = np.bincount(bin_N, confidence_N, bins) / filled_M
    accuracy_M = np.bincount(bin_N, correct_N, bins) / filled_M
    gaps_M = np.nan_to_num(np.abs(accuracy_M - confidence_M))
    return Calibration(counts_M, confidence_M, accuracy_M, float((counts_M * gaps_M).sum() / max(1, len(labels_N))))


def reliability_diagram(found: Calibration) -> Markup:
    """A bar for each bin that has images, up to its accuracy or its mean confidence, whichever is lower, with the gap
    to the other above it, and the diagonal."""
    bins = len(found.counts_M)
    x_axis, y_axis = Axis(0, 1, LEFT, WIDTH - RIGHT), Axis(0, 1, HEIGHT - BOTTOM, TOP)
    edges = x_axis.place(np.arange(bins + 1) / bins)
    parts = [frame(x_axis, y_axis, "probability of the predicted class", "accuracy", percent, percent)]
    spoken = []
    for m in range(bins):
        if not found.counts_M[m]:
            continue
        accuracy, confidence = float(found.accuracy_M[m]), float(found.confidence_M[m])
        words = (
            f"{percent(m / bins)} to {percent((m + 1) / bins)}: {found.counts_M[m]:,} images, "
            f"mean probability {percent(confidence)}, accuracy {percent(accuracy)}"
        )
        spoken.append(words)
        low, high = sorted((accuracy, confidence))
        kind = "gap" if confidence >= accuracy else "gap unsure"
        foot, top = y_axis.place(np.array([low, high]))  # no part lies over another: the gap begins where the bar ends
        left, width = edges[m] + 1, edges[m + 1] - edges[m] - 2
        parts.append(
            Markup(
                '<g><title>{}</title><rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/></g>'
            ).format(words, left, foot, width, HEIGHT - BOTTOM - foot, kind, left, top, width, foot - top)
        )
    parts.append(Markup('<path class="diagonal" d="M{} {}L{} {}"/>').format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, TOP))
    description = (
        f"Accuracy over the probability of the predicted class, in {bins} bins; on the diagonal both are equal. "
        f"Expected calibration error {percent(found.ece)}. " + "; ".join(spoken) + "."
    )
    below = Markup(
        '<ul class="legend"><li><span class="patch bar"></span>accuracy</li>'
        '<li><span class="patch gap"></span>mean probability beyond it: too sure</li>'
        '<li><span class="patch gap unsure"></span>accuracy beyond the mean probability: not sure enough</li></ul>'
    )
    return figure("Reliability diagram", "", svg("Reliability diagram", description, parts), below)
