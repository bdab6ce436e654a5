"""The numerics check: planted faults, the real one of this machine, no false alarm, nothing disturbed, remembered."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import harness.models.dual_branch  # noqa: F401  registers the networks
from harness.errors import HarnessError
from harness.models import numerics
from harness.models.kernel_check import Fault, check_kernel, tolerance
from harness.models.kernel_data import Call, Tiling, probe_images
from harness.models.numerics import NumericsReport, check_and_repair
from harness.models.safe_conv import SafeConv2d

CPU = torch.device("cpu")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def check(model: nn.Module, **settings: Any) -> NumericsReport:
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
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# ---- planted faults ---------------------------------------------------------------------------------------------


class _AlterGradient(torch.autograd.Function):
    """The identity, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alter: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.alter = alter
        return x.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.alter(gradient), None


def in_bf16(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu") and x.dtype != torch.float64


WHEN: dict[str, Callable[[Tensor, int], bool]] = {
    # where the planted kernel is wrong -> the first path that avoids it
    "space_to_batch": lambda x, dilation: dilation > 1 and in_bf16(x),
    "other_memory_format": lambda x, dilation: in_bf16(x) and not x.is_contiguous(),
    "float32": lambda x, dilation: in_bf16(x),
}


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, int], bool]) -> None:
    """A convolution whose weight gradient is 20 % too large: planted, as no machine has all of these faults."""
    right = F.conv2d

    def conv2d(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        if wrong(x, max(dilation)):
            weight = _AlterGradient.apply(weight, lambda g: g * 1.2)
        return right(x, weight, bias, stride, padding, dilation, groups)

    def by_name(x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                groups: int = 1) -> Tensor:  # fmt: skip
        dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
        return conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(F, "conv2d", by_name)


def two_convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    dilated = [nn.Conv2d(8, 8, 3, padding=2, dilation=2) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *dilated)


@pytest.mark.parametrize("path", WHEN)
def test_a_planted_fault_is_named_and_goes_by_the_first_right_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_convolutions()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    plant(monkeypatch, WHEN[path])
    report = check(model, image_size_px=12)
    dilated = next(kernel for kernel in report.wrong if "2" in kernel.layers)
    assert dilated.layers == ("2", "3")
    assert dilated.what == ("weight gradient",)
    assert dilated.relative_error == pytest.approx(0.2, rel=0.1)
    assert dilated.path == path
    assert "dilation=(2, 2)" in dilated.signature
    assert "6×8×12×12 bfloat16 channels_last" in dilated.signature
    assert [type(layer) for layer in model[2:]] == [SafeConv2d, SafeConv2d]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert check(model, image_size_px=12).wrong == ()  # the repaired network is right
    for text in ("relative error 0.2", dilated.signature, "layers: 2, 3", f"now by: {path}"):
        assert text in report.render()


def test_a_fault_on_every_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_convolutions()
    plant(monkeypatch, lambda x, dilation: x.dtype != torch.float64 and x.shape[1] == 8)
    with pytest.raises(HarnessError) as caught:
        check(model, image_size_px=12)
    text = caught.value.render()
    assert text.startswith("2: wrong kernel on cpu: weight gradient (relative error 0.2")
    assert "tried space_to_batch, other_memory_format, float32" in text
    assert "HINT: Try precision=no or memory_format=contiguous" in text
    assert getattr(model[2], "path", "direct") == "direct"


class OwnLinear(nn.Linear):
    """A linear layer with a backward pass of its own, altered by `alter`; wrong only in bfloat16 if `reduced`."""

    def __init__(self, alter: Callable[[Tensor], Tensor], *, reduced: bool) -> None:
        super().__init__(5, 4)
        self.alter, self.reduced = alter, reduced

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if not self.reduced or in_bf16(input):
            weight = _AlterGradient.apply(weight, self.alter)
        return F.linear(input, weight, self.bias)


def with_linear(linear: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def one_element(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[0, 0] += gradient.norm()
    return gradient


def test_a_layer_of_ones_own_that_is_wrong_in_bf16_computes_in_float32() -> None:
    linear = OwnLinear(lambda g: g + g.mean(), reduced=True)
    report = check(with_linear(linear), image_size_px=8)
    assert [(kernel.layers, kernel.what, kernel.path) for kernel in report.wrong] == [
        (("3",), ("weight gradient",), "float32")
    ]
    assert isinstance(linear, OwnLinear)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_layer_of_ones_own_with_a_wrong_derivative_in_any_precision_is_refused(precision: str) -> None:
    # Its float64 result is wrong as well, so comparing the two could not show it.
    model = with_linear(OwnLinear(lambda g: g * 1.5, reduced=False))
    with pytest.raises(HarnessError, match=r"3: wrong kernel on cpu: weight gradient in float64 \(relative error 0\.3"):
        check(model, image_size_px=8, precision=precision)
    assert check(with_linear(OwnLinear(lambda g: g, reduced=False)), image_size_px=8, precision=precision).wrong == ()


class Altered(nn.Conv2d):
    """A convolution of which one result is altered in bfloat16."""

    def __init__(self, what: str, alter: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.what, self.alter = what, alter

    def forward(self, input: Tensor) -> Tensor:
        parts: dict[str, Tensor] = {"input": input, "weight": self.weight, "bias": self.bias}  # type: ignore[dict-item]
        if in_bf16(input) and self.what in parts:
            parts[self.what] = _AlterGradient.apply(parts[self.what], self.alter)
        y = F.conv2d(parts["input"], parts["weight"], parts["bias"], padding=1)
        if in_bf16(input) and self.what == "output":
            return y + (self.alter(y) - y).detach()  # its gradients stay right
        return y


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
        one = _AlterGradient.apply(weight, lambda g: g * self.factor)
        return torch.cat([F.conv2d(input[:-1], weight, self.bias, padding=1),
                          F.conv2d(input[-1:], one, self.bias, padding=1)])  # fmt: skip


@pytest.mark.parametrize("count", [8, 16, 31, 64])
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_one_image_forgotten_in_a_sum_over_all_is_seen(factor: float, count: int) -> None:
    call = Call((count, 4, 8, 8), torch.bfloat16, (0, 2, 3, 1), input_gradient=True)
    faults = check_kernel(ForgetsImages(factor), call, precision="bf16", device=CPU, seed_text="x")
    assert "weight gradient" in [fault.what for fault in faults]


def test_a_kernel_that_raises_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.layer_norm

    def layer_norm(x: Tensor, *args: Any) -> Tensor:
        if x.dtype == torch.bfloat16 and len(x) > 2:
            raise RuntimeError('"layer_norm" not implemented for BFloat16')
        return right(x, *args)

    monkeypatch.setattr(F, "layer_norm", layer_norm)  # what a library without the kernel does
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.LayerNorm(4))
    report = check(model, image_size_px=8)
    assert report.wrong[0].what == ('kernel raised "layer_norm" not implemented for BFloat16',)
    assert report.wrong[0].path == "float32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(4, 3, 8, 8)).dtype == torch.bfloat16


def test_a_layer_used_at_two_sizes_goes_by_a_path_that_is_right_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=2, dilation=2)
            self.same = self.conv

        def forward(self, x: Tensor) -> Tensor:
            small: Tensor = self.same(F.avg_pool2d(x, 2))
            y: Tensor = self.conv(x)
            return y.mean((2, 3)) + small.mean((2, 3))

    # At 16 px space-to-batch would do, at 8 px (sub-grids of 4) it would not, and the other format at neither.
    plant(monkeypatch, lambda x, dilation: in_bf16(x) and (dilation > 1 or x.shape[-1] == 4))
    model = Twice()
    report = check(model, image_size_px=16)
    assert report.layers == 1
    assert report.wrong[0].layers == ("conv", "same")
    assert report.wrong[0].path == "float32"
    assert model.conv is model.same


# ---- the machine's own faults -----------------------------------------------------------------------------------


def depthwise_error(dilation: int, memory_format: torch.memory_format) -> float:
    """Relative error of the library's own weight gradient in bfloat16, by a comparison apart from the check's."""
    errors = []
    for attempt in range(3):
        torch.manual_seed(attempt)
        conv = nn.Conv2d(32, 32, 3, padding=dilation, dilation=dilation, groups=32, bias=False)
        x, gradient = torch.randn(8, 32, 32, 32).bfloat16(), torch.randn(8, 32, 32, 32).bfloat16()
        exact = copy.deepcopy(conv).double()
        exact(x.double()).backward(gradient.double())
        conv.to(memory_format=memory_format)  # type: ignore[call-overload]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv(x.contiguous(memory_format=memory_format))
        y.backward(gradient.contiguous(memory_format=memory_format))
        assert conv.weight.grad is not None
        assert exact.weight.grad is not None
        errors.append(relative_error(conv.weight.grad, exact.weight.grad))
    return max(errors, key=lambda error: float("inf") if error != error else error)


@pytest.fixture(scope="module")
def dilated_depthwise_is_wrong() -> bool:
    error = depthwise_error(2, torch.channels_last)
    return not error < 0.05


def seed_network(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("dual_branch_seed", **settings)
    return model


def test_the_real_fault_in_the_seed_is_found_and_repaired(dilated_depthwise_is_wrong: bool) -> None:
    if not dilated_depthwise_is_wrong:
        pytest.skip("this processor's bfloat16 dilated depthwise weight gradient is right, nothing real to find")
    model = seed_network()
    report = check(model, batch_size=16)
    assert [kernel.layers for kernel in report.wrong] == [
        (f"dilated_branches.0.{unit}.conv.depthwise",) for unit in range(3)
    ]
    assert {kernel.what for kernel in report.wrong} == {("weight gradient",)}
    assert {kernel.path for kernel in report.wrong} == {"space_to_batch"}
    assert all(kernel.relative_error > 0.1 for kernel in report.wrong)
    assert check(model, batch_size=16).wrong == ()


@pytest.mark.parametrize("channels", [3, 32, 64])
def test_the_real_fault_is_found_every_time(channels: int, dilated_depthwise_is_wrong: bool) -> None:
    if not dilated_depthwise_is_wrong:
        pytest.skip("this processor's bfloat16 dilated depthwise weight gradient is right, nothing real to find")
    conv = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels)
    call = Call((16, channels, 32, 32), torch.bfloat16, (0, 2, 3, 1), input_gradient=True)
    for attempt in range(10):
        faults = check_kernel(conv, call, precision="bf16", device=CPU, seed_text=str(attempt))
        assert [fault.what for fault in faults] == ["weight gradient"]


def gradients(model: nn.Module, images: Tensor, autocast: bool) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(images), torch.arange(len(images)) % 10)
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_the_repaired_seed_are_as_near_to_float64_as_bf16_can_be() -> None:
    torch.manual_seed(1)
    images = torch.randn(8, 3, 32, 32)
    model = seed_network(dropout=0.0)
    exact = gradients(copy.deepcopy(model).double(), images.double(), autocast=False)
    plain = gradients(copy.deepcopy(model), images, autocast=True)  # contiguous: the library's right kernels
    check(model, batch_size=8)
    found = gradients(model, images.contiguous(memory_format=torch.channels_last), autocast=True)
    assert found.keys() == exact.keys()
    dilated = [name for name in exact if name.startswith("dilated") and name.endswith("depthwise.weight")]
    assert len(dilated) == 9
    for name in dilated:
        assert relative_error(found[name], exact[name]) < 2 * relative_error(plain[name], exact[name]) + 0.02, name
    whole, plain_whole, exact_whole = (torch.cat([g.flatten() for g in d.values()]) for d in (found, plain, exact))
    best = F.cosine_similarity(plain_whole, exact_whole, dim=0)
    assert best > 0.9
    assert F.cosine_similarity(whole, exact_whole, dim=0) > best - 0.02


@pytest.mark.slow
def test_the_repaired_seed_trains_in_bf16_without_a_number_that_is_not_finite() -> None:
    model = seed_network()
    check(model, batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.008, momentum=0.95)
    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    first = last = 0.0
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), torch.arange(8) % 4)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all(), (step, name)
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first


