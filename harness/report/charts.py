"""Charts as inline SVG: functions from numbers to markup, without scripts, legible in both colour schemes.

Series are told apart by colour and by dashes; what a chart shows is said in words too (`description`), for those who
cannot see it. Sizes are in units of the drawing, about pixels on a desk. `templates/` has what is drawn, the colours
(`style.css`) and the values under the pointer (`hover.js`).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from harness.report.page import missing, render

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 86, 456, 14, 252  # edges of the axes
COLOURS = 8  # --series-0 … of style.css
DASHES = ("", "7 4", "2 3", "10 3 2 3", "14 4")  # eight colours and five dashes go together in forty ways
BUCKETS = 300  # a curve is thinned to as many stretches
LARGEST = 1e100  # a value beyond is left out, as infinity is
FEW_POINTS = 24  # up to which each is marked
SAME = 1e-9  # values that differ by no more than this share of them are drawn as one
LEAST = 1e-290  # a smaller span than this has no ticks that floats could tell apart


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on a stretch from `start` to `end` of a drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False  # the logarithms are spaced evenly
    whole: bool = False  # only whole numbers are marked

    def place(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Where values lie, in units of the drawing."""
        low, high, at = (np.log10(v) if self.log else np.asarray(v, float) for v in (self.low, self.high, values))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def written(self, write: Callable[..., str], about: int = 5) -> list[tuple[str, float]]:
        """Round numbers on the axis, by `number` or `percent` with so many digits that no two are alike, and where
        they lie."""
        found = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, about)
        values = [value for value in found if not self.whole or value.is_integer()]
        texts = [write(value) for value in values]
        for digits in range(5, 16):
            if len(set(texts)) == len(texts):
                break
            texts = [write(value, digits) for value in values]
        return list(zip(texts, self.place(values).tolist(), strict=True))


def fit_axis(
    values: np.ndarray,
    start: float,
    end: float,
    *,
    log: bool = False,
    room: float = 0.0,
    most: float | None = None,
    whole: bool = False,
) -> Axis:
    """An axis that holds all values, with `room`, a share of it, left free at either end.

    It goes neither below 0 nor beyond `most` (1 of shares) unless a value does.
    """
    low, high = float(np.min(values)), float(np.max(values))
    if log:
        factor = 1.5 if high / low <= 1 + SAME else (high / low) ** room
        return Axis(low / factor, high * factor, start, end, log=True)
    if high - low <= max(SAME * max(abs(low), abs(high)), LEAST):
        free = max(abs(low), abs(high)) * 0.1 or 1.0
    else:
        free = (high - low) * room
    least = max(0.0, low - free) if low >= 0 else low - free
    return Axis(least, high + free if most is None else max(high, min(most, high + free)), start, end, whole=whole)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two numbers, about as many as asked for."""
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers; over fewer than two of them 2 and 5 times them too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = max(1, (last - first) // 6)
    found = [f * 10.0**n for n in range(first, last + 1, every) for f in factors]
    inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return inside if len(inside) > 1 else ticks(low, high)


def number(value: float, digits: int = 4) -> str:
    """A number, short: 0.25, 1,500, 20k, 1.5M, 1e-05."""
    size = abs(value)
    for unit, letter, bound in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= bound:
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:,.{digits}g}" if size < 1e3 or digits > 4 else f"{value:,.0f}"


def percent(share: float, digits: int = 3) -> str:
    """A share from 0 to 1 in per cent, short; only 0 and 1 are 0% and 100%."""
    text = f"{100 * share:.{digits}g}%"
    if digits == 3 and 0 < share < 1e-4:
        return "<0.01%"
    return ">99.9%" if text == "100%" and share < 1 - SAME else text


def epoch_text(epoch: float) -> str:
    """With a tenth where it is not whole: what lies between two epochs is a share of one."""
    return f"{epoch:.1f}".removesuffix(".0") if abs(epoch) < 1e5 else f"{epoch:.4g}"


def thin(x_N: np.ndarray, y_N: np.ndarray, *, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The first, lowest, highest and last point in each of so many stretches of equal width, so no spike is lost (Jugel
    et al. 2014, "M4", https://doi.org/10.14778/2732951.2732953); x does not fall."""
    if len(x_N) <= 4 * buckets:
        return x_N, y_N
    span = float(x_N[-1] - x_N[0]) or 1.0
    bucket_N = np.minimum(((x_N - x_N[0]) / span * buckets).astype(np.int64), buckets - 1)
    kept: set[int] = set()
    for start, end in pairwise([*np.flatnonzero(np.diff(bucket_N, prepend=-1)), len(x_N)]):
        part = y_N[start:end]
        kept |= {start, start + int(part.argmin()), start + int(part.argmax()), end - 1}
    index = sorted(kept)
    return x_N[index], y_N[index]


