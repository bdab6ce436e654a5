"""The dual-branch family: the seed's network, its relatives, timm's interface, bad settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet
from harness.models.units import DepthwiseConv2d, branch_unit
from harness.recipe.schema import DualBranchArgs, parse_settings

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"widths": [[6, 8], [12]], "transition_widths": [10], "head_width": 7}

FAMILY = {
    "defaults": {"dropout": 0.0},
    "concat, dilation by unit": {**SMALL, "merge": "concat", "dilations": [[1, 3], [2]], "dropout": 0.1},
    "stem, group, gelu": {**SMALL, "stem": 8, "norm": "group", "activation": "gelu", "dilations": [3, 1]},
    "layer, silu, one block": {
        "widths": [[5, 9]],
        "transition_widths": [],
        "norm": "layer",
        "activation": "silu",
    },
    "no norm, leaky": {**SMALL, "norm": "none", "activation": "leaky_relu", "dropout": 0.0},
    "group norm of 48 and 33": {"widths": [[48, 33]], "transition_widths": [], "norm": "group", "stem": 4},
}


def test_the_seed_has_its_parameter_count() -> None:
    model = timm.create_model("dual_branch_seed")
    assert sum(p.numel() for p in model.parameters()) == 380_646


def test_the_familys_defaults_are_the_seed() -> None:
    assert timm.create_model("dual_branch_seed").args == timm.create_model("dual_branch").args == DualBranchArgs()


def test_names_and_shapes_of_the_weights_are_stable() -> None:
    """Checkpoints are loaded by these names: changing one breaks every older run."""
    state = timm.create_model("dual_branch_seed").state_dict()
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in state.items()]
    assert lines == (GOLDEN / "seed_state_dict.txt").read_text().splitlines()


def _reference(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The seed's network in evaluation mode, written out without any module of ours."""

    def branch(x: Tensor, prefix: str, dilation: int) -> Tensor:
        for unit in range(3):
            p = f"{prefix}.{unit}."
            x = F.conv2d(
                x,
                w[p + "conv.depthwise.weight"],
                w[p + "conv.depthwise.bias"],
                padding=dilation,
                dilation=dilation,
                groups=x.shape[1],
            )
            x = F.conv2d(x, w[p + "conv.pointwise.weight"], w[p + "conv.pointwise.bias"])
            mean, var = w[p + "norm.running_mean"], w[p + "norm.running_var"]
            x = F.batch_norm(x, mean, var, w[p + "norm.weight"], w[p + "norm.bias"])
            x = F.relu(x)
        return x

    for block in range(3):
        x = branch(x, f"depthwise_branches.{block}", 1) + branch(x, f"dilated_branches.{block}", 2)
        if block < 2:
            prefix = f"transitions.{block}.conv."
            x = F.conv2d(F.max_pool2d(x, 2), w[prefix + "weight"], w[prefix + "bias"])
    x = F.avg_pool2d(x, 8)
    x = F.conv2d(x, w["head.hidden.weight"], w["head.hidden.bias"])
    return F.conv2d(x, w["head.classifier.weight"], w["head.classifier.bias"]).flatten(1)


def test_the_seeds_logits_equal_a_plain_reference() -> None:
    torch.manual_seed(0)
    model = timm.create_model("dual_branch_seed")
    x = torch.randn(4, 3, 32, 32)
    model(x)  # gives the running statistics values of their own
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), _reference(x, model.state_dict()), rtol=1e-5, atol=1e-6)


def test_weights_have_pytorchs_default_initialisation() -> None:
    torch.manual_seed(3)
    unit = branch_unit(8, 16, dilation=2, norm="batch", activation="relu", dropout=0.25)
    torch.manual_seed(3)
    depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
    pointwise = nn.Conv2d(8, 16, 1)
    assert torch.equal(unit.conv.depthwise.weight, depthwise.weight)
    assert torch.equal(unit.conv.depthwise.bias, depthwise.bias)
    assert torch.equal(unit.conv.pointwise.weight, pointwise.weight)


