"""What a network is, without training it: layer table, receptive fields, constraints.

The table has the form and the counting rules of the torchsummary package, which the seed's table was made with: a row
for each call of a module other than the network itself, Sequential and ModuleList; parameters that the module owns
itself; sizes with 4 bytes a number, in units of 1024² bytes.

Receptive fields are those of Araujo, Norris & Sim 2019, "Computing Receptive Fields of Convolutional Neural Networks",
https://distill.pub/2019/computing-receptive-fields: with kernel k, stride s and dilation d of the layers 1 … L on a
path, along one axis and in pixels of the image,

    jump  j_L = s_1 · s_2 · … · s_L                 distance of neighbouring outputs
    field r_L = 1 + Σ_l (k_l - 1) · d_l · j_(l-1)   extent that one output depends on

Where branches merge the larger field counts. A dilated branch leaves holes in its field, which the measurement counts.
Normalisation is left out: in training, and with `norm: group` always, its statistics see the whole image.

Legend of shape letters: B images, C channels, H height and W width in pixels.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from harness.errors import HarnessError
from harness.models.build import one_thread
from harness.models.dual_branch import DualBranchNet

PARAMETER_LIMIT = 1_000_000
LARGEST_PROBE_PX = 1024  # side of the largest image measured on: some 3 GB of activations for the seed's network
NOTE_OTHER_MODELS = "Receptive fields are worked out for dual-branch networks alone."

Pair = tuple[int, int]  # along height and width, pixels


@dataclass(frozen=True)
class LayerRow:
    """One call of one module. `output_shape` begins with -1 for the batch; empty where no tensor came out."""

    type: str
    number: int
    module: str
    output_shape: tuple[int, ...]
    parameters: int

    @property
    def label(self) -> str:
        """Such as `Conv2d-1`."""
        return f"{self.type}-{self.number}"


@dataclass(frozen=True)
class Summary:
    """The layer table and its totals; sizes are for one image."""

    rows: tuple[LayerRow, ...]
    total_parameters: int
    trainable_parameters: int
    non_trainable_parameters: int
    input_mib: float
    forward_backward_mib: float
    parameters_mib: float
    total_mib: float

    def render(self) -> str:
        """The table as text, without a newline at the end."""
        name_width = max([20, *(len(row.label) for row in self.rows)])  # timm has long names
        thin, thick = "-" * (name_width + 44), "=" * (name_width + 44)
        lines = [thin, f"{'Layer (type)':>{name_width}}  {'Output Shape':>25} {'Param #':>15}", thick]
        for row in self.rows:
            lines.append(f"{row.label:>{name_width}}  {list(row.output_shape)!s:>25} {row.parameters:>15,}")
        totals = f"""{thick}
