"""Long curves as few points that look the same: the lowest and the highest value of each stretch are kept."""

from __future__ import annotations

import numpy as np


def thin(x_N: np.ndarray, y_N: np.ndarray, *, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `4 * buckets` points of a curve, drawn `buckets` pixels wide it covers the same pixels.

    The curve is cut into stretches of equal width; of each the first, lowest, highest and last point stay
    (Jugel et al. 2014, "M4", https://doi.org/10.14778/2732951.2732953), so no spike is lost. A curve that is
    short already is returned as it is.

    Args:
        x_N: (N,) float, not falling.
        y_N: (N,) float, finite.
        buckets: stretches, ≥ 1.
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
