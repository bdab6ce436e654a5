"""The sections of a report on the network: where it looks, how far it sees, what it is made of."""

from __future__ import annotations

import numpy as np
import torch
from markupsafe import Markup

from harness.models.dual_branch import DualBranchNet
from harness.models.inspect import constraints, summarise
from harness.models.receptive_field import NOTE_OTHER_MODELS
from harness.reporting.architecture import architecture_diagram
from harness.reporting.axes import percent
from harness.reporting.evidence import Evidence
from harness.reporting.fields import BRANCHES, branch_fields, field_drawing
from harness.reporting.gallery import caption_of
from harness.reporting.gradcam import grad_cam, layers_to_explain
from harness.reporting.page import facts, folded, grid, missing, table
from harness.reporting.pictures import overlaid, picture, resized
from harness.training.predictions import worst_mistakes

EXPLAINED = 8  # images with Grad-CAM
PICTURE_PX = 96
_THIRDS = (("upper left", "upper middle", "upper right"), ("left", "centre", "right"),
           ("lower left", "lower middle", "lower right"))  # fmt: skip


def grad_cam_body(evidence: Evidence) -> Markup:
    """Grad-CAM of the predicted class, for the worst mistakes (or any images, where there are none)."""
    found = evidence.predictions()
    probabilities_NK, labels_N = found.probabilities_NK.numpy(), found.labels_N.numpy()
    ids = worst_mistakes(probabilities_NK, labels_N, most=EXPLAINED)
    which = "the worst mistakes" if len(ids) else "the first test images, since none is misclassified"
    ids = ids if len(ids) else np.arange(min(EXPLAINED, len(labels_N)))
    images_BCHW = evidence.normalised(ids)
    model = evidence.network()
    layers = layers_to_explain(model, images_BCHW)
    maps = grad_cam(model, layers, images_BCHW, torch.from_numpy(probabilities_NK[ids].argmax(1)))
    tiles = []
    for i, number in enumerate(ids.tolist()):
        true, predicted, _ = caption_of(probabilities_NK[number], int(labels_N[number]), evidence.classes())
        image = evidence.images()[number]
        small = resized(image, PICTURE_PX)
        shown = [_column("image", picture(image, f"Test image {number}: {true}"))]
        for name, map_BHW in maps.items():
            alt = f"Grad-CAM of the {name} for test image {number} as {predicted}: {where_strongest(map_BHW[i])}"
            heat = resized(np.ascontiguousarray(map_BHW[i], np.float32), PICTURE_PX)
            shown.append(_column(name.removesuffix(" branch"), picture(overlaid(small, heat), alt)))
        said = "taken for" if probabilities_NK[number].argmax() != labels_N[number] else "rightly taken for"
        words = Markup("{}, {} <strong>{}</strong>").format(true, said, predicted)
        tiles.append(Markup('<figure class="cam"><div>{}</div><figcaption>{}</figcaption></figure>').format(
            Markup("").join(shown), words))  # fmt: skip
    where = " and ".join(f"{name} ({path})" for name, path in layers.items())
    told = Markup(
        '<p class="lead">Of {}: {}. {}Yellow speaks most for the predicted class, dark blue not at all; each picture '
        "has its own scale, so brightness says where, not how much.</p>"
    )
    branches = "Both branches of the last block see the same input. " if len(layers) > 1 else ""
    return told.format(which, where, branches) + Markup('<div class="cams">{}</div>').format(Markup("").join(tiles))


def where_strongest(map_HW: np.ndarray) -> str:
    """In words, the third of the height and of the width that the strongest pixel lies in."""
    if not map_HW.any():
        return "nothing speaks for the class"
    row, column = np.unravel_index(int(map_HW.argmax()), map_HW.shape)
    down, across = (min(2, int(3 * (at + 0.5) / size)) for at, size in zip((row, column), map_HW.shape, strict=True))
    return f"strongest in the {_THIRDS[down][across]}"


def fields_body(evidence: Evidence) -> Markup:
    """The receptive fields of both branches around a test image, and in a table."""
    model = evidence.bare_network()
    if not isinstance(model, DualBranchNet):
        return missing(NOTE_OTHER_MODELS)
    fields = branch_fields(model)
    image_HW3 = evidence.some_image()
    rows = [
        [str(found.block), found.branch, f"{found.field_px} × {found.field_px}",
         "–" if found.seen_share is None else percent(found.seen_share)]
        for found in sorted(fields, key=lambda found: (found.block, found.branch))
    ]  # fmt: skip
    listed = table(
        ["Block", "Branch", "Field, pixels", "Of these seen"], rows, caption="Receptive fields at the end of each "
        "branch: extent, and the share of its pixels that have an influence", numeric=[2, 3],
    )  # fmt: skip
    return grid(*(field_drawing(image_HW3, fields, branch) for branch in BRANCHES)) + listed


def architecture_body(evidence: Evidence) -> Markup:
    """The drawing, for dual-branch networks."""
    model = evidence.bare_network()
    if not isinstance(model, DualBranchNet):
        name = evidence.recipe().model.name
        return missing(
            f"The drawing is for dual-branch networks alone, and this is {name}; its layers are listed below."
        )
    args = model.args
    told = facts(
        {
            "Each unit of a branch": f"3×3 on each channel, 1×1 over the channels, norm: {args.norm}, "
            f"{args.activation}, dropout {args.dropout:g}",
            "Branches are joined by": "sum" if args.merge == "sum" else "concatenation",
            "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        }
    )
    return grid(architecture_diagram(model, evidence.recipe().data.image_size_px), told)


def layers_body(evidence: Evidence) -> Markup:
    """The layer table with its totals, and the constraints."""
    size = evidence.recipe().data.image_size_px
    model = evidence.bare_network()
    summary = summarise(model, (3, size, size))
    totals = facts(
        {
            "Layers": f"{len(summary.rows):,}",
            "Parameters": f"{summary.total_parameters:,}",
            "Forward and backward pass of an image": f"{summary.forward_backward_mib:.2f} MiB",
            "Size of the parameters": f"{summary.parameters_mib:.2f} MiB",
        }
    )
    met = [[c.name, "yes" if c.passed else "no", c.detail] for c in constraints(model)]
    rows = [
        [row.label, row.module, " × ".join(map(str, row.output_shape[1:])) or "–", f"{row.parameters:,}"]
        for row in summary.rows
    ]
    listed = table(["Layer", "Module", "Output of an image", "Parameters"], rows, caption="Layers as they are run",
                   numeric=[2, 3])  # fmt: skip
    return (
        totals
        + table(["Constraint", "Met", "Found"], met, caption="The three constraints of the assignment")
        + folded(f"All {len(rows):,} layers", listed)
    )


def _column(name: str, image: Markup) -> Markup:
    return Markup('<span class="column">{}<span>{}</span></span>').format(image, name)
