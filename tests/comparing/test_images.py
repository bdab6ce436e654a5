"""When answers may be compared image by image."""

from __future__ import annotations

import numpy as np
import pytest

from harness.comparing.images import Answers, why_not_paired


def answers(labels: list[int], digest: str = "1") -> Answers:
    return Answers(digest, np.array(labels), np.ones(len(labels), bool))


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([answers([1, 2])], None),
        ([answers([1, 2]), answers([1, 2])], None),
        ([answers([1, 2]), answers([1, 2], "2")], "other images"),
        ([answers([2, 1])], "labels of their test images differ"),
        ([answers([1, 2, 3])], "tested on 2 and 3 images"),
    ],
)
def test_only_the_same_images_with_the_same_labels_are_paired(others: list[Answers], why: str | None) -> None:
    found = why_not_paired([answers([1, 2]), *others])
    assert (found is None) if why is None else (found is not None and why in found)