Total params: {self.total_parameters:,}
Trainable params: {self.trainable_parameters:,}
Non-trainable params: {self.non_trainable_parameters:,}
{thin}
Input size (MB): {self.input_mib:0.2f}
Forward/backward pass size (MB): {self.forward_backward_mib:0.2f}
Params size (MB): {self.parameters_mib:0.2f}
Estimated Total Size (MB): {self.total_mib:0.2f}
{thin}"""
        return "\n".join([*lines, totals])


@torch.no_grad()
def summarise(model: nn.Module, input_CHW: tuple[int, int, int] = (3, 32, 32)) -> Summary:
    """Run one image of zeros through a copy of the network, in evaluation mode on the CPU, noting each layer.

    Raises:
        HarnessError: the network cannot take such an image.
    """
    probe = copy.deepcopy(model).cpu().float().eval()
    names = {module: name for name, module in probe.named_modules()}
    rows: list[LayerRow] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        shape = next(((-1, *leaf.shape[1:]) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), ())
        owned = sum(p.numel() for p in module.parameters(recurse=False))
        rows.append(LayerRow(type(module).__name__, len(rows) + 1, names[module], shape, owned))

    for module in names:
        if module is not probe and not isinstance(module, nn.Sequential | nn.ModuleList):
            module.register_forward_hook(note)
    try:
        with torch.random.fork_rng(devices=[]):
            probe(torch.zeros(1, *input_CHW))
    except (RuntimeError, ValueError, AssertionError) as error:
        what = f"the network cannot take an image of {input_CHW} (C, H, W): {error}"
        hint = "Give the image size that the network was built for, or build it again for this one."
        raise HarnessError(what, hint=hint) from error
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Each output is counted twice, for itself and for its gradient.
    activations = 2 * sum(abs(math.prod(row.output_shape)) for row in rows if row.output_shape)
    sizes_mib = [numbers * 4 / 1024**2 for numbers in (math.prod(input_CHW), activations, total)]
    parameters = (total, trainable, total - trainable)
    return Summary(tuple(rows), *parameters, sizes_mib[0], sizes_mib[1], sizes_mib[2], sum(sizes_mib))


@dataclass(frozen=True)
class LayerField:
    """The receptive field of one convolution or pooling layer.

    `path` is stem, depthwise, dilated, transition or head; `block` counts from 1 and is 0 outside of blocks.
    """

    layer: str
    kind: str
    path: str
    block: int
    kernel_px: Pair
    stride_px: Pair
    dilation_px: Pair
    jump_px: Pair
    field_px: Pair


@dataclass(frozen=True)
class MeasuredField:
    """Extent of the pixels that one central output unit depends on; `coverage` is the share of them that do, 0 to 1."""

    field_px: Pair
    coverage: float


def receptive_field(model: nn.Module) -> list[LayerField]:
    """The field of each convolution and pooling layer, in the order they are run; empty for other networks."""
    if not isinstance(model, DualBranchNet):
        return []
    names = {module: name for name, module in model.named_modules()}
    rows: list[LayerField] = []

    def along(part: nn.Module, path: str, block: int, field: Pair, jump: Pair) -> tuple[Pair, Pair]:
        """Add the layers of a sequential part of the network; field and jump after it from those before it."""
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                kernel, stride = _pair(module.kernel_size), _pair(module.stride)
                dilation = _pair(getattr(module, "dilation", 1))
                grown = [(k - 1) * d * j for k, d, j in zip(kernel, dilation, jump, strict=True)]
                field, jump = (field[0] + grown[0], field[1] + grown[1]), (jump[0] * stride[0], jump[1] * stride[1])
                place = (names[module], type(module).__name__, path, block)
                rows.append(LayerField(*place, kernel, stride, dilation, jump, field))
        return field, jump

    field, jump = along(model.stem, "stem", 0, (1, 1), (1, 1))
    blocks = zip(model.depthwise_branches, model.dilated_branches, model.transitions, strict=True)
    for block, (depthwise, dilated, transition) in enumerate(blocks, start=1):
        one, _ = along(depthwise, "depthwise", block, field, jump)
        other, _ = along(dilated, "dilated", block, field, jump)
        larger = (max(one[0], other[0]), max(one[1], other[1]))
        field, jump = along(transition, "transition", block, larger, jump)  # neither branch has a stride
    along(model.head, "head", 0, field, jump)
    return rows


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def measured_receptive_field(model: DualBranchNet, row: LayerField) -> MeasuredField | None:
    """The support of the gradient of one central output unit with respect to the image; None if it is too large.

    A copy of the network is run, on the CPU, in float32, in which nothing can hide a dependence: weights are positive
    and biases zero, normalisation, activation and dropout pass their input on, and max-pooling takes the mean instead
    of one element. What is left is the wiring. The image is large enough that no field is cut off by its border.
    """
    wiring = _wiring(model)
    jump, field = max(row.jump_px), max(row.field_px)
    # The arithmetic is only a first guess of the size; that the support keeps clear of the border is what
    # makes the measurement independent of it. An odd number of units has one in the middle of the image.
    units = max(3, -(-(field + 2) // jump)) | 1
    while units * jump <= LARGEST_PROBE_PX:
        support_HW = _support(wiring, row.layer, units * jump)
        rows, columns = support_HW.any(1).nonzero(), support_HW.any(0).nonzero()
        top, bottom, left, right = (int(i) for i in (rows[0], rows[-1], columns[0], columns[-1]))
        if min(top, left) > 0 and max(bottom, right) < units * jump - 1:
            extent = (bottom - top + 1, right - left + 1)
            return MeasuredField(extent, int(support_HW.sum()) / math.prod(extent))
        units = (units + units // 2) | 1
    return None


def _wiring(model: DualBranchNet) -> DualBranchNet:
    """A copy in which every gradient is positive where there is a dependence and zero where there is none."""
    wiring = copy.deepcopy(model).cpu().float().requires_grad_(False)
    for name, module in list(wiring.named_modules()):
        if isinstance(module, nn.Conv2d):
            # 1 / √taps keeps the centre of the field from overflow and its corners from underflow.
            nn.init.constant_(module.weight, 1 / (module.weight.shape[1] * math.sqrt(math.prod(module.kernel_size))))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):  # one that takes any size has its kernel again
            wiring.set_submodule(name, nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
        elif name and not isinstance(module, nn.Sequential) and next(module.children(), None) is None:
            wiring.set_submodule(name, nn.Identity())
    return wiring


class _Reached(Exception):  # no error: the layer's output is there and the rest need not be run
    pass


@torch.enable_grad()
@one_thread()
def _support(wiring: DualBranchNet, layer: str, side_px: int) -> Tensor:
    """bool (H, W): the pixels that the central output of `layer` depends on, in an image of side_px."""
    outputs: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...], output_BCHW: Tensor) -> None:
        outputs.append(output_BCHW)
        raise _Reached

    image_BCHW = torch.ones(1, wiring.in_chans, side_px, side_px, requires_grad=True)
    with wiring.get_submodule(layer).register_forward_hook(stop), contextlib.suppress(_Reached):
        wiring(image_BCHW)
    height, width = outputs[0].shape[-2:]
    (gradient_BCHW,) = torch.autograd.grad(outputs[0][0, :, height // 2, width // 2].sum(), image_BCHW)
    return gradient_BCHW[0].abs().sum(0) > 0


@dataclass(frozen=True)
class Constraint:
    """A demand on the network: what it is, whether it is met, and what was found."""

    name: str
    passed: bool
    detail: str


def constraints(model: nn.Module) -> list[Constraint]:
    """The seed's three demands on any network: a depthwise convolution, a dilated one, under a million parameters."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    kinds = {
        "depthwise": [name for name, conv in convs.items() if conv.groups == conv.in_channels > 1],
        # A 1×1 kernel has one tap, which no dilation moves.
        "dilated": [name for name, c in convs.items() if any(d > 1 < k for d, k in zip(c.dilation, c.kernel_size))],  # noqa: B905
    }
    met = []
    for kind, names in kinds.items():
        detail = f"{len(names)} found, the first is {names[0]}" if names else "none found"
        met.append(Constraint(f"at least one {kind} convolution", bool(names), detail))
    count = sum(p.numel() for p in model.parameters())
    limit = f"fewer than {PARAMETER_LIMIT:,} parameters"
    return [*met, Constraint(limit, count < PARAMETER_LIMIT, f"{count:,} parameters")]