# ---- no false alarm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["dual_branch_seed", "resnet18", "convnext_atto"])
def test_no_false_alarm(name: str, precision: str, memory_format: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    report = check(model, precision=precision, memory_format=memory_format, batch_size=16, image_size_px=32)
    assert report.checked >= 15
    wrong = [kernel.signature for kernel in report.wrong]
    # What is known to be wrong, each shown by a test apart from the check.
    known = {"dual_branch_seed": "dilation=(2, 2)", "convnext_atto": "LayerNorm2d"}.get(name)
    if precision == "bf16" and known is not None:
        wrong = [signature for signature in wrong if known not in signature]
    assert wrong == []


def test_layer_norm_in_bf16_on_the_cpu_is_as_wrong_as_the_check_says() -> None:
    torch.manual_seed(0)
    layer, rows = nn.LayerNorm(40), 64 * 256
    x, gradient = torch.randn(rows, 40).bfloat16(), torch.randn(rows, 40).bfloat16()
    exact = copy.deepcopy(layer).double()
    exact(x.double()).backward(gradient.double())
    layer(x).backward(gradient)
    assert layer.weight.grad is not None
    assert exact.weight.grad is not None
    error = relative_error(layer.weight.grad, exact.weight.grad)
    call = Call((64, 256, 40), torch.bfloat16, (0, 1, 2), input_gradient=True)
    faults = check_kernel(nn.LayerNorm(40), call, precision="bf16", device=CPU, seed_text="x")
    assert bool(faults) == (error > tolerance("bf16", CPU, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["dual_branch_seed", "resnet18", "convnext_atto"])
def test_no_false_alarm_on_a_gpu(name: str, precision: str) -> None:
    report = check(timm.create_model(name), precision=precision, device="cuda", batch_size=128)
    assert report.wrong == ()


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


# ---- nothing disturbed ------------------------------------------------------------------------------------------


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    model = seed_network()
    model.train()
    model.transitions[0].eval()  # type: ignore[operator, union-attr, index]
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    check(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_images_that_the_model_cannot_take() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(HarnessError, match="the model cannot take images of 3×8×8") as caught:
        check(model, image_size_px=8)
    assert "image_size_px" in (caught.value.hint or "")
    assert model.training


def test_layers_that_talk_to_other_ranks_are_not_tried_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert check(model, image_size_px=8).checked == 2
    numerics_only = copy.deepcopy(model)
    numerics_only[1].synchronises_ranks = True
    assert check(numerics_only, image_size_px=8).checked == 1


def test_the_first_layer_needs_no_input_gradient_and_frozen_layers_no_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model[2].requires_grad_(False)
    assert check(model, image_size_px=8).checked == 3  # three alike, called in three ways
    model[2].requires_grad_(True)
    assert check(model, image_size_px=8).checked == 2


# ---- report and memory ------------------------------------------------------------------------------------------


def test_report_as_json_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x, dilation: dilation > 1 and in_bf16(x))
    report = check(two_convolutions(), image_size_px=12)
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert fields["checked"] == report.checked == 2
    assert fields["layers"] == 3
    assert fields["wrong"][0]["layers"] == ["2", "3"]
    assert fields["wrong"][0]["path"] == "space_to_batch"
    assert fields["device"] == "cpu"
    assert report.seconds > 0
    assert not report.remembered
    kernel = dataclasses.replace(report.wrong[0], relative_error=float("inf"))
    infinite = dataclasses.replace(report, wrong=(kernel,))
    assert json.loads(json.dumps(infinite.to_json(), allow_nan=False))["wrong"][0]["relative_error"] is None
    assert "relative error inf" in infinite.render()
    assert check(two_convolutions()[:1], image_size_px=12).render().endswith("all right")


def forbid_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Fault]:
        raise AssertionError("checked again")

    monkeypatch.setattr(numerics, "check_kernel", fail)


def test_verdicts_and_paths_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x, dilation: dilation > 1 and in_bf16(x))
    first = check(two_convolutions(), cache_directory=tmp_path, image_size_px=12)
    (file,) = (tmp_path / "numerics").iterdir()  # and no temporary file
    stored = json.loads(file.read_text())
    assert stored["machine"]["torch"] == torch.__version__
    assert stored["machine"]["threads"] == str(torch.get_num_threads())
    with monkeypatch.context() as patch:
        forbid_checks(patch)
        model = two_convolutions()
        second = check(model, cache_directory=tmp_path, image_size_px=12)
    assert second.remembered
    assert not first.remembered
    assert second.wrong == first.wrong
    assert isinstance(model[2], SafeConv2d)
    assert "remembered" in second.render()
    wider = check(two_convolutions(), cache_directory=tmp_path, image_size_px=16)
    assert not wider.remembered
    with monkeypatch.context() as patch:
        forbid_checks(patch)  # other sizes are added to what is known
        assert check(two_convolutions(), cache_directory=tmp_path, image_size_px=12).remembered


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"machine": {}, "verdicts": {}}', '{"verdicts": 3}', "\x00\xff", "DAMAGED VERDICTS"],
)
def test_a_broken_memory_is_no_verdict(content: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    check(model, cache_directory=tmp_path, image_size_px=8)
    (file,) = (tmp_path / "numerics").iterdir()
    if content == "DAMAGED VERDICTS":
        stored = json.loads(file.read_text())
        stored["verdicts"] = {key: [["output"]] for key in stored["verdicts"]}
        content = json.dumps(stored)
    file.write_text(content, encoding="latin-1")
    assert not check(model, cache_directory=tmp_path, image_size_px=8).remembered
    assert check(model, cache_directory=tmp_path, image_size_px=8).remembered


def test_threads_precision_and_format_have_verdicts_of_their_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    threads = torch.get_num_threads()
    try:
        for count in (threads, threads + 1):
            torch.set_num_threads(count)
            for settings in ({}, {"precision": "no"}, {"memory_format": "contiguous"}):
                report = check(model, cache_directory=tmp_path, image_size_px=8, **settings)
                assert not report.remembered
    finally:
        torch.set_num_threads(threads)
    assert len(list((tmp_path / "numerics").iterdir())) == 6


def test_layers_of_unknown_versions_are_checked_each_time(tmp_path: Path) -> None:
    model = with_linear(OwnLinear(lambda g: g, reduced=False))
    for _ in range(2):
        assert not check(model, cache_directory=tmp_path, image_size_px=8).remembered
    (file,) = (tmp_path / "numerics").iterdir()
    assert "OwnLinear" not in file.read_text()
    assert "Conv2d" in file.read_text()


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert check(model, cache_directory=blocked, image_size_px=8).wrong == ()
    assert blocked.read_text() == "not a directory"
