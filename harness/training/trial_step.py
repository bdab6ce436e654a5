"""The recipe's training step on fixed random images, for measuring its time: no data is read, nothing is learnt.

Legend of shape letters: B images, C channels, H height and W width in pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from harness.recipe import Recipe
from harness.training.network import MEMORY_FORMATS, open_network

CPU = torch.device("cpu")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def trial_network(recipe: Recipe, device: torch.device = CPU) -> nn.Module:
    """The recipe's network as training has it on this device, with its seed's weights.

    Raises:
        HarnessError: an unknown network or argument, or a wrong kernel without a correct path.
    """
    torch.manual_seed(recipe.seed)
    classes = recipe.data.num_classes or 10
    return open_network(recipe, num_classes=classes, device=device, world_size=1).model


def trial_step(model: nn.Module, recipe: Recipe, *, images: int, device: torch.device = CPU) -> Callable[[], None]:
    """A training step as a function: forward, backward (with DDP's gradient exchange where the model has it), SGD.

    Args:
        model: on the device, perhaps within DistributedDataParallel.
        recipe: precision, layout, image size and classes are taken from it.
        images: B of a step.
        device: where the step runs; on a GPU the function returns before the step is done.
    """
    size = recipe.data.image_size_px
    images_BCHW = torch.randn(images, 3, size, size, device=device).contiguous(
        memory_format=MEMORY_FORMATS[recipe.training.memory_format]
    )
    labels_B = torch.arange(images, device=device) % (recipe.data.num_classes or 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    autocast: Any = nullcontext()
    if recipe.training.precision in AUTOCAST_DTYPES:
        autocast = torch.autocast(device.type, AUTOCAST_DTYPES[recipe.training.precision])

    def step() -> None:
        with autocast:
            logits_BK = model(images_BCHW)
        nn.functional.cross_entropy(logits_BK.float(), labels_B).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
