"""The dual-branch family: the seed's network, its relatives, bad settings."""

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
from harness.models.dual_branch import AvgPool2d, DepthwiseConv2d, DualBranchNet
from harness.recipe.schema import DualBranchArgs, parse_settings

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"widths": [[6, 8], [12]], "transition_widths": [10], "head_width": 7}
FAMILY = {
    "defaults": {"dropout": 0.0},
    "concat, dilation by unit": {**SMALL, "merge": "concat", "dilations": [[1, 3], [2]], "dropout": 0.1},
    "stem, group, gelu": {**SMALL, "stem": 8, "norm": "group", "activation": "gelu", "dilations": [3, 1]},
    "layer, silu, one block": {"widths": [[5, 9]], "transition_widths": [], "norm": "layer", "activation": "silu"},
    "no norm, leaky": {**SMALL, "norm": "none", "activation": "leaky_relu", "dropout": 0.0},
    "group norm of 48 and 33": {"widths": [[48, 33]], "transition_widths": [], "norm": "group", "stem": 4},
}


def test_the_seed_has_its_parameters_and_the_familys_defaults() -> None:
    model = timm.create_model("dual_branch_seed")
    assert sum(p.numel() for p in model.parameters()) == 380_646
    assert model.args == timm.create_model("dual_branch").args == DualBranchArgs()


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
            weight, bias = w[p + "conv.depthwise.weight"], w[p + "conv.depthwise.bias"]
            x = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation, groups=x.shape[1])
            x = F.conv2d(x, w[p + "conv.pointwise.weight"], w[p + "conv.pointwise.bias"])
            mean, var = w[p + "norm.running_mean"], w[p + "norm.running_var"]
            x = F.relu(F.batch_norm(x, mean, var, w[p + "norm.weight"], w[p + "norm.bias"]))
        return x

    for block in range(3):
        x = branch(x, f"depthwise_branches.{block}", 1) + branch(x, f"dilated_branches.{block}", 2)
        if block < 2:
            prefix = f"transitions.{block}.conv."
            x = F.conv2d(F.max_pool2d(x, 2), w[prefix + "weight"], w[prefix + "bias"])
    x = F.conv2d(F.avg_pool2d(x, 8), w["head.hidden.weight"], w["head.hidden.bias"])
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
    conv = DepthwiseConv2d(8, 16, dilation=2)
    torch.manual_seed(3)
    depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
    pointwise = nn.Conv2d(8, 16, 1)
    assert torch.equal(conv.depthwise.weight, depthwise.weight)
    assert torch.equal(conv.depthwise.bias, depthwise.bias)
    assert torch.equal(conv.pointwise.weight, pointwise.weight)


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
    model = DualBranchNet(widths=[list(range(1, 70))], transition_widths=[], norm="group")
    for unit in model.depthwise_branches[0]:
        assert unit.norm.num_channels % unit.norm.num_groups == 0
        assert unit.norm.num_groups <= max(1, unit.norm.num_channels // 16)


@pytest.mark.parametrize(("img_size", "shape"), [(28, (28, 28)), (30, (30, 30)), ((16, 48), (16, 48))])
def test_other_image_sizes(img_size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    assert DualBranchNet(img_size=img_size)(torch.randn(2, 3, *shape)).shape == (2, 10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pooling_has_the_bits_of_the_fixed_one(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    results = []
    for pool in (AvgPool2d(1), nn.AvgPool2d(8)):
        x = torch.randn(16, 256, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        y = pool(x)
        y.backward(torch.linspace(-1, 1, y.numel()).to(dtype).view_as(y))
        results.append((y, x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


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
        ({"img_size": 3}, r"3×3 px are too small for 2 transitions(.|\n)*at least 4 px"),
        ({"drop_rate": 1}, "drop_rate: must be at least 0 and less than 1, got 1"),
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
