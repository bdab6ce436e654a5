"""What a layer is run with when its kernel is checked: how it is called, which batch, which random numbers.

The layer runs at the shape it will be trained at, since the library picks its kernel by the shape; on a CPU, where
time counts, large layers run with a part of the batch. A float64 reference would take far longer there, so the
batch is a few base images repeated, a tile after a tile: a layer treats its images alike, so the reference for the
base images is the reference for all. The output gradients of the tiles have signs that do not cancel, so that a
kernel that leaves out or repeats some images gives another weight gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

REDUCED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BASE_IMAGES = 3
BASE_POSITIONS = 256  # images of few positions: more base images, so that sums are not over a handful of terms
CPU_VALUES = 1 << 21  # of input or output, above which a part of the batch must do on a CPU …
CPU_IMAGES = 16  # … but at least so many images
COUPLED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # images of a batch see each other


@dataclass(frozen=True)
class Call:
    """One way in which a layer is called.

    Args:
        shape: of its input at the training batch size.
        dtype: of its input.
        dim_order: dimensions from the largest stride to the smallest: (0, 2, 3, 1) is channels_last.
        input_gradient: whether training asks for the gradient of the input.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim_order: tuple[int, ...]
    input_gradient: bool

    def render(self) -> str:
        """Such as `128×64×32×32 bfloat16 channels_last`."""
        orders = {tuple(range(len(self.shape))): "contiguous", (0, 2, 3, 1): "channels_last"}
        order = orders.get(self.dim_order, f"strides in order {self.dim_order}")
        gradient = "" if self.input_gradient else ", no input gradient"
        return f"{'×'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')} {order}{gradient}"


class Tiling:
    """A batch of `count` images made of `base` different ones, repeated.

    The k tiles' signs sum to about √k, as a sum of k random signs would; the last one is positive, so that a last
    tile that is not whole leaves no image with a sum of zero. All are 1 when not `signed`.
    """

    def __init__(self, count: int, base: int, *, signed: bool) -> None:
        self.count, self.base = count, base
        tiles = math.ceil(count / base)
        root = math.isqrt(tiles) + 1
        negative = (tiles - root) // 2 if signed and tiles > root else 0
        self.signs = [-1] * negative + [1] * (tiles - negative)

    def weights(self) -> Tensor:
        """(base,): the sum of the signs with which each base image stands in the batch."""
        each = torch.tensor(self.signs, dtype=torch.float64).repeat_interleave(self.base)[: self.count]
        return torch.zeros(self.base, dtype=torch.float64).index_add_(0, torch.arange(self.count) % self.base, each)

    def fill(self, whole: Tensor, tile: Tensor, *, signed: bool) -> Tensor:
        """Write `tile` (base, …) over and over into `whole` (count, …)."""
        tile = torch.empty_like(whole[: len(tile)]).copy_(tile)  # in the memory format of `whole`
        for part, sign in zip(whole.split(self.base), self.signs, strict=True):
            torch.mul(tile[: len(part)], sign if signed else 1, out=part)
        return whole


def probe_images(count: int, values_per_image: int, device: torch.device) -> int:
    """How many of `count` images a check runs with."""
    if device.type != "cpu":
        return count
    return min(count, max(CPU_IMAGES, math.ceil(CPU_VALUES / values_per_image)))


def base_count(layer: nn.Module, call: Call) -> int:
    """How many different images the batch is made of."""
    count, positions = call.shape[0], math.prod(call.shape[2:])
    # An odd number: a kernel that mixes up images by a power of two then meets other images.
    wanted = min(count, max(BASE_IMAGES, math.ceil(BASE_POSITIONS / max(positions, 1))) | 1)
    if isinstance(layer, COUPLED):  # statistics of the copies equal those of the base images only if all are whole
        return next(base for base in range(wanted, count + 1) if count % base == 0)
    return wanted


def empty_input(call: Call, device: torch.device) -> Tensor:
    """A tensor for the call's input, with its strides in the order of the call."""
    inverse = sorted(range(len(call.dim_order)), key=call.dim_order.__getitem__)
    shape = [call.shape[dim] for dim in call.dim_order]
    return torch.empty(shape, dtype=call.dtype, device=device).permute(inverse)


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.dim() - 1))


def random_input(layer: nn.Module, call: Call, base: int, precision: str, generator: torch.Generator) -> Tensor:
    """(base, …) normal numbers; for maximum pooling all different, as ties may go either way."""
    shape = (base, *call.shape[1:])
    if not isinstance(layer, nn.MaxPool1d | nn.MaxPool2d | nn.AdaptiveMaxPool2d):
        return round_to(torch.randn(shape, generator=generator), precision).to(call.dtype)
    planes, positions = math.prod(shape[:2]), math.prod(shape[2:])
    shifts = torch.randint(positions, (planes, 1), generator=generator)
    ranks = (torch.randperm(positions, generator=generator) + shifts).remainder(positions).reshape(shape)
    steps = round(1 / torch.finfo(REDUCED_DTYPES.get(precision, call.dtype)).eps)
    octaves = ranks.div(steps, rounding_mode="floor") - positions // (2 * steps)
    return ((1 + (ranks % steps) / steps) * torch.exp2(octaves)).to(call.dtype)


def round_to(value: Tensor, precision: str) -> Tensor:
    """Rounded to what the precision can hold, so that casting it is no error."""
    reduced = REDUCED_DTYPES.get(precision)
    return value if reduced is None else value.to(reduced).to(value.dtype)
