"""The compiled passes and bulk dropout against the plain layers: the same function, gradients and statistics."""

from __future__ import annotations

import copy
import math
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from harness.models import fused_units, kernels
from harness.models.fused_units import FusedUnit, MaskDropout, adopt_compiled_kernels, adopt_mask_dropout, keep_mask
from harness.models.kernels import KernelsUnavailable, available, open_kernels
from harness.models.kernels.depthwise import applies, depthwise_conv2d
from harness.models.kernels.norm_relu_drop import LEVELS, moments, normalise_relu_drop
from harness.models.safe_conv import adopt_path
from tests.conftest import ROOT, RunRanks
from tests.models.without_kernels import closed

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
DRAWS = 10_000_000
WIDTHS = (1, 3, 7, 8, 16, 24, 31, 32, 33, 48, 64, 100)  # parts of a block of 32 channels, whole ones and both
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 6e-3}  # of the norm


@pytest.fixture(scope="module", autouse=True)
def _kernels(session_cache: Path) -> Iterator[None]:
    """Opened for this file alone."""
    with closed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_units, "FEW_VALUES", 0)
        open_kernels(session_cache)
        yield


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def distance(result: Tensor | None, exact: Tensor | None) -> float:
    assert result is not None
    assert exact is not None
    return float((result.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def unit_of(channels: int, dropout: float = 0.0, **settings: Any) -> Any:
    """A unit of a dilated branch."""
    torch.manual_seed(0)
    settings = {"widths": [[channels]], "transition_widths": [], "in_chans": channels, "dropout": dropout, **settings}
    unit = timm.create_model("dual_branch", **settings).dilated_branches[0][0]
    if isinstance(getattr(unit, "norm", None), nn.BatchNorm2d):
        nn.init.uniform_(unit.norm.weight, 0.5, 1.5)
        nn.init.uniform_(unit.norm.bias, -0.5, 0.5)
    return unit.to(memory_format=torch.channels_last)


def fused_unit_of(channels: int, dropout: float = 0.0) -> Any:
    """The same unit; its convolution stays torch's."""
    unit = unit_of(channels, dropout)
    unit.__class__ = FusedUnit
    return unit


# --- depthwise convolution


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("dilation", [1, 2, 3, 8])
def test_depthwise_is_the_convolution_and_its_derivative(dtype: torch.dtype, channels: int, dilation: int) -> None:
    """Margins wider than the image included; the reference is float64."""
    x, gradient = images(3, channels, 11, 7, dtype=dtype), images(3, channels, 11, 7, dtype=dtype, seed=1)
    weight, bias = images(channels, 1, 3, 3, seed=2), images(1, channels, 1, 1, seed=3).flatten()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = depthwise_conv2d(*leaves, dilation=dilation)
    y.backward(gradient)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    right = nn.functional.conv2d(*exact, padding=dilation, dilation=dilation, groups=channels)
    right.backward(gradient.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert distance(y.detach(), right.detach()) < ROUNDING[dtype]
    for leaf, other in zip(leaves, exact, strict=True):
        assert distance(leaf.grad, other.grad) < ROUNDING[dtype]


def test_depthwise_takes_any_layout_no_bias_and_frozen_weights() -> None:
    x, weight = images(2, 5, 6, 6).contiguous().requires_grad_(), images(5, 1, 3, 3, seed=2)
    y = depthwise_conv2d(x, weight, None, dilation=2)
    torch.testing.assert_close(y, nn.functional.conv2d(x, weight, padding=2, dilation=2, groups=5))
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_which_layers_are_depthwise_enough() -> None:
    right: dict[str, Any] = {"padding": 1, "groups": 8}
    assert applies(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8))
    assert applies(nn.Conv2d(8, 8, 3, padding="same", groups=8))
    for settings in (
        {"groups": 1},
        {"out_channels": 16},
        {"kernel_size": 5, "padding": 2},
        {"stride": 2},
        {"dilation": 2},
        {"padding": (1, 2), "dilation": (1, 2)},
        {"padding_mode": "reflect"},
    ):
        assert not applies(nn.Conv2d(8, **{"out_channels": 8, "kernel_size": 3, **right, **settings}))


def test_other_shapes_and_dtypes_never_reach_the_kernels() -> None:
    """They trust what they are given."""
    conv = adopt_path(nn.Conv2d(8, 8, 3, padding=1, groups=8), "compiled")
    with pytest.raises(RuntimeError, match="expected input"):
        conv(images(2, 16, 5, 5))
    assert conv(torch.zeros(8, 5, 5)).shape == (8, 5, 5)
    halved = copy.deepcopy(conv).bfloat16()
    assert halved(images(2, 8, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int, channels: int) -> None:
    """Sums have a fixed order: a run that is resumed with other threads has the same sums."""
    x, gradient = (images(7, channels, 9, 9, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    before = torch.get_num_threads()

    def results() -> list[Tensor | None]:
        weight = images(channels, 1, 3, 3, seed=2).requires_grad_()
        y = depthwise_conv2d(x, weight, None, dilation=2)
        y.backward(gradient)
        return [y.detach(), weight.grad, *moments(x), relu_drop(x, threshold=999, key=3)]

    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


# --- normalisation, ReLU, dropout


def relu_drop(x: Tensor, *, weight: Tensor | None = None, threshold: int = 0, key: int = 0) -> Tensor:
    """The pass with a mean of 0 and a variance of 1, so that nothing but the weight is applied."""
    channels = x.shape[1]
    weight = torch.ones(channels) if weight is None else weight
    statistics = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    return normalise_relu_drop(x, weight, torch.zeros(channels), *statistics, eps=0, threshold=threshold, key=key)


@pytest.mark.parametrize("channels", WIDTHS[1:])  # of one channel, the scale of the weights is taken away too
def test_a_unit_without_dropout_is_the_plain_one(channels: int) -> None:
    """Output, all gradients and the running statistics, to float32's rounding; the reference is float64."""
    x, gradient = images(3, channels, 12, 9), images(3, channels, 12, 9, seed=1)
    fused, exact = fused_unit_of(channels), unit_of(channels).double()
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    outputs = [unit(each) for unit, each in zip((fused, exact), inputs, strict=True)]
    outputs[0].backward(gradient)
    outputs[1].backward(gradient.double())
    assert distance(outputs[0].detach(), outputs[1].detach()) < 1e-5
    assert distance(inputs[0].grad, inputs[1].grad) < 1e-5
    for name, parameter in fused.named_parameters():
        if not name.endswith("wise.bias"):  # normalisation takes these away: 0 but for rounding, on either path
            assert distance(parameter.grad, exact.get_parameter(name).grad) < 1e-4, name
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer.double(), exact.get_buffer(name).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_unit_drops_its_share_by_keys_from_torchs_generator(dtype: torch.dtype) -> None:
    """That the gradient has the mask of the output is checked where the kernels are opened."""
    unit, x = fused_unit_of(48, 0.5), images(4, 48, 10, 10, dtype=dtype)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            outputs.append(unit(x))
    assert outputs[0].dtype == dtype
    assert 0.15 < (outputs[0] != 0).double().mean().item() < 0.35  # half of the half that ReLU lets through
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def draws(threshold: int, *, key: int = 12345, channels: int = 64) -> Tensor:
    """Which of ten million values are kept, (rows, channels)."""
    x = torch.ones(1, channels, DRAWS // channels, 1).contiguous(memory_format=torch.channels_last)
    y = relu_drop(x, threshold=threshold, key=key)
    kept = y != 0
    expected = torch.tensor(LEVELS / (LEVELS - threshold))
    assert torch.equal(y[kept], expected.expand(int(kept.sum())))
    return kept.permute(0, 2, 3, 1).reshape(-1, channels)


@pytest.mark.parametrize("threshold", [1, 6554, 16384, 32768, 65535])
def test_share_dropped_over_ten_million_draws(threshold: int) -> None:
    share = threshold / LEVELS
    tolerance = 5 * math.sqrt(share * (1 - share) / DRAWS)
    assert abs(1 - draws(threshold).double().mean().item() - share) < tolerance
    torch.manual_seed(0)
    assert abs(1 - keep_mask(torch.empty(DRAWS), threshold).double().mean().item() - share) < tolerance


def test_draws_know_nothing_of_each_other() -> None:
    """Of other channels, of the next row, of the same place in the next chunk and under a neighbouring key."""
    kept = draws(16384).double()
    bound = 5.5 / math.sqrt(len(kept))  # of 64 × 64 correlations
    correlation = torch.corrcoef(kept.T) - torch.eye(64)
    assert correlation.abs().max().item() < bound
    assert (kept.mean(0) - 0.75).abs().max().item() < 5 * math.sqrt(0.1875 / len(kept))
    flat = kept.flatten() - 0.75
    for lag in (64, 256 * 64, 32, 16 * 64):
        assert abs((flat[lag:] * flat[:-lag]).mean().item() / 0.1875) < 5 / math.sqrt(DRAWS - lag), lag
    for key in (12346, 12345 ^ 1 << 32, 12345 ^ 1 << 63):
        other = draws(16384, key=key).double().flatten() - 0.75
        assert abs((flat * other).mean().item() / 0.1875) < 5 / math.sqrt(DRAWS), key


def test_every_position_of_a_word_is_alike_and_independent() -> None:
    """Of bulk dropout: the top bit of a 64-bit word is random too, and neighbours know nothing of each other."""
    torch.manual_seed(0)
    kept = keep_mask(torch.empty(DRAWS), 16384).view(-1, 4).double()
    assert (kept.mean(0) - 0.75).abs().max().item() < 5 * math.sqrt(0.25 * 0.75 / len(kept))
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max().item() < 5 / math.sqrt(len(kept))
    following = torch.corrcoef(torch.stack([kept[:-1, 3], kept[1:, 0]]))[0, 1]
    assert abs(following.item()) < 5 / math.sqrt(len(kept))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_bulk_dropouts_gradient_has_the_mask_of_the_output(dtype: torch.dtype, layout: str) -> None:
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
    kept = out != 0
    assert 0.5 < kept.double().mean().item() < 0.95
    torch.testing.assert_close(x.grad, kept.to(dtype) * torch.tensor(4 / 3, dtype=torch.float32).to(dtype))
    torch.testing.assert_close(out, x.detach() * kept * (4 / 3), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_bulk_dropout_in_evaluation_at_its_extremes_and_in_a_network() -> None:
    x = torch.randn(100)
    assert MaskDropout(0.5).eval()(x) is x
    assert MaskDropout(0.0)(x) is x
    assert torch.equal(MaskDropout(1.0)(x), torch.zeros(100))
    assert MaskDropout(0.5)(torch.empty(0)).shape == (0,)
    model = timm.create_model("dual_branch_seed")
    adopt_mask_dropout(model)
    assert sum(type(m) is MaskDropout for m in model.modules()) == 18
    assert not any(type(m) is nn.Dropout for m in model.modules())


def test_large_means_cost_no_digits() -> None:
    x = images(8, 32, 16, 16) + 1000
    mean, variance = moments(x)
    exact_variance, exact_mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, exact_mean, rtol=1e-8, atol=0)
    torch.testing.assert_close(variance, exact_variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("outlier", "tolerance"), [(100.0, 1e-4), (1e4, 1e-3)])  # about as torch's own
def test_one_unusual_pixel_costs_few_digits(outlier: float, tolerance: float) -> None:
    """Wherever it is: the first pixel is what its chunk is measured from."""
    for place in (0, 5000):
        x = images(16, 8, 32, 32)
        x.permute(0, 2, 3, 1).reshape(-1, 8)[place] = outlier
        _, variance = moments(x)
        torch.testing.assert_close(variance, torch.var(x.double(), dim=(0, 2, 3), correction=0), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    """A training that diverges has to be seen."""
    x = images(1, 32, 4, 4, dtype=dtype)
    x[0, 5, 1, 1], x[0, 6, 2, 2] = math.nan, math.inf
    y = relu_drop(x)
    assert math.isnan(y[0, 5, 1, 1].item())
    assert y[0, 6, 2, 2].item() == math.inf
    assert int(y.isfinite().sum()) == y.numel() - 2
    x = x.float().requires_grad_()
    fused_unit_of(32)(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.isfinite().all()


def test_bfloat16_is_rounded_to_the_nearest_even() -> None:
    values = images(1, 32, 64, 64, dtype=torch.bfloat16).abs()
    slope = torch.linspace(0.9, 1.1, 32)
    expected = (values.float() * slope.view(1, -1, 1, 1)).to(torch.bfloat16)
    assert torch.equal(relu_drop(values, weight=slope), expected)


# --- where a unit is fused


def test_evaluation_uses_running_statistics_and_recalibration_their_average() -> None:
    fused, plain = fused_unit_of(40, 0.25), unit_of(40, 0.25)
    x = images(4, 40, 9, 9)
    for unit in (fused, plain):
        unit.eval()
        unit.norm.reset_running_stats()
        unit.norm.momentum = None
        unit.norm.train()
        with torch.no_grad():
            unit(x)
            unit(2 * x)
        unit.eval()
    torch.testing.assert_close(fused.norm.running_mean, plain.norm.running_mean)
    torch.testing.assert_close(fused.norm.running_var, plain.norm.running_var)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    x.requires_grad_()  # gradients in evaluation mode take the plain layers
    fused(x).sum().backward()
    assert x.grad is not None


def test_parameters_and_statistics_with_gaps_are_read_where_they_lie() -> None:
    """The kernels read from an address on, and every second value of a longer vector does not lie so."""
    fused, plain, x = fused_unit_of(8), unit_of(8), images(3, 8, 9, 9)
    for unit in (fused, plain):
        unit.norm.weight = nn.Parameter(torch.linspace(0.5, 2, 16)[::2])
        unit.norm.running_mean = torch.zeros(16)[::2]
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.norm.running_mean, plain.norm.running_mean)


def test_which_units_are_fused(session_cache: Path) -> None:
    """The last one has its dropout before the norm."""
    early = OrderedDict(drop=nn.Dropout(0.5), norm=nn.BatchNorm2d(4), act=nn.ReLU())
    for unit, fused in (
        (unit_of(4, 0.1), 1),
        (nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(4), act=nn.ReLU())), 1),
        (unit_of(4, activation="gelu"), 0),
        (unit_of(4, norm="group"), 0),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), 0),
        (nn.Sequential(early), 0),
    ):
        assert f"{fused} units" in adopt_compiled_kernels(unit, session_cache)
        assert (type(unit) is FusedUnit) == bool(fused)


def test_hooks_doubles_and_closed_kernels_take_the_plain_layers() -> None:
    unit, x = fused_unit_of(8), images(2, 8, 5, 5)
    expected = unit(x)
    seen: list[int] = []
    handle = unit.norm.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1]
    handle.remove()
    with closed():
        torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(unit).double()(x.double()).dtype == torch.float64
    with torch.no_grad():  # buffers of another type
        assert copy.deepcopy(unit).bfloat16().eval()(x.bfloat16()).float().abs().max() < 100
    with pytest.raises(ValueError, match="more than 1 value"):
        unit(images(1, 8, 1, 1))


def test_what_is_made_of_a_unit_later_is_what_runs() -> None:
    """A slice, another layer in a place, one more layer: the unit's class is still that of a fused one."""
    x, names = images(2, 32, 6, 6), ("conv", "norm", "act", "drop")
    for what in ("slice", "act", "norm", "drop", "append"):
        others = {"act": nn.GELU(), "norm": nn.InstanceNorm2d(32), "drop": nn.AvgPool2d(2)}
        results = []
        for unit in (unit_of(32), fused_unit_of(32)):
            if what in others:
                unit[names.index(what)] = others[what]
            elif what == "append":
                unit.append(nn.AvgPool2d(2))
            results.append((unit[:2] if what == "slice" else unit)(x).detach())
        assert results[0].shape == results[1].shape, what
        assert distance(results[1], results[0]) < ROUNDING[torch.float32], what


def test_little_work_without_dropout_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_units, "FEW_VALUES", 2 * 32 * 8 * 8)
    few, enough = images(1, 32, 8, 8), images(2, 32, 8, 8)
    for dropout, fused in ((0.0, False), (0.25, True)):
        unit = fused_unit_of(32, dropout)
        assert unit._fuses(few, []) is fused
        assert unit._fuses(enough, [])


# --- having them or not


def test_without_a_compiler_the_layers_stay_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    model = nn.ModuleList([unit_of(8, 0.1)])
    with closed():
        assert adopt_compiled_kernels(model, tmp_path) == "plain (no C++ compiler)"
        assert not available(torch.float32)
    assert type(model[0]) is nn.Sequential
    assert type(model[0].conv.depthwise) is nn.Conv2d


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("v.a < 0 ? zero : v.a", "v.a", "output"),
        ("halves(&means[c])", "halves(&means[0])", "gradient"),
        ("sums[1] + v * v", "sums[1] + v", "variance"),
        ("(words & 0xFFFF) >= threshold", "words >= threshold", "dropout"),
        ("passed.b != 0", "passed.a != 0", "gradient"),
    ],
)
def test_a_wrong_pass_is_found_and_not_used(
    right: str, wrong: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in kernels.FOLDER.glob("*.*"):
        (tmp_path / path.name).write_text(path.read_text())
    source = (tmp_path / "kernels.cpp").read_text()
    assert right in source
    (tmp_path / "kernels.cpp").write_text(source.replace(right, wrong))
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    model = nn.ModuleList([unit_of(8, 0.1)])
    with closed():
        verdict = adopt_compiled_kernels(model, tmp_path)
        assert verdict.startswith("plain (the compiled")
        assert what in verdict
        assert not available(torch.float32)
    assert type(model[0]) is nn.Sequential


def test_they_are_compiled_once_and_again_when_a_file_is_not_whole(tmp_path: Path) -> None:
    with closed():
        open_kernels(tmp_path)
        assert kernels.fingerprint()
    files = sorted(tmp_path.rglob("*.so"))
    assert len(files) == 2
    first = [file.stat().st_ino for file in files]
    with closed():
        open_kernels(tmp_path)
    assert [file.stat().st_ino for file in files] == first
    for file in files:
        file.unlink()  # not cut short where it is: this process has it in memory
    files[0].write_bytes(b"")  # as after a power cut
    # A library without our functions: any other one.
    files[1].write_bytes(Path(torch.__file__).with_name("lib").joinpath("libshm.so").read_bytes())
    with closed():
        open_kernels(tmp_path)
        assert available(torch.float32)
        assert available(torch.bfloat16)
    folder = tmp_path / "kernels" / str(os.getuid())  # what lies there is run: others must not write there
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    with closed():
        assert "no folder of ours alone" in adopt_compiled_kernels(nn.ModuleList(), tmp_path)


def test_the_compiler_that_cxx_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such flag' >&2; exit 1\n")
    failing.chmod(failing.stat().st_mode | stat.S_IXUSR)
    for cxx, message in (
        ("/nowhere/c++", 'no program "/nowhere/c\\+\\+", which CXX names'),
        ('c++ "-O2', "CXX cannot be read: no closing quotation"),
        (f"env {failing}", "no such flag"),  # a launcher before it, as ccache is
    ):
        monkeypatch.setenv("CXX", cxx)
        with closed(), pytest.raises(KernelsUnavailable, match=message):
            open_kernels(tmp_path)
    assert not list((tmp_path / "kernels").rglob("*.so"))


def test_a_cache_that_cannot_be_written_means_plain_layers(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    with closed():
        assert adopt_compiled_kernels(nn.ModuleList(), tmp_path).startswith("plain (")


def test_ranks_have_kernels_together_or_not_at_all(run_ranks: RunRanks) -> None:
    worker = Path(__file__).with_name("one_rank_without_kernels.py")
    done = run_ranks(2, worker, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "rank 0: plain (another rank has no compiled ones); open: False" in done.stdout
    assert 'rank 1: plain (no program "/nowhere/c++", which CXX names); open: False' in done.stdout
