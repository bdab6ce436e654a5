"""The recipe's network as it is trained on this machine: built, placed, checked, mended."""

from __future__ import annotations

import torch
from filelock import FileLock
from torch import nn

from harness.data.paths import writable_cache_directory
from harness.models.build import build_model
from harness.models.mask_dropout import adopt_mask_dropout
from harness.models.numerics import NumericsReport, check_and_repair
from harness.recipe import Recipe

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def open_network(
    recipe: Recipe, *, num_classes: int, device: torch.device, world_size: int, remember: bool = True
) -> tuple[nn.Module, NumericsReport]:
    """Build the network on the device and check each of its layers there, in the recipe's precision and layout.

    Args:
        num_classes: of the data.
        world_size: ranks that share the recipe's global batch.
        remember: take and keep the verdicts of this machine in the cache; otherwise check anew.

    Returns:
        The network, with correct paths where a kernel is wrong, and the report of the check.

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
    if device.type == "cpu":
        adopt_mask_dropout(model)
    cache = writable_cache_directory()
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
    return model, report
