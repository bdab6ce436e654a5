"""The numerics check before training: no layer trains on a kernel that is wrong on this machine.

Why: in torch 2.14 and 2.15 on x86 CPUs with AVX-512, the weight gradient of a dilated depthwise convolution in bfloat16
and channels_last is garbage for inputs wider than 28 pixels, and LayerNorm's in bfloat16 is summed in bfloat16. Nothing
fails; the network merely learns badly, or not at all.

`check_and_repair` finds every distinct layer shape of a network, compares it with float64 on random images
(`check_kernel`), and sends layers whose kernel is wrong down another path (see `safe_conv`) that is checked in the same
way. It looks at layers, not at functions that a model calls directly, such as attention.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, pooling

from harness.errors import HarnessError
from harness.files import write_json
from harness.machine import processor
from harness.models.build import MEMORY_FORMATS, eval_mode, one_thread
from harness.models.kernels import fingerprint
from harness.models.safe_conv import Route, adopt_path, candidate_paths

CHECK_VERSION = 2  # raise it when the check itself changes, so that old verdicts are not used
REDUCED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_POOLS = (pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd)
CHECKED = (
    *(conv._ConvNd, nn.Linear, batchnorm._BatchNorm, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(*MAX_POOLS, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd),
)
OBSERVED_IMAGES = 2  # enough to see which dimension is the batch
# A library picks its kernel by the shape, so a layer runs at its training size. On a CPU, where a float64 reference
# takes its time, a part of the batch must do above this many values of input or output …
CPU_VALUES = 1 << 20
CPU_IMAGES = 16  # … but at least so many images
TERMS_PER_VALUE = 64  # an output that sums more products counts as several values

# Half the distance from 1 to the next number (Higham 2002, section 2.1). float32 has a floor well above its
# own 2^-24, since fast convolutions (Winograd) lose some digits by design.
UNIT_ROUNDOFF = {"no": 2.0**-20, "bf16": 2.0**-8, "fp16": 2.0**-11}
TENSOR_FLOAT_32 = 2.0**-11  # what CUDA libraries may use in place of float32 in convolutions and products
ACCUMULATOR = 2.0**-24  # sums are kept in float32
MARGIN, ELEMENT_MARGIN = 8.0, 4.0
LARGEST_POISON_BYTES = 1 << 18
# What can change the choice of a kernel, apart from the arguments.
ENVIRONMENT = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY")

Faults = dict[str, float]  # wrong results, such as "weight gradient", with their errors; inf where not finite


@dataclass(frozen=True)
class WrongKernel:
    """A layer shape whose kernel is wrong, its largest error relative to the reference's norm, the path now used."""

    layers: tuple[str, ...]
    signature: str
    what: tuple[str, ...]
    relative_error: float
    path: str


