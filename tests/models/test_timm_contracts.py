"""What timm's users may count on in a registered model, for both names and a relative."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureInfo, group_parameters, load_checkpoint, save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet

NAMES = ("dual_branch", "dual_branch_seed")
RELATIVE = {"widths": [[6], [5, 8]], "transition_widths": [7], "head_width": 9, "stem": 4, "merge": "concat"}
MODELS = {name: (name, {}) for name in NAMES} | {"relative": ("dual_branch", RELATIVE)}
SCRIPTING = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> DualBranchNet:
    name, settings = MODELS[request.param]
    torch.manual_seed(0)
    return timm.create_model(name, **settings).eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_images_of_any_size(model: DualBranchNet) -> None:
    """A linear head after an average commutes with it."""
    for size in ((24, 40), (35, 33), (96, 96)):
        features = model.forward_features(images(*size))
        logits = model.head[2](model.head[1](features)).mean((2, 3))
        torch.testing.assert_close(model(images(*size)), logits, rtol=1e-4, atol=1e-5)


@SCRIPTING
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # of torch.fx's own class
@torch.no_grad()
def test_traced_and_scripted_it_takes_any_size_too(model: DualBranchNet) -> None:
    traced = torch.fx.symbolic_trace(model)
    for other in (traced, torch.jit.script(model), torch.jit.script(traced)):
        for size in ((32, 32), (40, 24)):
            torch.testing.assert_close(other(images(*size)), model(images(*size)))


def test_the_configuration_describes_the_network(model: DualBranchNet) -> None:
    config = model.default_cfg
    features = model.forward_features(images())
    assert features.shape == (2, model.num_features, *config["pool_size"])
    assert config["input_size"] == (3, 32, 32)
    first = [config["first_conv"]] if isinstance(config["first_conv"], str) else config["first_conv"]
    assert all(model.get_submodule(layer).in_channels == 3 for layer in first)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert timm.data.resolve_data_config(model=model)["mean"] == config["mean"]
    assert set(timm.list_models("dual_branch*")) == set(NAMES)
    assert timm.list_pretrained("dual_branch*") == []


@torch.no_grad()
def test_the_head_by_parts(model: DualBranchNet) -> None:
    features = model.forward_features(images())
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(images()))
    model.reset_classifier(7)
    assert model(images()).shape == (2, model.num_classes) == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(images()), hidden)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images()).mean((2, 3)), hidden, rtol=1e-4, atol=1e-5)
    unpooled = timm.create_model("dual_branch", num_classes=0, global_pool="", **model.args.model_dump()).eval()
    assert unpooled(images()).shape == model(images()).shape


@torch.no_grad()
def test_poolings() -> None:
    model = timm.create_model("dual_branch_seed", global_pool="max").eval()
    features = model.forward_features(images())
    hidden = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(hidden, model.head[1](features.amax((2, 3), keepdim=True)).flatten(1))
    model.reset_classifier(5)
    assert torch.equal(model.forward_head(features, pre_logits=True), hidden)
    assert model(images()).shape == (2, 5)
    model.reset_classifier(5, "avg")
    assert not torch.allclose(model.forward_head(features, pre_logits=True), hidden)
    for refused in (lambda: model.reset_classifier(5, "catavgmax"), lambda: DualBranchNet(global_pool="catavgmax")):
        with pytest.raises(HarnessError, match='no global_pool "catavgmax"') as caught:
            refused()
        assert isinstance(caught.value, AssertionError)  # as in timm's heads that cannot


def test_dropout_before_the_classifier() -> None:
    model = timm.create_model("dual_branch", dropout=0.0, norm="none", drop_rate=0.5)
    features = model.forward_features(images())
    dropped = model.forward_head(features, pre_logits=True) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert not (model.eval().forward_head(features, pre_logits=True) == 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_a_type_error_with_a_hint(name: str) -> None:
    with pytest.raises(TypeError, match=r'no setting "drop_out"\n  HINT: Did you mean "dropout"'):
        timm.create_model(name, drop_out=0.1, nonsense=1)


@pytest.mark.parametrize("settings", [{}, RELATIVE | {"activation": "prelu", "norm": "layer"}])
def test_device_and_dtype_reach_every_tensor(settings: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    model = timm.create_model("dual_branch", device="meta", dtype=torch.float64, **settings)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was made to be thrown away
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    assert model(torch.empty(2, 3, 32, 32, dtype=torch.float64, device="meta")).shape == (2, 10)
    model.eval().requires_grad_(False)
    model.reset_classifier(0, "")
    assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(2, "avg")
    assert model.get_classifier().weight.is_meta
    assert model.get_classifier().weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())


@torch.no_grad()
def test_features_of_each_block(model: DualBranchNet) -> None:
    x = images(40, 24)
    last, taken = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(last, taken[-1])
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [f.shape[1] for f in taken] == info.channels()
    assert [tuple(f.shape[2:]) for f in taken] == [(40 // r, 24 // r) for r in info.reduction()]
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, taken[0])


@SCRIPTING
@pytest.mark.parametrize("how", [None, "getter", "hook", "fx"])
@pytest.mark.parametrize("model_name", NAMES)
def test_features_only(model_name: str, how: str | None) -> None:
    chosen = {} if how is None else {"feature_cls": how, "out_indices": (0, 2)}
    torch.manual_seed(0)
    features = timm.create_model(model_name, features_only=True, **chosen).eval()
    torch.manual_seed(0)
    _, taken = timm.create_model(model_name).eval().forward_intermediates(images())
    if chosen:
        del taken[1]
    assert [f.shape[1] for f in taken] == features.feature_info.channels()
    for extract in (features,) if how == "hook" else (features, torch.jit.script(features)):  # hooks are not scripted
        assert all(torch.equal(got, f) for got, f in zip(extract(images()), taken, strict=True))


@pytest.mark.parametrize("block", [0, 1])
def test_pruned_networks_end_at_their_last_block(model: DualBranchNet, block: int) -> None:
    taken = model.forward_intermediates(images(), intermediates_only=True)[block]
    logits = model(images())
    whole = copy.deepcopy(model)
    assert whole.prune_intermediate_layers([-1], prune_head=False) == [len(model.merges) - 1]
    assert torch.equal(whole(images()), logits)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([block]) == [block]
    assert torch.equal(pruned.forward_features(images()), taken)
    pruned.train().forward_features(images()).sum().backward()
    assert not [name for name, p in pruned.named_parameters() if p.grad is None]
    pruned.eval().reset_classifier(7, "avg")
    assert pruned(images()).shape == (2, 7)
    assert pruned.head_hidden_size == pruned.num_features == taken.shape[1]


def step(network: nn.Module) -> tuple[int, tuple[Tensor, ...]]:
    """How many tensors a forward pass keeps, and the gradients."""
    kept: list[Tensor] = []
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = network(images())
    loss = sum(output.square().mean() for output in outputs)
    return len(kept), torch.autograd.grad(loss, [*network.parameters()])


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_gradients_are_the_same(name: str, features_only: bool) -> None:
    network = timm.create_model(name, features_only=features_only)
    kept, gradients = step(network)
    network.set_grad_checkpointing()
    kept_by_checkpoints, checkpointed = step(network)
    assert kept_by_checkpoints < kept
    assert all(torch.equal(one, other) for one, other in zip(gradients, checkpointed, strict=True))


def test_parameters_are_grouped_by_depth(model: DualBranchNet) -> None:
    for coarse in (False, True):
        depth = group_parameters(model, model.group_matcher(coarse), reverse=True)
        of = {name.rsplit(".", 1)[0]: at for name, at in depth.items()}
        assert of["depthwise_branches.1.0.conv.depthwise"] == of["dilated_branches.1.0.conv.pointwise"]
        assert of["depthwise_branches.0.0.conv.depthwise"] <= of["transitions.0.conv"] < of["dilated_branches.1.0.norm"]
        assert of["head.hidden"] == of["head.classifier"] == max(depth.values())
        assert len(set(depth.values())) == (
            1 + (model.args.stem is not None) + (len(model.merges) if coarse else sum(map(len, model.args.widths)))
        )
    assert model.no_weight_decay() == set()
    rates = {group["lr_scale"] for group in create_optimizer_v2(model, "sgd", lr=1, layer_decay=0.5).param_groups}
    assert len(rates) == len(set(group_parameters(model, model.group_matcher(), reverse=True).values()))


@pytest.fixture
def saved(model: DualBranchNet, tmp_path: Path) -> Path:
    model.train()(images())  # running statistics of their own
    save_for_hf(model.eval(), str(tmp_path), safe_serialization=True)
    return tmp_path


@torch.no_grad()
def test_saved_weights_come_back_to_the_bit(model: DualBranchNet, saved: Path) -> None:
    name, weights = model.default_cfg["architecture"], str(saved / "model.safetensors")
    settings = model.args.model_dump()
    for loaded in (
        timm.create_model(f"local-dir:{saved}", pretrained=True),
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights}, **settings),
        timm.create_model(name, checkpoint_path=weights, **settings),
    ):
        assert torch.equal(loaded.eval()(images()), model(images()))
    unloaded = timm.create_model(f"local-dir:{saved}")
    assert not torch.equal(unloaded.eval()(images()), model(images()))
    load_checkpoint(unloaded, weights)
    assert torch.equal(unloaded(images()), model(images()))
    features = timm.create_model(f"local-dir:{saved}", pretrained=True, features_only=True).eval()
    assert torch.equal(features(images())[-1], model.forward_features(images()))


@torch.no_grad()
def test_saved_weights_fit_other_classes_and_channels(model: DualBranchNet, saved: Path) -> None:
    other = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=4).eval()
    assert other(images()).shape == (2, 4)
    assert torch.equal(other.forward_features(images()), model.forward_features(images()))
    six = timm.create_model(f"local-dir:{saved}", pretrained=True, in_chans=6).eval()
    torch.testing.assert_close(six(images().repeat(1, 2, 1, 1)), model(images()))
    grey = timm.create_model(f"local-dir:{saved}", pretrained=True, in_chans=1).eval()
    for parameter, source in zip(grey.parameters(), model.parameters(), strict=True):
        assert parameter.shape != source.shape or torch.equal(parameter, source)
    if model.args.stem is not None:  # one convolution, which sees three equal channels as one
        torch.testing.assert_close(grey(images()[:, :1]), model(images()[:, :1].expand(-1, 3, -1, -1)))
    assert grey(images()[:, :1]).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_nowhere(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("dual_branch", **RELATIVE), str(tmp_path), safe_serialization=True)
    weights = {"file": str(tmp_path / "model.safetensors")}
    with pytest.raises(RuntimeError, match="depthwise_branches"):
        timm.create_model("dual_branch_seed", pretrained=True, pretrained_cfg_overlay=weights)
