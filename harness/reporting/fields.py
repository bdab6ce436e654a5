"""The receptive field of each branch, drawn around an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet
from harness.models.receptive_field import LayerField, measured_receptive_field, receptive_field
from harness.reporting.drawing import WIDTH, figure, legend, stroke, svg
from harness.reporting.pictures import data_uri

BRANCHES = ("depthwise", "dilated")
MARGIN = 10


@dataclass(frozen=True)
class BranchField:
    """What one unit at the end of a branch sees.

    Attributes:
        branch: depthwise or dilated.
        block: from 1.
        field_px: its extent, pixels of the image (the larger side).
        seen_share: of the pixels in that extent, those that have an influence; None where it was not measured.
    """

    branch: str
    block: int
    field_px: int
    seen_share: float | None


def branch_fields(model: DualBranchNet) -> list[BranchField]:
    """The field at the end of each branch of each block, measured on the network too."""
    last: dict[tuple[str, int], LayerField] = {}
    for row in receptive_field(model):
        if row.path in BRANCHES:
            last[row.path, row.block] = row
    return [
        BranchField(path, block, max(row.field_px), _seen_share(model, row.layer))
        for (path, block), row in last.items()
    ]


def field_drawing(image_HW3: np.ndarray, fields: Sequence[BranchField], branch: str) -> Markup:
    """An image with the fields of one branch around its centre, to scale, one frame a block."""
    own = [found for found in fields if found.branch == branch]
    image_px = max(image_HW3.shape[:2])
    extent = max([image_px, *(found.field_px for found in fields)])  # of all, so that both drawings have one scale
    scale = (WIDTH - 2 * MARGIN) / extent
    middle = WIDTH / 2
    side = image_px * scale
    parts = [
        Markup('<image class="pixels" href="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            data_uri(image_HW3), middle - side / 2, middle - side / 2, side, side
        )
    ]
    for found in own:
        half = found.field_px * scale / 2
        for kind in ("halo-line", "series"):  # the first is a wider line below, so that the frame shows on any image
            parts.append(
                Markup('<rect class="{}" style="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    kind, stroke(found.block - 1) if kind == "series" else "", middle - half, middle - half,
                    2 * half, 2 * half,
                )
            )  # fmt: skip
    words = [f"block {found.block}: {found.field_px} × {found.field_px} px" for found in own]
    description = (
        f"A test image of {image_px} × {image_px} pixels with the receptive field of a central unit at the end of the "
        f"{branch} branch of each block. " + "; ".join(words) + "."
    )
    title = f"{branch.capitalize()} branch"
    names = [(text, found.block - 1) for text, found in zip(words, own, strict=True)]
    return figure(title, "", svg(title, description, parts, height=WIDTH), legend(names))


def _seen_share(model: DualBranchNet, layer: str) -> float | None:
    try:
        return measured_receptive_field(model, layer).coverage
    except HarnessError:  # too large to be measured
        return None
