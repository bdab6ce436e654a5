"""Networks by name, with published figures, and networks given as alpha and bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.errors import HarnessError, nearest
from harness.scaling.collectives import Algorithm, Link, all_reduce_seconds, hierarchical_seconds

RANGES = {"alpha_us": (0.0, 1e9), "gbps": (1e-6, 1e9)}  # of a network that is given
CUSTOM_KEYS = (*RANGES, "intra")


@dataclass(frozen=True)
class Network:
    """What connects the ranks.

    Attributes:
        name: as given.
        inter: link between nodes.
        intra: link within a node; None where all ranks are equally far.
        ranks_per_node: how many share `intra`; 1 without one.
        adapter_per_rank: each rank of a node has a network adapter of its own; else they share one.
        algorithm: of the all-reduce between nodes.
        most_ranks: the network joins no more; None: no limit.
        source: where the figures are from.
    """

    name: str
    inter: Link
    intra: Link | None = None
    ranks_per_node: int = 1
    adapter_per_rank: bool = True
    algorithm: Algorithm = "best"
    most_ranks: int | None = None
    source: str = ""

    def all_reduce_seconds(self, ranks: int, size_bytes: float) -> float:
        """Of one all-reduce; 0 for one rank.

        Ranks fill whole nodes; where their number is no multiple of a node's, the model takes nodes as large as the
        largest divisor that fits, as a scheduler would.
        """
        if self.intra is None:
            return all_reduce_seconds(ranks, size_bytes, self.inter, self.algorithm)
        here = max(size for size in range(1, min(ranks, self.ranks_per_node) + 1) if ranks % size == 0)
        if here == ranks:
            return all_reduce_seconds(ranks, size_bytes, self.intra, self.algorithm)
        return hierarchical_seconds(
            ranks // here,
            here,
            size_bytes,
            intra=self.intra,
            inter=self.inter,
            adapter_per_rank=self.adapter_per_rank,
            algorithm=self.algorithm,
        )

    def describe(self) -> str:
        """One line: links, node, adapters and source."""
        parts = [f"{self.name}: {_link(self.inter)}"]
        if self.intra is not None:
            adapters = "an adapter a GPU" if self.adapter_per_rank else "one adapter a node"
            parts.append(f"{self.ranks_per_node} GPUs a node by {_link(self.intra)}, {adapters}")
        if self.algorithm == "ring":
            parts.append("ring only")
        return "; ".join(parts) + (f" ({self.source})" if self.source else "")


def _link(link: Link) -> str:
    return f"alpha {link.alpha_us:g} us, {link.gbps:,.4g} Gbit/s each way"


# Latencies a hop of NCCL's own model, for its protocol LL128 in a ring: `hwLat` in NVIDIA/nccl, src/graph/tuning.cc
# (NVLink 1.9, PCI 2.5, network 4.0 µs). Bandwidths are line rates in one direction; real ones are some tenths lower.
_NCCL = "latency: NCCL src/graph/tuning.cc, ring LL128"
_NVLINK3 = Link.of(alpha_us=1.9, gbps=2400)  # A100: 600 GB/s in both directions (NVIDIA A100 datasheet)
_NVLINK4 = Link.of(alpha_us=1.9, gbps=3600)  # H100: 900 GB/s in both directions (NVIDIA H100 datasheet)
_PCIE4 = Link.of(alpha_us=2.5, gbps=252)  # 16 lanes of 16 GT/s, 128b/130b (PCI Express 4.0)
# TCP through the kernel: half of a round trip of 92 to 100 µs between AWS instances with enhanced networking in one
# placement group (Scalable Logic, January 2014, "Enhanced Networking in the AWS Cloud, part 2").
_TCP_ALPHA_US = 48.0
_TCP = "latency: TCP, half of a round trip of 92 to 100 us, Scalable Logic 2014"

# The middle of two runs of `harness bench allreduce` on two quiet cores of an AMD EPYC, torch 2.14.1 (docs/results.md).
LOOPBACK_LINK = Link.of(alpha_us=173, gbps=16.4)
LOOPBACK_WAIT_SECONDS, LOOPBACK_BUSY_SHARE = 0.2e-3, 0.75  # of ranks that share cores

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            "nvlink4", _NVLINK4, most_ranks=256,
            source=f"{_NCCL}; bandwidth: NVIDIA H100 datasheet; NVLink Switch System: up to 256 GPUs",
        ),
        Network(
            "infiniband-ndr", Link.of(alpha_us=4.0, gbps=400), intra=_NVLINK4, ranks_per_node=8,
            source=f"{_NCCL}; bandwidth: NDR, 4 lanes of 100 Gbit/s; node: DGX H100, 8 ConnectX-7",
        ),
        Network(
            "infiniband-hdr", Link.of(alpha_us=4.0, gbps=200), intra=_NVLINK3, ranks_per_node=8,
            source=f"{_NCCL}; bandwidth: HDR, 4 lanes of 50 Gbit/s; node: DGX A100, 8 ConnectX-6",
        ),
        Network(
            "ethernet-100g", Link.of(alpha_us=_TCP_ALPHA_US, gbps=100), intra=_PCIE4, ranks_per_node=8,
            adapter_per_rank=False, source=f"{_TCP}; bandwidth: IEEE 802.3ba; PCIe 4.0 x16 within a node",
        ),
        Network(
            "ethernet-25g", Link.of(alpha_us=_TCP_ALPHA_US, gbps=25), intra=_PCIE4, ranks_per_node=8,
            adapter_per_rank=False, source=f"{_TCP}; bandwidth: IEEE 802.3by; PCIe 4.0 x16 within a node",
        ),
        Network(
            "loopback-gloo", LOOPBACK_LINK, algorithm="ring",
            source="harness bench allreduce on two cores of an AMD EPYC, torch 2.14.1; a core for each rank",
        ),
    )
}  # fmt: skip


def parse_network(text: str, *, gpus_per_node: int | None = None) -> Network:
    """A network by its name, or from `alpha_us=5,gbps=100` with, if wanted, `intra=NAME` for the link within a node.

    Args:
        text: what the user wrote.
        gpus_per_node: instead of the network's own number; 1 leaves out the link within nodes.

    Raises:
        HarnessError: an unknown name or key, a value that is no positive number, or GPUs a node without a link.
    """
    network = _custom(text) if "=" in text else _named(text, where="--network")
    if gpus_per_node is None or gpus_per_node == network.ranks_per_node:
        return network
    if gpus_per_node == 1:
        return _changed(network, intra=None, ranks_per_node=1)
    if network.intra is None:
        raise HarnessError(
            f"{network.name} has no link of its own within a node",
            where="--gpus-per-node",
            hint="Leave it out (all GPUs equally far), or name one: --network alpha_us=5,gbps=100,intra=nvlink4",
        )
    return _changed(network, intra=network.intra, ranks_per_node=gpus_per_node)


def _changed(network: Network, *, intra: Link | None, ranks_per_node: int) -> Network:
    return Network(
        network.name,
        network.inter,
        intra=intra,
        ranks_per_node=ranks_per_node,
        adapter_per_rank=network.adapter_per_rank,
        algorithm=network.algorithm,
        most_ranks=network.most_ranks,
        source=network.source,
    )


def _named(name: str, *, where: str) -> Network:
    if name not in NETWORKS:
        raise HarnessError(f'unknown network "{name}"', where=where, hint=nearest(name, NETWORKS))
    return NETWORKS[name]


def _custom(text: str) -> Network:
    values: dict[str, str] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in CUSTOM_KEYS:
            raise HarnessError(f'unknown key "{key}"', where=f"--network {text}", hint=nearest(key, CUSTOM_KEYS))
        if key in values:
            raise HarnessError(f"{key} is given twice", where=f"--network {text}", hint="Leave one of them out.")
        values[key] = value
    for key in RANGES:
        if key not in values:
            raise HarnessError(f"{key} is missing", where=f"--network {text}", hint="--network alpha_us=5,gbps=100")
    numbers = {key: _number(text, key, values[key], *RANGES[key]) for key in RANGES}
    inter = Link.of(alpha_us=numbers["alpha_us"], gbps=numbers["gbps"])
    if "intra" not in values:
        return Network(text, inter, source="as given")
    within = _named(values["intra"], where=f"--network {text}").inter
    return Network(text, inter, intra=within, ranks_per_node=8, source="as given")


def _number(text: str, key: str, value: str, least: float, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not least <= number <= most:  # NaN is refused, too
        raise HarnessError(
            f'{key} must be a number from {least:g} to {most:g}, not "{value}"',
            where=f"--network {text}",
            hint="alpha_us is the latency of a message in microseconds, gbps the bandwidth in Gbit/s each way.",
        )
    return number
