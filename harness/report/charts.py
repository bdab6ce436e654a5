"""Charts as inline SVG: pure functions from numbers to markup, without scripts, legible in both colour schemes.

A chart is a `<figure>` with its title, the drawing and, where it has several series, a legend. Series are told apart
by colour and by dashes; what a chart shows is said in words too (`description`), for those who cannot see it. Sizes
are in units of the drawing, about pixels on a desk; on a phone the drawing is smaller and its letters are larger.
Colours are in `templates/style.css`; `templates/hover.js` adds values under the pointer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from markupsafe import Markup

from harness.report.axes import Axis, fit_axis, number, percent, thin, written
from harness.report.page import missing

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 86, 24, 14, 48
COLOURS = 8  # --series-0 … of style.css
DASHES = ("", "7 4", "2 3", "10 3 2 3", "14 4")  # eight colours and five dashes go together in forty ways
BUCKETS = 300  # a curve is thinned to as many stretches
LARGEST = 1e100  # a value beyond is left out, as infinity is
SMALL_CELL = 19.0  # narrower ones have no room for a name in the usual size
FEW_POINTS = 24  # up to which each is marked


@dataclass(frozen=True)
class Series:
    """A named curve.

    Attributes:
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
    from_zero: bool = False,
) -> Markup:
    """Curves over common axes.

    Args:
        series: the curves; those without a point are left out.
        description: what it shows, for readers who cannot see it; the last values are added.
        x_label, y_label: with units.
        log_x, log_y: a logarithmic axis; values that are not positive are left out.
        as_percent: write shares from 0 to 1 in per cent.
        from_zero: the axis of the values holds 0.
    """
    curves = [(s.name, i if s.style is None else s.style, *_points(s, log_x, log_y)) for i, s in enumerate(series)]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return figure(title, missing("No values yet." if not series else "No values that can be drawn."))
    write = percent if as_percent else number
    x_values, y_values = (np.concatenate([curve[axis] for curve in curves]) for axis in (2, 3))
    whole = not log_x and bool((x_values % 1 == 0).all())  # there is no half a step
    x_axis = fit_axis(x_values, LEFT, WIDTH - RIGHT, log=log_x, whole=whole)
    y_values = np.append(y_values, 0.0) if from_zero else y_values
    y_axis = fit_axis(y_values, HEIGHT - BOTTOM, TOP, log=log_y, room=0.04, most=1.0 if as_percent else None)
    last = "; ".join(f"{name}: {write(float(y[-1]))} at {number(float(x[-1]))}" for name, _, x, y in curves)
    drawn = [frame(x_axis, y_axis, x_label, y_label, number, write)]
    drawn += [_curve(name, style, x, y, x_axis, y_axis) for name, style, x, y in curves]
    plot = f"{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM} {int(as_percent)}"
    drawing = svg(title, f"{description} Last values: {last}.", drawn, data_plot=plot)
    return figure(title, drawing, legend([curve[:2] for curve in curves]) if len(curves) > 1 else "")


def bar_chart(labels: Sequence[str], shares: Sequence[float], *, title: str, description: str) -> Markup:
    """Horizontal bars from 0 to 1, each with its label and its share in per cent, from top to bottom."""
    row, left, right = 24, 160, 76
    drawn = []
    for i, (label, share) in enumerate(zip(labels, shares, strict=True)):
        y, length = i * row, share * (WIDTH - left - right)
        parts = [
            element("title", f"{label}: {percent(share)}"),
            element("text", shortened(label, 16), class_="end", x=left - 6, y=y + 17),
            element("rect", class_="bar", x=left, y=y + 4, width=length, height=row - 6),
            element("text", percent(share), x=left + length + 6, y=y + 17),
        ]
        drawn.append(element("g", *parts))
    spoken = "; ".join(f"{label}: {percent(share)}" for label, share in zip(labels, shares, strict=True))
    return figure(title, svg(title, f"{description} {spoken}.", drawn, height=row * len(shares) + 6))


def heat_map(
    values_RC: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    description: str,
    row_label: str,
    column_label: str,
    texts: Sequence[Sequence[str]],
) -> Markup:
    """A matrix of cells, the fuller their colour the larger the value; empty cells where it is 0.

    Args:
        values_RC: (R, C) float, from 0 to 1.
        rows, columns: their names.
        row_label, column_label: what the rows and columns are.
        texts: what is written in the cells (R lists of C), where there is room.
    """
    left = 116
    cell = (WIDTH - left - 14) / max(1, len(columns))
    down = min(cell, 36.0) if len(columns) < 12 else cell
    # Names of many classes are small, so that they do not lie over one another.
    small = {"style": f"font-size:{0.8 * cell:.1f}px"} if cell < SMALL_CELL else {}
    above = [shortened(column, 11) for column in columns]
    top = round(14 + (0.53 * cell if small else 10) * max(map(len, above), default=0))
    height = round(top + down * len(rows) + 26)
    drawn = []
    for r, row in enumerate(rows):
        y, middle = top + r * down, float(top + r * down + down / 2 + 4)
        drawn.append(element("text", shortened(row, 11), class_="end", x=left - 6, y=middle, **small))
        for c, column in enumerate(columns):
            value, x = float(values_RC[r, c]), float(left + c * cell)
            if value <= 0:
                continue
            words = element("title", f"{row} → {column}: {texts[r][c]}")
            # So far from full colour that text on it can be read, in the light and the dark scheme.
            opacity = f"{0.06 + 0.44 * min(1.0, value):.2f}"
            place = {"x": x, "y": float(y), "width": cell, "height": down}
            drawn.append(element("rect", words, class_="cell", **place, fill_opacity=opacity))
            if cell >= 24:
                drawn.append(element("text", texts[r][c], class_="cell-text", x=x + cell / 2, y=middle))
    for c, name in enumerate(above):
        turned = f"translate({left + (c + 0.5) * cell + 4:.1f} {top - 6}) rotate(-90)"
        drawn.append(element("text", name, transform=turned, **small))
    size = {"width": WIDTH - left - 14, "height": down * len(rows)}
    drawn.append(element("rect", class_="frame", x=left, y=top, **size))
    axes = f"rows: {row_label}; columns: {column_label}"
    drawn.append(element("text", axes, class_="label", x=left, y=height - 6))
    return figure(title, svg(title, description, drawn, height=height))


