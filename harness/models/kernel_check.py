"""Is the library's kernel for one layer right? Forward and backward against float64, on the device at hand.

Output, input gradient and the gradients of the parameters are compared within a tolerance that follows from the
precision and the length of the sums. `kernel_data` says what the layer is run with.
"""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.kernel_data import (
    COUPLED,
    REDUCED_DTYPES,
    Call,
    Tiling,
    base_count,
    column,
    empty_input,
    random_input,
    round_to,
)
from harness.models.threads import one_thread

# Half the distance from 1 to the next number (Higham 2002, section 2.1). float32 has a floor well above its
# own 2^-24, since fast convolutions (Winograd) lose some digits by design.
UNIT_ROUNDOFF = {"no": 2.0**-20, "bf16": 2.0**-8, "fp16": 2.0**-11}
TENSOR_FLOAT_32 = 2.0**-11  # what CUDA libraries may use in place of float32 in convolutions and products
ACCUMULATOR = 2.0**-24  # sums are kept in float32
MARGIN = 8.0
ELEMENT_MARGIN = 4.0
LARGEST_POISON_BYTES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """A result that is not within its tolerance.

    Args:
        what: "output", "input gradient", "weight gradient", "bias gradient", or the error that a kernel raised.
        relative_error: its distance from the reference, relative to the reference's norm; inf where not finite.
    """

    what: str
    relative_error: float


def tolerance(precision: str, device: torch.device, reduction_length: int) -> float:
    """Largest relative error, in the norm, of a right kernel.

    8·(u + √K·2^-24): one rounding of the result to the precision's unit roundoff u, and a sum of K terms kept in
    float32, whose roundings, being independent, grow with √K (Higham & Mary 2019, "A new approach to
    probabilistic rounding error analysis", theorem 2.4). Inputs are exact in the precision, so that they add
    nothing. The 8 leaves room for another order of operations and a second rounding on the way: right kernels
    come to a tenth of the bound, wrong ones far above it.
    """
    roundoff = UNIT_ROUNDOFF[precision]
    if device.type == "cuda":
        roundoff = max(roundoff, TENSOR_FLOAT_32)
    return MARGIN * (roundoff + math.sqrt(reduction_length) * ACCUMULATOR)


