"""The layer table against the seed's own, receptive fields against the measured gradient, the constraints."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet
from harness.models.summary import (
    Constraint,
    MeasuredField,
    constraints,
    measured_receptive_field,
    receptive_field,
    render_report,
    report_json,
    summarise,
)

GOLDEN = (Path(__file__).parents[1] / "golden" / "seed_summary.txt").read_text()
RELATIVE = {
    "widths": [[6, 8], [12, 5, 6]],
    "transition_widths": [10],
    "dilations": [[1, 3], [2, 4, 1]],
    "stem": 4,
    "merge": "concat",
    "norm": "group",
    "activation": "gelu",
}
TINY = {"widths": [[4, 4]], "transition_widths": [], "img_size": (4, 6)}


@pytest.fixture(scope="module")
def seed() -> DualBranchNet:
    torch.manual_seed(0)
    return timm.create_model("dual_branch_seed")


def measured(model: DualBranchNet, layer: str) -> MeasuredField | None:
    (row,) = (row for row in receptive_field(model) if row.layer == layer)
    return measured_receptive_field(model, row)


def test_the_seeds_table_to_the_character(seed: DualBranchNet) -> None:
    summary = summarise(seed)
    assert summary.render() + "\n" == GOLDEN
    assert len(summary.rows) == 115


def test_totals(seed: DualBranchNet) -> None:
    frozen = copy.deepcopy(seed)
    frozen.head.requires_grad_(False)
    summary = summarise(frozen)
    assert summary.total_parameters == 380_646 == sum(row.parameters for row in summary.rows)
    assert summary.non_trainable_parameters == 16_448 + 650
    assert summary.parameters_mib == pytest.approx(380_646 * 4 / 2**20)


def test_the_model_stays_as_it_was() -> None:
    model = DualBranchNet(widths=[[6, 8], [12]], transition_widths=[10])
    model.depthwise_branches[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    render_report(model, (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert any(isinstance(module, nn.MaxPool2d) for module in model.modules())


class _Odd(nn.Module):
    """Outputs that are no single tensor, parameters of the network itself, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.twice = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.pieces = _Pieces()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x)).flatten(2, 3)[..., :4]
        return self.pieces(self.lstm(x)[0])["b"] * self.scale.sum()


class _Pieces(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"b": x, "a": x[:, :1]}


def test_any_module_can_be_summarised() -> None:
    summary = summarise(_Odd(), (3, 2, 4))
    assert [(row.label, row.output_shape) for row in summary.rows] == [
        ("Linear-1", (-1, 3, 2, 4)),
        ("Linear-2", (-1, 3, 2, 4)),
        ("LSTM-3", (-1, 3, 5)),
        ("_Pieces-4", (-1, 3, 5)),
    ]
    # Each parameter counts once, also that of the network itself and that of the layer called twice.
    assert summary.total_parameters == sum(p.numel() for p in _Odd().parameters())


def test_a_wrong_image_is_explained(seed: DualBranchNet) -> None:
    with pytest.raises(HarnessError, match=r"cannot take an image of \(1, 32, 32\)"):
        summarise(seed, (1, 32, 32))


def test_fields_worked_out_by_hand(seed: DualBranchNet) -> None:
    fields = {row.layer: row for row in receptive_field(seed)}
    assert len(fields) == 43
    expected = {
        "depthwise_branches.0.2.conv.depthwise": (7, 1),  # 1 + 3 · 2
        "dilated_branches.0.2.conv.depthwise": (13, 1),  # 1 + 3 · 4
        "transitions.0.pool": (14, 2),  # the larger branch, + 1
        "depthwise_branches.1.2.conv.pointwise": (26, 2),  # 14 + 3 · 2 · 2
        "dilated_branches.1.2.conv.pointwise": (38, 2),  # 14 + 3 · 4 · 2
        "transitions.1.conv": (40, 4),  # 38 + 2
        "depthwise_branches.2.2.conv.depthwise": (64, 4),  # 40 + 3 · 2 · 4
        "dilated_branches.2.2.conv.depthwise": (88, 4),  # 40 + 3 · 4 · 4
        "head.classifier": (116, 32),  # 88 + 7 · 4
    }
    assert {name: (fields[name].field_px[0], fields[name].jump_px[0]) for name in expected} == expected


