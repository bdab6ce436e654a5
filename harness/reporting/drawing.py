"""What charts are drawn with: the sheet, its axes, its legend; sizes in units of the drawing, about pixels on a desk.

On a phone the drawing is smaller and its letters are larger (`templates/style.css`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
from markupsafe import Markup, escape

from harness.reporting.axes import Axis, written

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 86, 24, 14, 48
COLOURS = 8  # --series-0 … of style.css
# In units of the drawing. Eight colours and five dashes go together in forty ways.
DASHES = ("", "7 4", "2 3", "10 3 2 3", "14 4")


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


def swatch(style: int) -> Markup:
    """A short piece of a series' line, for legends and tables."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">'
        '<path class="series" style="{}" d="M1 5H27"/></svg>'
    ).format(stroke(style))


def stroke(style: int) -> str:
    """A series' colour and dashes as CSS."""
    dash = DASHES[style % len(DASHES)]
    return f"stroke:var(--series-{style % COLOURS})" + (f";stroke-dasharray:{dash}" if dash else "")


def frame(
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    y_label: str,
    write_x: Callable[..., str],
    write_y: Callable[..., str],
) -> Markup:
    """Ticks with their numbers, grid lines and labels of both axes."""
    parts = []
    for text, at in _ticks(y_axis, write_y):
        parts.append(
            Markup('<path class="gridline" d="M{} {:.1f}H{}"/><text class="end" x="{}" y="{:.1f}">{}</text>').format(
                LEFT, at, WIDTH - RIGHT, LEFT - 6, at + 4, text
            )
        )
    for text, at in _ticks(x_axis, write_x):
        parts.append(
            Markup(
                '<path class="gridline" d="M{0:.1f} {1}v4"/><text class="middle" x="{0:.1f}" y="{2}">{3}</text>'
            ).format(at, HEIGHT - BOTTOM, HEIGHT - BOTTOM + 18, text)
        )
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(Markup('<text class="label middle" x="{:.0f}" y="{}">{}</text>').format(middle, HEIGHT - 8, x_label))
    if y_label:
        parts.append(
            Markup('<text class="label middle" transform="translate(13 {:.0f}) rotate(-90)">{}</text>').format(
                (TOP + HEIGHT - BOTTOM) / 2, y_label
            )
        )
    return Markup("").join(parts)


def _ticks(axis: Axis, write: Callable[..., str]) -> list[tuple[str, float]]:
    values = axis.ticks()
    return list(zip(written(values, write), axis.place(np.array(values)).tolist(), strict=True))


def svg(
    title: str, description: str, parts: Sequence[Markup], *, height: int = HEIGHT, extra: Markup | str = ""
) -> Markup:
    """A drawing of the sheet's width with its name and what it shows in words; `extra` are further attributes."""
    return Markup('<svg role="img" viewBox="0 0 {} {}"{}><title>{}</title><desc>{}</desc>{}</svg>').format(
        WIDTH, height, extra, title, description, Markup("").join(parts)
    )


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """Names of series with their styles, as a list that wraps."""
    items = (Markup("<li>{}<span>{}</span></li>").format(swatch(style), name) for name, style in names)
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def figure(title: str, words: str, drawing: Markup, below: Markup | str = "") -> Markup:
    """A drawing with its title above, words in place of it where there are any, and what goes below."""
    told = Markup('<p class="missing">{}</p>').format(words) if words else ""
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}{}{}</figure>').format(
        escape(title), told, drawing, below
    )
