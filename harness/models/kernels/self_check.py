"""Are the compiled passes right on this machine? The numerics check looks at convolutions, this at the rest.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.models.kernels.compiled import DEFINES, NoKernels
from harness.models.kernels.norm_relu_drop import LEVELS, NormReluDrop, moments
from harness.models.threads import one_thread

# Part of a block of channels, a whole one, both; rows beyond one chunk.
SHAPES = ((2, 3, 13, 17), (3, 32, 10, 10), (1, 40, 20, 21))
EPS = 1e-5
THRESHOLD = LEVELS // 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # of each element, relative to the largest: two roundings


def check_fused_pass() -> None:
    """Compare normalisation, ReLU and dropout, forward and backward, with float64; takes some milliseconds.

    Raises:
        NoKernels: a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    with one_thread(), torch.random.fork_rng(devices=[]):
        for dtype in DEFINES:
            for shape in SHAPES:
                for what, result, exact in _results(shape, dtype, generator):
                    error = float((result.double() - exact).abs().max() / exact.abs().max())
                    if not error <= TOLERANCE[dtype]:
                        raise NoKernels(f"the compiled {what} is wrong in {dtype} by {error:.2g}")


def _results(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, result and right result of each output of the pass."""
    x = (3 + torch.randn(shape, generator=generator)).to(dtype).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = 1 + 0.1 * torch.randn(2, shape[1], generator=generator)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, weight, bias)]
    mean, variance = moments(x)
    y = NormReluDrop.apply(*leaves, mean, variance, x.numel() / shape[1], EPS, THRESHOLD, False)
    y.backward(gradient)

    exact = x_exact, weight_exact, bias_exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact_variance, exact_mean = torch.var_mean(x_exact, dim=(0, 2, 3), correction=0)
    normalised = torch.nn.functional.batch_norm(
        x_exact, None, None, weight_exact, bias_exact, training=True, eps=EPS
    ).relu()
    scale = LEVELS / (LEVELS - THRESHOLD)
    kept = (y != 0).double()
    (normalised * kept * scale).backward(gradient.double())
    yield "mean", mean, exact_mean.detach()
    yield "variance", variance, exact_variance.detach()
    yield "output", y.detach(), (normalised * kept * scale).detach()
    names = ("input gradient", "weight gradient", "bias gradient")
    for name, leaf, right in zip(names, leaves, exact, strict=True):
        assert leaf.grad is not None
        assert right.grad is not None
        yield name, leaf.grad, right.grad
    share = float(kept.sum() / (normalised > 0).sum())
    if not abs(share - 1 / scale) < 0.1:  # some six standard deviations
        raise NoKernels(f"the compiled dropout is wrong in {dtype}: it keeps {share:.0%}")
