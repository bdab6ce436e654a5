"""The family as timm's users have it: any image size, features, graphs, devices, saved and loaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.fx
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import group_parameters, save_for_hf
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.units import AvgPool2d

NAMES = ("dual_branch", "dual_branch_seed")
SMALL: dict[str, Any] = {"widths": [[4, 6], [8], [6]], "transition_widths": [5, 7], "head_width": 9, "dropout": 0.3}
RELATIVES: dict[str, dict[str, Any]] = {
    "sum": SMALL,
    "concat, stem": {**SMALL, "merge": "concat", "stem": 4, "norm": "group"},
    "one block": {"widths": [[4]], "transition_widths": [], "activation": "prelu"},
}
relatives = pytest.mark.parametrize("settings", RELATIVES.values(), ids=RELATIVES)
torchscript = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def create(settings: dict[str, Any] = SMALL, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("dual_branch", **settings, **kwargs).eval()


def images(height: int = 16, width: int = 24, *, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pooling_has_the_bits_of_the_seeds(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(16, 64, 8, 8).to(dtype).contiguous(memory_format=layout)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, seeds = AvgPool2d(5)(one), nn.AvgPool2d(8)(other)
    assert torch.equal(ours, seeds)
    slope = torch.randn_like(ours)
    ours.backward(slope)
    seeds.backward(slope)
    assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (33, 65), (128, 128), (4, 4)])
def test_images_of_any_size(shape: tuple[int, int]) -> None:
    model, x = create(img_size=32), images(*shape)
    means = model.forward_features(x).mean((2, 3), keepdim=True)
    torch.testing.assert_close(model(x), model.head.classifier(model.head.hidden(means)).flatten(1))


@torchscript
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # torch's own GraphModule
@relatives
def test_graphs_of_it_give_the_same_at_any_size(settings: dict[str, Any]) -> None:
    model = create(settings)
    graph = torch.fx.symbolic_trace(model)
    for form in (graph, torch.jit.script(model), torch.jit.script(graph)):
        for x in (images(), images(33, 20)):
            torch.testing.assert_close(form(x), model(x))


@relatives
def test_intermediate_features(settings: dict[str, Any]) -> None:
    model, x = create(settings), images()
    last, features = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(last, features[-1])
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in model.feature_info]
    assert [16 // f.shape[2] for f in features] == [info["reduction"] for info in model.feature_info]
    only = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(only[0], features[0])
    assert len(model.forward_intermediates(x, indices=1)[1]) == 1
    for how in ("getter", "hook"):
        backbone = create(settings, features_only=True, feature_cls=how)
        found = backbone(x)
        assert backbone.feature_info.channels() == [f.shape[1] for f in found]
        assert len(found) == len(features)
        assert all(torch.equal(one, other) for one, other in zip(found, features, strict=True)), how


@torchscript
def test_some_features_alone() -> None:
    backbone = create(features_only=True, out_indices=(0, -2))
    features, script = backbone(images()), torch.jit.script(backbone)
    assert [f.shape[1] for f in features] == backbone.feature_info.channels() == [6, 8]
    torch.testing.assert_close(script(images()), features)
    with pytest.raises(HarnessError, match="getter and hook"):
        create(features_only=True, feature_cls="fx")
    with pytest.raises(HarnessError, match='no setting "widhts"'):
        create(features_only=True, widhts=[[3]])


@pytest.mark.parametrize("indices", [[0], [1], [2], [0, 1, 2], 2, None])
def test_a_pruned_network_has_no_unused_parameter(indices: Any) -> None:
    model = create(drop_rate=0.5).train()
    whole = model.forward_intermediates(images(), indices=indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices)
    features = model.forward_intermediates(images(), indices=taken, intermediates_only=True)
    assert [f.shape for f in features] == [f.shape for f in whole]
    sum(f.sum() for f in features).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.reset_classifier(5, "avg")
    assert model(images()).shape == (2, 5)
    assert model.forward_head(model.forward_features(images()), pre_logits=True).shape == (2, model.num_features)


def test_checkpointed_gradients_are_the_same() -> None:
    gradients = []
    for enable in (False, True):
        model = create().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_made_where_and_as_asked(name: str) -> None:
    model = timm.create_model(name, activation="prelu", device="meta", dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    for classes, pool, shape in ((0, None, (2, 64)), (0, "", (2, 64, 4, 6)), (3, "", (2, 3, 4, 6)), (4, "avg", (2, 4))):
        model.reset_classifier(classes, pool)
        assert model(torch.empty(2, 3, 16, 24, device="meta", dtype=torch.bfloat16)).shape == shape
        assert not any(module.training for module in model.modules())
        tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
        assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert next(timm.create_model(name).parameters()).is_meta


def test_pooling_and_dropout_of_the_head() -> None:
    unpooled, model, x = create(global_pool=""), create(), images()
    torch.testing.assert_close(unpooled(x).mean((2, 3)), model(x))
    unpooled.reset_classifier(3)
    assert unpooled(x).shape == (2, 3, 4, 6)
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    dropping = create(drop_rate=0.4)
    assert torch.equal(dropping(x), model(x))
    dropping.head.train()
    dropping.training = True
    torch.manual_seed(5)
    features = dropping.forward_head(dropping.forward_features(x), pre_logits=True)
    torch.manual_seed(5)
    torch.testing.assert_close(features, F.dropout(hidden, 0.4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "max"}, 'no global_pool "max"'),
        ({"drop_rate": 1.0}, "drop_rate: must be a share"),
        ({"drop_path_rate": 0.1}, 'no setting "drop_path_rate"'),
    ],
)
def test_what_the_family_has_not_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        create(**arguments)
    with pytest.raises(HarnessError, match="no global_pool"):
        create().reset_classifier(3, "max")
    with pytest.raises(TypeError, match='no setting "not_an_argument"'):  # as Python has it, which timm relies on
        create(not_an_argument=1)


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_for_rates_by_depth(coarse: bool) -> None:
    model = create(RELATIVES["concat, stem"])
    layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert layer["stem.conv.weight"] == 0
    assert layer["depthwise_branches.0.0.conv.depthwise.weight"] == 1
    assert layer["dilated_branches.0.1.conv.pointwise.bias"] == (1 if coarse else 2)
    assert layer["transitions.0.conv.weight"] == (1 if coarse else 2)
    assert layer["dilated_branches.1.0.conv.depthwise.weight"] == (2 if coarse else 3)
    assert layer["head.hidden.weight"] == layer["head.classifier.bias"] == max(layer.values())
    assert not model.no_weight_decay()


@pytest.fixture(scope="module")
def trained() -> Any:
    """A network whose weights and statistics nothing else has."""
    torch.manual_seed(9)
    model = timm.create_model("dual_branch", **SMALL, num_classes=6, img_size=(16, 24))
    model(images())
    return model.eval()


@pytest.fixture(scope="module")
def saved(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_for_hf(trained, str(folder), safe_serialization=True)
    return folder


def test_saved_weights_load_to_the_bit(trained: Any, saved: Path) -> None:
    weights = str(saved / "model.safetensors")
    overlay = {"file": weights, "num_classes": 6}
    loaded = (
        timm.create_model(f"local-dir:{saved}", pretrained=True),
        create(num_classes=6, checkpoint_path=weights),
        create(num_classes=6, pretrained=True, pretrained_cfg_overlay=overlay),
    )
    for model in loaded:
        assert torch.equal(model.eval()(images()), trained(images()))
    assert loaded[0].final_size == (4, 6)
    backbone = timm.create_model(f"local-dir:{saved}", pretrained=True, features_only=True).eval()
    assert torch.equal(backbone(images())[-1], trained.forward_features(images()))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_saved_weights_load_for_other_classes_and_channels(trained: Any, saved: Path, channels: int) -> None:
    model = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=4, in_chans=channels).eval()
    assert model(images(channels=channels)).shape == (2, 4)
    first = ("branches.0.0.conv", "head.classifier")
    before, after = trained.state_dict(), model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if not any(part in key for part in first))
    depthwise, pointwise = (f"dilated_branches.0.0.conv.{kind}.weight" for kind in ("depthwise", "pointwise"))
    if channels == 1:  # a grey image, as if it were given as three channels of a network with alike kernels
        torch.testing.assert_close(after[depthwise][0], before[depthwise].mean(0))
        torch.testing.assert_close(after[pointwise][:, 0], before[pointwise].sum(1))
    else:
        assert torch.equal(after[depthwise][channels - 1], before[depthwise][(channels - 1) % 3])
        torch.testing.assert_close(after[pointwise][:, 0], before[pointwise][:, 0] * 3 / channels)


def test_there_are_no_weights_to_load_unless_a_file_is_given() -> None:
    assert not timm.list_pretrained("dual_branch*")
    for name in NAMES:
        assert timm.is_model(name)
        assert resolve_data_config(model=timm.create_model(name))["mean"] == (0.4914, 0.4822, 0.4465)
        with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
            timm.create_model(name, pretrained=True)
