"""Axes of charts: where values lie, which ticks are round numbers, how numbers are written, which points are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SAME = 1e-9  # values that differ by no more than this share of them are drawn as one
LEAST = 1e-290  # a smaller span than this has no ticks that floats could tell apart


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on a stretch from `start` to `end`, in units of the drawing.

    With `log` the logarithms are what is spaced evenly; both ends are then positive. With `whole` only whole numbers
    are marked.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values lie, in units of the drawing."""
        low, high, at = (np.log10(np.asarray(v, float)) if self.log else v for v in (self.low, self.high, values))
        return self.start + (np.asarray(at, float) - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers on the axis."""
        found = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, about)
        return [value for value in found if not self.whole or value.is_integer()]


def fit_axis(
    values: Sequence[float] | np.ndarray,
    start: float,
    end: float,
    *,
    log: bool = False,
    room: float = 0.0,
    most: float | None = None,
    whole: bool = False,
) -> Axis:
    """An axis that holds all values.

    Args:
        values: not empty; positive where `log`.
        room: share of the axis that is left free at either end; never below 0 where no value is.
        most: no value is beyond it by its nature (1 of shares), so neither is the axis unless a value is all the same.
        whole: mark whole numbers alone; not with `log`.
    """
    low, high = float(np.min(values)), float(np.max(values))
    if log:
        factor = 1.5 if high / low <= 1 + SAME else (high / low) ** room
        return Axis(low / factor, high * factor, start, end, True)
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
    for bound, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
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


def written(values: Sequence[float], write: Callable[..., str]) -> list[str]:
    """Ticks by `number` or `percent`, with so many digits that no two are alike."""
    texts = [write(value) for value in values]
    for digits in range(5, 16):
        if len(set(texts)) == len(texts):
            break
        texts = [write(value, digits) for value in values]
    return texts


def thin(x_N: np.ndarray, y_N: np.ndarray, *, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `4 * buckets` points of a curve, which cover the same pixels where it is drawn `buckets` pixels wide.

    The curve is cut into stretches of equal width; of each the first, lowest, highest and last point stay
    (Jugel et al. 2014, "M4", https://doi.org/10.14778/2732951.2732953), so no spike is lost.

    Args:
        x_N: (N,) float, not falling.
        y_N: (N,) float, finite.
    """
    if len(x_N) <= 4 * buckets:
        return x_N, y_N
    span = float(x_N[-1] - x_N[0]) or 1.0
    bucket_N = np.minimum(((x_N - x_N[0]) / span * buckets).astype(np.int64), buckets - 1)
    starts = np.flatnonzero(np.diff(bucket_N, prepend=-1))
    kept: set[int] = set()
    for start, end in zip(starts, [*starts[1:], len(x_N)], strict=True):
        part = y_N[start:end]
        kept |= {int(start), int(start + part.argmin()), int(start + part.argmax()), int(end) - 1}
    index = np.array(sorted(kept))
    return x_N[index], y_N[index]