@pytest.mark.parametrize("settings", FAMILY.values(), ids=FAMILY)
def test_a_relative_trains_a_step(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("dual_branch", num_classes=5, in_chans=2, img_size=16, **settings)
    images, labels = torch.randn(16, 2, 16, 16), torch.arange(16) % 5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(images)
    assert logits.shape == (16, 5)
    F.cross_entropy(logits, labels).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        # A bias in front of a batch normalisation has no influence, so its gradient may round to zero.
        if p.ndim > 1 or model.args.norm == "none":
            assert p.grad.abs().sum() > 0, name
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.ndim == 1 or not torch.equal(p, before[name]), name


@pytest.mark.parametrize("activation", get_args(DualBranchArgs.model_fields["activation"].annotation))
def test_every_activation_of_the_schema_is_built(activation: str) -> None:
    model = timm.create_model("dual_branch", activation=activation, widths=[[4]], transition_widths=[])
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert not any(isinstance(m, nn.ReLU) for m in model.modules()) or activation == "relu"


def test_dilations_and_merge_shape_the_network() -> None:
    model = DualBranchNet(**{**SMALL, "dilations": [[1, 3], 2], "merge": "concat"})
    dilated = [m.depthwise.dilation for m in model.dilated_branches.modules() if isinstance(m, DepthwiseConv2d)]
    plain = [m.depthwise.dilation for m in model.depthwise_branches.modules() if isinstance(m, DepthwiseConv2d)]
    assert dilated == [(1, 1), (3, 3), (2, 2)]
    assert plain == [(1, 1)] * 3
    assert model.transitions[0].conv.in_channels == 16
    assert model.num_features == 24
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 24, 16, 16)


def test_group_norm_divides_any_width() -> None:
    for channels in range(1, 70):
        norm = branch_unit(1, channels, dilation=1, norm="group", activation="relu", dropout=0).norm
        assert channels % norm.num_groups == 0
        assert norm.num_groups <= max(1, channels // 16)


def test_timm_lists_and_describes_the_family() -> None:
    assert set(timm.list_models("dual_branch*")) == {"dual_branch", "dual_branch_seed"}
    model = timm.create_model("dual_branch_seed")
    assert model.default_cfg["input_size"] == (3, 32, 32)
    assert model.default_cfg["architecture"] == "dual_branch_seed"
    modules = dict(model.named_modules())
    assert modules[model.default_cfg["classifier"]] is model.get_classifier()
    assert all(isinstance(modules[name], nn.Conv2d) for name in model.default_cfg["first_conv"])
    stemmed = timm.create_model("dual_branch", stem=8)
    assert dict(stemmed.named_modules())[stemmed.default_cfg["first_conv"]].out_channels == 8


def test_timms_interface_to_features_and_head() -> None:
    model = timm.create_model("dual_branch_seed").eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier().out_channels == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), hidden)
    assert timm.create_model("dual_branch_seed", num_classes=0)(x).shape == (2, 64)


def test_a_reset_classifier_keeps_the_dtype() -> None:
    model = timm.create_model("dual_branch_seed").double()
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("img_size", "shape"), [(28, (28, 28)), (30, (30, 30)), ((16, 48), (16, 48))])
def test_other_image_sizes(img_size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    assert DualBranchNet(img_size=img_size)(torch.randn(2, 3, *shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widhts": [[1]]}, r'no setting "widhts"\n  HINT: Did you mean "widths"'),
        ({"widths": []}, "widths: needs at least one block"),
        ({"widths": [[8], []], "transition_widths": [4]}, r"widths\.1"),
        ({"widths": [[8, 0]], "transition_widths": []}, r"widths\.0\.1: .*greater than or equal to 1, got 0"),
        ({"widths": [[8.0]], "transition_widths": []}, r"widths\.0\.0: .*valid integer"),
        ({"widths": [[8]]}, "transition_widths: needs one width .* so 0, and has 2"),
        ({"dilations": 0}, "dilations: must be one number for all"),
        ({"dilations": [1, 2]}, "dilations: is for 2 blocks, and widths has 3"),
        ({"dilations": [1, 2, [1]]}, "dilations: block 3 has 1 dilations and 3 units"),
        ({"merge": "add"}, "merge: .*'sum' or 'concat', got 'add'"),
        ({"dropout": 1.0}, "dropout: .*less than 1"),
        ({"dropout": float("nan")}, "dropout: "),
        ({"stem": True}, "stem: .*valid integer"),
        ({"merge": "add", "norm": "instance"}, "2 errors"),
        ({"num_classes": -1}, "num_classes: must be a whole number ≥ 0"),
        ({"in_chans": 0}, "in_chans: must be a whole number ≥ 1"),
        ({"img_size": 3}, r"3×3 px are too small for 2 transitions(.|\n)*at least 4 px"),
        ({"img_size": (32, 32, 3)}, "img_size: must be one number or"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        timm.create_model("dual_branch", **settings)


def test_settings_are_immutable_and_have_a_description_each() -> None:
    args = parse_settings({"widths": [[4, 5]], "transition_widths": []})
    assert args.widths == ((4, 5),)
    assert args.unit_dilations() == ((2, 2),)
    hash(args)
    assert all(field.description for field in DualBranchArgs.model_fields.values())


def test_settings_are_checked_without_importing_torch() -> None:
    code = "import sys, harness.recipe.schema; sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
