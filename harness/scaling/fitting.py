"""Alpha, beta, and what sharing cores costs, from measured all-reduces: least squares on relative errors."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.errors import HarnessError
from harness.scaling.collectives import Link, shared_cores_ring_seconds

# Where the constants of shared cores are searched: between a microsecond and a second, and up to all of the time.
WAITS_SECONDS = np.geomspace(1e-6, 1.0, 301)
BUSY_SHARES = np.linspace(0.4, 1.0, 61)


@dataclass(frozen=True)
class Measured:
    """One all-reduce: n ranks, m bytes, seconds."""

    ranks: int
    message_bytes: int
    seconds: float


@dataclass(frozen=True)
class LoopbackModel:
    """`shared_cores_ring_seconds` with its constants.

    Attributes:
        link: of ranks with a core each.
        cores: of the machine.
        wait_seconds, busy_share: of shared cores; 0 and 1 where no measurement had more ranks than cores.
    """

    link: Link
    cores: int
    wait_seconds: float = 0.0
    busy_share: float = 1.0

    def seconds(self, ranks: int, message_bytes: float) -> float:
        """Of an all-reduce."""
        return shared_cores_ring_seconds(
            ranks,
            message_bytes,
            self.link,
            cores=self.cores,
            wait_seconds=self.wait_seconds,
            busy_share=self.busy_share,
        )

    def relative_error(self, point: Measured) -> float:
        """Predicted over measured, less 1."""
        return self.seconds(point.ranks, point.message_bytes) / point.seconds - 1


def fit_link(points: Sequence[Measured]) -> Link:
    """α and β of a ring that minimise the sum of squared relative errors, both at least 0.

    2(n-1)·α + 2(n-1)/n·m·β = t is linear in both; each equation is divided by its t, so that a microsecond counts in a
    small message and not in a large one.

    Raises:
        HarnessError: fewer than two message sizes, or no point of several ranks.
    """
    several = [point for point in points if point.ranks > 1]
    if len({point.message_bytes / point.ranks for point in several}) < 2:
        raise HarnessError(
            "alpha and beta cannot be told apart", hint="Measure two message sizes or more, on two ranks or more."
        )
    messages = np.array([2 * (p.ranks - 1) / p.seconds for p in several])
    moved_bytes = np.array([2 * (p.ranks - 1) / p.ranks * p.message_bytes / p.seconds for p in several])
    columns = np.stack([messages, moved_bytes], axis=1)
    scale = np.linalg.norm(columns, axis=0)
    alpha, beta = np.linalg.lstsq(columns / scale, np.ones(len(several)), rcond=None)[0] / scale
    if alpha < 0:  # the best on the border: the other one alone
        return Link(0.0, float(moved_bytes.sum() / (moved_bytes @ moved_bytes)))
    if beta < 0:
        return Link(float(messages.sum() / (messages @ messages)), 0.0)
    return Link(float(alpha), float(beta))


def fit_loopback(points: Sequence[Measured], *, cores: int) -> LoopbackModel:
    """The link from points with a core for each rank, then the other constants from those of more ranks than cores.

    Where a machine has too few cores for any group, α and β come from all points with their share of a core.

    Raises:
        HarnessError: as `fit_link`.
    """
    roomy = [point for point in points if point.ranks <= cores]
    crowded = [point for point in points if point.ranks > cores]
    link = fit_link(roomy or [Measured(p.ranks, p.message_bytes, p.seconds * cores / p.ranks) for p in points])
    if not crowded:
        return LoopbackModel(link, cores)
    constants = itertools.product(WAITS_SECONDS, BUSY_SHARES)
    models = (LoopbackModel(link, cores, float(wait), float(share)) for wait, share in constants)
    return min(models, key=lambda model: math.fsum(model.relative_error(point) ** 2 for point in crowded))


def error_summary(model: LoopbackModel, points: Sequence[Measured]) -> dict[str, float]:
    """Median and largest absolute relative error, percent, and how many points there are.

    Raises:
        HarnessError: no points.
    """
    if not points:
        raise HarnessError("no measurement was held out", hint="Measure more message sizes or numbers of ranks.")
    errors = [100 * abs(model.relative_error(point)) for point in points]
    return {"points": len(errors), "error_percent_median": statistics.median(errors), "error_percent_max": max(errors)}
