"""The layer table against the seed's own, receptive fields against the measured gradient, the constraints."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet
from harness.models.inspect import (
    Constraint,
    constraints,
    measured_receptive_field,
    receptive_field,
    render_report,
    report_json,
    summarise,
)

GOLDEN = (Path(__file__).parents[1] / "golden" / "seed_summary.txt").read_text()
ROW = re.compile(r"^ *(\w+)-(\d+) +\[(.*)\] +([\d,]+)$", re.MULTILINE)
RELATIVE = {
    "widths": [[6, 8], [12, 5, 6]],
    "transition_widths": [10],
    "dilations": [[1, 3], [2, 4, 1]],
    "stem": 4,
    "merge": "concat",
    "norm": "group",
    "activation": "gelu",
}


@pytest.fixture(scope="module")
def seed() -> DualBranchNet:
    torch.manual_seed(0)
    return timm.create_model("dual_branch_seed")


def test_each_row_of_the_seeds_table(seed: DualBranchNet) -> None:
    expected = [
        (kind, int(number), tuple(int(n) for n in shape.split(",")), int(count.replace(",", "")))
        for kind, number, shape, count in ROW.findall(GOLDEN)
    ]
    rows = [(row.type, row.number, row.output_shape, row.parameters) for row in summarise(seed).rows]
    assert len(expected) == 115
    for row, wanted in zip(rows, expected, strict=True):
        assert row == wanted


def test_the_seeds_table_to_the_character(seed: DualBranchNet) -> None:
    assert summarise(seed).render() + "\n" == GOLDEN


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
    render_report(model)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x)).flatten(2, 3)[..., :4]
        return self.pieces(self.lstm(x)[0])["a"] * self.scale.sum()


class _Pieces(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": x, "b": x[:, :1]}


def test_any_module_can_be_summarised() -> None:
    summary = summarise(_Odd(), (3, 2, 4))
    shapes = [(row.label, row.output_shape) for row in summary.rows]
    assert shapes == [
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


def test_long_names_keep_the_columns_apart() -> None:
    lines = summarise(timm.create_model("resnet10t", num_classes=3)).render().splitlines()
    rows = [line for line in lines if "[" in line]
    assert any("SelectAdaptivePool2d-" in line for line in rows)
    assert {len(line) for line in rows} == {len(lines[0]) - 1}


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


@pytest.mark.parametrize("settings", [{}, RELATIVE], ids=["seed", "relative"])
def test_every_measured_field_equals_the_arithmetic(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = DualBranchNet(**settings)
    rows = receptive_field(model)
    paths = [(row.path, row.block) for row in rows]
    blocks = range(1, len(model.args.widths) + 1)
    assert {(path, block) for path in ("depthwise", "dilated") for block in blocks} <= set(paths)
    for row in rows:
        assert measured_receptive_field(model, row.layer).field_px == row.field_px, row.layer


def test_an_image_that_is_not_square() -> None:
    model = DualBranchNet(img_size=(16, 32), widths=[[4], [4]], transition_widths=[4])
    row = receptive_field(model)[-1]
    assert row.field_px == (6 + 8 + 7 * 2, 6 + 8 + 15 * 2)
    assert measured_receptive_field(model, row.layer).field_px == row.field_px


def test_the_measurement_does_not_lean_on_the_arithmetic(seed: DualBranchNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told fields of one pixel it still finds the true ones: its image grows until no border is touched."""
    layer = "dilated_branches.1.2.conv.depthwise"
    wrong = [row.__class__(**{**vars(row), "field_px": (1, 1)}) for row in receptive_field(seed)]
    monkeypatch.setattr("harness.models.receptive_field.receptive_field", lambda model: wrong)
    assert measured_receptive_field(seed, layer).field_px == (38, 38)


def test_dilation_leaves_holes(seed: DualBranchNet) -> None:
    dilated = measured_receptive_field(seed, "dilated_branches.0.2.conv.depthwise")
    assert (dilated.field_px, dilated.seen_px) == ((13, 13), 7 * 7)
    assert dilated.coverage == pytest.approx(49 / 169)
    assert measured_receptive_field(seed, "transitions.0.pool").coverage == 1


