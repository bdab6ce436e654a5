"""`harness scale`: step time and efficiency on n GPUs, from the time of a step on one and the cost of the network.

A step is: the passes over the micro-batches; SyncBatchNorm's messages, which every layer waits for; and the part of the
gradient exchange that the backward pass does not hide. DistributedDataParallel exchanges a bucket of gradients as soon
as the backward pass has filled it (Li et al. 2020, "PyTorch Distributed", VLDB 13(12), section 3.2.3).

A message of m bytes takes α + β·m seconds (Hockney 1994, "The communication challenge for MPP", Parallel Computing
20(3)); the costs of all-reduces over n ranks are those of Thakur, Rabenseifner & Gropp 2005, "Optimization of
Collective Communication Operations in MPICH", IJHPCA 19(1), section 4, with the arithmetic of the sums as part of β.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from harness.errors import HarnessError, nearest
from harness.machine import seconds_of
from harness.models.build import build_model
from harness.recipe import Recipe
from harness.training.build import trial_network, trial_step

MEASURE_SECONDS = 3.0  # for each of the two batch sizes, and no fewer steps than
MIN_STEPS, MAX_STEPS = 5, 100
# A convolution's backward pass computes two products of the size of the forward pass's one, by inputs and by weights.
BACKWARD_SHARE = 2 / 3
# torch.distributed's kDefaultFirstBucketBytes and kDefaultBucketBytes (DistributedDataParallel, bucket_cap_mb).
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20


class Link(NamedTuple):
    """What a message costs: latency in microseconds, bandwidth in gigabits (10⁹ bits) a second in one direction."""

    alpha_us: float
    gbps: float

    def seconds(self, size_bytes: float) -> float:
        return self.alpha_us * 1e-6 + size_bytes * 8e-9 / self.gbps

    def __str__(self) -> str:
        return f"alpha {self.alpha_us:g} us, {self.gbps:,.4g} Gbit/s each way"


def ring_seconds(ranks: int, size_bytes: float, link: Link) -> float:
    """All-reduce as reduce-scatter and all-gather around a ring, 2(n-1)·α + 2(n-1)/n·m·β: the fewest bytes."""
    return 2 * (ranks - 1) * link.seconds(size_bytes / ranks)


def all_reduce_seconds(ranks: int, size_bytes: float, link: Link) -> float:
    """The fastest of ring, recursive doubling, log₂n·(α + m·β), and Rabenseifner's recursive halving, then doubling,
    2·log₂n·α + 2(n-1)/n·m·β. Where n is no power of two, the ranks beyond the largest one that fits hand the latter
    two's vector to a neighbour first and get the sum from it last: two more messages.
    """
    steps = ranks.bit_length() - 1
    doubling = steps * link.seconds(size_bytes)
    halving = 2 * math.fsum(link.seconds(size_bytes / 2**step) for step in range(1, steps + 1))
    tree = min(doubling, halving) + (0 if ranks == 2**steps else 2 * link.seconds(size_bytes))
    return min(ring_seconds(ranks, size_bytes, link), tree)


@dataclass(frozen=True)
class Network:
    """What connects the ranks."""

    name: str
    inter: Link  # between nodes
    source: str  # of the figures
    intra: Link | None = None  # within a node; None where all ranks are equally far
    gpus_per_node: int = 1
    adapter_per_gpu: bool = True  # else those of a node share one adapter's bandwidth
    all_reduce: Callable[[int, float, Link], float] = all_reduce_seconds
    most_ranks: float = math.inf

    def all_reduce_seconds(self, ranks: int, size_bytes: float) -> float:
        """On several nodes of g ranks: the ring's two halves within each, 2(g-1)·(α + m/g·β), and between nodes each
        rank's all-reduce of m/g bytes with its peers, all at once. Nodes are as large as the largest divisor that fits.
        """
        if self.intra is None:
            return self.all_reduce(ranks, size_bytes, self.inter)
        here = max(size for size in range(1, min(ranks, self.gpus_per_node) + 1) if ranks % size == 0)
        if here == ranks:
            return self.all_reduce(ranks, size_bytes, self.intra)
        outer = self.inter if self.adapter_per_gpu else self.inter._replace(gbps=self.inter.gbps / here)
        return ring_seconds(here, size_bytes, self.intra) + self.all_reduce(ranks // here, size_bytes / here, outer)


# Latencies a hop of NCCL's own model, for its protocol LL128 in a ring: `hwLat` in NVIDIA/nccl, src/graph/tuning.cc
# (NVLink 1.9, PCI 2.5, network 4.0 µs). Bandwidths are line rates in one direction; real ones are some tenths lower.
_NCCL = "latency: NCCL src/graph/tuning.cc, ring LL128; bandwidth: "
_NVLINK3, _NVLINK4 = Link(1.9, 2400), Link(1.9, 3600)  # half of 600 and 900 GB/s (NVIDIA A100, H100 datasheets)
_PCIE4 = Link(2.5, 252)  # 16 lanes of 16 GT/s, 128b/130b (PCI Express 4.0)
# TCP: half of a round trip between AWS instances with enhanced networking in one placement group.
_TCP = "latency: half of TCP's 92 to 100 us, Scalable Logic 2014; node: PCIe 4.0 x16; bandwidth: "
_RING = "two cores, one for each rank: docs/results.md; ring only"
NETWORKS = {
    network.name: network
    for network in (
        Network("nvlink4", _NVLINK4, f"{_NCCL}NVIDIA H100 datasheet, up to 256 GPUs", most_ranks=256),
        Network("infiniband-ndr", Link(4.0, 400), f"{_NCCL}4 lanes of 100 Gbit/s; node: DGX H100", _NVLINK4, 8),
        Network("infiniband-hdr", Link(4.0, 200), f"{_NCCL}4 lanes of 50 Gbit/s; node: DGX A100", _NVLINK3, 8),
        Network("ethernet-100g", Link(48.0, 100), f"{_TCP}IEEE 802.3ba", _PCIE4, 8, adapter_per_gpu=False),
        Network("ethernet-25g", Link(48.0, 25), f"{_TCP}IEEE 802.3by", _PCIE4, 8, adapter_per_gpu=False),
        Network("loopback-gloo", Link(173, 16.4), _RING, all_reduce=ring_seconds),
    )
}


def parse_network(text: str, *, gpus_per_node: int | None = None) -> Network:
    """A network by its name, or from `alpha_us=5,gbps=100` and, if wanted, `intra=NAME` within nodes.

    Raises:
        HarnessError: an unknown name or key, a value that is no positive number, or GPUs a node without a link.
    """
    network = _custom(text) if "=" in text else _known(text, NETWORKS, "network", "--network")
    gpus_per_node = gpus_per_node or network.gpus_per_node
    if gpus_per_node > 1 and network.intra is None:
        what = f"{network.name} has no link of its own within a node"
        hint = "Leave it out (all GPUs equally far), or name one: --network alpha_us=5,gbps=100,intra=nvlink4"
        raise HarnessError(what, where="--gpus-per-node", hint=hint)
    return replace(network, intra=network.intra if gpus_per_node > 1 else None, gpus_per_node=gpus_per_node)


def _known(name: str, valid: dict[str, Any], what: str, where: str) -> Any:
    if name not in valid:
        raise HarnessError(f'unknown {what} "{name}"', where=where, hint=nearest(name, valid))
    return valid[name]


def _custom(text: str) -> Network:
    where, parts = f"--network {text}", [part.partition("=")[::2] for part in text.split(",")]
    given: dict[str, Any] = {"alpha_us": "", "gbps": "", "intra": None}
    for key, value in parts:
        _known(key, given, "key", where)
        given[key] = _known(value, NETWORKS, "network", where).inter if key == "intra" else value
    link, intra = Link(math.nan, math.nan), given["intra"]
    with suppress(ValueError):
        link = Link(float(given["alpha_us"]), float(given["gbps"]))
    if len(dict(parts)) < len(parts) or not (0 <= link.alpha_us <= 1e9 and 1e-6 <= link.gbps <= 1e9):
        what = "needs alpha_us, a number from 0 to 1e9, and gbps, one from 1e-6 to 1e9, each once"
        hint = "Microseconds of latency and Gbit/s each way: --network alpha_us=5,gbps=100"
        raise HarnessError(what, where=where, hint=hint)
    return Network(text, link, "as given", intra, 8 if intra else 1)


@dataclass(frozen=True)
class Workload:
    """An optimizer step of a recipe."""

    global_batch_size: int
    gradient_accumulation_steps: int
    bucket_bytes: Sequence[int]  # of gradients, in the order in which the backward pass fills them
    sync_batch_norm_bytes: Sequence[int] = ()  # of each message in one micro-batch
    fixed_seconds: float = 0.0  # of a micro-batch's forward and backward pass on one device
    seconds_per_image: float = 0.0

    @property
    def micro_batch_size(self) -> int:
        return self.global_batch_size // self.gradient_accumulation_steps

    def pass_seconds(self, images: float) -> float:
        return self.fixed_seconds + self.seconds_per_image * images


def predict(work: Workload, network: Network, gpus: int, *, mode: str) -> dict[str, Any]:
    """A step on so many GPUs that share the recipe's global batch ("strong") or each have it for themselves ("weak").

    Returns "gpus", and "impossible" with the reason or the figures of the step: compute is the passes, exchange what of
    the gradient exchange they do not hide, efficiency images/s over n times those of one GPU.
    """
    micro, accumulation = work.micro_batch_size, work.gradient_accumulation_steps
    if gpus > network.most_ranks:
        return {"gpus": gpus, "impossible": f"{network.name} joins at most {network.most_ranks} GPUs"}
    if mode == "strong" and micro % gpus:
        return {"gpus": gpus, "impossible": f"a micro-batch of {micro} images does not divide among {gpus} GPUs"}
    all_reduce = partial(network.all_reduce_seconds, gpus)
    images = micro // gpus if mode == "strong" else micro
    compute = accumulation * work.pass_seconds(images)
    norms = accumulation * math.fsum(map(all_reduce, work.sync_batch_norm_bytes))
    exposed = exposed_seconds(work.bucket_bytes, BACKWARD_SHARE * work.pass_seconds(images), all_reduce)
    rate = gpus * images * accumulation / (compute + norms + exposed)
    return {
        "gpus": gpus,
        "images_per_gpu": images * accumulation,
        "step_ms": (compute + norms + exposed) * 1e3,
        "compute_ms": compute * 1e3,
        "sync_batch_norm_ms": norms * 1e3,
        "exchange_ms": exposed * 1e3,
        "exchange_total_ms": math.fsum(map(all_reduce, work.bucket_bytes)) * 1e3,
        "images_per_second": rate,
        "efficiency": min(1.0, rate / (gpus * micro / work.pass_seconds(micro))),  # above 1 by rounding alone
    }


def exposed_seconds(buckets: Sequence[int], backward_seconds: float, all_reduce: Callable[[float], float]) -> float:
    """What of the gradient exchange is left when the backward pass has ended.

    Gradients come evenly, byte by byte; a bucket's exchange begins when its last one is there and the bucket before has
    been exchanged. A single bucket is therefore not hidden at all.
    """
    filled, free_at = 0, 0.0
    for size in buckets:
        filled += size
        free_at = max(free_at, backward_seconds * (filled / sum(buckets))) + all_reduce(size)
    return max(0.0, free_at - backward_seconds)


def gradient_buckets(sizes: Sequence[int], *, first: int = FIRST_BUCKET_BYTES, cap: int = BUCKET_BYTES) -> list[int]:
    """How DistributedDataParallel packs gradients: parameters from the last to the first, a bucket until it is full."""
    buckets, current = list[int](), 0
    for size in reversed(sizes):
        current += size
        if current >= (cap if buckets else first):
            buckets.append(current)
            current = 0
    return [*buckets, current] if current else buckets


def workload_of(recipe: Recipe, *, on_gpu: bool = False) -> Workload:
    """The recipe's step with its network's messages, two of each synchronised normalisation of C channels: 2C + 1 sums
    forward (count, mean, square) and 2C backward, float64 in ours on CPUs, float32 in torch's own on GPUs.
    """
    training, size_px, classes = recipe.training, recipe.data.image_size_px, recipe.data.num_classes or 10
    net = build_model(recipe.model.name, num_classes=classes, image_size_px=size_px, args=recipe.model.args)
    norms = [m.num_features for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    messages = [(4 if on_gpu else 8) * numbers for c in norms for numbers in (2 * c + 1, 2 * c)]
    buckets = gradient_buckets([p.numel() * p.element_size() for p in net.parameters() if p.requires_grad])
    steps = training.gradient_accumulation_steps
    return Workload(training.global_batch_size, steps, buckets, messages if training.sync_batch_norm else ())


def measured_pass(recipe: Recipe, device: torch.device) -> tuple[float, float, str]:
    """Fixed seconds, seconds an image, and how: medians over steps, at the recipe's micro-batch and a quarter of it."""
    if recipe.training.precision == "fp16" and device.type == "cpu":
        raise HarnessError("fp16 needs a GPU", where="training.precision", hint="Give --step-ms, or measure with bf16.")
    images = recipe.training.global_batch_size // recipe.training.gradient_accumulation_steps
    model = trial_network(recipe, device).train()

    def median_seconds(count: int) -> float:
        step, seconds = trial_step(model, recipe, images=count, device=device), [math.inf]
        while len(seconds) < 2 + min(MAX_STEPS, max(MIN_STEPS, MEASURE_SECONDS / seconds[-1])):
            seconds.append(seconds_of(step, device=device.type))
        return statistics.median(seconds[2:])  # after the one that warms up

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    how, fixed, large = f"measured on {where}, median, at {images} images a pass", 0.0, median_seconds(images)
    smaller = images // 4
    if smaller >= 2:  # batch statistics of one image are refused
        fixed, how = affine((smaller, median_seconds(smaller)), (images, large)), f"{how} and at {smaller}"
    return fixed, (large - fixed) / images, how


