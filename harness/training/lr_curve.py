"""Pictures of a learning-rate range test: one for the terminal, one as SVG."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from harness.training.lr_range import LrRange

COLUMNS, ROWS = 64, 12
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 24, 40, 56
HEADROOM = 0.5  # of the fall from the first to the least loss: as much is drawn above the first
COLOURS = ("#b0b0b0", "#1f77b4", "#d62728", "#2ca02c")  # losses, smoothed, the two suggestions


def render_curve(found: LrRange) -> str:
    """The smoothed loss over the rate in letters; `|` are suggested rates."""
    if not found.smoothed:
        return "no loss was finite"
    low, high = _y_range(found)
    cells = [[" "] * COLUMNS for _ in range(ROWS)]
    for suggestion in found.suggestions:
        column = _place(suggestion.lr, found)
        if column is not None:
            for row in cells:
                row[round(column * (COLUMNS - 1))] = "|"
    for lr, loss in zip(found.lrs, found.smoothed, strict=True):
        share = (min(loss, high) - low) / (high - low)
        column = _place(lr, found) or 0.0
        cells[ROWS - 1 - round(share * (ROWS - 1))][round(column * (COLUMNS - 1))] = "*"
    labels = {0: f"{high:.3g}", ROWS - 1: f"{low:.3g}"}
    lines = [f"{labels.get(number, ''):>8} {''.join(row)}".rstrip() for number, row in enumerate(cells)]
    first, last = f"{found.lrs[0]:.1e}", f"{found.lrs[-1]:.1e}"
    return "\n".join([*lines, f"{'lr':>8} {first}{last:>{COLUMNS - len(first)}}"])


def render_suggestions(found: LrRange) -> str:
    """What the rules say, a line each, and how the test ended."""
    lines = []
    for suggestion in found.suggestions:
        said = f"{suggestion.lr:.2e}" if suggestion.lr is not None else f"none: {suggestion.reason}"
        lines.append(f"{said}  ({suggestion.rule}; {suggestion.source})" if suggestion.lr else said)
    lines = list(dict.fromkeys(lines))
    end = "went to the largest rate" if found.diverged_at is None else f"diverged at lr {found.diverged_at:.2e}"
    return "\n".join([f"{len(found.losses)} steps, {end}; smoothed with beta {found.beta}", *lines])


def curve_svg(found: LrRange, title: str) -> str:
    """The curve as a picture of its own: losses, smoothed loss and suggested rates over a logarithmic axis."""
    low, high = _y_range(found)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        *_axes(found, low, high),
        _polyline(found, found.losses, low, high, COLOURS[0], 1.0),
        _polyline(found, found.smoothed, low, high, COLOURS[1], 2.5),
    ]
    for number, suggestion in enumerate(found.suggestions):
        share = _place(suggestion.lr, found)
        if share is not None:
            x, colour = _x(share), COLOURS[2 + number % 2]
            y = TOP + 14 * (number + 1)
            parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{colour}" stroke-dasharray="5 4"/>')
            parts.append(f'<text x="{x + 4:.1f}" y="{y}" fill="{colour}">{suggestion.lr:.2e}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(found: LrRange, low: float, high: float) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = [f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#000000"/>']
    if found.lrs:
        for power in range(
            math.ceil(math.log10(found.lrs[0]) - 1e-9), math.floor(math.log10(found.lrs[-1]) + 1e-9) + 1
        ):
            x = _x(_place(10.0**power, found) or 0.0)
            parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#000000"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">1e{power}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, value = bottom - share * (bottom - TOP), low + share * (high - low)
        parts.append(f'<path d="M{LEFT - 5} {y:.1f}h5" stroke="#000000"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">learning rate</text>')
    parts.append(f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">training loss</text>')
    return parts


def _polyline(found: LrRange, values: list[float], low: float, high: float, colour: str, width: float) -> str:
    points = []
    for lr, value in zip(found.lrs, values, strict=True):
        share = (min(max(value, low), high) - low) / (high - low)
        points.append(f"{_x(_place(lr, found) or 0.0):.1f},{HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP):.1f}")
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - RIGHT - LEFT)


def _place(lr: float | None, found: LrRange) -> float | None:
    """Where a rate lies on the logarithmic axis, 0 to 1; None beside it."""
    if lr is None or not found.lrs or not found.lrs[0] <= lr * (1 + 1e-9) or not lr <= found.lrs[-1] * (1 + 1e-9):
        return None
    span = math.log(found.lrs[-1] / found.lrs[0])
    return min(1.0, max(0.0, math.log(lr / found.lrs[0]) / span)) if span > 0 else 0.0


def _y_range(found: LrRange) -> tuple[float, float]:
    """The losses that are drawn: a diverging end would press all else flat."""
    if not found.smoothed:
        return 0.0, 1.0
    low, first = min(found.smoothed), found.smoothed[0]
    high = first + HEADROOM * (first - low)
    return low, high if high > low else low + max(1e-6, 0.1 * abs(low))
