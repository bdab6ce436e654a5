"""The recipe's network as it is trained on this machine: built, placed, sped up, checked, mended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from harness.files import writable_cache_directory
from harness.models.build import MEMORY_FORMATS, build_model
from harness.models.fused_units import adopt_compiled_kernels, adopt_mask_dropout
from harness.models.numerics import NumericsReport, check_and_repair
from harness.recipe import Recipe
from harness.recipe.schema import Training


@dataclass(frozen=True)
class Network:
    """A network that is ready to be trained or evaluated.

    Attributes:
        model: on its device, with correct paths where a kernel is wrong.
        numerics: the report of the check.
        kernels: a phrase: whether its passes on a CPU are compiled ones, and if not, why.
    """

    model: nn.Module
    numerics: NumericsReport
    kernels: str


def open_network(
    recipe: Recipe, *, num_classes: int, device: torch.device, world_size: int, remember: bool = True
) -> Network:
    """Build the network on the device and check each of its layers there, in the recipe's precision and layout.

    Args:
        num_classes: of the data.
        world_size: ranks that share the recipe's global batch.
        remember: take and keep the verdicts of this machine in the cache; otherwise check anew.

    Raises:
        HarnessError: an unknown network or argument, or a wrong kernel without a correct path.
    """
    training = recipe.training
    model = build_model(
        recipe.model.name,
        num_classes=num_classes,
        image_size_px=recipe.data.image_size_px,
        args=recipe.model.args,
    )
    model = model.to(device).to(memory_format=MEMORY_FORMATS[training.memory_format])
    cache = writable_cache_directory()
    kernels = "torch's own"
    if device.type == "cpu":
        adopt_mask_dropout(model)
        kernels = _speed_up(model, training, cache)
    with FileLock(cache / "numerics.lock"):  # one rank of a machine checks, the others find its verdict
        report = check_and_repair(
            model,
            batch_size=max(1, training.global_batch_size // training.gradient_accumulation_steps // world_size),
            image_size_px=recipe.data.image_size_px,
            device=device,
            precision=training.precision,
            memory_format=training.memory_format,
            cache_directory=cache if remember else None,
        )
    return Network(model, report, kernels)


def _speed_up(model: nn.Module, training: Training, cache: Path) -> str:
    """Compiled passes where the recipe allows and has use for them; says in a phrase which there are."""
    if training.kernels == "plain":
        return "plain (training.kernels)"
    if training.compile:  # which fuses by itself
        return "plain (training.compile)"
    if training.precision == "fp16" or training.memory_format != "channels_last":
        return "plain (they are for channels_last, precision no or bf16)"
    return adopt_compiled_kernels(model, cache)
