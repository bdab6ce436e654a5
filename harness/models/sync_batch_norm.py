"""Batch normalisation over the images of all ranks, on the CPU too.

`torch.nn.SyncBatchNorm` refuses CPU tensors. With it only on CUDA, a recipe trained on two CPU ranks would be
another one than on two GPUs, and no test on CPU ranks could compare with one process.

Legend of shape letters: B images of this rank, C channels, H height and W width in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from harness.errors import HarnessError
from harness.models.safe_conv import original_class


class _SyncBatchNorm(torch.autograd.Function):
    """Normalise by the mean and variance over all ranks: one all-reduce forward, one backward.

    Ioffe & Szegedy 2015, "Batch Normalization", section 3 gives both passes; sums over the batch become sums over
    the ranks. Ranks may have different numbers of images. Passes over the images are torch's own fused kernels:
    reductions of a BCHW tensor to its channels are ten times slower on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Returns y (B, C, H, W) of x's dtype; float64 mean (C,), biased variance (C,) and count of all ranks."""
        mean, variance, count = over_ranks(*_local_statistics(x_BCHW, weight_C.dtype))
        y_BCHW = _normalise(x_BCHW, mean, variance, weight_C, bias_C, eps)
        ctx.save_for_backward(x_BCHW, weight_C, mean, variance)
        ctx.eps, ctx.count = eps, count
        ctx.mark_non_differentiable(mean, variance)
        return y_BCHW, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's x, and this rank's share of those of weight and bias."""
        x_BCHW, weight_C, mean, variance = ctx.saved_tensors
        fixed = mean.to(weight_C.dtype), variance.to(weight_C.dtype)
        # As if mean and variance were constants: γ/σ · gradient, Σ gradient · x̂ and Σ gradient.
        x_gradient, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient_BCHW, x_BCHW, weight_C, *fixed, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = torch.cat([bias_gradient.double(), weight_gradient.double()])
            dist.all_reduce(sums)
            # What they add through x: -γ/σ · (mean of the gradient + x̂ · mean of gradient · x̂), again a batch norm.
            factor = -weight_C.double() * (variance + ctx.eps).rsqrt() / ctx.count
            bias, weight = (factor.repeat(2) * sums).to(weight_C.dtype).chunk(2)
            x_gradient += _normalise(x_BCHW, mean, variance, weight, bias, ctx.eps)
        return x_gradient, weight_gradient, bias_gradient, None


def _local_statistics(x_BCHW: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Mean (C,) and biased variance (C,) of this rank in float64, summed in `dtype`, and the count of values."""
    channels = x_BCHW.shape[1]
    count = x_BCHW.numel() // channels
    if count == 1:  # which the library refuses
        values = x_BCHW.detach().reshape(channels).double()
        return values, torch.zeros_like(values), count
    mean, variance = (torch.zeros(channels, dtype=dtype, device=x_BCHW.device) for _ in range(2))
    F.batch_norm(x_BCHW, mean, variance, training=True, momentum=1.0)  # leaves them in the running statistics
    return mean.double(), variance.double() * ((count - 1) / count), count


def _normalise(x_BCHW: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias, of x's dtype."""
    return F.batch_norm(x_BCHW, mean.to(weight.dtype), variance.to(weight.dtype), weight, bias, eps=eps)


def several_ranks() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def synchronises(norm: nn.Module) -> bool:
    """Whether this layer talks to other ranks as it is called."""
    return isinstance(norm, CpuSyncBatchNorm2d | CpuSyncBatchNormAct2d) and norm.training and several_ranks()


def over_ranks(mean: Tensor, variance: Tensor, count: float) -> tuple[Tensor, Tensor, float]:
    """Mean (C,), biased variance (C,) and count of all ranks' values from those of each, float64; one all-reduce."""
    # Σx² of a rank from its own variance: summed in float32 it would lose the digits that matter.
    sums = torch.cat([mean.new_tensor([count]), count * mean, count * (variance + mean.square())])
    dist.all_reduce(sums)
    all_mean, second_moment = (sums[1:] / sums[:1]).chunk(2)
    return all_mean, (second_moment - all_mean.square()).clamp_min(0), float(sums[0])


def next_momentum(norm: nn.BatchNorm2d) -> float:
    """Counts a batch, and says what it weighs in the running statistics."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:  # a plain average over all batches
        return 1.0 / float(norm.num_batches_tracked)
    return norm.momentum


def _synchronised(norm: nn.BatchNorm2d, x_BCHW: Tensor) -> Tensor:
    """Forward pass in training over several ranks; updates the running statistics as `nn.BatchNorm2d` does."""
    if x_BCHW.dim() != 4:
        raise ValueError(f"expected 4D input (got {x_BCHW.dim()}D input)")
    dtype = torch.float64 if x_BCHW.dtype == torch.float64 else torch.float32
    weight = x_BCHW.new_ones(norm.num_features, dtype=dtype) if norm.weight is None else norm.weight
    bias = x_BCHW.new_zeros(norm.num_features, dtype=dtype) if norm.bias is None else norm.bias
    with torch.autocast(x_BCHW.device.type, enabled=False):
        y_BCHW, mean, variance, count = _SyncBatchNorm.apply(x_BCHW, weight.to(dtype), bias.to(dtype), norm.eps)
    if norm.running_mean is not None and norm.running_var is not None:
        momentum = next_momentum(norm)
        unbiased = variance * (count / (count - 1))  # there are at least as many values as ranks
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    return y_BCHW


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of all ranks together; same state dict keys.

    In evaluation mode or with one rank it is `nn.BatchNorm2d`. Every rank must call it equally often. As with
    `nn.SyncBatchNorm`, the gradients of weight and bias are this rank's share: DistributedDataParallel averages them.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) of the same dtype; ranks may have different B."""
        return _synchronised(self, input) if synchronises(self) else super().forward(input)


class CpuSyncBatchNormAct2d(BatchNormAct2d):
    """timm's batch normalisation with activation, synchronised as `CpuSyncBatchNorm2d` is."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) of the same dtype; ranks may have different B."""
        if synchronises(self):
            result: Tensor = self.act(self.drop(_synchronised(self, x)))
            return result
        return super().forward(x)


_CPU_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: CpuSyncBatchNorm2d,
    BatchNormAct2d: CpuSyncBatchNormAct2d,
}


def convert_sync_batch_norm(model: nn.Module, device_type: str) -> nn.Module:
    """The model with its batch normalisation synchronised over ranks; call it before `DistributedDataParallel`.

    On the CPU the layers change in place and keep names, parameters and buffers. On other devices they are replaced by
    torch's `SyncBatchNorm` (by timm's conversion, which keeps activations that are fused with them); parameters and
    state dict keys stay.

    Raises:
        HarnessError: on the CPU, a batch normalisation layer of a class that cannot be synchronised there.
    """
    if device_type != "cpu":
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    for name, module in model.named_modules():
        original = original_class(module)  # float32 for one that was repaired: ours computes in it anyway
        if original in _CPU_CLASSES:
            module.__class__ = _CPU_CLASSES[original]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in _CPU_CLASSES.values():
            raise HarnessError(
                f"{type(module).__name__} cannot be synchronised over CPU ranks",
                where=name,
                hint="Switch synchronised batch normalisation off, or train on GPUs.",
            )
    return model
