"""What a network is, without training it: layer table, receptive fields, constraints.

The table has the form and the counting rules of the torchsummary package, which the seed's table was made
with: a row for each call of a module other than the network itself, Sequential and ModuleList; parameters
that the module owns itself; sizes with 4 bytes a number, in units of 1024² bytes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.receptive_field import (
    NOTE_OTHER_MODELS,
    LayerField,
    MeasuredField,
    measured_receptive_field,
    receptive_field,
)

__all__ = [
    "Constraint",
    "LayerField",
    "LayerRow",
    "MeasuredField",
    "Summary",
    "constraints",
    "measured_receptive_field",
    "receptive_field",
    "render_report",
    "report_json",
    "summarise",
]

BYTES_A_NUMBER = 4  # float32
BYTES_A_MIB = 1024**2
PARAMETER_LIMIT = 1_000_000


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
    input_mib: float
    forward_backward_mib: float
    parameters_mib: float

    @property
    def non_trainable_parameters(self) -> int:
        return self.total_parameters - self.trainable_parameters

    @property
    def total_mib(self) -> float:
        return self.input_mib + self.forward_backward_mib + self.parameters_mib

    def render(self) -> str:
        """The table as text, without a newline at the end."""
        name_width = max([20, *(len(row.label) for row in self.rows)])  # timm has long names
        thin, thick = "-" * (name_width + 44), "=" * (name_width + 44)
        lines = [thin, f"{'Layer (type)':>{name_width}}  {'Output Shape':>25} {'Param #':>15}", thick]
        for row in self.rows:
            lines.append(f"{row.label:>{name_width}}  {list(row.output_shape)!s:>25} {row.parameters:>15,}")
        return "\n".join(
            [
                *lines,
                thick,
                f"Total params: {self.total_parameters:,}",
                f"Trainable params: {self.trainable_parameters:,}",
                f"Non-trainable params: {self.non_trainable_parameters:,}",
                thin,
                f"Input size (MB): {self.input_mib:0.2f}",
                f"Forward/backward pass size (MB): {self.forward_backward_mib:0.2f}",
                f"Params size (MB): {self.parameters_mib:0.2f}",
                f"Estimated Total Size (MB): {self.total_mib:0.2f}",
                thin,
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists; the keys are the fields' names."""
        totals = {
            "non_trainable_parameters": self.non_trainable_parameters,
            "total_mib": self.total_mib,
        }
        rows = [{**asdict(row), "output_shape": list(row.output_shape)} for row in self.rows]
        return {**asdict(self), **totals, "rows": rows}


@torch.no_grad()
def summarise(model: nn.Module, input_CHW: tuple[int, int, int] = (3, 32, 32)) -> Summary:
    """Run one image of zeros through a copy of the network, in evaluation mode on the CPU, noting each layer.

    Weights, buffers, modes, hooks and generators of `model` stay as they are.

    Args:
        model: any network that maps float32 (1, C, H, W).
        input_CHW: channels, height and width of the image.

    Raises:
        HarnessError: the network cannot take such an image.
    """
    probe = copy.deepcopy(model).cpu().float().eval()
    rows: list[LayerRow] = []
    for name, module in probe.named_modules():
        if module is not probe and not isinstance(module, nn.Sequential | nn.ModuleList):
            module.register_forward_hook(_noting(rows, name))
    try:
        with torch.random.fork_rng(devices=[]):
            probe(torch.zeros(1, *input_CHW))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise HarnessError(
            f"the network cannot take an image of {input_CHW} (C, H, W): {error}",
            hint="Give the image size that the network was built for, or build it anew for this one.",
        ) from error
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total = sum(count for count, _ in parameters)
    # Each output is counted twice, for itself and for its gradient.
    activations = 2 * sum(abs(math.prod(row.output_shape)) for row in rows if row.output_shape)
    return Summary(
        rows=tuple(rows),
        total_parameters=total,
        trainable_parameters=sum(count for count, trainable in parameters if trainable),
        input_mib=math.prod(input_CHW) * BYTES_A_NUMBER / BYTES_A_MIB,
        forward_backward_mib=activations * BYTES_A_NUMBER / BYTES_A_MIB,
        parameters_mib=total * BYTES_A_NUMBER / BYTES_A_MIB,
    )


def _noting(rows: list[LayerRow], name: str) -> Any:
    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = next(_tensors(output), None)
        shape = () if first is None else (-1, *first.shape[1:])
        owned = sum(p.numel() for p in module.parameters(recurse=False))
        rows.append(LayerRow(type(module).__name__, len(rows) + 1, name, shape, owned))

    return note


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


