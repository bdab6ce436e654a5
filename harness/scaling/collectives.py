"""How long an all-reduce takes: the alpha–beta model, as pure functions.

A message of m bytes between two ranks takes α + β·m seconds (Hockney 1994, "The communication challenge for MPP: Intel
Paragon and Meiko CS-2", Parallel Computing 20(3)). The costs of the algorithms are those of Thakur, Rabenseifner &
Gropp 2005, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1), section 4; the arithmetic of
the sums (γ there) is part of β here.

Letters: n ranks, m bytes, α seconds a message, β seconds a byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["ring", "tree", "best"]


@dataclass(frozen=True)
class Link:
    """What a message costs.

    Attributes:
        alpha_seconds: of a message of no bytes, at least 0.
        beta_seconds_per_byte: the inverse of the bandwidth in one direction, at least 0.
    """

    alpha_seconds: float
    beta_seconds_per_byte: float

    @classmethod
    def of(cls, *, alpha_us: float, gbps: float) -> Link:
        """From microseconds and gigabits (10⁹ bits) a second in one direction."""
        return cls(alpha_us * 1e-6, 8 / (gbps * 1e9))

    @property
    def alpha_us(self) -> float:
        """Microseconds a message."""
        return self.alpha_seconds * 1e6

    @property
    def gbps(self) -> float:
        """Gigabits a second in one direction; infinite where bytes cost nothing."""
        return 8e-9 / self.beta_seconds_per_byte if self.beta_seconds_per_byte else math.inf

    def seconds(self, size_bytes: float) -> float:
        """Of one message."""
        return self.alpha_seconds + self.beta_seconds_per_byte * size_bytes


def ring_seconds(ranks: int, size_bytes: float, link: Link) -> float:
    """All-reduce as a reduce-scatter and an all-gather around a ring: 2(n-1)·α + 2(n-1)/n·m·β.

    2(n-1) messages of m/n bytes (Thakur et al. 2005, sections 4.1 and 4.4; Patarasuk & Yuan 2009, "Bandwidth optimal
    all-reduce algorithms for clusters of workstations", show that no algorithm moves fewer bytes). One rank: 0.
    """
    return 2 * (ranks - 1) * link.seconds(size_bytes / ranks)


def recursive_doubling_seconds(ranks: int, size_bytes: float, link: Link) -> float:
    """All-reduce by exchanging whole vectors with ever farther partners: log₂n·(α + m·β); for short messages.

    Thakur et al. 2005, section 4.5. Where n is no power of two, the ranks beyond the largest one that fits hand their
    vector to a neighbour first and get the sum from it last: two more messages.
    """
    steps, is_power = _log2(ranks)
    return (steps + (0 if is_power else 2)) * link.seconds(size_bytes)


def halving_doubling_seconds(ranks: int, size_bytes: float, link: Link) -> float:
    """Rabenseifner's all-reduce, recursive halving, then doubling: 2·log₂n·α + 2(n-1)/n·m·β; for long messages.

    Thakur et al. 2005, section 4.5; n that is no power of two as in `recursive_doubling_seconds`.
    """
    steps, is_power = _log2(ranks)
    inner = 2**steps
    seconds = 2 * steps * link.alpha_seconds + 2 * (inner - 1) / inner * size_bytes * link.beta_seconds_per_byte
    return seconds if is_power else seconds + 2 * link.seconds(size_bytes)


def tree_seconds(ranks: int, size_bytes: float, link: Link) -> float:
    """The faster of recursive doubling and halving-doubling, whose messages grow with log₂n alone."""
    doubling = recursive_doubling_seconds(ranks, size_bytes, link)
    return min(doubling, halving_doubling_seconds(ranks, size_bytes, link))


def all_reduce_seconds(ranks: int, size_bytes: float, link: Link, algorithm: Algorithm = "best") -> float:
    """All-reduce over ranks that all reach each other by such a link; `best` is the faster of ring and tree.

    Args:
        ranks: n, at least 1; 0 seconds for 1.
        size_bytes: m, at least 0.
    """
    if algorithm == "ring":
        return ring_seconds(ranks, size_bytes, link)
    if algorithm == "tree":
        return tree_seconds(ranks, size_bytes, link)
    return min(ring_seconds(ranks, size_bytes, link), tree_seconds(ranks, size_bytes, link))


def hierarchical_seconds(
    nodes: int,
    ranks_per_node: int,
    size_bytes: float,
    *,
    intra: Link,
    inter: Link,
    adapter_per_rank: bool = True,
    algorithm: Algorithm = "best",
) -> float:
    """All-reduce on several nodes: reduce-scatter within each, all-reduce between them, all-gather within.

    With g ranks a node, the ring's two halves within a node take 2(g-1)·(α + m/g·β); between nodes each rank
    all-reduces its m/g bytes with its peers of the other nodes, all of them at once.

    Args:
        nodes: at least 1.
        ranks_per_node: g, at least 1.
        size_bytes: m.
        intra: link within a node.
        inter: link between nodes, of one adapter.
        adapter_per_rank: each rank has a network adapter of its own; else the g ranks of a node share one, and each
            has a g-th of its bandwidth.
        algorithm: between the nodes.
    """
    shared = 1 if adapter_per_rank else ranks_per_node
    outer = Link(inter.alpha_seconds, inter.beta_seconds_per_byte * shared)
    within = ring_seconds(ranks_per_node, size_bytes, intra)
    return within + all_reduce_seconds(nodes, size_bytes / ranks_per_node, outer, algorithm)


def shared_cores_ring_seconds(
    ranks: int, size_bytes: float, link: Link, *, cores: int, wait_seconds: float, busy_share: float = 1.0
) -> float:
    """A ring all-reduce of ranks that share the cores of one machine; with a core for each it is `ring_seconds`.

    Over loopback a message is work for a core, its copies and its system calls, for a share u of the time that it takes
    with a core for each rank; the rest is waiting, in which other ranks work. With n ranks on c < n cores each of the
    ring's 2(n-1) steps takes k = max(1, u·n/c) times as long, and with probability 1 - c/n the neighbour has no core
    and is waited for. Bytes move while others wait, so the two add like the sides of a right angle, a smooth maximum:
    2(n-1)·(k·α + √(((1 - c/n)·w)² + (k·m/n·β)²)). k and the probability follow from the counts; the smooth maximum is
    a choice, checked against measurements (`harness bench allreduce`).

    Args:
        ranks: n, at least 1.
        size_bytes: m.
        link: as it is with a core for each rank.
        cores: c, at least 1.
        wait_seconds: w, until the system gives a waiting process a core: of the order of the scheduler's time slice.
        busy_share: u, above 0 and at most 1.
    """
    crowding = max(1.0, busy_share * ranks / cores)
    wait = max(0.0, 1 - cores / ranks) * wait_seconds
    moving = crowding * size_bytes / ranks * link.beta_seconds_per_byte
    return 2 * (ranks - 1) * (crowding * link.alpha_seconds + math.hypot(wait, moving))


def _log2(ranks: int) -> tuple[int, bool]:
    """The exponent of the largest power of two that fits, and whether it is n itself."""
    steps = ranks.bit_length() - 1
    return steps, ranks == 2**steps
