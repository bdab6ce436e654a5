"""The memory roofline of a training step: the bytes it must move over the device's measured copy bandwidth.

The counting rule. Sizes are those of the tensors between layers, taken from one forward pass; each tensor counts with
the width of an activation (4 bytes in float32 and TF32, 2 in bf16). For one image, a pass reads and writes each of its
tensors once:

    convolution, linear   forward: input, output; backward: gradient of the output, input, gradient of the input
                          (none for the images); both gradients come from one pass
    pool                  forward: input, output; backward: gradient of the output, gradient of the input
    run of elementwise    normalisation, activation and dropout one after another are one pass;
    layers                forward: input, output; backward: gradient of the output, input, gradient of the input.
                          BatchNorm reads its input once more forward, and input and gradient once more backward: its
                          sums over the batch must be known first. Masks are computed anew, not stored
    merge of branches     part of the runs before it: what they give is not written, the merged tensor is; backward its
                          gradient is read as often as the runs read it
    split into branches   the second gradient is added to the first as it is written: the first is read once more

To that come, for each step, parameters in float32: read forward and backward, gradient written and read, momentum and
weight read and written: 8 × 4 bytes (SGD with momentum). That is "fused", what an ideal compiler around the library's
convolutions moves, and the roofline that results are compared with. "layerwise" counts the same with each layer,
merge and sum of gradients a pass of its own, as eager execution has it: a lower ceiling, told beside it.

Williams et al. 2009, "Roofline", https://doi.org/10.1145/1498765.1498785.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.errors import HarnessError

PARAMETER_BYTES_A_STEP = 8 * 4
ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
Kind = Literal["conv", "pool", "norm", "elementwise"]
_CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.Linear)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_PROBE_IMAGES = 2  # BatchNorm wants more than one value a channel


@dataclass(frozen=True)
class Pass:
    """One call of a layer; sizes in elements for one image.

    Attributes:
        kind: which line of the rule it follows.
        source: number of the pass whose output it reads; None for the images or the result of a merge.
        elements_in, elements_out: of its input and its output.
        first: its input needs no gradient.
    """

    kind: Kind
    source: int | None
    elements_in: int
    elements_out: int
    first: bool


@dataclass(frozen=True)
class Trace:
    """The layers of a network in the order of their calls, and how branches part and meet.

    Attributes:
        passes: the layers.
        merged_elements: of each merge's result.
        merged: numbers of the passes whose outputs go into a merge.
        split_elements: of each tensor that several layers read and that has a gradient, once for each layer beyond
            the first.
        parameters: of the whole network.
    """

    passes: tuple[Pass, ...]
    merged_elements: tuple[int, ...]
    merged: frozenset[int]
    split_elements: tuple[int, ...]
    parameters: int


def trace(model: nn.Module, input_CHW: tuple[int, int, int]) -> Trace:
    """Run two images of zeros through a copy of the network on the CPU and note each layer.

    Args:
        model: maps float32 (B, C, H, W) to one tensor; stays as it is.
        input_CHW: channels, height and width of an image.

    Raises:
        HarnessError: the network cannot take such images.
    """
    probe = copy.deepcopy(model).cpu().float().train()
    recorder = _Recorder()
    for module in probe.modules():
        if not list(module.children()) and not isinstance(module, nn.Sequential | nn.ModuleList | nn.Identity):
            module.register_forward_hook(recorder.note)
    images_BCHW = torch.zeros(_PROBE_IMAGES, *input_CHW)
    recorder.images = images_BCHW
    try:
        with torch.random.fork_rng(devices=[]):
            probe(images_BCHW)
    except (RuntimeError, ValueError) as error:
        raise HarnessError(
            f"the network cannot take an image of {input_CHW} (C, H, W): {error}",
            hint="Give the image size that the network was built for.",
        ) from error
    return recorder.finish(sum(p.numel() for p in model.parameters()))


class _Recorder:
    """Follows tensors from layer to layer by address; all are kept alive, so that no address is used twice."""

    def __init__(self) -> None:
        self.images: Tensor | None = None
        self._passes: list[Pass] = []
        self._outputs: list[Tensor] = []
        self._made_by: dict[int, int] = {}
        self._readers: dict[int, list[Tensor]] = {}

    def note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source = inputs[0]
        place = source.data_ptr()
        if output.data_ptr() == place:  # a view, dropout with probability 0, or in place, within the run before
            return
        self._readers.setdefault(place, []).append(source)
        made_by = self._made_by.get(place)
        first = source is self.images or not source.requires_grad
        kind = _kind(module, source, output)
        self._passes.append(Pass(kind, made_by, _size(source), _size(output), first))
        self._made_by[output.data_ptr()] = len(self._outputs)
        self._outputs.append(output)

    def finish(self, parameters: int) -> Trace:
        read = {number for key, number in self._made_by.items() if key in self._readers}
        last = len(self._passes) - 1
        merged = frozenset(set(range(last)) - read)  # no layer reads them: a function between layers does
        merges = [
            _size(tensors[0])
            for place, tensors in self._readers.items()
            if place not in self._made_by and tensors[0] is not self.images
        ]
        splits = [_size(t) for tensors in self._readers.values() for t in tensors[1:] if t.requires_grad]
        return Trace(tuple(self._passes), tuple(merges), merged, tuple(splits), parameters)


def _kind(module: nn.Module, source: Tensor, output: Tensor) -> Kind:
    if isinstance(module, _CONVOLUTIONS):
        return "conv"
    if isinstance(module, _BATCH_NORMS):
        return "norm"
    return "elementwise" if source.shape == output.shape else "pool"


def _size(tensor: Tensor) -> int:
    return tensor.numel() // _PROBE_IMAGES


def layerwise_elements(traced: Trace) -> int:
    """Elements moved for one image with a pass of its own for each layer, merge and sum of gradients."""
    total = 0
    for each in traced.passes:
        into, out = each.elements_in, each.elements_out
        gradient = 0 if each.first else into
        extra = into + into + out if each.kind == "norm" else 0
        total += into + out + extra + out + gradient + (0 if each.kind == "pool" else into)
    dangling = sum(traced.passes[number].elements_out for number in traced.merged)
    return total + dangling + sum(traced.merged_elements) + 3 * sum(traced.split_elements)


def fused_elements(traced: Trace) -> int:
    """Elements moved for one image with each run of elementwise layers one pass; see the rule above."""
    runs = _runs(traced)
    within = {number for run in runs for number in run}
    total = 0
    for number, each in enumerate(traced.passes):
        if number not in within:
            gradient = 0 if each.first else each.elements_in
            stored = each.elements_in if each.kind == "conv" else 0
            total += each.elements_in + 2 * each.elements_out + stored + gradient
    normed_merges = False
    for run in runs:
        into, out = traced.passes[run[0]].elements_in, traced.passes[run[-1]].elements_out
        times = 2 if any(traced.passes[number].kind == "norm" for number in run) else 1
        meets = run[-1] in traced.merged
        normed_merges |= meets and times == 2
        gradient = 0 if traced.passes[run[0]].first else into
        total += times * into + times * into + gradient + (0 if meets else out + times * out)
    unfused = sum(traced.passes[n].elements_out for n in traced.merged if n not in within)  # read, gradient written
    merges = (3 if normed_merges else 2) * sum(traced.merged_elements)
    return total + merges + 2 * unfused + sum(traced.split_elements)


def _runs(traced: Trace) -> list[list[int]]:
    """Numbers of norm and elementwise passes, each the only reader of the one before it."""
    readers: dict[int, list[int]] = {}
    for number, each in enumerate(traced.passes):
        if each.source is not None:
            readers.setdefault(each.source, []).append(number)
    runs: list[list[int]] = []
    for number, each in enumerate(traced.passes):
        if each.kind not in ("norm", "elementwise"):
            continue
        goes_on = runs and runs[-1][-1] == each.source and readers[runs[-1][-1]] == [number] and each.kind != "norm"
        if goes_on:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def images_per_second_limit(
    elements_per_image: int, *, parameters: int, batch_size: int, element_bytes: int, bytes_per_second: float
) -> float:
    """The roofline in images a second.

    Args:
        elements_per_image: of `fused_elements` or `layerwise_elements`.
        parameters: of the network.
        batch_size: images that share a step's traffic of parameters.
        element_bytes: width of an activation, bytes.
        bytes_per_second: of `copy_bandwidth`, bytes read and bytes written both counted.
    """
    moved = elements_per_image * element_bytes + parameters * PARAMETER_BYTES_A_STEP / batch_size
    return bytes_per_second / moved


def copy_bandwidth(device: torch.device, *, copied_bytes: int, repeats: int = 20) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes both counted; the median.

    Args:
        copied_bytes: size of the buffer; it should be many times the device's cache.
        repeats: copies measured, after three that are not.
    """
    source = torch.randint(0, 256, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, repeats=repeats, warmup=3)
    return 2 * copied_bytes / statistics.median(seconds)


def timed(function: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int) -> Sequence[float]:
    """Seconds of each of `repeats` calls after `warmup` unmeasured ones; on a GPU between events in its stream."""
    for _ in range(warmup):
        function()
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return seconds
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]
