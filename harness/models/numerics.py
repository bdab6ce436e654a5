"""The numerics check before training: no layer trains on a kernel that is wrong on this machine.

Why: in torch 2.14 and 2.15 on x86 CPUs with AVX-512, the weight gradient of a dilated depthwise
convolution in bfloat16 and channels_last is garbage for inputs wider than 28 pixels, and LayerNorm's in bfloat16
is summed in bfloat16. Nothing fails; the network merely learns badly, or not at all.

`check_and_repair` finds every distinct layer shape of a network, has `kernel_check` compare it with float64, and
sends layers whose kernel is wrong down another path (see `safe_conv`) that is checked in the same way.

It looks at layers (convolution, linear, normalisation, pooling), not at functions that a model calls directly,
such as attention.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harness.errors import HarnessError
from harness.models.kernel_check import Fault, autocast, check_kernel
from harness.models.kernel_data import Call, probe_images
from harness.models.numerics_memory import Memory
from harness.models.safe_conv import Path, adopt_path, candidate_paths

CHECKED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    nn.AdaptiveMaxPool2d,
)
OBSERVED_IMAGES = 2  # enough to see which dimension is the batch
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class WrongKernel:
    """A layer shape whose kernel is wrong, and what was done.

    Args:
        layers: names of the layers in the model.
        signature: class, settings and input.
        what: the wrong results, such as "weight gradient".
        relative_error: the largest of their errors relative to the reference's norm; inf where not finite.
        path: the path that was checked and is now used.
    """

    layers: tuple[str, ...]
    signature: str
    what: tuple[str, ...]
    relative_error: float
    path: str


@dataclass(frozen=True)
class NumericsReport:
    """What `check_and_repair` found.

    Args:
        checked: distinct layer shapes.
        layers: layers of these shapes.
        wrong: the shapes whose kernel is wrong, each replaced.
        seconds: wall time of the check.
        remembered: whether every verdict came from an earlier check on the same machine.
        device, precision, memory_format, batch_size: what was checked.
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
        fields = dataclasses.asdict(self)
        for kernel in fields["wrong"]:
            if not math.isfinite(kernel["relative_error"]):
                kernel["relative_error"] = None
        return fields


def check_and_repair(
    model: nn.Module,
    *,
    batch_size: int,
    image_size_px: int,
    device: torch.device | str,
    precision: Literal["no", "bf16", "fp16"],
    memory_format: Literal["channels_last", "contiguous"],
    cache_directory: pathlib.Path | None,
    channels: int = 3,
) -> NumericsReport:
    """Check each distinct layer shape of `model` at its training size; replace the kernels that are wrong.

    The model is moved to the device and memory format. Layers are changed in place and keep their names and
    parameters: call it before `DistributedDataParallel`, `torch.compile` and synchronised batch normalisation.
    Parameters, buffers, training flags and random generators are left as they were.

    Args:
        model: takes (B, channels, image_size_px, image_size_px) float32.
        batch_size: images of one forward pass on this device.
        image_size_px: height and width of the images.
        device: the device to train on.
        precision: of the autocast.
        memory_format: of images and weights.
        cache_directory: verdicts are remembered in its folder `numerics`; None remembers nothing.
        channels: of the images.

    Raises:
        HarnessError: a kernel is wrong and no other path is right, or the model cannot take such images.
    """
    started = time.perf_counter()
    device = torch.device(device)
    layout = MEMORY_FORMATS[memory_format]
    model.to(device=device).to(memory_format=layout)
    images = torch.zeros(OBSERVED_IMAGES, channels, image_size_px, image_size_px, device=device)
    calls = _observe(model, images.contiguous(memory_format=layout), batch_size, precision)
    memory = Memory(cache_directory, device=device, precision=precision, memory_format=memory_format)
    checker = _Checker(memory, precision, device)
    verdicts = {layer: checker.first_fault(layer, layer_calls) for layer, layer_calls in calls.items()}
    checked = len(checker.signatures)
    try:
        wrong = _repair_all(model, calls, verdicts, checker)
    finally:
        memory.save()
    return NumericsReport(
        checked=checked,
        layers=len(calls),
        wrong=wrong,
        seconds=time.perf_counter() - started,
        remembered=checker.fresh == 0,
        device=str(device),
        precision=precision,
        memory_format=memory_format,
        batch_size=batch_size,
    )


