"""Other paths to the same layer: exact in float64, alike in every precision, and invisible from outside."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from harness.models.build import MEMORY_FORMATS
from harness.models.kernels import KernelsUnavailable, open_kernels
from harness.models.safe_conv import (
    Route,
    SafeConv2d,
    adopt_path,
    candidate_paths,
    original_class,
    space_to_batch_applies,
)
from tests.models.without_kernels import closed


@pytest.fixture(scope="module", autouse=True)
def _kernels(session_cache: Path) -> Iterator[None]:
    """Opened for this file alone."""
    with closed():
        with contextlib.suppress(KernelsUnavailable):  # without them, that path is the direct one
            open_kernels(session_cache)
        yield


def same_conv(
    dilation: tuple[int, int], kernel: tuple[int, int], groups: int, out_channels: int = 8, **settings: Any
) -> nn.Conv2d:
    torch.manual_seed(0)
    padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    return nn.Conv2d(4, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, **settings)


def by(layer: nn.Module, path: Route) -> Any:
    return adopt_path(copy.deepcopy(layer), path)


def results(conv: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients; the output gradient is fixed."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = conv(x)
    y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape))
    assert x.grad is not None
    gradients = {name: p.grad for name, p in conv.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **gradients}


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [(2, 2), (3, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize(("size", "kernel"), [((8, 12), (3, 3)), ((7, 9), (3, 3)), ((5, 11), (3, 5)), ((1, 2), (5, 1))])
def test_space_to_batch_is_the_convolution(
    size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], groups: int, layout: str
) -> None:
    conv = same_conv(dilation, kernel, groups).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=MEMORY_FORMATS[layout])
    expected, found = results(conv, x), results(by(conv, "space_to_batch"), x)
    assert found.keys() == expected.keys() == {"output", "input", "weight", "bias"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)
    assert found["output"].is_contiguous(memory_format=MEMORY_FORMATS[layout])


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("path", get_args(Route))
def test_every_path_gives_the_same_dtype_layout_and_values(
    path: Route, autocast: bool, bias: bool, layout: str
) -> None:
    out_channels = 4 if path == "compiled" else 8
    conv = same_conv((2, 2), (3, 3), 4, out_channels, bias=bias).to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]
    x = torch.randn(2, 4, 7, 9).contiguous(memory_format=MEMORY_FORMATS[layout])
    expected = results(copy.deepcopy(conv).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = results(by(conv, path), x)
    assert found["output"].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert found["output"].is_contiguous(memory_format=MEMORY_FORMATS[layout])
    assert found["input"].dtype == found["weight"].dtype == torch.float32
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < (0.03 if autocast else 1e-5), (name, error)


def test_the_other_memory_format_is_used() -> None:
    conv = by(same_conv((1, 1), (3, 3), 1), "other_memory_format")
    seen: list[Tensor] = []
    conv._conv_forward = lambda x, weight, bias: seen.append(x) or nn.Conv2d._conv_forward(conv, x, weight, bias)  # type: ignore[func-returns-value]
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


class OwnConv2d(nn.Conv2d):
    """A convolution of somebody else."""


def test_candidates_of_other_classes_and_of_compiled_layers() -> None:
    own = OwnConv2d(4, 4, 3, padding=2, dilation=2)
    assert candidate_paths(own, "bf16") == ["float32"]
    assert candidate_paths(own, "no") == []
    compiled = by(same_conv((1, 1), (3, 3), 4, 4), "compiled")
    assert candidate_paths(compiled, "bf16") == ["direct", "other_memory_format", "float32"]


def test_adopting_keeps_everything_but_the_path() -> None:
    conv = same_conv((2, 2), (3, 3), 4)
    calls: list[int] = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    keys, weight = list(conv.state_dict()), conv.weight
    safe = adopt_path(conv, "space_to_batch")
    assert safe is conv
    assert isinstance(safe, SafeConv2d)
    assert list(safe.state_dict()) == keys
    assert safe.weight is weight
    safe(torch.zeros(1, 4, 5, 5))
    assert calls == [1]
    assert copy.deepcopy(safe).path == "space_to_batch"
    assert "path=space_to_batch" in repr(safe)
    assert original_class(safe) is nn.Conv2d
    assert type(adopt_path(safe, "direct")) is nn.Conv2d


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.LayerNorm(6), nn.AvgPool1d(2), nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_in_float32(layer: nn.Module, dtype: torch.dtype) -> None:
    """The result has the dtype that the layer itself gives under autocast."""
    original, keys = type(layer), list(layer.state_dict())
    x = torch.randn(2, 4, 6, dtype=dtype)
    safe = by(layer, "float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, direct = safe(x), layer(x)
    assert y.dtype == direct.dtype
    torch.testing.assert_close(y, layer(x.float()).to(y.dtype), rtol=0, atol=0)
    assert isinstance(safe, original)
    assert original_class(safe) is original
    assert type(safe).__name__ == f"Float32{original.__name__}"
    for same in (copy.deepcopy(safe), copy.copy(safe), pickle.loads(pickle.dumps(safe))):
        assert list(same.state_dict()) == keys
        assert repr(same) == repr(safe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(same(x), y, rtol=0, atol=0)
    assert original_class(adopt_path(safe, "float32")) is original  # not wrapped twice
    assert candidate_paths(safe, "bf16") == []
    assert type(adopt_path(safe, "direct")) is original
