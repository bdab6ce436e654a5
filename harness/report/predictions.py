"""The sections of a report on the answers to the test images: confusion matrix, accuracy by class, calibration.

Calibration: Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equation 3:
images are sorted by the probability of their predicted class into M bins of equal width, ((m - 1)/M, m/M], and

    ECE = Σ_m |B_m|/N · |accuracy(B_m) - confidence(B_m)|

Legend of shape letters: N images, K classes, M bins; in a matrix rows are true classes and columns predicted ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from harness.report.axes import Axis, percent
from harness.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    bar_chart,
    element,
    figure,
    frame,
    heat_map,
    svg,
)
from harness.report.evidence import Evidence
from harness.report.page import facts, folded, grid, missing, table

MOST_CLASSES_DRAWN = 30
BINS = 15  # as in the paper's tables


def confusion_body(evidence: Evidence) -> Markup:
    """The matrix, and the mistakes that are made most often."""
    matrix_KK, names = _matrix(evidence)
    rows = [
        [names[true], names[predicted], f"{count:,}", percent(count / max(1, matrix_KK[true].sum()))]
        for true, predicted, count in most_confused(matrix_KK, most=10)
    ]
    header = ["True class", "Predicted", "Images", "Of the class"]
    commonest = table(header, rows, caption="Commonest mistakes", numeric=[2, 3])
    if not rows:
        commonest = missing("There is no mistake.")
    if len(names) > MOST_CLASSES_DRAWN:
        words = f"A matrix of {len(names):,} classes cannot be read: only the commonest mistakes are listed."
        return missing(words) + commonest
    drawn = heat_map(
        matrix_KK / np.maximum(1, matrix_KK.sum(1, keepdims=True)),
        names,
        names,
        title="Confusion matrix",
        description="How many images of each true class (row) are taken for each class (column); the commonest "
        "mistakes are listed beside it.",
        row_label="true class",
        column_label="predicted class",
        texts=[[str(count) for count in row] for row in matrix_KK.tolist()],
    )
    return grid(drawn, commonest)


def class_body(evidence: Evidence) -> Markup:
    """Accuracy (recall) and precision of each class."""
    matrix_KK, names = _matrix(evidence)
    recall_K, precision_K = per_class(matrix_KK)
    rows = [
        [names[k], f"{int(matrix_KK[k].sum()):,}", _share(recall_K[k]), _share(precision_K[k])]
        for k in range(len(names))
    ]
    header = ["Class", "Images", "Accuracy", "Precision"]
    listed = table(header, rows, caption="Accuracy (recall) and precision of each class", numeric=[1, 2, 3])
    known = np.flatnonzero(np.isfinite(recall_K)).tolist()
    if len(names) > MOST_CLASSES_DRAWN:
        known = sorted(known, key=lambda k: float(recall_K[k]))[:MOST_CLASSES_DRAWN]
        listed = folded(f"All {len(names):,} classes", listed)
    drawn = bar_chart(
        [names[k] for k in known],
        [float(recall_K[k]) for k in known],
        title="Accuracy by class" if len(known) == len(names) else f"The {len(known)} classes of lowest accuracy",
        description="The share of each class's test images that are classified rightly.",
    )
    return grid(drawn, listed)


def calibration_body(evidence: Evidence) -> Markup:
    """Reliability diagram and expected calibration error."""
    found = evidence.predictions()
    binned = calibration(found.probabilities_NK.numpy(), found.labels_N.numpy())
    confidence = float(found.probabilities_NK.max(1).values.double().mean())
    accuracy = float(found.correct_N.double().mean())
    figures = {
        f"Expected calibration error (ECE, {BINS} bins)": f"{binned.ece:.4f}",
        "Mean probability of the predicted class": percent(confidence),
        "Accuracy": percent(accuracy),
        "On the whole the network is": sureness(confidence, accuracy),
    }
    return grid(reliability_diagram(binned), facts(figures))


def confusion_matrix(labels_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> np.ndarray:
    """int64 (K, K): how many images of each true class (row) were predicted as each class (column)."""
    pairs_N = labels_N.astype(np.int64) * classes + predicted_N.astype(np.int64)
    return np.bincount(pairs_N, minlength=classes * classes).reshape(classes, classes)


def per_class(matrix_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision of each class, float64 (K,) both; NaN for a class without images or predictions."""
    right_K = np.diag(matrix_KK).astype(np.float64)
    true_K, predicted_K = matrix_KK.sum(1), matrix_KK.sum(0)
    return right_K / np.where(true_K, true_K, np.nan), right_K / np.where(predicted_K, predicted_K, np.nan)