def check_kernel(layer: nn.Module, call: Call, *, precision: str, device: torch.device, seed_text: str) -> list[Fault]:
    """The faults of a layer's forward and backward pass at one call; an empty list when it is right.

    The layer itself is not run: a copy with fixed random parameters is. No generator of torch is used.

    Args:
        layer: one tensor in, one tensor out.
        call: how it is called.
        precision: no, bf16 or fp16: the autocast, as Accelerate applies it (forward pass only).
        device: where to run; the reference is computed there on CUDA, on the CPU otherwise.
        seed_text: decides the random data.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(seed_text.encode()))
    probe = _probe(layer, precision, generator)
    tiling = Tiling(call.shape[0], base_count(layer, call), signed=not isinstance(layer, COUPLED))
    with one_thread():
        x = random_input(layer, call, tiling.base, precision, generator)
        reference, gradient = _reference(probe, x, tiling, precision, generator, device)
        x_tiled = tiling.fill(empty_input(call, device), x.to(device), signed=False)
        probe.to(device)
        _poison(probe, device)
    try:
        results = _run(probe, x_tiled, gradient.to(device), tiling, precision, call.input_gradient)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as raised:
        return [Fault(f"kernel raised {(str(raised) or type(raised).__name__).splitlines()[0]}", math.inf)]
    with one_thread():
        lengths = _reduction_lengths(layer, x_tiled, results["output"])
        faults = _compare(results, reference, tiling, lengths, precision, device)
        if type(layer).__module__.startswith(("torch.nn.", "harness.models.")):
            return faults
        return faults + _wrong_derivatives(probe, x, generator)


def _compare(
    results: dict[str, Tensor],
    reference: dict[str, Tensor],
    tiling: Tiling,
    lengths: dict[str, int],
    precision: str,
    device: torch.device,
) -> list[Fault]:
    faults = []
    for what, result in results.items():
        bound = tolerance(precision, device, lengths.get(what, lengths["weight gradient"]))
        signs = {"output": [1] * len(tiling.signs), "input gradient": tiling.signs}.get(what)
        error = _relative_error(result, reference[what], bound, signs)
        if not error <= bound:
            faults.append(Fault(what, error if math.isfinite(error) else math.inf))
    return faults


def _probe(layer: nn.Module, precision: str, generator: torch.Generator) -> nn.Module:
    """A copy on the CPU, in training mode, without activation (its kink would magnify roundings)."""
    probe = copy.deepcopy(layer).cpu().train()
    for name, _ in list(probe.named_children()):
        if name != "parametrizations":
            setattr(probe, name, nn.Identity())
    with torch.no_grad():
        for parameter in probe.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            fan_in = math.prod(parameter.shape[1:])
            value = value / math.sqrt(max(fan_in, 1)) if parameter.dim() > 1 else 1 + 0.25 * value
            parameter.copy_(round_to(value, precision))
    return probe


def _reference(
    probe: nn.Module,
    x: Tensor,
    tiling: Tiling,
    precision: str,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor]:
    """Right results in float64 for the base images, and the output gradient (base, …) that belongs to them.

    The parameters' gradients are those of the whole batch.
    """
    device = device if device.type == "cuda" else torch.device("cpu")
    exact = _in_float64(probe, device)
    x = x.double().to(device).contiguous()
    with torch.no_grad():
        shape = exact(x).shape
    gradient = round_to(torch.randn(shape, generator=generator), precision)
    weighted = gradient.double().to(device)
    weighted *= column(tiling.weights(), weighted)
    whole = Tiling(tiling.base, tiling.base, signed=False)
    results = _run(exact, x, weighted, whole, "no", input_gradient=True)
    results["input gradient"] /= column(tiling.weights(), x)
    return results, gradient


def _in_float64(probe: nn.Module, device: torch.device) -> Any:
    exact: Any = copy.deepcopy(probe).double().to(device).to(memory_format=torch.contiguous_format)
    if hasattr(exact, "path"):
        exact.path = "direct"
    return exact


def _run(
    layer: nn.Module, x: Tensor, gradient: Tensor, tiling: Tiling, precision: str, input_gradient: bool
) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward pass, by name; `gradient` is that of a tile's output."""
    x = x.detach().requires_grad_(input_gradient)
    layer.zero_grad()
    with autocast(x.device, precision):
        y = layer(x)
    if y.requires_grad:
        with one_thread():
            gradient = tiling.fill(torch.empty_like(y), gradient.to(y.dtype), signed=True)
        y.backward(gradient)
    results = {"output": y.detach()}
    if x.grad is not None:
        results["input gradient"] = x.grad
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            results[f"{name} gradient"] = parameter.grad
    return results


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The autocast that Accelerate puts around a forward pass."""
    dtype = REDUCED_DTYPES.get(precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield


def _reduction_lengths(layer: nn.Module, x: Tensor, y: Tensor) -> dict[str, int]:
    """How many terms each result sums, at most; results that are not named are sums over the images as well."""
    positions = max(x.numel() // x.shape[1], y.numel() // y.shape[1], x.shape[-1])
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() > 1:
        fans = {"output": weight[0].numel(), "input gradient": weight.numel() // weight.shape[1]}
        return {**fans, "weight gradient": positions}
    return {"output": positions, "input gradient": positions, "weight gradient": positions}


def _poison(layer: nn.Module, device: torch.device) -> None:
    """Leave NaN in freed memory of the sizes a kernel will ask for.

    A kernel that does not write all of its result otherwise shows whatever lay there: zeros, or the right
    result of the call before.
    """
    sizes = {parameter.numel() * width for parameter in layer.parameters() for width in (2, 4, 8)}
    sizes |= {1 << power for power in range(8, LARGEST_POISON_BYTES.bit_length())}
    # All bits set is NaN in every floating type. The blocks live together, then are freed together.
    blocks = [
        torch.full((size,), 255, dtype=torch.uint8, device=device)
        for size in sizes
        if size <= LARGEST_POISON_BYTES
        for _ in range(4)
    ]
    del blocks


def _relative_error(result: Tensor, reference: Tensor, bound: float, signs: list[int] | None) -> float:
    """‖result - reference‖ / ‖reference‖, or more where single elements stand out; nan or inf if not finite.

    One element may be wrong by 4 bounds, relative to the root mean square of the reference (the data are normal
    numbers: the largest element is a few times that).

    Args:
        result: (images, …) when `signs` is given, else the shape of the reference.
        reference: (base, …), float64.
        bound: the tolerance of the norm.
        signs: for each tile, the factor between its result and the reference.
    """
    like = result[: len(reference)]  # in the result's memory format: another one would make each step far slower
    reference = torch.empty_like(like, dtype=torch.float32).copy_(reference)
    size = reference.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    tiles = [result] if signs is None else result.split(len(reference))
    squares, largest = [], []
    for tile, sign in zip(tiles, signs or [1], strict=True):
        difference = tile.to(torch.float32, copy=True).sub_(reference[: len(tile)], alpha=sign)
        squares.append(torch.linalg.vector_norm(difference).square())
        largest.append(difference.abs_().amax())
    norm_error = float((torch.stack(squares).sum() / result.numel()).sqrt() / size)
    element_error = float(torch.stack(largest).max() / size) / ELEMENT_MARGIN
    return norm_error if element_error <= bound else max(element_error, norm_error)


def _wrong_derivatives(probe: nn.Module, x: Tensor, generator: torch.Generator) -> list[Fault]:
    """For a layer with code of its own: is its backward pass the derivative of its forward pass, in float64?

    A central difference along a random direction; its own error is of the order of the step squared.
    """
    exact = _in_float64(probe, torch.device("cpu"))
    leaves = {"input": x.double().clone(), **dict(exact.named_parameters())}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = exact(leaves["input"])
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(y, list(leaves.values()), weights, allow_unused=True)
    step, faults = 1e-4, []
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        # Along the claimed gradient where there is one: a random direction is nearly orthogonal to it.
        random = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        claimed = torch.zeros_like(leaf) if gradient is None else gradient
        size = claimed.square().mean().sqrt()
        direction = random + (claimed / size if size > 0 else 0)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                leaf.add_(direction, alpha=sign * step)
                values.append(exact(leaves["input"]))
                leaf.sub_(direction, alpha=sign * step)
            slope = float(((values[0] - values[1]) * weights).sum()) / (2 * step)
        expected = float((claimed * direction).sum())
        error = abs(slope - expected) / max(abs(slope), abs(expected), 1e-30)
        if not error <= 1e-3:
            faults.append(Fault(f"{name} gradient in float64", error if math.isfinite(error) else math.inf))
    return faults