def report_json(model: nn.Module, input_CHW: tuple[int, int, int]) -> dict[str, Any]:
    """Layer table, receptive fields and constraints as one JSON object; raises as `summarise`."""
    fields = [
        {
            **asdict(row),
            "measured_field_px": measured and measured.field_px,
            "measured_coverage": measured and round(measured.coverage, 4),
        }
        for row, measured in _fields(model)
    ]
    return {
        "summary": asdict(summarise(model, input_CHW)),
        "receptive_field": fields,
        "receptive_field_note": None if fields else NOTE_OTHER_MODELS,
        "constraints": [asdict(constraint) for constraint in constraints(model)],
    }


def render_report(model: nn.Module, input_CHW: tuple[int, int, int]) -> str:
    """The layer table, the receptive field of each layer and the constraints, as text; raises as `summarise`."""
    summary = summarise(model, input_CHW)
    labels = {row.module: row.label for row in summary.rows}
    lines = [summary.render(), "", *_render_fields(_fields(model), labels), "", "Constraints"]
    for constraint in constraints(model):
        lines.append(f"  {'PASS' if constraint.passed else 'FAIL'}  {constraint.name}: {constraint.detail}")
    return "\n".join(lines)


def _fields(model: nn.Module) -> list[tuple[LayerField, MeasuredField | None]]:
    return [(row, measured_receptive_field(model, row)) for row in receptive_field(model)]  # type: ignore[arg-type]


def _render_fields(fields: list[tuple[LayerField, MeasuredField | None]], labels: dict[str, str]) -> Iterator[str]:
    if not fields:
        yield NOTE_OTHER_MODELS
        return
    yield "Receptive field of each layer, pixels of the image"
    columns = "{:>20}  {:<12} {:>6} {:>6} {:>8} {:>5} {:>8} {:>9} {:>5}"
    yield columns.format("Layer", "Path", "Kernel", "Stride", "Dilation", "Jump", "Field", "Measured", "Seen")
    for row, measured in fields:
        path = f"{row.path} {row.block}" if row.block else row.path
        pairs = map(_px, (row.kernel_px, row.stride_px, row.dilation_px, row.jump_px, row.field_px))
        found = (_px(measured.field_px), f"{measured.coverage:.0%}") if measured else ("–", "–")
        yield columns.format(labels[row.layer], path, *pairs, *found)
    yield "Field: 1 + sum of (kernel - 1) x dilation x jump before the layer (Araujo et al. 2019); after"
    yield "a merge that of the larger branch. A field larger than the image is cut off by its border."
    yield "Measured: extent of a central unit's gradient. Seen: share of that extent with an influence."


def _px(pair: Pair) -> str:
    """One number for a square."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
