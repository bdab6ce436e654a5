"""`harness scale`: predictions for several numbers of GPUs, as JSON and as a table with its assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from harness.errors import HarnessError
from harness.recipe import Recipe
from harness.scaling.networks import Network
from harness.scaling.prediction import BACKWARD_SHARE, Impossible, Mode, Prediction, Workload, predict
from harness.scaling.workload import Timing, given_timing, measured_timing, workload_of

MODES: tuple[Mode, ...] = ("strong", "weak")
MOST_GPUS = 1_000_000


def scale(recipe: Recipe, gpus: Sequence[int], network: Network, *, step_ms: float | None = None) -> dict[str, Any]:
    """Predict step time and efficiency on each number of GPUs.

    Args:
        recipe: its network gives the messages, its batch the compute time.
        gpus: numbers of GPUs, each at least 1.
        network: what connects them.
        step_ms: compute time of an optimizer step on one device; None measures it here (seconds to minutes).

    Returns:
        A dict for JSON: "strong" and "weak" (a row for each number: figures with their units in their names, or
        "impossible" with the reason), "recipe", "compute", "network" and "assumptions".

    Raises:
        HarnessError: the network of the recipe is wrong, a number of GPUs or a time is out of range.
    """
    if not gpus or min(gpus) < 1 or max(gpus) > MOST_GPUS:
        raise HarnessError(
            f"a number of GPUs must be from 1 to {MOST_GPUS:,}", where="--gpus", hint="For example --gpus 1,8,64."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timing = measured_timing(recipe, device) if step_ms is None else given_timing(recipe, step_ms)
    workload = workload_of(recipe, timing, device_type=device.type)
    rows: dict[str, Any] = {
        mode: [_row(predict(workload, network, count, mode=mode)) for count in sorted(set(gpus))] for mode in MODES
    }
    return rows | {
        "recipe": {
            "name": recipe.name,
            "model": recipe.model.name,
            "global_batch_size": workload.global_batch_size,
            "gradient_accumulation_steps": workload.accumulation_steps,
            "gradient_bytes": sum(workload.bucket_bytes),
            "bucket_bytes": list(workload.bucket_bytes),
            "sync_batch_norm_messages_per_step": workload.accumulation_steps * len(workload.sync_batch_norm_bytes),
        },
        "compute": {
            "step_ms": timing.step_seconds * 1e3,
            "fixed_ms_per_pass": timing.fixed_seconds * 1e3,
            "ms_per_image": timing.seconds_per_image * 1e3,
            "how": timing.how,
            "measured_on": timing.measured_on,
        },
        "network": {
            "name": network.name,
            "inter": {"alpha_us": network.inter.alpha_us, "gbps": network.inter.gbps},
            "intra": network.intra and {"alpha_us": network.intra.alpha_us, "gbps": network.intra.gbps},
            "gpus_per_node": network.ranks_per_node,
            "source": network.source,
        },
        "assumptions": assumptions(workload, network, timing),
    }


def _row(prediction: Prediction | Impossible) -> dict[str, Any]:
    if isinstance(prediction, Impossible):
        return {"gpus": prediction.gpus, "impossible": prediction.why}
    row: dict[str, Any] = {}
    for name, value in asdict(prediction).items():
        if name.endswith("_seconds"):
            row[name.removesuffix("_seconds") + "_ms"] = value * 1e3
        else:
            row[name] = value
    return row


def assumptions(workload: Workload, network: Network, timing: Timing) -> list[str]:
    """What the figures rest on, a sentence each."""
    buckets = len(workload.bucket_bytes)
    lines = [
        f"Compute: {timing.step_seconds * 1e3:.1f} ms a step on one device ({timing.how}); a pass takes "
        f"{timing.fixed_seconds * 1e3:.2f} ms + {timing.seconds_per_image * 1e3:.4f} ms an image. Every GPU is "
        "this device, alike and undisturbed: no stragglers, no jitter, and data is always there in time.",
        f"Network: {network.describe()}. Line rates; no congestion.",
        "All-reduce: alpha-beta model (Hockney 1994; Thakur, Rabenseifner & Gropp 2005), "
        + ("ring" if network.algorithm == "ring" else "the faster of ring and recursive halving or doubling")
        + "; on several nodes reduce-scatter within, all-reduce between, all-gather within.",
        f"Overlap: gradients come evenly over the backward pass, {BACKWARD_SHARE:.0%} of the last micro-batch's time; "
        f"{_plural(buckets, 'bucket')} (DDP: 1 MiB, then 25 MiB), each exchanged when full, one after the other, "
        "at no cost to the computation" + (". One bucket hides nothing." if buckets == 1 else "."),
    ]
    messages = len(workload.sync_batch_norm_bytes)
    if messages:
        lines.append(
            f"SyncBatchNorm: {messages} small all-reduces a micro-batch ({messages // 2} layers, one forward and one "
            "backward), none hidden: every layer waits."
        )
    return lines


def render_scale(result: dict[str, Any]) -> str:
    """The tables and the assumptions."""
    recipe = result["recipe"]
    lines = [
        f"{recipe['name']}: {recipe['model']}, {recipe['gradient_bytes'] / 1e6:.2f} MB of gradients in "
        f"{_plural(len(recipe['bucket_bytes']), 'bucket')}, "
        f"{recipe['sync_batch_norm_messages_per_step']} SyncBatchNorm messages a step"
    ]
    if result["compute"]["measured_on"] == "cpu":
        lines.append(
            "The step was measured on a CPU and is no GPU's: each of the GPUs below is as slow as this CPU. "
            "--step-ms X takes the milliseconds of a step on one GPU."
        )
    titles = {
        "strong": f"strong scaling: {recipe['global_batch_size']} images a step over all GPUs",
        "weak": f"weak scaling: {recipe['global_batch_size']} images a step on each GPU",
    }
    for mode in MODES:
        lines += ["", titles[mode], _TITLE, *map(_line, result[mode])]
    return "\n".join([*lines, "", "Assumptions", *(f"- {text}" for text in result["assumptions"])])


_COLUMNS = {
    "gpus": ("GPUs", 6, ",d"),
    "images_per_gpu": ("images/GPU", 12, ",d"),
    "step_ms": ("step ms", 11, ",.2f"),
    "compute_ms": ("compute ms", 12, ",.2f"),
    "sync_batch_norm_ms": ("SyncBN ms", 11, ",.2f"),
    "exchange_ms": ("exchange ms", 13, ",.2f"),
    "exchange_total_ms": ("(with hidden)", 15, ",.2f"),
    "images_per_second": ("images/s", 13, ",.0f"),
    "efficiency": ("efficiency", 12, ".1%"),
}
_TITLE = "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS.values())


def _line(row: dict[str, Any]) -> str:
    if "impossible" in row:
        return f"{row['gpus']:>6,d}  – {row['impossible']}"
    return "".join(f"{format(row[name], form):>{width}}" for name, (_, width, form) in _COLUMNS.items())


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
