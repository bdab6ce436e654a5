"""Finds the layer in which numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def first_bad_layer(model: nn.Module, forward: Callable[[], None]) -> str:
    """Name the first layer whose weights, output or gradient is not finite, as a phrase.

    Args:
        model: in the state before the update, gradients in place.
        forward: runs the model on the batches of the step once more.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f'the weights of layer "{_layer(name)}" are not finite (after an earlier step)'
    found: list[str] = []
    handles = [
        module.register_forward_hook(_watch(name, found))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f'the output of layer "{found[0]}" is not finite (the first in the forward pass)'
    # In the backward pass, the layer met first stands last in the network.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f'the gradient of layer "{_layer(name)}" is not finite (the first in the backward pass)'
    return "the loss is not finite, though every layer's output is (its sum over the batch overflows)"


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not _finite(output):
            found.append(name)

    return hook


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _layer(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0] or parameter_name