def test_a_layer_that_is_not_there(seed: DualBranchNet) -> None:
    with pytest.raises(HarnessError, match=r'Did you mean "transitions\.0\.pool"'):
        measured_receptive_field(seed, "transitions.0.pol")


def test_a_field_too_large_is_said() -> None:
    model = DualBranchNet(widths=[[2]], transition_widths=[], dilations=64, img_size=1000)
    with pytest.raises(HarnessError, match="too large"):
        measured_receptive_field(model, "head.pool")


def _verdicts(model: nn.Module) -> list[bool]:
    return [constraint.passed for constraint in constraints(model)]


def test_constraints_pass_and_fail_each(seed: DualBranchNet) -> None:
    assert _verdicts(seed) == [True, True, True]
    assert constraints(seed)[2] == Constraint("fewer than 1,000,000 parameters", True, "380,646 parameters")
    assert "18 found" in constraints(seed)[0].detail
    assert "9 found" in constraints(seed)[1].detail
    assert _verdicts(DualBranchNet(dilations=1)) == [True, False, True]
    assert _verdicts(DualBranchNet(widths=[[900, 900]], transition_widths=[])) == [True, True, False]
    assert _verdicts(nn.Conv2d(4, 8, 3, groups=2)) == [False, False, True]
    assert _verdicts(nn.Conv2d(1, 8, 3)) == [
        False,
        False,
        True,
    ]  # one group of one channel is no depthwise one
    assert _verdicts(nn.Conv2d(4, 8, 1, dilation=2)) == [False, False, True]
    assert _verdicts(nn.Conv2d(4, 8, (1, 3), dilation=(2, 1))) == [False, False, True]
    assert _verdicts(nn.Conv2d(4, 8, (1, 3), dilation=(1, 2), groups=4)) == [True, True, True]
    assert _verdicts(nn.Linear(1000, 1000, bias=False)) == [
        False,
        False,
        False,
    ]  # exactly a million is too many
    assert constraints(nn.Linear(1, 1))[0].detail == "none found"


def test_the_report(seed: DualBranchNet) -> None:
    text = render_report(seed, measure=False)
    assert text.startswith(GOLDEN)
    assert re.search(r"^ +Conv2d-31 +dilated 1 +3 +1 +2 +1 +13$", text, re.MULTILINE)
    assert re.search(r"^ +AvgPool2d-113 +head +8 +8 +1 +32 +116$", text, re.MULTILINE)
    assert text.count("PASS") == 3
    assert "Measured" not in text
    small = DualBranchNet(widths=[[4, 4]], transition_widths=[], img_size=(4, 6))
    measured = render_report(small, (3, 4, 6))
    assert re.search(r"^ +Conv2d-13 +dilated 1 +3 +1 +2 +1 +5 +5 +36%$", measured, re.MULTILINE)
    assert re.search(r"^ +AvgPool2d-25 +head +4x6 +4x6 +1 +4x6 +12x14 +12x14 +100%$", measured, re.MULTILINE)


def test_the_report_as_json(seed: DualBranchNet) -> None:
    report = json.loads(json.dumps(report_json(seed, measure=False)))
    assert len(report["summary"]["rows"]) == 115
    assert report["summary"]["rows"][2]["output_shape"] == [-1, 32, 32, 32]
    assert report["summary"]["total_parameters"] == 380_646
    assert len(report["receptive_field"]) == 43
    assert [constraint["passed"] for constraint in report["constraints"]] == [True, True, True]
    assert report["receptive_field"][0]["measured_field_px"] is None
    measured = report_json(DualBranchNet(widths=[[4, 4]], transition_widths=[], img_size=4), (3, 4, 4))[
        "receptive_field"
    ]
    assert all(row["measured_field_px"] == row["field_px"] for row in measured)
    assert min(row["measured_coverage"] for row in measured) < 1


def test_the_report_of_a_model_of_timm() -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    text = render_report(model)
    assert "dual-branch networks alone" in text
    assert text.count("FAIL") == 3
    assert report_json(model)["receptive_field"] == []
    assert "alone" in report_json(model)["receptive_field_note"]
