"""Networks by name: the family, timm's, and what wrong names and arguments get."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.errors import HarnessError
from harness.models.build import RESERVED, build_model


def build(name: str, *, size: int = 32, classes: int = 7, **args: Any) -> torch.nn.Module:
    return build_model(name, num_classes=classes, image_size_px=size, args=args)


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("dual_branch_seed", 32, {}),
        ("dual_branch", 24, {"widths": [[8]], "transition_widths": [], "merge": "concat"}),
        ("resnet18", 32, {"drop_rate": 0.1}),
        ("resnet10t", 64, {}),
        ("vit_tiny_patch16_224", 32, {"patch_size": 4, "depth": 2}),  # takes img_size
    ],
)
def test_builds_what_is_named(name: str, size: int, args: dict[str, Any]) -> None:
    model = build(name, size=size, **args)
    assert all(module.training for module in model.modules())
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_the_image_size_reaches_the_network() -> None:
    assert build("dual_branch_seed", size=64).final_size == (16, 16)


def test_the_same_seed_gives_the_same_weights_and_the_check_changes_nothing() -> None:
    torch.manual_seed(5)
    first, after = build("dual_branch_seed"), torch.rand(1)
    torch.manual_seed(5)
    second = build("dual_branch_seed")
    assert torch.equal(torch.rand(1), after)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert torch.equal(first.depthwise_branches[0][0].norm.running_mean, torch.zeros(32))
    assert first.depthwise_branches[0][0].norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet81", {}, r'model\.name: there is no model "resnet81"\n  HINT: Did you mean "resnet'),
        ("dual_branch_sed", {}, 'HINT: Did you mean "dual_branch_seed"'),
        ("hf-hub:timm/resnet18.a1_in1k", {}, "there is no model"),
        ("", {}, "there is no model"),
        ("resnet18.nonsense", {}, "cannot build .*nonsense"),
        ("resnet18", {"drop_raet": 0.1}, r'model\.args\.drop_raet: .*\n  HINT: Did you mean "drop_rate"'),
        ("vit_tiny_patch16_224", {"detph": 3}, 'Did you mean "depth"'),
        ("deit_tiny_distilled_patch16_224", {"embed_dmi": 3}, 'Did you mean "embed_dim"'),
        ("efficientvit_b0", {"nonsense": 3}, 'has no argument "nonsense"'),
        ("resnet18", {"block": 3}, "cannot build"),
        ("dual_branch", {"widhts": [[3]]}, r'model\.args: .*"widhts"\n  HINT: Did you mean "widths"'),
        ("dual_branch", {"widths": [[1]] * 6, "transition_widths": [1] * 5}, "at least|too small for 5 transitions"),
        ("inception_v4", {}, "cannot take images of 32×32 px"),
        ("resnet18", {"global_pool": ""}, "cannot|not logits of 7 classes"),
    ],
)
def test_wrong_names_and_arguments_are_explained(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message) as caught:
        build(name, size=31 if name == "dual_branch" else 32, **args)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize("key", sorted(RESERVED))
def test_what_the_data_or_the_launcher_decides_is_no_argument(key: str) -> None:
    with pytest.raises(HarnessError, match=rf"^model\.args\.{key}: {key} must not be set in model\.args: \w+"):
        build("resnet18", **{key: None})