def affine(small: tuple[int, float], large: tuple[int, float]) -> float:
    """Seconds for no images, by two measurements (images, seconds): at least 0 and at most the larger one's."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return min(max(0.0, large[1] - slope * large[0]), large[1])


def scale(recipe: Recipe, gpus: Sequence[int], network: Network, *, step_ms: float | None = None) -> dict[str, Any]:
    """Predict step time and efficiency on each number of GPUs; `step_ms` is the compute time of an optimizer step on
    one device, proportional to its images, None measures it here.

    Returns a dict for JSON: "strong" and "weak" (a row of `predict` for each number), "recipe", "compute", "network"
    and "assumptions", a sentence each.

    Raises:
        HarnessError: the recipe's network is wrong, or fp16 is to be measured without a GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fixed, an_image = 0.0, (step_ms or 0.0) / 1e3 / recipe.training.global_batch_size
    how = "as given, proportional to the images"
    if step_ms is None:
        fixed, an_image, how = measured_pass(recipe, device)
    work = replace(workload_of(recipe, on_gpu=device.type == "cuda"), fixed_seconds=fixed, seconds_per_image=an_image)
    accumulation, messages = work.gradient_accumulation_steps, len(work.sync_batch_norm_bytes)
    compute = {"step_ms": accumulation * work.pass_seconds(work.micro_batch_size) * 1e3, "how": how}
    compute |= {"fixed_ms_per_pass": fixed * 1e3, "ms_per_image": an_image * 1e3}
    compute |= {"measured_on": device.type if step_ms is None else None}
    what = {"name": recipe.name, "model": recipe.model.name, **asdict(work), "gradient_bytes": sum(work.bucket_bytes)}
    what |= {"sync_batch_norm_messages_per_step": accumulation * messages}
    links = {"inter": network.inter._asdict(), "intra": network.intra and network.intra._asdict()}
    where = {"name": network.name, **links, "gpus_per_node": network.gpus_per_node, "source": network.source}
    rows = {mode: [predict(work, network, n, mode=mode) for n in sorted(set(gpus))] for mode in ("strong", "weak")}
    assumptions = _assumptions(work, network, compute)
    return {**rows, "recipe": what, "compute": compute, "network": where, "assumptions": assumptions}


