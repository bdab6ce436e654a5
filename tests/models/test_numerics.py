"""The numerics check: planted faults, the real one of this machine, no false alarm, what it reports and remembers."""

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
from harness.models.numerics import Call, NumericsReport, check_and_repair, check_kernel, tolerance
from harness.models.safe_conv import SafeConv2d

CPU = torch.device("cpu")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
Alter = Callable[[Tensor], Tensor]


def check(model: nn.Module, **settings: Any) -> NumericsReport:
    """`check_and_repair` for small images in bfloat16 and channels_last, unless told otherwise."""
    defaults: dict[str, Any] = {"batch_size": 6, "image_size_px": 32, "device": "cpu", "precision": "bf16"}
    return check_and_repair(
        model, **{**defaults, "memory_format": "channels_last", "cache_directory": None, **settings}
    )


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    """‖found - expected‖ / ‖expected‖."""
    assert found is not None
    assert expected is not None
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class AlterGradient(torch.autograd.Function):
    """The identity, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alter: Alter) -> Tensor:
        ctx.alter = alter
        return x.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.alter(gradient), None


# --- one layer


class Altered(nn.Conv2d):
    """A convolution of which one result is altered, but not in the float64 of the reference."""

    def __init__(self, what: str, alter: Alter, **settings: Any) -> None:
        super().__init__(4, 4, 3, **settings)
        self.what, self.alter = what, alter

    def forward(self, input: Tensor) -> Tensor:
        parts: dict[str, Any] = {"input": input, "weight": self.weight, "bias": self.bias}
        if input.dtype != torch.float64 and self.what in parts:
            parts[self.what] = AlterGradient.apply(parts[self.what], self.alter)
        y = self._conv_forward(*parts.values())
        if input.dtype != torch.float64 and self.what == "output":
            return y + (self.alter(y) - y).detach()  # its gradients stay right
        return y


def one_element(values: Tensor) -> Tensor:
    values = values.clone()
    values[1, 0] += values.norm() / values[1, 0].numel() ** 0.5
    return values


def last_image_left_out(values: Tensor) -> Tensor:
    return torch.cat([values[:-1], torch.zeros_like(values[-1:])])


def images_swapped(values: Tensor) -> Tensor:
    return torch.cat([values[4:], values[:4]])


def nan_somewhere(values: Tensor) -> Tensor:
    values = values.clone()
    values[1, 0, 1, 1] = torch.nan
    return values


ALTERATIONS: dict[str, tuple[str, Alter]] = {
    "output scaled": ("output", lambda y: y * 1.1),
    "output's last image": ("output", last_image_left_out),
    "output's images swapped": ("output", images_swapped),
    "one output is nan": ("output", nan_somewhere),
    "input gradient's last image": ("input", last_image_left_out),
    "input gradient negated": ("input", lambda g: -g),
    "weight gradient's one element": ("weight", one_element),
    "weight gradient scaled": ("weight", lambda g: g * 0.9),
    "weight gradient is zero": ("weight", torch.zeros_like),
    "weight gradient is nan": ("weight", nan_somewhere),
    "bias gradient": ("bias", lambda g: g * 0.9),
}
KINDS = {
    "dense": {"padding": 1},
    "dilated": {"padding": 2, "dilation": 2},
    "depthwise": {"padding": 1, "groups": 4},
    "dilated depthwise": {"padding": 2, "dilation": 2, "groups": 4},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALTERATIONS)
def test_every_result_is_compared(name: str, kind: str, precision: str) -> None:
    what, alter = ALTERATIONS[name]
    for count in (16, 23):
        call = Call((count, 4, 8, 8), PRECISIONS[precision], (0, 2, 3, 1))
        faults = check_kernel(Altered(what, alter, **KINDS[kind]), call, precision, CPU, name)
        assert list(faults) == ["output" if what == "output" else f"{what} gradient"]
        assert (max(faults.values()) == float("inf")) == ("nan" in name)
        assert check_kernel(Altered("nothing", alter, **KINDS[kind]), call, precision, CPU, name) == {}


class ForgetsImages(nn.Conv2d):
    """A weight gradient that leaves the last image out, or counts it twice, in bfloat16."""

    def __init__(self, factor: float) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float64:
            return super().forward(input)
        last = AlterGradient.apply(self.weight, lambda g: g * self.factor)
        parts = [(input[:-1], self.weight), (input[-1:], last)]
        return torch.cat([F.conv2d(x, weight, self.bias, padding=1) for x, weight in parts])


@pytest.mark.parametrize("count", [8, 16, 31, 64])
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_one_image_forgotten_in_a_sum_over_all_is_seen(factor: float, count: int) -> None:
    call = Call((count, 4, 8, 8), torch.bfloat16, (0, 2, 3, 1))
    assert "weight gradient" in check_kernel(ForgetsImages(factor), call, "bf16", CPU, "x")


def test_memory_that_a_kernel_leaves_unwritten_is_not_a_number() -> None:
    layer = nn.Conv2d(8, 16, 3)
    for dtype in (torch.float32, torch.bfloat16):
        numerics._poison(layer, CPU)
        assert torch.empty_like(layer.weight, dtype=dtype).isnan().any()


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
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_of_every_kind_pass(name: str, precision: str) -> None:
    layer, shape = LAYERS[name]
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    assert check_kernel(layer, Call(shape, PRECISIONS[precision], order), precision, CPU, name) == {}


def test_the_tolerance_grows_with_roundings_and_length() -> None:
    assert tolerance("bf16", CPU, 1) == pytest.approx(8 * 2**-8, rel=1e-3)
    assert tolerance("fp16", CPU, 1) < tolerance("bf16", CPU, 1)
    assert tolerance("no", CPU, 100) < tolerance("no", CPU, 10_000) < 1e-4
    assert tolerance("no", torch.device("cuda"), 1) > tolerance("no", CPU, 1)


# --- a network with a planted fault


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


def in_bf16(x: Tensor) -> bool:
    """Whether a layer computes in bfloat16; the float64 reference never does."""
    return torch.is_autocast_enabled("cpu") and x.dtype != torch.float64


def two_convolutions() -> nn.Sequential:
    """Layers 2 and 3 are dilated and alike."""
    torch.manual_seed(0)
    dilated = [nn.Conv2d(8, 8, 3, padding=2, dilation=2) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *dilated)


def plant_in_dilated(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x, dilation: dilation > 1 and in_bf16(x))


WHEN: dict[str, Callable[[Tensor, int], bool]] = {
    # where the planted kernel is wrong -> the first path that avoids it
    "space_to_batch": lambda x, dilation: dilation > 1 and in_bf16(x),
    "other_memory_format": lambda x, dilation: in_bf16(x) and not x.is_contiguous(),
    "float32": lambda x, dilation: in_bf16(x),
}


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
    assert all(isinstance(layer, nn.Conv2d) and layer.path == path for layer in model[2:])
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
    assert type(model[2]) is nn.Conv2d


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


def test_the_first_layer_needs_no_input_gradient() -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    assert check(model, image_size_px=8).checked == 2  # three alike, called in two ways


def test_a_part_of_a_large_batch_does_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, int] = {}

    def note(layer: nn.Module, call: Call, *_: Any) -> numerics.Faults:
        shapes[type(layer).__name__] = call.shape[0]
        return {}

    monkeypatch.setattr(numerics, "check_kernel", note)
    pool, dense = nn.AvgPool2d(16), nn.Conv2d(256, 256, 3, padding=1)
    check(nn.Sequential(nn.Conv2d(3, 256, 1), nn.BatchNorm2d(256), dense, pool, nn.Flatten(), nn.Linear(256, 1)),
          batch_size=128, image_size_px=16)  # fmt: skip
    assert shapes == {"Conv2d": 16, "BatchNorm2d": 16, "AvgPool2d": 16, "Linear": 128}


# --- the real fault


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
        errors.append(relative_error(conv.weight.grad, exact.weight.grad))
    return max(errors, key=lambda error: float("inf") if error != error else error)


@pytest.fixture(scope="module")
def _dilated_depthwise_is_wrong() -> None:
    if depthwise_error(2, torch.channels_last) < 0.05:
        pytest.skip("this processor's bfloat16 dilated depthwise weight gradient is right, nothing real to find")


def seed_network(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("dual_branch_seed", **settings)
    return model


@pytest.mark.usefixtures("_dilated_depthwise_is_wrong")
def test_the_real_fault_in_the_seed_is_found_and_repaired() -> None:
    model = seed_network()
    report = check(model, batch_size=16)
    assert [kernel.layers for kernel in report.wrong] == [
        (f"dilated_branches.0.{unit}.conv.depthwise",) for unit in range(3)
    ]
    assert {kernel.what for kernel in report.wrong} == {("weight gradient",)}
    assert {kernel.path for kernel in report.wrong} == {"space_to_batch"}
    assert all(kernel.relative_error > 0.1 for kernel in report.wrong)
    assert check(model, batch_size=16).wrong == ()


@pytest.mark.usefixtures("_dilated_depthwise_is_wrong")
@pytest.mark.parametrize("channels", [3, 32, 64])
def test_the_real_fault_is_found_every_time(channels: int) -> None:
    conv = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels)
    call = Call((16, channels, 32, 32), torch.bfloat16, (0, 2, 3, 1))
    for attempt in range(10):
        assert list(check_kernel(conv, call, "bf16", CPU, str(attempt))) == ["weight gradient"]


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


# --- no false alarm, nothing disturbed


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["dual_branch_seed", "resnet18", "convnext_atto"])
def test_no_false_alarm(name: str, precision: str, memory_format: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    report = check(model, precision=precision, memory_format=memory_format, batch_size=16)
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
    faults = check_kernel(nn.LayerNorm(40), Call((64, 256, 40), torch.bfloat16, (0, 1, 2)), "bf16", CPU, "x")
    assert bool(faults) == (relative_error(layer.weight.grad, exact.weight.grad) > tolerance("bf16", CPU, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["dual_branch_seed", "resnet18", "convnext_atto"])
def test_no_false_alarm_on_a_gpu(name: str, precision: str) -> None:
    report = check(timm.create_model(name), precision=precision, device="cuda", batch_size=128)
    assert report.wrong == ()


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    model = seed_network()
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


# --- what it reports and remembers


def test_report_as_json_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_dilated(monkeypatch)
    report = check(two_convolutions(), image_size_px=12)
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (fields["checked"], fields["layers"], fields["device"], fields["batch_size"]) == (2, 3, "cpu", 6)
    assert (fields["precision"], fields["memory_format"], fields["remembered"]) == ("bf16", "channels_last", False)
    assert (fields["wrong"][0]["layers"], fields["wrong"][0]["path"]) == (["2", "3"], "space_to_batch")
    assert report.seconds > 0
    kernel = dataclasses.replace(report.wrong[0], relative_error=float("inf"))
    infinite = dataclasses.replace(report, wrong=(kernel,))
    assert json.loads(json.dumps(infinite.to_json(), allow_nan=False))["wrong"][0]["relative_error"] is None
    assert "relative error inf" in infinite.render()
    assert check(two_convolutions()[:1], image_size_px=12).render().endswith("all right")


def test_verdicts_and_paths_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again() -> tuple[nn.Sequential, NumericsReport]:
        model = two_convolutions()
        with monkeypatch.context() as patch:
            patch.setattr(numerics, "check_kernel", lambda *_: pytest.fail("checked again"))
            return model, check(model, cache_directory=tmp_path, image_size_px=12)

    plant_in_dilated(monkeypatch)
    first = check(two_convolutions(), cache_directory=tmp_path, image_size_px=12)
    (file,) = (tmp_path / "numerics").iterdir()  # and no temporary file
    stored = json.loads(file.read_text())
    assert stored["machine"]["torch"] == torch.__version__
    assert stored["machine"]["threads"] == str(torch.get_num_threads())
    model, second = again()
    assert second.remembered
    assert not first.remembered
    assert second.wrong == first.wrong
    assert isinstance(model[2], SafeConv2d)
    assert "remembered" in second.render()
    assert not check(two_convolutions(), cache_directory=tmp_path, image_size_px=16).remembered
    assert again()[1].remembered  # other sizes are added to what is known


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
        content = json.dumps({**stored, "verdicts": {key: [["output"]] for key in stored["verdicts"]}})
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


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert check(nn.Sequential(nn.Conv2d(3, 4, 3)), cache_directory=blocked, image_size_px=8).wrong == ()
    assert blocked.read_text() == "not a directory"