# --- charts


@dataclass(frozen=True)
class Series:
    """A named curve; `style` chooses colour and dashes, None by the series' place in the chart."""

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
    """Curves over common axes; values that are not finite, beyond LARGEST or ≤ 0 on a logarithmic axis are left out.

    `description` says what it shows to those who cannot see it, to which the last values are added.
    """
    drawable = [(s.name, i if s.style is None else s.style, *_points(s, log_x, log_y)) for i, s in enumerate(series)]
    drawable = [curve for curve in drawable if len(curve[2])]
    if not drawable:
        why = missing("No values yet." if not series else "No values that can be drawn.")
        return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(title, why)
    write = percent if as_percent else number
    x_values, y_values = (np.concatenate([curve[axis] for curve in drawable]) for axis in (2, 3))
    whole = not log_x and bool((x_values % 1 == 0).all())  # there is no half a step
    x_axis = fit_axis(x_values, LEFT, RIGHT, log=log_x, whole=whole)
    y_values = np.append(y_values, 0.0) if from_zero else y_values
    y_axis = fit_axis(y_values, BOTTOM, TOP, log=log_y, room=0.04, most=1.0 if as_percent else None)
    curves = []
    for name, style, x, y in drawable:
        places = list(zip(x_axis.place(x).tolist(), y_axis.place(y).tolist(), strict=True))
        curves.append(
            {
                "name": name,
                "style": style,
                "points": " ".join(f"{px:.1f},{py:.1f}" for px, py in places),
                # Places, which have a tenth of a unit, are too coarse to read values from.
                "data": " ".join(f"{vx:.9g},{vy:.5g}" for vx, vy in zip(x.tolist(), y.tolist(), strict=True)),
                "dense": len(places) > BUCKETS,
                "marked": places if len(places) <= FEW_POINTS else [],
            }
        )
    last = "; ".join(f"{name}: {write(float(y[-1]))} at {number(float(x[-1]))}" for name, _, x, y in drawable)
    return drawing(
        "lines.html",
        title=title,
        description=f"{description} Last values: {last}.",
        curves=curves,
        plot=f"{LEFT} {TOP} {RIGHT} {BOTTOM} {int(as_percent)}",
        x_ticks=x_axis.written(number),
        y_ticks=y_axis.written(write),
        x_label=x_label,
        y_label=y_label,
        names=[curve[:2] for curve in drawable] if len(drawable) > 1 else (),
    )


def bar_chart(labels: Sequence[str], shares: Sequence[float], *, title: str, description: str) -> Markup:
    """Horizontal bars from 0 to 1, each with its label and its share in per cent, from top to bottom."""
    left = 160
    bars = [(name, percent(s), s * (WIDTH - left - 76)) for name, s in zip(labels, shares, strict=True)]
    spoken = "; ".join(f"{name}: {share}" for name, share, _ in bars)
    words = {"title": title, "description": f"{description} {spoken}."}
    return drawing("bars.html", **words, height=24 * len(bars) + 6, bars=bars, left=left)


def drawing(template: str, **values: Any) -> Markup:
    """A drawing of the usual width, by a template that extends `drawing.html`: `title`, `description` and what the
    template needs; `names`, of series with their styles, are a legend below it."""
    edges = {"WIDTH": WIDTH, "LEFT": LEFT, "RIGHT": RIGHT, "TOP": TOP, "BOTTOM": BOTTOM, "COLOURS": COLOURS}
    tools = {"stroke": stroke, "swatch": swatch, "shortened": shortened}
    return render(template, **{"height": HEIGHT, "names": (), **edges, **tools, **values})


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


def _points(series: Series, log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    drawable = (np.abs(x) < LARGEST) & (np.abs(y) < LARGEST)  # nor what is not a number
    drawable &= ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
    x, y = x[drawable], y[drawable]
    order = np.argsort(x, kind="stable")
    return thin(x[order], y[order], buckets=BUCKETS)