def _assumptions(work: Workload, network: Network, compute: dict[str, Any]) -> list[str]:
    adapters = "an adapter a GPU" if network.adapter_per_gpu else "one adapter a node"
    node = f"; {network.gpus_per_node} GPUs a node by {network.intra}, {adapters}" if network.intra else ""
    texts = [
        f"Compute: {compute['step_ms']:.1f} ms a step on one device ({compute['how']}); a pass takes "
        f"{compute['fixed_ms_per_pass']:.2f} ms + {compute['ms_per_image']:.4f} ms an image. Every GPU is this device, "
        "alike and undisturbed: no stragglers, no jitter, and data is always there in time.",
        f"Network: {network.name}: {network.inter}{node} ({network.source}). Line rates; no congestion.",
        "All-reduce: alpha-beta model (Hockney 1994; Thakur, Rabenseifner & Gropp 2005), the fastest of ring, doubling "
        "and halving; on several nodes reduce-scatter within, all-reduce between, all-gather within.",
        f"Overlap: gradients come evenly over the backward pass, {BACKWARD_SHARE:.0%} of the last micro-batch's time; "
        f"buckets ({len(work.bucket_bytes)}; DDP: 1 MiB, then 25 MiB) are exchanged when full, one after the other, at "
        "no cost to the computation; the last one is never hidden.",
        f"SyncBatchNorm: {len(work.sync_batch_norm_bytes)} small all-reduces a micro-batch, none hidden.",
    ]
    return texts if work.sync_batch_norm_bytes else texts[:-1]


