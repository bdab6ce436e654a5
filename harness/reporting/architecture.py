"""The dual-branch network as a drawing, from the network's own settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from harness.models.dual_branch import DualBranchNet
from harness.reporting.drawing import WIDTH, figure, svg

BOX_WIDTH, BOX_HEIGHT, GAP = 214, 42, 12
COLUMNS = {"depthwise": 119, "dilated": WIDTH - 119}
MIDDLE = WIDTH // 2


@dataclass
class _Sheet:
    """What is drawn so far, and how far down."""

    parts: list[Markup] = field(default_factory=list)
    y: int = 8

    def box(self, x: int, y: int, lines: tuple[str, ...], kind: str, *, width: int = BOX_WIDTH) -> None:
        height = BOX_HEIGHT if len(lines) > 1 else 28
        self.parts.append(
            Markup('<rect class="box {}" x="{}" y="{}" width="{}" height="{}" rx="6"/>').format(
                kind, x - width // 2, y, width, height
            )
        )
        for i, line in enumerate(lines):
            at = y + 19 + 16 * i - (1 if len(lines) > 1 else 0)
            self.parts.append(Markup('<text class="middle" x="{}" y="{}">{}</text>').format(x, at, line))

    def line(self, path: str) -> None:
        self.parts.append(Markup('<path class="axis" d="{}"/>').format(path))

    def down(self, by: int) -> None:
        self.line(f"M{MIDDLE} {self.y}v{by}")
        self.y += by

    def note(self, text: str) -> None:
        """A size of the features, to the right of the middle line."""
        self.parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(MIDDLE + 8, self.y + 16, text))
        self.down(24)

    def stage(self, *lines: str) -> None:
        """A box in the middle."""
        self.box(MIDDLE, self.y, lines, "shared")
        self.y += BOX_HEIGHT if len(lines) > 1 else 28


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
        _block(sheet, number, channels, widths, dilations, args.merge)
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
        + "; ".join(spoken) + f". Then a mean, {args.head_width} hidden channels and {model.num_classes} classes."
    )  # fmt: skip
    drawing = svg("Architecture", description, sheet.parts, height=sheet.y + 8)
    return figure("Dual-branch network", "", drawing)


def _block(
    sheet: _Sheet, number: int, channels: int, widths: tuple[int, ...], dilations: tuple[int, ...], merge: str
) -> None:
    """Both branches below each other's heading, and where they join."""
    sheet.down(GAP)
    left, right = COLUMNS.values()
    sheet.line(f"M{left} {sheet.y + 26}V{sheet.y}H{right}V{sheet.y + 26}")
    for name, x in COLUMNS.items():
        sheet.parts.append(
            Markup('<text class="label middle halo" x="{}" y="{}">{} branch {}</text>').format(
                x, sheet.y + 17, name, number
            )
        )
    top = sheet.y + 26
    for unit, width in enumerate(widths):
        y = top + unit * (BOX_HEIGHT + GAP)
        before = channels if unit == 0 else widths[unit - 1]
        for name, x in COLUMNS.items():
            dilation = dilations[unit] if name == "dilated" else 1
            taps = "3×3" if dilation == 1 else f"3×3, dilation {dilation}"
            sheet.box(x, y, (taps, f"1×1: {before} → {width}"), name)
            sheet.line(f"M{x} {y + BOX_HEIGHT}v{GAP}")
    bottom = top + len(widths) * (BOX_HEIGHT + GAP)
    sign = "+" if merge == "sum" else "concat"
    sheet.line(f"M{left} {bottom}V{bottom + 16}H{right}V{bottom}")
    sheet.box(MIDDLE, bottom + 2, (sign,), "shared", width=32 if merge == "sum" else 76)
    sheet.y = bottom + 30
