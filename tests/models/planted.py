"""Planted faults for the numerics check: layers whose gradients go through a function of the test's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.numerics import NumericsReport, check_and_repair


def check(model: nn.Module, **settings: Any) -> NumericsReport:
    """`check_and_repair` for small images in bfloat16 and channels_last, unless told otherwise."""
    defaults: dict[str, Any] = {
        "batch_size": 6,
        "image_size_px": 32,
        "device": "cpu",
        "precision": "bf16",
        "memory_format": "channels_last",
        "cache_directory": None,
    }
    return check_and_repair(model, **{**defaults, **settings})


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class AlterGradient(torch.autograd.Function):
    """The identity, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alter: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.alter = alter
        return x.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.alter(gradient), None


def in_bf16(x: Tensor) -> bool:
    """Whether a layer computes in bfloat16; the float64 reference never does."""
    return torch.is_autocast_enabled("cpu") and x.dtype != torch.float64


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, int], bool]) -> None:
    """A convolution whose weight gradient is 20 % too large: planted, as no machine has all of these faults."""
    right = F.conv2d

    def conv2d(x: Tensor, weight: Tensor, bias: Any = None, *args: Any, **settings: Any) -> Tensor:
        # nn.Conv2d passes stride, padding, dilation and groups by position, our own code by name.
        dilation = args[2] if len(args) > 2 else settings.get("dilation", (1, 1))
        if wrong(x, max(dilation)):
            weight = AlterGradient.apply(weight, lambda g: g * 1.2)
        return right(x, weight, bias, *args, **settings)

    monkeypatch.setattr(F, "conv2d", conv2d)


def two_convolutions() -> nn.Sequential:
    """Layers 2 and 3 are dilated and alike."""
    torch.manual_seed(0)
    dilated = [nn.Conv2d(8, 8, 3, padding=2, dilation=2) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *dilated)


class OwnLinear(nn.Linear):
    """A linear layer with a backward pass of its own, altered by `alter`; wrong only in bfloat16 if `reduced`."""

    def __init__(self, alter: Callable[[Tensor], Tensor], *, reduced: bool) -> None:
        super().__init__(5, 4)
        self.alter, self.reduced = alter, reduced

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if not self.reduced or in_bf16(input):
            weight = AlterGradient.apply(weight, self.alter)
        return F.linear(input, weight, self.bias)


def with_linear(linear: nn.Module) -> nn.Sequential:
    """A network whose layer 3 is the one given."""
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