def render(result: dict[str, Any]) -> str:
    """What `scale` found as tables, with its assumptions."""
    recipe, messages = result["recipe"], result["recipe"]["sync_batch_norm_messages_per_step"]
    size = f"{recipe['gradient_bytes'] / 1e6:.2f} MB of gradients, {messages} SyncBatchNorm messages a step"
    lines = [f"{recipe['name']}: {recipe['model']}, {size}"]
    if result["compute"]["measured_on"] == "cpu":
        lines.append("The step was measured on a CPU and is no GPU's: each of the GPUs below is as slow as this CPU.")
        lines.append("--step-ms X takes the milliseconds of a step on one GPU.")
    for mode, share in {"strong": "over all GPUs", "weak": "on each GPU"}.items():
        names = max(result[mode], key=len)  # of a row with figures, if there is one
        lines += ["", f"{mode} scaling: {recipe['global_batch_size']} images a step {share}"]
        lines.append("".join(f"{name.replace('_', ' '):>{len(name) + 2}}" for name in names))
        for row in result[mode]:
            cells = (f"{_cell(name, figure):>{len(name) + 2}}" for name, figure in row.items())
            lines.append(f"{row['gpus']:>6,d}  – {row['impossible']}" if "impossible" in row else "".join(cells))
    return "\n".join([*lines, "", "Assumptions", *(f"- {text}" for text in result["assumptions"])])


def _cell(name: str, figure: Any) -> str:
    if name == "efficiency":
        return f"{figure:.1%}"
    return f"{figure:,d}" if isinstance(figure, int) else f"{figure:,.2f}"
