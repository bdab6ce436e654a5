"""Which classes are taken for which.

Legend of shape letters: N images, K classes; in a matrix rows are true classes and columns predicted ones.
"""

from __future__ import annotations

import numpy as np


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
    wrong_KK = matrix_KK.copy()
    np.fill_diagonal(wrong_KK, 0)
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[:most]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong_KK.shape), strict=True)]
    return [(i, j, int(wrong_KK[i, j])) for i, j in pairs if wrong_KK[i, j]]
