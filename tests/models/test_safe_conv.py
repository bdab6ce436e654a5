"""Other paths to the same convolution: exact in float64, alike in every precision, and invisible from outside."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import harness.models.dual_branch  # noqa: F401  registers the networks
from harness.models.kernels.compiled import NoKernels, open_kernels
from harness.models.safe_conv import (
    Float32Layer,
    Path,
    SafeConv2d,
    adopt_path,
    candidate_paths,
    original_class,
    space_to_batch_applies,
)
from tests.models.without_kernels import closed

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PATHS = get_args(Path)


@pytest.fixture(scope="module", autouse=True)
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Opened for this file alone."""
    with closed():
        with contextlib.suppress(NoKernels):  # without them, that path is the direct one
            open_kernels(tmp_path_factory.mktemp("kernels"))
        yield


def same_conv(
    dilation: tuple[int, int], kernel: tuple[int, int], groups: int, out_channels: int = 8, **settings: Any
) -> nn.Conv2d:
    torch.manual_seed(0)
    padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    return nn.Conv2d(4, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, **settings)


def by(conv: nn.Conv2d, path: Path) -> SafeConv2d:
    return SafeConv2d.adopt(copy.deepcopy(conv), path)


def results(conv: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients; the output gradient is fixed."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = conv(x)
    y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape))
    assert x.grad is not None
    gradients = {name: p.grad for name, p in conv.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **gradients}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [(2, 2), (3, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize(("size", "kernel"), [((8, 12), (3, 3)), ((7, 9), (3, 3)), ((5, 11), (3, 5)), ((1, 2), (5, 1))])
def test_space_to_batch_is_the_convolution(
    size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], groups: int, layout: str
) -> None:
    conv = same_conv(dilation, kernel, groups).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    expected, found = results(conv, x), results(by(conv, "space_to_batch"), x)
    assert found.keys() == expected.keys() == {"output", "input", "weight", "bias"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)
    assert found["output"].is_contiguous(memory_format=LAYOUTS[layout])


def test_space_to_batch_has_the_right_derivatives() -> None:
    conv = by(same_conv((2, 3), (3, 3), 2).double(), "space_to_batch")
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: conv(x), (x, *conv.parameters()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_same_dtype_layout_and_values(path: Path, autocast: bool, bias: bool, layout: str) -> None:
    out_channels = 4 if path == "compiled" else 8
    conv = same_conv((2, 2), (3, 3), 4, out_channels, bias=bias).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    x = torch.randn(2, 4, 7, 9).contiguous(memory_format=LAYOUTS[layout])
    expected = results(copy.deepcopy(conv).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = results(by(conv, path), x)
    assert found["output"].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert found["output"].is_contiguous(memory_format=LAYOUTS[layout])
    assert found["input"].dtype == found["weight"].dtype == torch.float32
    tolerance = 0.03 if autocast else 1e-5
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < tolerance, (name, error)


def test_the_other_memory_format_is_used() -> None:
    conv = by(same_conv((1, 1), (3, 3), 1), "other_memory_format")
    seen: list[Tensor] = []
    conv._conv_forward = lambda x, weight, bias: seen.append(x) or nn.Conv2d._conv_forward(conv, x, weight, bias)  # type: ignore[assignment, func-returns-value]
    x = torch.randn(2, 4, 6, 6)
    assert conv(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert conv(x).is_contiguous()
    assert seen[0].is_contiguous()
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("settings", "applies"),
    [
        ({"padding": 2, "dilation": 2}, True),
        ({"padding": "same", "dilation": 2}, True),
        ({"padding": (2, 3), "dilation": (2, 3)}, True),
        ({"padding": 1, "dilation": 1}, False),
        ({"padding": 1, "dilation": 2}, False),
        ({"padding": "valid", "dilation": 2}, False),
        ({"padding": 2, "dilation": 2, "stride": 2}, False),
        ({"padding": 2, "dilation": 2, "padding_mode": "reflect"}, False),
        ({"padding": 3, "dilation": 2, "kernel_size": 4}, False),
    ],
)
def test_where_space_to_batch_applies(settings: dict[str, Any], applies: bool) -> None:
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, **settings})
    assert space_to_batch_applies(conv) is applies
    assert ("space_to_batch" in candidate_paths(conv, "no")) is applies
    if not applies:
        with pytest.raises(ValueError, match="space_to_batch cannot compute"):
            SafeConv2d.adopt(conv, "space_to_batch")
        assert type(conv) is nn.Conv2d


def test_adopting_keeps_everything_but_the_path() -> None:
    conv = same_conv((2, 2), (3, 3), 4)
    calls: list[int] = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    keys, weight = list(conv.state_dict()), conv.weight
    safe = SafeConv2d.adopt(conv, "space_to_batch")
    assert safe is conv
    assert isinstance(safe, nn.Conv2d)
    assert list(safe.state_dict()) == keys
    assert safe.weight is weight
    safe(torch.zeros(1, 4, 5, 5))
    assert calls == [1]
    assert copy.deepcopy(safe).path == "space_to_batch"
    assert "path=space_to_batch" in repr(safe)
    assert original_class(safe) is nn.Conv2d


class OwnConv2d(nn.Conv2d):
    """A convolution of somebody else."""


def test_other_classes_are_not_taken_for_plain_convolutions() -> None:
    conv = OwnConv2d(4, 4, 3, padding=2, dilation=2)
    with pytest.raises(ValueError, match="OwnConv2d is no plain Conv2d"):
        SafeConv2d.adopt(conv, "space_to_batch")
    assert candidate_paths(conv, "bf16") == ["float32"]
    assert candidate_paths(conv, "no") == []


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(nn.Linear(6, 5), torch.bfloat16), (nn.LayerNorm(6), torch.bfloat16), (nn.AvgPool1d(2), torch.bfloat16)],
)
def test_a_layer_in_float32(layer: nn.Module, dtype: torch.dtype) -> None:
    original, keys = type(layer), list(layer.state_dict())
    x = torch.randn(2, 4, 6, dtype=torch.bfloat16)
    safe = adopt_path(copy.deepcopy(layer), "float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = safe(x)
    assert isinstance(safe, original)
    assert original_class(safe) is original
    assert type(safe).__name__ == f"Float32{original.__name__}"
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x.float()).to(dtype), rtol=0, atol=0)
    for same in (copy.deepcopy(safe), copy.copy(safe), pickle.loads(pickle.dumps(safe))):
        assert list(same.state_dict()) == keys
        assert repr(same) == repr(safe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(same(x), y, rtol=0, atol=0)
    assert adopt_path(safe, "direct") is safe
    assert type(adopt_path(safe, "float32")).__mro__[1] is Float32Layer  # not wrapped twice
    assert candidate_paths(safe, "bf16") == []
    with pytest.raises(ValueError, match="has no path space_to_batch"):
        adopt_path(safe, "space_to_batch")