@dataclass(frozen=True)
class NumericsReport:
    """What `check_and_repair` found: how many distinct shapes, in how many layers, and which of them were wrong.

    `remembered`: every verdict came from an earlier check on the same machine.
    """

    checked: int
    layers: int
    wrong: tuple[WrongKernel, ...]
    seconds: float
    remembered: bool
    device: str
    precision: str
    memory_format: str
    batch_size: int

    def render(self) -> str:
        """Lines for the console; one when all is right."""
        source = "remembered" if self.remembered else f"{self.seconds:.1f} s"
        verdict = f"{len(self.wrong)} wrong and replaced" if self.wrong else "all right"
        lines = [
            f"numerics: {self.checked} layer shapes in {self.layers} layers, forward and backward against float64 "
            f"({self.device}, precision {self.precision}, {self.memory_format}, batch {self.batch_size}, {source}): "
            f"{verdict}"
        ]
        for kernel in self.wrong:
            lines += [
                f"  wrong: {', '.join(kernel.what)}, relative error {kernel.relative_error:.2g}",
                f"    kernel: {kernel.signature}",
                f"    layers: {', '.join(kernel.layers)}",
                f"    now by: {kernel.path}, checked",
            ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types; an error that is not finite is null."""
        wrong = [{**asdict(kernel), "relative_error": _finite(kernel.relative_error)} for kernel in self.wrong]
        return {**asdict(self), "wrong": wrong}


@dataclass(frozen=True)
class Call:
    """One way in which a layer is called.

    `dim_order` is from the largest stride to the smallest: (0, 2, 3, 1) is channels_last. `input_gradient`: whether
    training asks for it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim_order: tuple[int, ...]
    input_gradient: bool = True

    def render(self) -> str:
        """Such as `128×64×32×32 bfloat16 channels_last`."""
        orders = {tuple(range(len(self.shape))): "contiguous", (0, 2, 3, 1): "channels_last"}
        order = orders.get(self.dim_order, f"strides in order {self.dim_order}")
        gradient = "" if self.input_gradient else ", no input gradient"
        return f"{'×'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')} {order}{gradient}"


def check_and_repair(
    model: nn.Module,
    *,
    batch_size: int,
    image_size_px: int,
    device: torch.device | str,
    precision: str,
    memory_format: str,
    cache_directory: Path | None,
) -> NumericsReport:
    """Check each distinct layer shape of `model` at its training size; replace the kernels that are wrong.

    The model, which takes (B, 3, image_size_px, image_size_px) float32, is moved to the device and memory format.
    Layers are changed in place and keep their names and parameters: call it before `DistributedDataParallel`,
    `torch.compile` and synchronised batch normalisation. Generators and modes are left as they were. Verdicts are
    remembered in the folder `numerics` of `cache_directory`, if there is one.

    Raises:
        HarnessError: a kernel is wrong and no other path is right.
    """
    started = time.perf_counter()
    device = torch.device(device)
    layout = MEMORY_FORMATS[memory_format]
    model.to(device).to(memory_format=layout)
    images = torch.zeros(OBSERVED_IMAGES, 3, image_size_px, image_size_px, device=device)
    calls = _observe(model, images.contiguous(memory_format=layout), batch_size, precision)
    verdicts = _Verdicts(cache_directory, device, precision, memory_format)
    found = {layer: verdicts.first_fault(layer, layer_calls) for layer, layer_calls in calls.items()}
    checked = len(verdicts.used)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or "(the model itself)")
    wrong: dict[tuple[str, str], WrongKernel] = {}
    try:
        for layer, (signature, faults) in found.items():
            if faults:
                path = _repair(layer, calls[layer], verdicts, where=", ".join(names[layer]))
                same = wrong.get((signature, path))
                layers = (*(same.layers if same else ()), *names[layer])
                wrong[signature, path] = WrongKernel(layers, signature, tuple(faults), max(faults.values()), path)
    finally:
        verdicts.save()
    outcome = (checked, len(calls), tuple(wrong.values()), time.perf_counter() - started, not verdicts.fresh)
    return NumericsReport(*outcome, str(device), precision, memory_format, batch_size)


def _repair(layer: nn.Module, calls: list[Call], verdicts: _Verdicts, *, where: str) -> str:
    """Send the layer down the first path that is right at all its calls; returns the path."""
    signature, faults = verdicts.first_fault(layer, calls)
    original: Route = getattr(layer, "path", "direct")
    tried = candidate_paths(layer, verdicts.precision)
    for path in tried:
        if not verdicts.first_fault(adopt_path(layer, path), calls)[1]:
            return path
    adopt_path(layer, original)
    what = " and ".join(f"{what} (relative error {error:.2g})" for what, error in faults.items())
    raise HarnessError(
        f"wrong kernel on {verdicts.device}: {what} of {signature}, and no other path is right"
        + (f" (tried {', '.join(tried)})" if tried else ""),
        where=where,
        hint="Try precision=no or memory_format=contiguous, or another version of torch.",
    )


