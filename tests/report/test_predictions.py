"""What a report says of predictions, against plain loops and scikit-learn: calibration, confusion, worst mistakes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import precision_recall_fscore_support

from harness.report.predictions import (
    calibration,
    confusion_matrix,
    most_confused,
    per_class,
    reliability_diagram,
    sureness,
)
from harness.training.inference import worst_mistakes


def random_predictions(seed: int, images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.3), images).astype(np.float32)
    return probabilities, rng.integers(0, classes, images)


def naive_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Equation 3 of Guo et al. 2017, an image at a time, in float64."""
    members: list[list[int]] = [[] for _ in range(bins)]
    for i, row in enumerate(probabilities):
        confidence = float(max(row))
        for m in range(bins):
            if m / bins < confidence <= (m + 1) / bins or (m == bins - 1 and confidence > 1):
                members[m].append(i)
    total = 0.0
    for inside in filter(None, members):
        accuracy = sum(int(np.argmax(probabilities[i])) == labels[i] for i in inside) / len(inside)
        confidence = sum(float(max(probabilities[i])) for i in inside) / len(inside)
        total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


def test_calibration_by_hand() -> None:
    """Ten images at 90 % of which seven are right, ten at 60 % of which six are: (0.2 + 0) / 2."""
    rows = [[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10
    labels = [0] * 7 + [1] * 3 + [1] * 6 + [0] * 4
    found = calibration(np.array(rows), np.array(labels), bins=5)
    assert found.ece == pytest.approx(0.1)
    assert found.counts_M.tolist() == [0, 0, 10, 0, 10]
    assert math.isnan(found.confidence_M[0])
    edges = calibration(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([0, 0]), bins=4)
    assert edges.counts_M.tolist() == [0, 1, 0, 1]  # an edge belongs to the bin below


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(2, 12), st.integers(1, 20))
def test_calibration_is_that_of_a_plain_loop(seed: int, images: int, classes: int, bins: int) -> None:
    probabilities, labels = random_predictions(seed, images, classes)
    found = calibration(probabilities, labels, bins=bins)
    assert found.ece == pytest.approx(naive_ece(probabilities, labels, bins), abs=1e-12)
    assert found.counts_M.sum() == images


def test_in_the_diagram_no_gap_lies_over_a_bar_and_each_colour_is_explained() -> None:
    sure, unsure = [0.9, 0.1], [0.6, 0.4]  # half of the former are right, all of the latter
    drawn = str(reliability_diagram(calibration(np.array([sure, sure, unsure, unsure]), np.array([0, 1, 0, 0]))))
    assert "Expected calibration error 40%" in drawn
    assert "nan" not in drawn
    pairs = re.findall(r'<rect class="bar"([^>]*)/><rect class="gap[^"]*"([^>]*)/>', drawn)
    assert len(pairs) == 2
    for bar, gap in pairs:
        place = [{n: float(v) for n, v in re.findall(r'(y|height)="([\d.]+)"', rect)} for rect in (bar, gap)]
        assert place[1]["y"] + place[1]["height"] == pytest.approx(place[0]["y"], abs=0.11)
    legend = drawn.split('class="legend"')[1]
    for kind in ("bar", "gap", "gap unsure"):
        assert drawn.count(f'<rect class="{kind}"') == (2 if kind == "bar" else 1)
        assert f'class="patch {kind}"' in legend


@pytest.mark.parametrize(
    ("confidence", "accuracy", "text"),
    [
        (0.6, 0.5, "too sure"),
        (0.5, 0.6, "not sure enough"),
        (1.0, 1.0, "as sure as it is right"),
        (0.99999, 1.0, "as sure as it is right"),
    ],
)
def test_how_sure_a_network_is(confidence: float, accuracy: float, text: str) -> None:
    assert sureness(confidence, accuracy) == text


def test_confusion_recall_and_precision_are_scikit_learns() -> None:
    probabilities, labels = random_predictions(1, 500, 7)
    predicted = probabilities.argmax(1)
    matrix = confusion_matrix(labels, predicted, 7)
    assert np.array_equal(matrix, sklearn_confusion_matrix(labels, predicted, labels=range(7)))
    precision, recall, _, _ = precision_recall_fscore_support(labels, predicted)
    np.testing.assert_allclose(per_class(matrix), (recall, precision))


def test_classes_without_images_and_the_commonest_mistakes() -> None:
    matrix = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    recall, precision = per_class(matrix)
    assert recall[:2].tolist() == [0.8, 0.5]
    assert np.isnan([recall[2], precision[2]]).all()
    assert most_confused(matrix, most=10) == [(1, 0, 5), (0, 1, 2)]
    assert most_confused(matrix, most=1) == [(1, 0, 5)]


def test_the_worst_mistakes_come_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.9, 0.1]])
    assert worst_mistakes(probabilities, np.array([1, 1, 1, 1]), most=5).tolist() == [0, 3, 2]
    assert worst_mistakes(probabilities, np.array([1, 1, 1, 1]), most=1).tolist() == [0]
    assert worst_mistakes(probabilities, np.array([0, 1, 0, 0]), most=5).tolist() == []


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_no_mistake_that_is_left_out_is_worse(seed: int) -> None:
    probabilities, labels = random_predictions(seed, 200, 5)
    shown = worst_mistakes(probabilities, labels, most=10)
    wrong = {i for i in range(200) if int(probabilities[i].argmax()) != labels[i]}
    assert set(shown.tolist()) <= wrong
    losses = [-math.log(max(1e-300, float(probabilities[i, labels[i]]))) for i in range(200)]
    assert min(losses[i] for i in shown) >= max((losses[i] for i in wrong - set(shown.tolist())), default=0)