@pytest.mark.parametrize("settings", [{}, RELATIVE, TINY], ids=["seed", "relative", "not square"])
def test_every_measured_field_equals_the_arithmetic(settings: dict[str, object]) -> None:
    model = DualBranchNet(**settings)
    rows = receptive_field(model)
    blocks = range(1, len(model.args.widths) + 1)
    assert {(path, block) for path in ("depthwise", "dilated") for block in blocks} <= {
        (row.path, row.block) for row in rows
    }
    for row in rows:
        found = measured_receptive_field(model, row)
        assert found is not None
        assert found.field_px == row.field_px, row.layer


def test_the_measurement_does_not_lean_on_the_arithmetic(seed: DualBranchNet) -> None:
    """Given a field of one pixel it still finds the true one: its image grows until no border is touched."""
    (row,) = (row for row in receptive_field(seed) if row.layer == "dilated_branches.1.2.conv.depthwise")
    assert measured_receptive_field(seed, replace(row, field_px=(1, 1))) == MeasuredField((38, 38), 1)


def test_dilation_leaves_holes(seed: DualBranchNet) -> None:
    dilated = measured(seed, "dilated_branches.0.2.conv.depthwise")
    assert dilated == MeasuredField((13, 13), pytest.approx(7 * 7 / 169))
    pool = measured(seed, "transitions.0.pool")
    assert pool is not None
    assert pool.coverage == 1


def test_a_field_too_large_to_be_measured_is_left_open() -> None:
    model = DualBranchNet(widths=[[2]], transition_widths=[], dilations=64, img_size=1000)
    assert measured(model, "head.pool") is None
    assert re.search(r"AvgPool2d-\d+ +head +1000 +1000 +1 +1000 +1128 +– +–$", render_report(model, (3, 8, 8)), re.M)
    assert report_json(model, (3, 8, 8))["receptive_field"][-1]["measured_field_px"] is None


def _verdicts(model: nn.Module) -> list[bool]:
    return [constraint.passed for constraint in constraints(model)]


def test_constraints_pass_and_fail_each(seed: DualBranchNet) -> None:
    assert constraints(seed)[2] == Constraint("fewer than 1,000,000 parameters", True, "380,646 parameters")
    assert "18 found" in constraints(seed)[0].detail
    assert "9 found" in constraints(seed)[1].detail
    assert constraints(nn.Linear(1, 1))[0].detail == "none found"
    for model, verdicts in (
        (seed, [True, True, True]),
        (DualBranchNet(dilations=1), [True, False, True]),
        (DualBranchNet(widths=[[900, 900]], transition_widths=[]), [True, True, False]),
        (nn.Conv2d(4, 8, 3, groups=2), [False, False, True]),
        (nn.Conv2d(1, 8, 3), [False, False, True]),  # one group of one channel is no depthwise one
        (nn.Conv2d(4, 8, 1, dilation=2), [False, False, True]),
        (nn.Conv2d(4, 8, (1, 3), dilation=(2, 1)), [False, False, True]),
        (nn.Conv2d(4, 8, (1, 3), dilation=(1, 2), groups=4), [True, True, True]),
        (nn.Linear(1000, 1000, bias=False), [False, False, False]),  # exactly a million is too many
    ):
        assert _verdicts(model) == verdicts, model


def test_the_report() -> None:
    text = render_report(DualBranchNet(**TINY), (3, 4, 6))
    assert text.startswith(summarise(DualBranchNet(**TINY), (3, 4, 6)).render())
    assert re.search(r"^ +Conv2d-13 +dilated 1 +3 +1 +2 +1 +5 +5 +36%$", text, re.MULTILINE)
    assert re.search(r"^ +AvgPool2d-25 +head +4x6 +4x6 +1 +4x6 +12x14 +12x14 +100%$", text, re.MULTILINE)
    assert text.count("PASS") == 3
    report = json.loads(json.dumps(report_json(DualBranchNet(**TINY), (3, 4, 6))))
    assert report["summary"]["rows"][2]["output_shape"] == [-1, 4, 4, 6]
    assert [constraint["passed"] for constraint in report["constraints"]] == [True, True, True]
    assert all(row["measured_field_px"] == row["field_px"] for row in report["receptive_field"])
    assert min(row["measured_coverage"] for row in report["receptive_field"]) < 1


def test_the_report_of_a_model_of_timm() -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    text = render_report(model, (3, 32, 32))
    rows = [line for line in text.splitlines() if "[" in line]
    assert any("SelectAdaptivePool2d-" in line for line in rows)
    assert {len(line) for line in rows} == {len(text.splitlines()[0]) - 1}  # long names keep the columns apart
    assert "dual-branch networks alone" in text
    assert text.count("FAIL") == 3
    report = report_json(model, (3, 32, 32))
    assert report["receptive_field"] == []
    assert "alone" in report["receptive_field_note"]
