"""The sections of a report on the network itself: how far its branches see, its drawing, its layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from harness.models.dual_branch import DualBranchNet
from harness.models.summary import (
    NOTE_OTHER_MODELS,
    LayerField,
    constraints,
    measured_receptive_field,
    receptive_field,
    summarise,
)
from harness.report.axes import percent
from harness.report.charts import WIDTH, element, figure, legend, stroke, svg
from harness.report.evidence import Evidence
from harness.report.explain import data_uri
from harness.report.page import facts, folded, grid, missing, table

BRANCHES = ("depthwise", "dilated")
MARGIN = 10  # around a drawing of fields
BOX_WIDTH, BOX_HEIGHT, LOW_BOX_HEIGHT, GAP = 214, 42, 28, 12
BRANCH_X = {"depthwise": 119, "dilated": WIDTH - 119}
MIDDLE = WIDTH // 2


def fields_body(evidence: Evidence) -> Markup:
    """The receptive fields at the end of both branches of each block, around a test image, and in a table."""
    model = evidence.bare_network()
    if not isinstance(model, DualBranchNet):
        return missing(NOTE_OTHER_MODELS)
    fields = {(row.block, row.path): row for row in receptive_field(model) if row.path in BRANCHES}  # the last of each
    rows = []
    for (block, branch), row in sorted(fields.items()):
        measured = measured_receptive_field(model, row)
        seen = percent(measured.coverage) if measured else "–"  # too large to be measured
        rows.append([str(block), branch, f"{max(row.field_px)} × {max(row.field_px)}", seen])
    caption = "Receptive fields at the end of each branch: extent, and the share of its pixels that have an influence"
    listed = table(["Block", "Branch", "Field, pixels", "Of these seen"], rows, caption=caption, numeric=[2, 3])
    image_HW3 = evidence.some_image()
    return grid(*(field_drawing(image_HW3, list(fields.values()), branch) for branch in BRANCHES)) + listed


def field_drawing(image_HW3: np.ndarray, fields: list[LayerField], branch: str) -> Markup:
    """An image with the fields of one branch around its centre, to scale, one frame a block."""
    image_px = max(image_HW3.shape[:2])
    extent = max([image_px, *(max(row.field_px) for row in fields)])  # of all, so that both drawings have one scale

    def centred(size_px: int) -> dict[str, float]:
        half = size_px * (WIDTH - 2 * MARGIN) / extent / 2
        return {"x": WIDTH / 2 - half, "y": WIDTH / 2 - half, "width": 2 * half, "height": 2 * half}

    parts = [element("image", class_="pixels", href=data_uri(image_HW3), **centred(image_px))]
    names = []
    for row in fields:
        if row.path != branch:
            continue
        size_px, style = max(row.field_px), row.block - 1
        # A wider line below the frame, so that it shows on any image.
        parts.append(element("rect", class_="halo-line", style="", **centred(size_px)))
        parts.append(element("rect", class_="series", style=stroke(style), **centred(size_px)))
        names.append((f"block {row.block}: {size_px} × {size_px} px", style))
    description = (
        f"A test image of {image_px} × {image_px} pixels with the receptive field of a central unit at the end of the "
        f"{branch} branch of each block. " + "; ".join(name for name, _ in names) + "."
    )
    title = f"{branch.capitalize()} branch"
    return figure(title, svg(title, description, parts, height=WIDTH), legend(names))


def architecture_body(evidence: Evidence) -> Markup:
    """The drawing, for dual-branch networks."""
    model, recipe = evidence.bare_network(), evidence.recipe()
    if not isinstance(model, DualBranchNet):
        return missing(
            f"The drawing is for dual-branch networks alone, and this is {recipe.model.name}; its layers are listed "
            "below."
        )
    args = model.args
    settings = {
        "Each unit of a branch": f"3×3 on each channel, 1×1 over the channels, norm: {args.norm}, "
        f"{args.activation}, dropout {args.dropout:g}",
        "Branches are joined by": "sum" if args.merge == "sum" else "concatenation",
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    return grid(architecture_diagram(model, recipe.data.image_size_px), facts(settings))


def layers_body(evidence: Evidence) -> Markup:
    """The layer table with its totals, and the constraints."""
    size = evidence.recipe().data.image_size_px
    model = evidence.bare_network()
    summary = summarise(model, (3, size, size))
    totals = {
        "Layers": f"{len(summary.rows):,}",
        "Parameters": f"{summary.total_parameters:,}",
        "Forward and backward pass of an image": f"{summary.forward_backward_mib:.2f} MiB",
        "Size of the parameters": f"{summary.parameters_mib:.2f} MiB",
    }
    met = [[c.name, "yes" if c.passed else "no", c.detail] for c in constraints(model)]
    rows = [
        [row.label, row.module, " × ".join(map(str, row.output_shape[1:])) or "–", f"{row.parameters:,}"]
        for row in summary.rows
    ]
    header = ["Layer", "Module", "Output of an image", "Parameters"]
    listed = table(header, rows, caption="Layers as they are run", numeric=[2, 3])
    return (
        facts(totals)
        + table(["Constraint", "Met", "Found"], met, caption="The three constraints of the assignment")
        + folded(f"All {len(rows):,} layers", listed)
    )


def architecture_diagram(model: DualBranchNet, image_size_px: int) -> Markup:
    """Both branches of each block side by side, from the image at the top to the classes at the bottom."""
    args, sheet = model.args, _Sheet()
    channels, size = model.in_chans, image_size_px
    sheet.stage(f"image {channels} × {size} × {size}")
    if args.stem is not None:
        sheet.down(GAP)
        sheet.stage("stem", f"3×3: {channels} → {args.stem}")
        channels = args.stem
    spoken = []
    for number, (widths, dilations) in enumerate(zip(args.widths, args.unit_dilations(), strict=True), start=1):
        sheet.block(number, [channels, *widths], dilations, "+" if args.merge == "sum" else "concat")
        spoken.append(f"block {number} from {channels} to {' to '.join(map(str, widths))} channels at {size} × {size}")
        channels = widths[-1] * (2 if args.merge == "concat" else 1)
        sheet.note(f"{channels} × {size} × {size}")
        if number <= len(args.transition_widths):
            after = args.transition_widths[number - 1]
            sheet.stage("max-pool 2×2", f"1×1: {channels} → {after}")
            channels, size = after, size // 2
            sheet.note(f"{channels} × {size} × {size}")
    height, width = model.final_size
    sheet.stage(f"mean over {height}×{width}", f"1×1: {channels} → {args.head_width}")
    sheet.down(GAP)
    sheet.stage(f"1×1: {args.head_width} → {model.num_classes} classes")
    description = (
        f"In each block a depthwise and a dilated branch see the same input; their outputs are joined by {args.merge}. "
        f"{'; '.join(spoken)}. Then a mean, {args.head_width} hidden channels and {model.num_classes} classes."
    )
    return figure("Dual-branch network", svg("Architecture", description, sheet.parts, height=sheet.y + 8))


@dataclass
class _Sheet:
    """What is drawn so far, and how far down."""

    parts: list[Markup] = field(default_factory=list)
    y: int = 8

    def box(self, x: int, y: int, lines: tuple[str, ...], kind: str, *, width: int = BOX_WIDTH) -> int:
        """A box with one or two lines of text; returns its height."""
        low = len(lines) == 1
        height = LOW_BOX_HEIGHT if low else BOX_HEIGHT
        place = {"x": x - width // 2, "y": y, "width": width, "height": height}
        self.parts.append(element("rect", class_=f"box {kind}", **place, rx=6))
        for i, line in enumerate(lines):
            self.parts.append(element("text", line, class_="middle", x=x, y=y + (19 if low else 18) + 16 * i))
        return height

    def line(self, path: str) -> None:
        self.parts.append(element("path", class_="axis", d=path))

    def down(self, by: int) -> None:
        self.line(f"M{MIDDLE} {self.y}v{by}")
        self.y += by

    def note(self, text: str) -> None:
        """A size of the features, to the right of the middle line."""
        self.parts.append(element("text", text, class_="label", x=MIDDLE + 8, y=self.y + 16))
        self.down(24)

    def stage(self, *lines: str) -> None:
        """A box in the middle."""
        self.y += self.box(MIDDLE, self.y, lines, "shared")

    def block(self, number: int, channels: list[int], dilations: tuple[int, ...], join: str) -> None:
        """Both branches below their headings, and where they join; `channels` of the input and of each unit."""
        self.down(GAP)
        left, right = BRANCH_X.values()
        self.line(f"M{left} {self.y + 26}V{self.y}H{right}V{self.y + 26}")
        for branch, x in BRANCH_X.items():
            heading = f"{branch} branch {number}"
            self.parts.append(element("text", heading, class_="label middle halo", x=x, y=self.y + 17))
        self.y += 26
        for unit, dilation in enumerate(dilations):
            for branch, x in BRANCH_X.items():
                taps = f"3×3, dilation {dilation}" if branch == "dilated" and dilation > 1 else "3×3"
                self.box(x, self.y, (taps, f"1×1: {channels[unit]} → {channels[unit + 1]}"), branch)
                self.line(f"M{x} {self.y + BOX_HEIGHT}v{GAP}")
            self.y += BOX_HEIGHT + GAP
        self.line(f"M{left} {self.y}V{self.y + 16}H{right}V{self.y}")
        self.box(MIDDLE, self.y + 2, (join,), "shared", width=32 if join == "+" else 76)
        self.y += 30