def most_confused(matrix_KK: np.ndarray, *, most: int) -> list[tuple[int, int, int]]:
    """The commonest mistakes: (true class, predicted class, images), most images first, none without an image."""
    wrong_KK = matrix_KK - np.diag(np.diag(matrix_KK))
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, wrong_KK.shape), strict=True)
    return [(int(i), int(j), int(wrong_KK[i, j])) for i, j in pairs if wrong_KK[i, j]]


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
    bins, floor = len(found.counts_M), HEIGHT - BOTTOM
    x_axis, y_axis = Axis(0, 1, LEFT, WIDTH - RIGHT), Axis(0, 1, floor, TOP)
    edges = x_axis.place(np.arange(bins + 1) / bins)
    parts = [frame(x_axis, y_axis, "probability of the predicted class", "accuracy", percent, percent)]
    spoken = []
    for m in np.flatnonzero(found.counts_M).tolist():
        accuracy, confidence = float(found.accuracy_M[m]), float(found.confidence_M[m])
        words = (
            f"{percent(m / bins)} to {percent((m + 1) / bins)}: {found.counts_M[m]:,} images, "
            f"mean probability {percent(confidence)}, accuracy {percent(accuracy)}"
        )
        spoken.append(words)
        # No part lies over another: the gap begins where the bar ends.
        bar_end, gap_end = y_axis.place(np.sort([accuracy, confidence])).tolist()
        place = {"x": float(edges[m] + 1), "width": float(edges[m + 1] - edges[m] - 2)}
        kind = "gap" if confidence >= accuracy else "gap unsure"
        bar = element("rect", class_="bar", **_between(bar_end, floor, **place))
        gap = element("rect", class_=kind, **_between(gap_end, bar_end, **place))
        parts.append(element("g", element("title", words), bar, gap))
    parts.append(element("path", class_="diagonal", d=f"M{LEFT} {floor}L{WIDTH - RIGHT} {TOP}"))
    description = (
        f"Accuracy over the probability of the predicted class, in {bins} bins; on the diagonal both are equal. "
        f"Expected calibration error {percent(found.ece)}. {'; '.join(spoken)}."
    )
    below = Markup(
        '<ul class="legend"><li><span class="patch bar"></span>accuracy</li>'
        '<li><span class="patch gap"></span>mean probability beyond it: too sure</li>'
        '<li><span class="patch gap unsure"></span>accuracy beyond the mean probability: not sure enough</li></ul>'
    )
    return figure("Reliability diagram", svg("Reliability diagram", description, parts), below)


def _between(top: float, bottom: float, *, x: float, width: float) -> dict[str, float]:
    return {"x": x, "y": top, "width": width, "height": bottom - top}


def sureness(confidence: float, accuracy: float) -> str:
    """How a mean probability compares with the accuracy, both shares; alike is what differs by no 0.05 points."""
    if abs(confidence - accuracy) < 5e-4:
        return "as sure as it is right"
    return "too sure" if confidence > accuracy else "not sure enough"


def _matrix(evidence: Evidence) -> tuple[np.ndarray, list[str]]:
    found, names = evidence.predictions(), evidence.classes()
    return confusion_matrix(found.labels_N.numpy(), found.predicted_N.numpy(), len(names)), names


def _share(value: float) -> str:
    return percent(float(value)) if np.isfinite(value) else "–"