@torch.no_grad()
def _observe(model: nn.Module, images_BCHW: Tensor, batch_size: int, precision: str) -> dict[nn.Module, list[Call]]:
    """How each layer is called, by one forward pass in evaluation mode; shapes scaled to the batch size."""
    calls: dict[nn.Module, list[Call]] = {}
    device = images_BCHW.device

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = inputs[0] if inputs else None
        if len(inputs) != 1 or not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return
        if x.dim() < 2 or not x.is_floating_point():
            return
        per_image, rest = divmod(len(x), len(images_BCHW))
        terms = layer.weight[0].numel() if isinstance(layer, conv._ConvNd | nn.Linear) else 1
        values = max(x[0].numel(), output[0].numel() * max(1, terms // TERMS_PER_VALUE)) * max(1, per_image)
        part = max(CPU_IMAGES, math.ceil(CPU_VALUES / values)) if device.type == "cpu" else batch_size
        count = len(x) if rest else per_image * min(batch_size, part)
        order = tuple(sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True))
        call = Call((count, *x.shape[1:]), x.dtype, order, input_gradient=x is not images_BCHW)
        if call not in calls.setdefault(layer, []):
            calls[layer].append(call)

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, CHECKED)]
    try:
        devices = [device] if device.type == "cuda" else []
        with eval_mode(model), torch.random.fork_rng(devices=devices), _autocast(device, precision):
            model(images_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    """As Accelerate puts it around a forward pass."""
    dtype = REDUCED_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class _Verdicts:
    """The faults of layers at their calls: each distinct check runs once, or not at all on a machine that remembers.

    They are kept in `<cache_directory>/numerics/<key>.json`. A file that is missing, broken or of another machine is no
    verdict: the check runs again. A directory that cannot be written only means that nothing is remembered.
    """

    def __init__(self, cache_directory: Path | None, device: torch.device, precision: str, memory_format: str) -> None:
        self.device, self.precision = device, precision
        self.machine = _machine(device) | {"precision": precision, "memory_format": memory_format}
        key = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:24]
        self.path = None if cache_directory is None else cache_directory / "numerics" / f"{key}.json"
        self.known = self._read()
        self.used: set[str] = set()
        self.fresh: set[str] = set()

    def first_fault(self, layer: nn.Module, calls: list[Call]) -> tuple[str, Faults]:
        """Signature and faults of the first call at which the layer is wrong; of the last one if it is right."""
        signature = ""
        for call in calls:
            signature = f"{type(layer).__name__}({layer.extra_repr()}) on {call.render()}"
            self.used.add(signature)
            if signature not in self.known:
                self.known[signature] = check_kernel(layer, call, self.precision, self.device, signature)
                self.fresh.add(signature)
            if self.known[signature]:
                break
        return signature, self.known[signature]

    def save(self) -> None:
        """Of two processes that write at once, the last one's verdicts stay."""
        if self.path is None or not self.fresh:
            return
        verdicts = {
            signature: {what: _finite(error) for what, error in faults.items()}
            for signature, faults in {**self._read(), **self.known}.items()
        }
        with contextlib.suppress(OSError, HarnessError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"machine": self.machine, "verdicts": verdicts})

    def _read(self) -> dict[str, Faults]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
            if stored.get("machine") != self.machine:
                return {}
            return {
                signature: {what: math.inf if error is None else float(error) for what, error in faults.items()}
                for signature, faults in stored["verdicts"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _machine(device: torch.device) -> dict[str, str]:
    """What a verdict depends on besides the layer and the recipe: hardware, libraries, threads, settings."""
    described: dict[str, Any] = {
        "check": CHECK_VERSION,
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "device": device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **{name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["processor"] = f"{properties.name} {properties.major}.{properties.minor}"
        described["cuda"] = f"{torch.version.cuda} {torch.backends.cudnn.version()}"
        described["cudnn.benchmark"] = torch.backends.cudnn.benchmark
    else:
        described["processor"] = f"{processor()} {torch.backends.cpu.get_cpu_capability()}"
        described["threads"] = torch.get_num_threads()
        described["kernels"] = fingerprint()
        described["onednn"] = torch.backends.mkldnn.enabled
    return {name: str(value) for name, value in described.items()}


def check_kernel(layer: nn.Module, call: Call, precision: str, device: torch.device, seed_text: str) -> Faults:
    """The wrong results of a layer's forward and backward pass against float64; empty when it is right.

    A copy of the layer runs, with random parameters and on random images that `seed_text` decides; no generator of
    torch is used.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(seed_text.encode()))

    def gradient_like(y: Tensor) -> Tensor:
        values = torch.randn(y.shape, generator=torch.Generator().manual_seed(generator.initial_seed() + 1))
        return torch.empty_like(y).copy_(_rounded(values, precision))

    with one_thread():  # torch's float64 depthwise convolution takes 16 s by two threads, 0.06 s by one
        probe, x = _probe(layer, precision, generator), _random_input(layer, call, precision, generator)
        exact = adopt_path(copy.deepcopy(probe), "direct").to(device, torch.float64)
        exact.to(memory_format=torch.contiguous_format)
        reference = _run(exact, x.to(device, torch.float64), gradient_like, "no")
        inverse = sorted(range(x.dim()), key=call.dim_order.__getitem__)
        x = x.permute(call.dim_order).contiguous().permute(inverse)  # its strides in the order of the call
        _poison(probe.to(device), device)
    try:
        results = _run(probe, x.to(device), gradient_like, precision, call.input_gradient)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as raised:
        return {f"kernel raised {(str(raised) or type(raised).__name__).splitlines()[0]}": math.inf}
    faults = {}
    with one_thread():
        for what, result in results.items():
            bound = tolerance(precision, device, _terms(layer, what, x, results["output"]))
            error = _relative_error(result, reference[what], bound)
            if not error <= bound:
                faults[what] = error if math.isfinite(error) else math.inf
    return faults


def tolerance(precision: str, device: torch.device, terms: int) -> float:
    """Largest relative error, in the norm, of a right kernel.

    8·(u + √K·2^-24): one rounding of the result to the precision's unit roundoff u, and a sum of K terms kept in
    float32, whose roundings, being independent, grow with √K (Higham & Mary 2019, "A new approach to
    probabilistic rounding error analysis", theorem 2.4). Inputs are exact in the precision, so that they add
    nothing. The 8 leaves room for another order of operations and a second rounding on the way: right kernels
    come to a tenth of the bound, wrong ones far above it.
    """
    roundoff = max(UNIT_ROUNDOFF[precision], TENSOR_FLOAT_32 if device.type == "cuda" else 0)
    return MARGIN * (roundoff + math.sqrt(terms) * ACCUMULATOR)


def _terms(layer: nn.Module, what: str, x: Tensor, y: Tensor) -> int:
    """How many terms a result sums, at most."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() > 1 and what in ("output", "input gradient"):
        return weight[0].numel() if what == "output" else weight.numel() // weight.shape[1]
    return max(x.numel() // x.shape[1], y.numel() // y.shape[1], x.shape[-1])


def _probe(layer: nn.Module, precision: str, generator: torch.Generator) -> nn.Module:
    """A copy on the CPU, in training mode, without activation (its kink would magnify roundings)."""
    probe = copy.deepcopy(layer).cpu().train()
    for name, _ in list(probe.named_children()):
        setattr(probe, name, nn.Identity())
    with torch.no_grad():
        for parameter in probe.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            fan_in = max(1, math.prod(parameter.shape[1:]))
            parameter.copy_(_rounded(value / math.sqrt(fan_in) if parameter.dim() > 1 else 1 + 0.25 * value, precision))
    return probe


def _random_input(layer: nn.Module, call: Call, precision: str, generator: torch.Generator) -> Tensor:
    """Normal numbers; for maximum pooling all different in an image's channel, as ties may go either way."""
    if not isinstance(layer, MAX_POOLS):
        return _rounded(torch.randn(call.shape, generator=generator), precision).to(call.dtype)
    ranks = torch.rand(call.shape, generator=generator).flatten(2).argsort(-1) % (1 << 14)
    # Neighbouring bit patterns, here around that of 1, are neighbouring numbers.
    dtype = REDUCED_DTYPES.get(precision, torch.bfloat16)
    patterns = int(torch.ones((), dtype=dtype).view(torch.int16)) + ranks - int(ranks.max()) // 2
    return patterns.to(torch.int16).view(dtype).to(call.dtype).reshape(call.shape)


def _rounded(values: Tensor, precision: str) -> Tensor:
    """To what the precision can hold, so that casting it is no error."""
    return values.to(REDUCED_DTYPES.get(precision, values.dtype)).to(values.dtype)


def _run(
    layer: nn.Module, x: Tensor, gradient_like: Callable[[Tensor], Tensor], precision: str, input_gradient: bool = True
) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward pass, by name."""
    x = x.detach().requires_grad_(input_gradient)
    with _autocast(x.device, precision):
        y = layer(x)
    if y.requires_grad:
        gradient = gradient_like(y)
        y.backward(gradient)
    leaves = {"input": x, **dict(layer.named_parameters())}
    gradients = {f"{name} gradient": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": y.detach(), **gradients}


def _poison(layer: nn.Module, device: torch.device) -> None:
    """Leave NaN in freed memory of the sizes a kernel will ask for.

    A kernel that does not write all of its result otherwise shows whatever lay there: zeros, or the right
    result of the call before.
    """
    sizes = {parameter.numel() * width for parameter in layer.parameters() for width in (2, 4, 8)}
    sizes |= {1 << power for power in range(8, LARGEST_POISON_BYTES.bit_length())}
    sizes = {size for size in sizes if size <= LARGEST_POISON_BYTES}
    # All bits set is NaN in every floating type. The blocks live together, then are freed together.
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes for _ in range(4)]
    del blocks


def _relative_error(result: Tensor, reference: Tensor, bound: float) -> float:
    """‖result - reference‖ / ‖reference‖, or more where single elements stand out; nan or inf if not finite.

    One element may be wrong by 4 bounds, relative to the root mean square of the reference (the data are normal
    numbers: the largest element is a few times that).
    """
    difference = result.double() - reference
    size = reference.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    norm_error = float(difference.square().mean().sqrt() / size)
    element_error = float(difference.abs().max() / size) / ELEMENT_MARGIN
    return norm_error if element_error <= bound else max(element_error, norm_error)
