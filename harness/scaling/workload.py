"""What a recipe's training step does and how long it takes on one device: measured, or as given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.errors import HarnessError
from harness.models.build import build_model
from harness.recipe import Recipe
from harness.scaling.prediction import Workload
from harness.training.trial_step import trial_network, trial_step

MEASURE_SECONDS = 3.0  # for each of the two batch sizes, and no fewer steps than
MIN_STEPS, MAX_STEPS = 5, 100
LONGEST_STEP_MS = 86_400_000.0  # a day
SMALL_BATCH_PART = 4  # the second batch size: this part of the first
# torch.distributed's kDefaultFirstBucketBytes and kDefaultBucketBytes (DistributedDataParallel, bucket_cap_mb).
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
# Bytes of an element in SyncBatchNorm's messages: ours on CPUs sends float64, torch's own on GPUs float32.
STATISTIC_BYTES = {"cpu": 8}
GPU_STATISTIC_BYTES = 4


@dataclass(frozen=True)
class Timing:
    """How the time of a pass was come by.

    Attributes:
        step_seconds: of the passes of one optimizer step on one device.
        fixed_seconds, seconds_per_image: of a micro-batch's passes.
        how: a phrase for people.
        measured_on: the type of the device, such as "cpu"; None where the time was given.
    """

    step_seconds: float
    fixed_seconds: float
    seconds_per_image: float
    how: str
    measured_on: str | None = None


def given_timing(recipe: Recipe, step_ms: float) -> Timing:
    """From the milliseconds of an optimizer step on one device, proportional to the images.

    Raises:
        HarnessError: not a number above 0.
    """
    if not 0 < step_ms <= LONGEST_STEP_MS:  # NaN is refused, too
        raise HarnessError(
            f"a step takes more than 0 and at most {LONGEST_STEP_MS:,.0f} ms, not {step_ms:g}",
            where="--step-ms",
            hint="Give the milliseconds of a step on one device, or leave it out to have it measured.",
        )
    seconds = step_ms * 1e-3
    return Timing(seconds, 0.0, seconds / recipe.training.global_batch_size, "as given, proportional to the images")


def measured_timing(recipe: Recipe, device: torch.device) -> Timing:
    """Medians over real steps on random images, at the recipe's micro-batch and at a quarter of it.

    Raises:
        HarnessError: the network or its arguments are wrong, or fp16 without a GPU.
    """
    if recipe.training.precision == "fp16" and device.type == "cpu":
        raise HarnessError(
            "fp16 needs a GPU to be measured",
            where="training.precision",
            hint="Give --step-ms, or measure with training.precision=bf16.",
        )
    accumulation = recipe.training.gradient_accumulation_steps
    images = recipe.training.global_batch_size // accumulation
    model = trial_network(recipe, device).train()
    seconds = _median_seconds(trial_step(model, recipe, images=images, device=device), device)
    fixed, smaller = 0.0, images // SMALL_BATCH_PART
    if smaller >= 2:  # batch statistics of one image are refused
        small = _median_seconds(trial_step(model, recipe, images=smaller, device=device), device)
        fixed, _ = affine((smaller, small), (images, seconds))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    how = f"measured on {where}, median, at {images} images a pass" + (f" and at {smaller}" if smaller >= 2 else "")
    return Timing(accumulation * seconds, fixed, (seconds - fixed) / images, how, device.type)


def affine(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """(fixed seconds, seconds an image) through two measurements (images, seconds); neither is below 0."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    fixed = min(max(0.0, large[1] - slope * large[0]), large[1])
    return fixed, (large[1] - fixed) / large[0]


def workload_of(recipe: Recipe, timing: Timing, *, device_type: str = "cpu") -> Workload:
    """The recipe's step with the messages of its network.

    Raises:
        HarnessError: the network or its arguments are wrong.
    """
    training = recipe.training
    model = build_model(
        recipe.model.name,
        num_classes=recipe.data.num_classes or 10,
        image_size_px=recipe.data.image_size_px,
        args=recipe.model.args,
    )
    sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    norms = batch_norm_channels(model) if training.sync_batch_norm else []
    return Workload(
        global_batch_size=training.global_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        fixed_seconds=timing.fixed_seconds,
        seconds_per_image=timing.seconds_per_image,
        bucket_bytes=gradient_buckets(sizes),
        sync_batch_norm_bytes=sync_batch_norm_messages(norms, STATISTIC_BYTES.get(device_type, GPU_STATISTIC_BYTES)),
    )


def gradient_buckets(
    sizes_bytes: Sequence[int], *, first_bytes: int = FIRST_BUCKET_BYTES, cap_bytes: int = BUCKET_BYTES
) -> tuple[int, ...]:
    """How DistributedDataParallel packs gradients: parameters from the last to the first, a bucket until it is full.

    Args:
        sizes_bytes: of the parameters in the order of the model.
        first_bytes: the first bucket closes with the gradient that reaches this; small, so that it starts early.
        cap_bytes: the same of the others.
    """
    buckets: list[int] = []
    current = 0
    for size in reversed(sizes_bytes):
        current += size
        if current >= (cap_bytes if buckets else first_bytes):
            buckets.append(current)
            current = 0
    return (*buckets, current) if current else tuple(buckets)


def batch_norm_channels(model: nn.Module) -> list[int]:
    """Channels of each batch normalisation."""
    return [m.num_features for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def sync_batch_norm_messages(channels: Iterable[int], element_bytes: int) -> tuple[int, ...]:
    """Two messages a layer of C channels: 2C + 1 sums forward (count, mean, square), 2C backward."""
    return tuple(size * element_bytes for c in channels for size in (2 * c + 1, 2 * c))


def _median_seconds(step: Callable[[], None], device: torch.device) -> float:
    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    seconds = [timed()]
    steps = min(MAX_STEPS, max(MIN_STEPS, int(MEASURE_SECONDS / seconds[0])))
    seconds += [timed() for _ in range(steps - 1)]
    return statistics.median(seconds)