# --- what charts are drawn with


def element(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element of a drawing. Floats are written in tenths of a unit; `class_` is the attribute class, `fill_opacity`
    fill-opacity, and so on."""
    written_out = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    if not children:
        return Markup("<{}{}/>").format(name, written_out)
    inside = Markup("").join(children)
    return Markup("<{}{}>{}</{}>").format(name, written_out, inside, name)


def svg(title: str, description: str, parts: Sequence[Markup], *, height: int = HEIGHT, **attributes: str) -> Markup:
    """A drawing of the usual width with its name and what it shows in words."""
    said = [element("title", title), element("desc", description)]
    return element("svg", *said, *parts, role="img", viewBox=f"0 0 {WIDTH} {height}", **attributes)


def figure(title: str, drawing: Markup, below: Markup | str = "") -> Markup:
    """A drawing, or words in its place, with its title above and what goes below."""
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}{}</figure>').format(title, drawing, below)


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """Names of series with their styles, as a list that wraps."""
    items = (Markup("<li>{}<span>{}</span></li>").format(swatch(style), name) for name, style in names)
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def swatch(style: int) -> Markup:
    """A short piece of a series' line, for legends and tables."""
    line = element("path", class_="series", style=stroke(style), d="M1 5H27")
    return element("svg", line, class_="swatch", viewBox="0 0 28 10", width=28, height=10, aria_hidden="true")


def stroke(style: int) -> str:
    """A series' colour and dashes as CSS."""
    dash = DASHES[style % len(DASHES)]
    return f"stroke:var(--series-{style % COLOURS})" + (f";stroke-dasharray:{dash}" if dash else "")


def frame(
    x_axis: Axis, y_axis: Axis, x_label: str, y_label: str, write_x: Callable[..., str], write_y: Callable[..., str]
) -> Markup:
    """Ticks with their numbers, grid lines and labels of both axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for text, at in _ticks(y_axis, write_y):
        parts.append(element("path", class_="gridline", d=f"M{LEFT} {at:.1f}H{right}"))
        parts.append(element("text", text, class_="end", x=LEFT - 6, y=at + 4))
    for text, at in _ticks(x_axis, write_x):
        parts.append(element("path", class_="gridline", d=f"M{at:.1f} {bottom}v4"))
        parts.append(element("text", text, class_="middle", x=at, y=bottom + 18))
    parts.append(element("path", class_="axis", d=f"M{LEFT} {bottom}H{right}"))
    parts.append(element("text", x_label, class_="label middle", x=(LEFT + right) // 2, y=HEIGHT - 8))
    if y_label:
        turned = f"translate(13 {(TOP + bottom) // 2}) rotate(-90)"
        parts.append(element("text", y_label, class_="label middle", transform=turned))
    return Markup("").join(parts)


def shortened(text: str, most: int) -> str:
    """A text no wider than so many letters of common width, cut with an ellipsis."""
    widths = list(accumulate(map(_width, text)))
    if not widths or widths[-1] <= most:
        return text
    return text[: sum(width <= most - _width("…") for width in widths)] + "…"


def _width(letter: str) -> float:
    """About how wide it is, in digits' widths; fonts differ, so a little too much rather than too little."""
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.8
    return 1.5 if letter in "MW@%mw…" else 1.25 if letter.isupper() else 1.0


def _ticks(axis: Axis, write: Callable[..., str]) -> list[tuple[str, float]]:
    values = axis.ticks()
    return list(zip(written(values, write), axis.place(np.array(values)).tolist(), strict=True))


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


def _curve(name: str, style: int, x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis) -> Markup:
    places = list(zip(x_axis.place(x).tolist(), y_axis.place(y).tolist(), strict=True))
    # The values themselves: places, which have a tenth of a unit, are too coarse.
    values = " ".join(f"{vx:.9g},{vy:.5g}" for vx, vy in zip(x.tolist(), y.tolist(), strict=True))
    points = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    kind = "series dense" if len(places) > BUCKETS else "series"
    line = element("polyline", class_=kind, data_name=name, data_values=values, style=stroke(style), points=points)
    marked = places if len(places) <= FEW_POINTS else []
    colour = f"fill:var(--series-{style % COLOURS})"
    marks = (element("circle", class_="point", style=colour, cx=px, cy=py, r="2.6") for px, py in marked)
    return line + Markup("").join(marks)
