"""Step time and efficiency on n GPUs, from the time of a step on one and the cost of the network.

A step on n GPUs is: the passes over the micro-batches; SyncBatchNorm's messages, which every layer waits for; and the
part of the gradient exchange that the backward pass does not hide. DistributedDataParallel exchanges gradients in
buckets as soon as the backward pass has filled one (Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating
Data Parallel Training", VLDB 13(12), section 3.2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.scaling.networks import Network

# A convolution's backward pass computes two products of the size of the forward pass's one, by inputs and by weights.
BACKWARD_SHARE = 2 / 3

Mode = Literal["strong", "weak"]


@dataclass(frozen=True)
class Workload:
    """What a step of a recipe does.

    Attributes:
        global_batch_size: images an optimizer step.
        accumulation_steps: micro-batches an optimizer step.
        fixed_seconds: of a micro-batch's passes, whatever its images.
        seconds_per_image: of a micro-batch's passes, for each image.
        bucket_bytes: of the gradient buckets, in the order in which the backward pass fills them.
        sync_batch_norm_bytes: of each message of the synchronised normalisations in one micro-batch.
    """

    global_batch_size: int
    accumulation_steps: int
    fixed_seconds: float
    seconds_per_image: float
    bucket_bytes: tuple[int, ...]
    sync_batch_norm_bytes: tuple[int, ...] = ()

    @property
    def images_per_micro_batch(self) -> int:
        """On one GPU."""
        return self.global_batch_size // self.accumulation_steps

    def pass_seconds(self, images: float) -> float:
        """Forward and backward pass of a micro-batch of so many images on one GPU."""
        return self.fixed_seconds + self.seconds_per_image * images


@dataclass(frozen=True)
class Prediction:
    """A row of the table.

    Attributes:
        gpus: n.
        images_per_gpu: in a step.
        step_seconds: all of it.
        compute_seconds: the passes alone.
        exchange_seconds: of the gradient exchange what the backward pass does not hide.
        exchange_total_seconds: of the gradient exchange, hidden or not.
        sync_batch_norm_seconds: of the normalisations' messages.
        images_per_second: over all GPUs.
        efficiency: images/s over n times those of one GPU, at most 1.
    """

    gpus: int
    images_per_gpu: int
    step_seconds: float
    compute_seconds: float
    exchange_seconds: float
    exchange_total_seconds: float
    sync_batch_norm_seconds: float
    images_per_second: float
    efficiency: float


@dataclass(frozen=True)
class Impossible:
    """A row without figures, and why."""

    gpus: int
    why: str


def predict(workload: Workload, network: Network, gpus: int, *, mode: Mode) -> Prediction | Impossible:
    """A step on n GPUs.

    Args:
        gpus: n, at least 1.
        mode: "strong": the global batch is that of the recipe, shared among the GPUs; "weak": every GPU has the
            recipe's global batch for itself.
    """
    micro = workload.images_per_micro_batch
    if network.most_ranks is not None and gpus > network.most_ranks:
        return Impossible(gpus, f"{network.name} joins at most {network.most_ranks} GPUs")
    if mode == "strong":
        if micro < gpus:
            return Impossible(gpus, f"a micro-batch of {micro} images is smaller than the number of GPUs")
        if micro % gpus:
            return Impossible(gpus, f"a micro-batch of {micro} images does not divide among {gpus} GPUs")
    images = micro // gpus if mode == "strong" else micro
    passes = workload.pass_seconds(images)
    compute = workload.accumulation_steps * passes

    def all_reduce(size_bytes: float) -> float:
        return network.all_reduce_seconds(gpus, size_bytes)

    norms = workload.accumulation_steps * math.fsum(map(all_reduce, workload.sync_batch_norm_bytes))
    exposed = exposed_seconds(workload.bucket_bytes, BACKWARD_SHARE * passes, all_reduce)
    step = compute + norms + exposed
    images_a_step = images * workload.accumulation_steps
    one_gpu_rate = micro / workload.pass_seconds(micro)
    rate = gpus * images_a_step / step
    return Prediction(
        gpus=gpus,
        images_per_gpu=images_a_step,
        step_seconds=step,
        compute_seconds=compute,
        exchange_seconds=exposed,
        exchange_total_seconds=math.fsum(map(all_reduce, workload.bucket_bytes)),
        sync_batch_norm_seconds=norms,
        images_per_second=rate,
        efficiency=min(1.0, rate / (gpus * one_gpu_rate)),  # above 1 by rounding alone
    )


def exposed_seconds(
    bucket_bytes: Sequence[int], backward_seconds: float, all_reduce: Callable[[float], float]
) -> float:
    """What of the gradient exchange is left when the backward pass has ended.

    Gradients come evenly over the backward pass, byte by byte; a bucket's exchange begins when its last gradient is
    there and the bucket before has been exchanged. A single bucket is therefore not hidden at all.

    Args:
        bucket_bytes: in the order in which they are filled.
        backward_seconds: of the backward pass that fills them.
        all_reduce: seconds for a number of bytes.
    """
    total, filled, free_at = sum(bucket_bytes), 0, 0.0
    if not total:
        return 0.0
    for size in bucket_bytes:
        filled += size
        ready_at = backward_seconds * (filled / total)
        free_at = max(free_at, ready_at) + all_reduce(size)
    return max(0.0, free_at - backward_seconds)