class _Checker:
    """Runs each distinct check once, or takes the verdict from the memory."""

    def __init__(self, memory: Memory, precision: str, device: torch.device) -> None:
        self.memory, self.precision, self.device = memory, precision, device
        self.signatures: dict[str, list[Fault]] = {}
        self.fresh = 0

    def faults(self, layer: nn.Module, call: Call) -> tuple[str, list[Fault]]:
        """The signature and the faults of a layer at one call."""
        signature = _signature(layer, call)
        if signature not in self.signatures:
            remembered = self.memory.get(signature)
            if remembered is None:
                self.fresh += 1
                remembered = check_kernel(
                    layer, call, precision=self.precision, device=self.device, seed_text=signature
                )
                if _code_is_versioned(layer):
                    self.memory.put(signature, remembered)
            self.signatures[signature] = remembered
        return signature, self.signatures[signature]

    def first_fault(self, layer: nn.Module, calls: list[Call]) -> tuple[str, list[Fault]]:
        """Signature and faults of the first call at which the layer is wrong; of the last one if it is right."""
        verdict: tuple[str, list[Fault]] = ("", [])
        for call in calls:
            verdict = self.faults(layer, call)
            if verdict[1]:
                break
        return verdict


def _repair_all(
    model: nn.Module,
    calls: dict[nn.Module, list[Call]],
    verdicts: dict[nn.Module, tuple[str, list[Fault]]],
    checker: _Checker,
) -> tuple[WrongKernel, ...]:
    """Send every wrong layer down another path; one entry for each layer shape and path."""
    names = _names(model)
    wrong: dict[tuple[str, str], WrongKernel] = {}
    for layer, (signature, faults) in verdicts.items():
        if not faults:
            continue
        path = _repair(layer, calls[layer], checker, signature, faults, names[layer])
        known = wrong.get((signature, path))
        wrong[signature, path] = WrongKernel(
            layers=(*(known.layers if known else ()), *names[layer]),
            signature=signature,
            what=tuple(fault.what for fault in faults),
            relative_error=max(fault.relative_error for fault in faults),
            path=path,
        )
    return tuple(wrong.values())


def _repair(
    layer: nn.Module,
    calls: list[Call],
    checker: _Checker,
    signature: str,
    faults: list[Fault],
    names: tuple[str, ...],
) -> str:
    """Send the layer down the first path that is right at all its calls; returns the path."""
    original_path: Path = getattr(layer, "path", "direct")
    tried: list[Path] = []
    for path in candidate_paths(layer, checker.precision):
        adopt_path(layer, path)
        if not checker.first_fault(layer, calls)[1]:
            return path
        tried.append(path)
    adopt_path(layer, original_path)
    what = " and ".join(f"{fault.what} (relative error {fault.relative_error:.2g})" for fault in faults)
    raise HarnessError(
        f"wrong kernel on {checker.device}: {what} of {signature}, and no other path is right"
        + (f" (tried {', '.join(tried)})" if tried else ""),
        where=", ".join(names),
        hint="Try precision=no or memory_format=contiguous, or another version of torch.",
    )


def _names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name or "(the model itself)")
    return names


def _signature(layer: nn.Module, call: Call) -> str:
    """Everything a kernel may be chosen by, apart from what the memory's key holds."""
    frozen = [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    suffix = f", frozen {', '.join(frozen)}" if frozen else ""
    return f"{type(layer).__name__}({layer.extra_repr()}){suffix} on {call.render()}"


def _code_is_versioned(layer: nn.Module) -> bool:
    """Whether the memory's key changes with the layer's code: torch's own, timm's and ours."""
    package = type(layer).__module__.split(".")[0]
    return package in ("torch", "timm", "harness") and not parametrize.is_parametrized(layer)


def _observe(model: nn.Module, images_BCHW: Tensor, batch_size: int, precision: str) -> dict[nn.Module, list[Call]]:
    """How each layer is called, by one forward pass in evaluation mode; shapes scaled to the batch size."""
    calls: dict[nn.Module, list[Call]] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = inputs[0] if inputs else None
        if len(inputs) != 1 or not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return
        if x.dim() < 2 or not x.is_floating_point():
            return
        count, rest = divmod(x.shape[0], len(images_BCHW))
        largest = max(x[0].numel(), output[0].numel()) * count
        strides = x.stride()
        images = probe_images(batch_size, largest, x.device)
        first = x.shape[0] if rest else count * images
        call = Call(
            shape=(first, *x.shape[1:]),
            dtype=x.dtype,
            dim_order=tuple(sorted(range(x.dim()), key=strides.__getitem__, reverse=True)),
            input_gradient=x is not images_BCHW,
        )
        known = calls.setdefault(layer, [])
        if call not in known:
            known.append(call)

    with _undisturbed(model, images_BCHW.device):
        hooks = [m.register_forward_hook(note) for m in model.modules() if _is_checked(m)]
        try:
            with torch.no_grad(), autocast(images_BCHW.device, precision):
                model(images_BCHW)
        except RuntimeError as error:
            raise HarnessError(
                f"the model cannot take images of {'×'.join(map(str, images_BCHW.shape[1:]))}: {error}",
                hint="Check image_size_px and the model's settings.",
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def _is_checked(module: nn.Module) -> bool:
    """Layers whose kernels are the library's; those that talk to other ranks cannot be tried alone."""
    return isinstance(module, CHECKED) and not getattr(module, "synchronises_ranks", False)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; training flags and torch's random generators as before outside."""
    training = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