@dataclass(frozen=True)
class Constraint:
    """A demand on the network: what it is, whether it is met, and what was found."""

    name: str
    passed: bool
    detail: str


def constraints(model: nn.Module) -> list[Constraint]:
    """The seed's three demands: a depthwise convolution, a dilated one, fewer than a million parameters.

    Works on any network. Buffers are no parameters.
    """
    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    depthwise = [name for name, conv in convs if conv.groups == conv.in_channels > 1]
    # A 1×1 kernel has one tap, which no dilation moves.
    dilated = [name for name, c in convs if any(d > 1 < k for d, k in zip(c.dilation, c.kernel_size, strict=True))]
    count = sum(p.numel() for p in model.parameters())
    return [
        Constraint("at least one depthwise convolution", bool(depthwise), _found(depthwise)),
        Constraint("at least one dilated convolution", bool(dilated), _found(dilated)),
        Constraint(f"fewer than {PARAMETER_LIMIT:,} parameters", count < PARAMETER_LIMIT, f"{count:,} parameters"),
    ]


def _found(names: list[str]) -> str:
    return f"{len(names)} found, the first is {names[0]}" if names else "none found"


def render_report(model: nn.Module, input_CHW: tuple[int, int, int] = (3, 32, 32), *, measure: bool = True) -> str:
    """The layer table, the receptive field of each layer and the constraints, as text.

    Args:
        model: any network.
        input_CHW: channels, height and width of the images.
        measure: also measure each receptive field on the network (about two seconds for the seed's).

    Raises:
        HarnessError: the network cannot take such an image.
    """
    summary = summarise(model, input_CHW)
    lines = [summary.render(), "", *_render_fields(model, summary, measure), "", "Constraints"]
    for constraint in constraints(model):
        lines.append(f"  {'PASS' if constraint.passed else 'FAIL'}  {constraint.name}: {constraint.detail}")
    return "\n".join(lines)


def report_json(
    model: nn.Module, input_CHW: tuple[int, int, int] = (3, 32, 32), *, measure: bool = True
) -> dict[str, Any]:
    """What `render_report` says, as one JSON object: summary, receptive_field and constraints.

    Raises:
        HarnessError: the network cannot take such an image.
    """
    fields = []
    for row, measured in _fields(model, measure):
        found: dict[str, Any] = {"measured_field_px": None, "measured_coverage": None}
        if measured:
            found = {"measured_field_px": measured.field_px, "measured_coverage": round(measured.coverage, 4)}
        fields.append({**asdict(row), **found})
    return {
        "summary": summarise(model, input_CHW).to_json(),
        "receptive_field": fields,
        "receptive_field_note": None if fields else NOTE_OTHER_MODELS,
        "constraints": [asdict(constraint) for constraint in constraints(model)],
    }


def _fields(model: nn.Module, measure: bool) -> list[tuple[LayerField, MeasuredField | None]]:
    return [
        (row, measured_receptive_field(model, row.layer) if measure else None)  # type: ignore[arg-type]
        for row in receptive_field(model)
    ]


def _render_fields(model: nn.Module, summary: Summary, measure: bool) -> Iterator[str]:
    fields = _fields(model, measure)
    if not fields:
        yield NOTE_OTHER_MODELS
        return
    labels = {row.module: row.label for row in summary.rows}
    yield "Receptive field of each layer, pixels of the image"
    head = f"{'Layer':>20}  {'Path':<12} {'Kernel':>6} {'Stride':>6} {'Dilation':>8} {'Jump':>5} {'Field':>8}"
    yield head + (f" {'Measured':>9} {'Seen':>5}" if measure else "")
    for row, measured in fields:
        path = f"{row.path} {row.block}" if row.block else row.path
        pairs = f"{_px(row.kernel_px):>6} {_px(row.stride_px):>6} {_px(row.dilation_px):>8} {_px(row.jump_px):>5}"
        line = f"{labels[row.layer]:>20}  {path:<12} {pairs} {_px(row.field_px):>8}"
        yield line + (f" {_px(measured.field_px):>9} {measured.coverage:>5.0%}" if measured else "")
    yield "Field: 1 + sum of (kernel - 1) x dilation x jump before the layer (Araujo et al. 2019); after"
    yield "a merge that of the larger branch. A field larger than the image is cut off by its border."
    if measure:
        yield "Measured: extent of a central unit's gradient. Seen: share of that extent with an influence."


def _px(pair: tuple[int, int]) -> str:
    """One number for a square."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
