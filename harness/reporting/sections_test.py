"""The sections of a report on what a checkpoint says of the test images."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from harness.reporting.axes import percent
from harness.reporting.calibration import BINS, calibration, reliability_diagram
from harness.reporting.charts import bar_chart, heat_map
from harness.reporting.confusion import confusion_matrix, most_confused, per_class
from harness.reporting.evidence import Evidence
from harness.reporting.gallery import gallery, name_of
from harness.reporting.page import facts, folded, grid, missing, table
from harness.training.predictions import worst_mistakes

MOST_CLASSES_DRAWN = 30
MISTAKES = 24  # in the gallery


def confusion_body(evidence: Evidence) -> Markup:
    """The matrix, and the mistakes that are made most often."""
    matrix_KK, names = _matrix(evidence)
    rows = [
        [names[true], names[predicted], f"{count:,}", percent(count / max(1, matrix_KK[true].sum()))]
        for true, predicted, count in most_confused(matrix_KK, most=10)
    ]
    header = ["True class", "Predicted", "Images", "Of the class"]
    commonest = (
        table(header, rows, caption="Commonest mistakes", numeric=[2, 3]) if rows else missing("There is no mistake.")
    )
    if len(names) > MOST_CLASSES_DRAWN:
        told = f"A matrix of {len(names):,} classes cannot be read: only the commonest mistakes are listed."
        return missing(told) + commonest
    shares_KK = matrix_KK / np.maximum(1, matrix_KK.sum(1, keepdims=True))
    drawn = heat_map(
        shares_KK,
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
    known = [k for k in range(len(names)) if np.isfinite(recall_K[k])]
    if len(names) > MOST_CLASSES_DRAWN:
        known = sorted(known, key=lambda k: float(recall_K[k]))[:MOST_CLASSES_DRAWN]
        listed = folded(f"All {len(names):,} classes", listed)
    drawn = bar_chart(
        [names[k] for k in known],
        [float(recall_K[k]) for k in known],
        title="Accuracy by class" if len(known) == len(names) else f"The {len(known)} classes of lowest accuracy",
        description="The share of each class's test images that are classified rightly.",
        as_percent=True,
        largest=1.0,
    )
    return grid(drawn, listed)


def calibration_body(evidence: Evidence) -> Markup:
    """Reliability diagram and expected calibration error."""
    found = evidence.predictions()
    binned = calibration(found.probabilities_NK.numpy(), found.labels_N.numpy())
    confidence = float(found.probabilities_NK.max(1).values.double().mean())
    accuracy = float(found.correct_N.double().mean())
    told = facts(
        {
            f"Expected calibration error (ECE, {BINS} bins)": f"{binned.ece:.4f}",
            "Mean probability of the predicted class": percent(confidence),
            "Accuracy": percent(accuracy),
            "On the whole the network is": sureness(confidence, accuracy),
        }
    )
    return grid(reliability_diagram(binned), told)


def sureness(confidence: float, accuracy: float) -> str:
    """How a mean probability compares with the accuracy, both shares; alike is what differs by no 0.05 points."""
    if abs(confidence - accuracy) < 5e-4:
        return "as sure as it is right"
    return "too sure" if confidence > accuracy else "not sure enough"


def gallery_body(evidence: Evidence) -> Markup:
    """Pictures of the worst mistakes."""
    found = evidence.predictions()
    probabilities_NK, labels_N = found.probabilities_NK.numpy(), found.labels_N.numpy()
    ids = worst_mistakes(probabilities_NK, labels_N, most=MISTAKES)
    if not len(ids):
        return missing("No test image is misclassified.")
    return gallery(evidence.images(), probabilities_NK, labels_N, ids, _names(evidence, probabilities_NK.shape[1]))


def _matrix(evidence: Evidence) -> tuple[np.ndarray, list[str]]:
    found = evidence.predictions()
    classes = found.logits_NK.shape[1]
    matrix_KK = confusion_matrix(found.labels_N.numpy(), found.predicted_N.numpy(), classes)
    return matrix_KK, _names(evidence, classes)


def _names(evidence: Evidence, classes: int) -> list[str]:
    known = evidence.classes()
    return [name_of(known, k) for k in range(classes)]


def _share(value: float) -> str:
    return percent(float(value)) if np.isfinite(value) else "–"
