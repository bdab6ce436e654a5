"""Dropout from bulk bits: the function, the layout and the statistics of nn.Dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from harness.models.build import build_model
from harness.models.mask_dropout import MaskDropout, adopt_mask_dropout, keep_mask

DRAWS = 10_000_000


@pytest.mark.parametrize("p", [0.25, 0.1, 0.5, 0.999])
def test_share_dropped_over_ten_million_draws(p: float) -> None:
    torch.manual_seed(0)
    layer = MaskDropout(p)
    out = layer(torch.ones(DRAWS))
    dropped = (out == 0).double().mean().item()
    share = round(p * 65536) / 65536
    assert abs(share - p) <= 2**-17
    assert abs(dropped - share) < 5 * math.sqrt(p * (1 - p) / DRAWS)
    assert out.max().item() == pytest.approx(1 / (1 - share), rel=1e-6)
    assert abs(out.double().mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / DRAWS)


def test_every_position_of_a_word_is_alike_and_independent() -> None:
    """The top bit of a 64-bit word is random too, and neighbours know nothing of each other."""
    torch.manual_seed(0)
    kept = keep_mask(torch.empty(DRAWS), 16384).view(-1, 4).double()
    bound = 5 * math.sqrt(0.25 * 0.75 / len(kept))
    assert (kept.mean(0) - 0.75).abs().max().item() < bound
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max().item() < 5 / math.sqrt(len(kept))
    following = torch.corrcoef(torch.stack([kept[:-1, 3], kept[1:, 0]]))[0, 1]
    assert abs(following.item()) < 5 / math.sqrt(len(kept))


def test_no_number_of_sixteen_bits_is_missing() -> None:
    """Thresholds that differ by a small share differ in what they drop, at both ends of the range."""
    torch.manual_seed(0)
    x = torch.empty(DRAWS)
    for threshold in (1, 65535):
        share = keep_mask(x, threshold).double().mean().item()
        expected = 1 - threshold / 65536
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / DRAWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_gradient_has_the_mask_of_the_output(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, 9, dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = x[:, :, ::2]
    x = x.detach().requires_grad_()
    out = MaskDropout(0.25)(x)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    assert x.grad is not None
    kept = out != 0
    assert 0.5 < kept.double().mean().item() < 0.95
    scale = torch.tensor(4 / 3, dtype=torch.float32).to(dtype)
    torch.testing.assert_close(x.grad, kept.to(dtype) * scale)
    torch.testing.assert_close(out, x.detach() * kept * (4 / 3), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_evaluation_and_extremes() -> None:
    x = torch.randn(100)
    assert MaskDropout(0.5).eval()(x) is x
    assert MaskDropout(0.0)(x) is x
    assert torch.equal(MaskDropout(1.0)(x), torch.zeros(100))
    assert MaskDropout(0.5)(torch.empty(0)).shape == (0,)


def test_the_seed_decides() -> None:
    x = torch.ones(1000)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(MaskDropout(0.25)(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_the_seeds_network_is_adopted_whole() -> None:
    model = build_model("dual_branch_seed", num_classes=10, image_size_px=32, args={})
    names = list(model.state_dict())
    assert adopt_mask_dropout(model) == 18
    assert sum(isinstance(m, MaskDropout) for m in model.modules()) == 18
    assert not any(type(m) is nn.Dropout for m in model.modules())
    assert list(model.state_dict()) == names
    torch.manual_seed(0)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
