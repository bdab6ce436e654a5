"""One layer against float64: every wrong result is seen, right layers of every kind pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from harness.models.kernel_check import check_kernel, tolerance
from harness.models.kernel_data import Call, Tiling, probe_images
from tests.models.planted import (
    AlterGradient,
    in_bf16,
)

CPU = torch.device("cpu")


class Altered(nn.Conv2d):
    """A convolution of which one result is altered in bfloat16."""

    def __init__(self, what: str, alter: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.what, self.alter = what, alter

    def forward(self, input: Tensor) -> Tensor:
        parts: dict[str, Tensor] = {"input": input, "weight": self.weight, "bias": self.bias}  # type: ignore[dict-item]
        if in_bf16(input) and self.what in parts:
            parts[self.what] = AlterGradient.apply(parts[self.what], self.alter)
        y = F.conv2d(parts["input"], parts["weight"], parts["bias"], padding=1)
        if in_bf16(input) and self.what == "output":
            return y + (self.alter(y) - y).detach()  # its gradients stay right
        return y


def one_element(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[0, 0] += gradient.norm()
    return gradient


def last_image_left_out(values: Tensor) -> Tensor:
    return torch.cat([values[:-1], torch.zeros_like(values[-1:])])


def images_swapped(values: Tensor) -> Tensor:
    return torch.cat([values[4:], values[:4]])


def nan_somewhere(values: Tensor) -> Tensor:
    values = values.clone()
    values[1, 1, 1, 1] = torch.nan
    return values


ALTERATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "output scaled": ("output", lambda y: y * 1.1),
    "output's last image": ("output", last_image_left_out),
    "output's images swapped": ("output", images_swapped),
    "one output is nan": ("output", nan_somewhere),
    "input gradient's last image": ("input", last_image_left_out),
    "input gradient negated": ("input", lambda g: -g),
    "weight gradient's one element": ("weight", lambda g: one_element(g.flatten(1)).reshape(g.shape)),
    "weight gradient is zero": ("weight", torch.zeros_like),
    "weight gradient is nan": ("weight", nan_somewhere),
    "bias gradient": ("bias", lambda g: g * 0.9),
}


@pytest.mark.parametrize("count", [16, 23])
@pytest.mark.parametrize("name", ALTERATIONS)
def test_every_result_is_compared(name: str, count: int) -> None:
    what, alter = ALTERATIONS[name]
    call = Call((count, 4, 8, 8), torch.bfloat16, (0, 2, 3, 1), input_gradient=True)
    faults = check_kernel(Altered(what, alter), call, precision="bf16", device=CPU, seed_text=name)
    assert [fault.what for fault in faults] == ["output" if what == "output" else f"{what} gradient"]
    assert (faults[0].relative_error == float("inf")) == ("nan" in name)
    right = check_kernel(Altered("nothing", alter), call, precision="bf16", device=CPU, seed_text=name)
    assert right == []


class ForgetsImages(nn.Conv2d):
    """A weight gradient that leaves the last image out, or counts the first twice, in bfloat16."""

    def __init__(self, factor: float) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        if not in_bf16(input):
            return super().forward(input)
        weight = self.weight
        one = AlterGradient.apply(weight, lambda g: g * self.factor)
        return torch.cat([F.conv2d(input[:-1], weight, self.bias, padding=1),
                          F.conv2d(input[-1:], one, self.bias, padding=1)])  # fmt: skip


@pytest.mark.parametrize("count", [8, 16, 31, 64])
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_one_image_forgotten_in_a_sum_over_all_is_seen(factor: float, count: int) -> None:
    call = Call((count, 4, 8, 8), torch.bfloat16, (0, 2, 3, 1), input_gradient=True)
    faults = check_kernel(ForgetsImages(factor), call, precision="bf16", device=CPU, seed_text="x")
    assert "weight gradient" in [fault.what for fault in faults]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 7), (9, 12)),
    "linear on tokens": (nn.Linear(12, 7), (4, 9, 12)),
    "overlapping maximum": (nn.MaxPool2d(3, 2, padding=1), (5, 6, 15, 15)),
    "maximum over all": (nn.AdaptiveMaxPool2d(1), (5, 6, 20, 20)),
    "average": (nn.AvgPool2d(3, 2, padding=1), (5, 6, 14, 14)),
    "adaptive average": (nn.AdaptiveAvgPool2d((2, 3)), (5, 6, 14, 14)),
    "group norm": (nn.GroupNorm(2, 8), (7, 8, 9, 9)),
    "batch norm of features": (nn.BatchNorm1d(8), (32, 8)),
    "batch norm of a prime batch": (nn.BatchNorm2d(8), (7, 8, 6, 6)),
    "batch norm with activation": (BatchNormAct2d(8, act_layer=nn.SiLU), (6, 8, 6, 6)),
    "instance norm": (nn.InstanceNorm2d(8, affine=True), (5, 8, 6, 6)),
    "rms norm": (nn.RMSNorm(16), (40, 16)),
    "strided": (nn.Conv2d(8, 16, 3, stride=2, padding=1), (23, 8, 9, 9)),
    "transposed": (nn.ConvTranspose2d(8, 4, 2, stride=2), (5, 8, 7, 7)),
    "grouped": (nn.Conv2d(8, 16, 3, groups=4), (5, 8, 7, 7)),
    "of one dimension": (nn.Conv1d(8, 16, 3), (5, 8, 17)),
    "one image": (nn.Conv2d(8, 16, 3), (1, 8, 9, 9)),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of RMSNorm under autocast
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_of_every_kind_pass(name: str, precision: str) -> None:
    layer, shape = LAYERS[name]
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    call = Call(shape, dtype, order, input_gradient=True)
    assert check_kernel(layer, call, precision=precision, device=CPU, seed_text=name) == []


def test_the_tolerance_grows_with_roundings_and_length() -> None:
    assert tolerance("bf16", CPU, 1) == pytest.approx(8 * 2**-8, rel=1e-3)
    assert tolerance("fp16", CPU, 1) < tolerance("bf16", CPU, 1)
    assert tolerance("no", CPU, 100) < tolerance("no", CPU, 10_000) < 1e-4
    assert tolerance("no", torch.device("cuda"), 1) > tolerance("no", CPU, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 128, 391])
@pytest.mark.parametrize("base", [1, 3, 4])
def test_tiles_leave_no_image_without_weight(count: int, base: int) -> None:
    tiling = Tiling(count, min(base, count), signed=True)
    weights = tiling.weights()
    assert (weights >= 1).all()
    assert weights.max() <= 2 * (count / tiling.base) ** 0.5 + 2
    whole = tiling.fill(torch.zeros(count, 1), torch.ones(tiling.base, 1), signed=True)
    assert whole.sum() == weights.sum()
    assert (whole.abs() == 1).all()


def test_a_part_of_a_large_batch_does_on_a_cpu_alone() -> None:
    assert probe_images(128, 128 * 1024, CPU) == 16
    assert probe_images(128, 64, CPU) == 128
    assert probe_images(8, 10**9, CPU) == 8
    assert probe_images(128, 10**9, torch.device("cuda")) == 128
