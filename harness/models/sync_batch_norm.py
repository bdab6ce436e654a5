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

_REDUCED = (0, 2, 3)  # of BCHW: all but the channels


class _SyncBatchNorm(torch.autograd.Function):
    """Normalise by the mean and variance over all ranks: one all-reduce forward, one backward.

    Ioffe & Szegedy 2015, "Batch Normalization", section 3 gives both passes; sums over the batch become sums over
    the ranks. Ranks may have different numbers of images.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns y (B, C, H, W) of x's dtype; float64 mean (C,), biased variance (C,) and count (1,) of all ranks."""
        x = x_BCHW.float() if x_BCHW.dtype in (torch.bfloat16, torch.float16) else x_BCHW
        variance, mean = torch.var_mean(x, dim=_REDUCED, correction=0)
        variance, mean = variance.double(), mean.double()
        count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64)
        # Σx² of a rank from its own variance: taken from x directly in float32 it would lose digits.
        sums = torch.cat([count, count * mean, count * (variance + mean.square())])
        dist.all_reduce(sums)
        count, mean, second_moment = sums[:1], *(sums[1:] / sums[:1]).chunk(2)
        variance = (second_moment - mean.square()).clamp_min(0)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = F.batch_norm(
            x, mean.to(dtype), variance.to(dtype), _as(weight_C, dtype), _as(bias_C, dtype), False, 0.0, eps
        )
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x_BCHW, weight_C, bias_C, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x_BCHW.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's x, and this rank's share of those of weight and bias."""
        x_BCHW, weight_C, bias_C, mean, scale, count = ctx.saved_tensors
        dtype = torch.float64 if x_BCHW.dtype == torch.float64 else torch.float32
        gradient = gradient_BCHW.to(dtype)
        normalised = (x_BCHW.to(dtype) - _channels(mean, dtype)) * _channels(scale, dtype)
        bias_gradient = gradient.sum(_REDUCED)
        weight_gradient = (gradient * normalised).sum(_REDUCED)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([bias_gradient.double(), weight_gradient.double()])
            dist.all_reduce(sums)
            mean_gradient, mean_product = (sums / count).chunk(2)
            factor = scale if weight_C is None else scale * weight_C.double()
            # factor · (gradient - mean gradient - normalised · mean product), in place: these are large tensors.
            x_gradient = normalised.mul_(_channels(-mean_product, dtype)).add_(gradient)
            x_gradient = x_gradient.sub_(_channels(mean_gradient, dtype)).mul_(_channels(factor, dtype))
            x_gradient = x_gradient.to(x_BCHW.dtype)
        return (
            x_gradient,
            None if weight_C is None else weight_gradient.to(weight_C.dtype),
            None if bias_C is None else bias_gradient.to(bias_C.dtype),
            None,
        )


def _as(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def _channels(values_C: Tensor, dtype: torch.dtype) -> Tensor:
    return values_C.to(dtype).view(1, -1, 1, 1)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _synchronised(norm: nn.BatchNorm2d, x_BCHW: Tensor) -> Tensor:
    """Forward pass in training over several ranks; updates the running statistics as `nn.BatchNorm2d` does.

    Raises:
        ValueError: one value for each channel over all ranks, whose variance says nothing.
    """
    if x_BCHW.dim() != 4:
        raise ValueError(f"expected 4D input (got {x_BCHW.dim()}D input)")
    with torch.autocast(x_BCHW.device.type, enabled=False):
        y_BCHW, mean, variance, count = _SyncBatchNorm.apply(x_BCHW, norm.weight, norm.bias, norm.eps)
    if count.item() <= 1:
        raise ValueError("expected more than 1 value for each channel when training")
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        momentum = norm.momentum
        if momentum is None:  # a plain average over all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
        unbiased = variance * (count / (count - 1))
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    return y_BCHW


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of all ranks together; same state dict keys.

    In evaluation mode or with one rank it is `nn.BatchNorm2d`. Every rank must call it equally often. As with
    `nn.SyncBatchNorm`, the gradients of weight and bias are this rank's share: DistributedDataParallel averages them.
    """

    synchronises_ranks = True

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) of the same dtype; ranks may have different B."""
        if self.training and _several_ranks():
            return _synchronised(self, input)
        return super().forward(input)


class CpuSyncBatchNormAct2d(BatchNormAct2d):
    """timm's batch normalisation with activation, synchronised as `CpuSyncBatchNorm2d` is."""

    synchronises_ranks = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) of the same dtype; ranks may have different B."""
        if self.training and _several_ranks():
            result: Tensor = self.act(self.drop(_synchronised(self, x)))
            return result
        return super().forward(x)


_CPU_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: CpuSyncBatchNorm2d,
    BatchNormAct2d: CpuSyncBatchNormAct2d,
}


def convert_sync_batch_norm(model: nn.Module, device_type: str) -> nn.Module:
    """Synchronise the batch normalisation layers over ranks; call it before `DistributedDataParallel`.

    On the CPU the layers change in place and keep names, parameters and buffers. On other devices they are
    replaced by torch's `SyncBatchNorm` (by timm's conversion, which keeps activations that are fused with them);
    parameters and state dict keys stay.

    Args:
        model: any model.
        device_type: such as "cpu" or "cuda".

    Returns:
        The model, to be used instead of the one given.

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
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not getattr(module, "synchronises_ranks", False):
            raise HarnessError(
                f"{type(module).__name__} cannot be synchronised over CPU ranks",
                where=name,
                hint="Switch synchronised batch normalisation off, or train on GPUs.",
            )
    return model
