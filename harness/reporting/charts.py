"""Charts as inline SVG: pure functions from numbers to markup, without scripts, legible in both colour schemes.

A chart is a `<figure>` with its title, the drawing and, where it has several series, a legend. Series are told apart
by colour and by dashes; what a chart shows is told in words too (`description`), for those who cannot see it. Colours
and sizes are in `templates/style.css`; `templates/hover.js` adds values under the pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from harness.reporting.axes import Axis, fit_axis, number, percent
from harness.reporting.drawing import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    figure,
    frame,
    legend,
    shortened,
    stroke,
    svg,
    swatch,
)
from harness.reporting.thinning import thin

__all__ = ["Series", "bar_chart", "heat_map", "line_chart", "shortened", "swatch"]

BUCKETS = 300  # a curve is thinned to as many stretches
LARGEST = 1e100  # a value beyond is left out, as infinity is
SMALL_CELL = 19.0  # units of the drawing: narrower ones have no room for a name in the usual size
FEW_POINTS = 24  # up to which each is marked


@dataclass(frozen=True)
class Series:
    """A named curve.

    Attributes:
        name: in the legend.
        x, y: of its points; a value that is not finite, or beyond LARGEST, is left out.
        style: which colour and dashes; None takes the series' place in the chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int | None = None


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    as_percent: bool = False,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Curves over a common axis.

    Args:
        series: the curves; those without a point are left out.
        title: above the chart.
        description: what it shows, for readers who cannot see it; the last values are added.
        x_label, y_label: with units.
        log_x, log_y: a logarithmic axis; values that are not positive are left out.
        as_percent: write shares from 0 to 1 in per cent.
        x_range, y_range: what the axes must hold at least.
    """
    curves = [(s, i if s.style is None else s.style, *_points(s, log_x, log_y)) for i, s in enumerate(series)]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return figure(title, "No values yet." if not series else "No values that can be drawn.", Markup(""))
    write = percent if as_percent else number
    x_values = np.concatenate([x for _, _, x, _ in curves] + _ends(x_range))
    whole = not log_x and bool((x_values % 1 == 0).all())  # there is no half a step
    x_axis = fit_axis(x_values, LEFT, WIDTH - RIGHT, log=log_x, whole=whole)
    y_values = np.concatenate([y for _, _, _, y in curves] + _ends(y_range))
    y_axis = fit_axis(y_values, HEIGHT - BOTTOM, TOP, log=log_y, room=0.04, most=1.0 if as_percent else None)
    last = "; ".join(f"{s.name}: {write(float(y[-1]))} at {number(float(x[-1]))}" for s, _, x, y in curves)
    drawn = [
        frame(x_axis, y_axis, x_label, y_label, number, write),
        *(_curve(s, style, x, y, x_axis, y_axis) for s, style, x, y in curves),
    ]
    names = [(s.name, style) for s, style, _, _ in curves]
    plot = f"{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM} {int(as_percent)}"
    drawing = svg(title, f"{description} Last values: {last}.", drawn, extra=Markup(' data-plot="{}"').format(plot))
    return figure(title, "", drawing, legend(names) if len(names) > 1 else Markup(""))


def bar_chart(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    description: str,
    value_label: str = "",
    as_percent: bool = False,
    largest: float | None = None,
) -> Markup:
    """Horizontal bars from zero, each with its label and value; values ≥ 0.

    Args:
        labels, values: of the bars, from top to bottom.
        title, description: as `line_chart`.
        value_label: what the values are, with their unit.
        as_percent: write shares from 0 to 1 in per cent.
        largest: what the longest bar would be worth; None takes the largest value.
    """
    if not len(values):
        return figure(title, "No values yet.", Markup(""))
    write = percent if as_percent else number
    row, left, right = 24, 160, 76
    top = max(largest or 0, *values) or 1.0
    height = row * len(values) + (28 if value_label else 6)
    drawn = []
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        y, length = i * row, max(0.0, value / top) * (WIDTH - left - right)
        drawn.append(
            Markup(
                '<g><title>{}: {}</title><text class="end" x="{}" y="{}">{}</text><rect class="bar" x="{}" y="{}" '
                'width="{:.1f}" height="{}"/><text x="{:.1f}" y="{}">{}</text></g>'
            ).format(
                label,
                write(value),
                left - 6,
                y + 17,
                shortened(label, 16),
                left,
                y + 4,
                length,
                row - 6,
                left + length + 6,
                y + 17,
                write(value),
            )
        )
    if value_label:
        drawn.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(left, height - 6, value_label))
    spoken = "; ".join(f"{label}: {write(value)}" for label, value in zip(labels, values, strict=True))
    return figure(title, "", svg(title, f"{description} {spoken}.", drawn, height=height))


def heat_map(
    values_RC: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    description: str,
    row_label: str,
    column_label: str,
    texts: Sequence[Sequence[str]] | None = None,
) -> Markup:
    """A matrix of cells, the fuller their colour the larger the value; empty cells where it is 0.

    Args:
        values_RC: (R, C) float, from 0 to 1.
        rows, columns: their names.
        title, description: as `line_chart`.
        row_label, column_label: what the rows and columns are.
        texts: what is written in the cells (R lists of C), where there is room; None writes nothing.
    """
    left, cell = 116, (WIDTH - 116 - 14) / max(1, len(columns))
    down = min(cell, 36.0) if len(columns) < 12 else cell
    # Names of many classes are small, so that they do not lie over one another.
    small = Markup(' style="font-size:{:.1f}px"').format(0.8 * cell) if cell < SMALL_CELL else ""
    above = [shortened(column, 11) for column in columns]
    top = round(14 + (0.53 * cell if small else 10) * max(map(len, above), default=0))
    height = round(top + down * len(rows) + 26)
    drawn = []
    for r, row in enumerate(rows):
        y = top + r * down
        drawn.append(
            Markup('<text class="end" x="{}" y="{:.1f}"{}>{}</text>').format(
                left - 6, y + down / 2 + 4, small, shortened(row, 11)
            )
        )
        for c, column in enumerate(columns):
            value = float(values_RC[r, c])
            if value > 0:
                text = texts[r][c] if texts is not None else f"{value:.3g}"
                drawn.append(_cell(left + c * cell, y, cell, down, value, f"{row} → {column}: {text}"))
                if texts is not None and cell >= 24:
                    drawn.append(
                        Markup('<text class="cell-text" x="{:.1f}" y="{:.1f}">{}</text>').format(
                            left + (c + 0.5) * cell, y + down / 2 + 4, text
                        )
                    )
    for c, name in enumerate(above):
        x = left + (c + 0.5) * cell + 4
        drawn.append(
            Markup('<text transform="translate({:.1f} {}) rotate(-90)"{}>{}</text>').format(x, top - 6, small, name)
        )
    drawn.append(
        Markup('<rect class="frame" x="{}" y="{}" width="{}" height="{:.1f}"/>').format(
            left, top, WIDTH - left - 14, down * len(rows)
        )
    )
    words = Markup('<text class="label" x="{}" y="{}">{}</text>').format(
        left, height - 6, f"rows: {row_label}; columns: {column_label}"
    )
    return figure(title, "", svg(title, description, [*drawn, words], height=height))


def _points(series: Series, log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    drawable = (np.abs(x) < LARGEST) & (np.abs(y) < LARGEST)  # nor what is not a number
    if log_x:
        drawable &= x > 0
    if log_y:
        drawable &= y > 0
    x, y = x[drawable], y[drawable]
    order = np.argsort(x, kind="stable")
    return thin(x[order], y[order], buckets=BUCKETS)


def _ends(bounds: tuple[float, float] | None) -> list[np.ndarray]:
    return [] if bounds is None else [np.asarray(bounds, float)]


def _curve(series: Series, style: int, x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis) -> Markup:
    places = list(zip(x_axis.place(x), y_axis.place(y), strict=True))
    points = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    kind = "series dense" if len(places) > BUCKETS else "series"
    # The values themselves: places, which have a tenth of a unit, tell them too coarsely.
    values = " ".join(f"{vx:.9g},{vy:.5g}" for vx, vy in zip(x.tolist(), y.tolist(), strict=True))
    line = Markup('<polyline class="{}" data-name="{}" data-values="{}" style="{}" points="{}"/>').format(
        kind, series.name, values, stroke(style), points
    )
    if len(places) > FEW_POINTS:
        return line
    colour = f"fill:var(--series-{style % COLOURS})"
    return line + Markup("").join(
        Markup('<circle class="point" style="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(colour, px, py)
        for px, py in places
    )


def _cell(x: float, y: float, width: float, height: float, value: float, words: str) -> Markup:
    shape = '<rect class="cell" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">'
    return Markup(shape + "<title>{}</title></rect>").format(x, y, width, height, _opacity(value), words)


def _opacity(value: float) -> float:
    """So far from full colour that text on it can be read, in the light and the dark scheme."""
    return 0.06 + 0.44 * min(1.0, value)
