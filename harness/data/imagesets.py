"""What a source gives: where its images are, and then the images themselves.

Shapes: B images, H height, W width, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np


class LabelledImages(NamedTuple):
    """Images of one size, uint8 (B, H, W, 3), and their labels, int64 (B,)."""

    images_BHWC: np.ndarray  # noqa: N815
    labels_B: np.ndarray  # noqa: N815


@dataclass(frozen=True)
class ImageSets:
    """A whole data set in memory; labels are indices into `classes`."""

    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Located:
    """The input of a source, found but not yet read.

    Attributes:
        source: the name asked for.
        origin: where the images come from, for people.
        load: read and check everything; raises HarnessError.
        files: whose path, size and time of change tell whether a converted copy is up to date.
        options: whatever else decides the pixels or labels.
        left_out: what lies there and is no image of the data set, in words; empty where there is nothing.
    """

    source: str
    origin: str
    load: Callable[[], ImageSets]
    files: tuple[Path, ...] = ()
    options: Mapping[str, int | str] = field(default_factory=dict)
    left_out: str = ""
