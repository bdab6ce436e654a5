"""Grad-CAM against a plain computation by autograd, on the branches and on networks of timm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness.errors import HarnessError
from harness.models.build import build_model
from harness.report.explain import HEAT_SHARE, data_uri, grad_cam, layers_to_explain, overlaid, resized, where_strongest

SMALL = {"widths": [[4, 8], [8, 6]], "transition_widths": [5], "head_width": 8}


def network(merge: str = "sum") -> nn.Module:
    torch.manual_seed(0)
    model = build_model("dual_branch", num_classes=4, image_size_px=16, args={**SMALL, "merge": merge}).eval()
    for module in model.modules():  # statistics as after a training, so that the layer is no identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("block", [0, 1])  # behind the last one only a mean follows, and its gradient is flat
@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_both_branches_against_the_network_written_out(merge: str, block: int) -> None:
    model = network(merge)
    images, classes = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 1])
    layers = {name: f"{name}_branches.{block}" for name in ("depthwise", "dilated")}
    found = grad_cam(model, layers, images, classes)
    for i in range(3):  # an image at a time: none may influence another
        x, kept = images[i : i + 1], {}
        blocks = zip(model.depthwise_branches, model.dilated_branches, model.transitions, strict=True)
        for number, (depthwise, dilated, transition) in enumerate(blocks):
            one, other = depthwise(x), dilated(x)
            if number == block:
                kept = {"depthwise": one, "dilated": other}
            x = transition(one + other if merge == "sum" else torch.cat((one, other), 1))
        logit = model.forward_head(x)[0, classes[i]]
        for name, features in kept.items():
            (gradient,) = torch.autograd.grad(logit, features, retain_graph=True)
            expected = torch.zeros(features.shape[2:])
            for c in range(features.shape[1]):
                expected += gradient[0, c].mean() * features[0, c].detach()
            expected = expected.clamp_min(0)
            if expected.max() > 0:
                expected /= expected.max()
            np.testing.assert_allclose(found[name][i], expected.numpy(), atol=1e-5)


def test_it_looks_at_both_branches_of_the_last_block() -> None:
    assert layers_to_explain(network(), torch.zeros(1, 3, 16, 16)) == {
        "depthwise branch": "depthwise_branches.1",
        "dilated branch": "dilated_branches.1",
    }


def test_it_leaves_the_network_as_it_was() -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # as callers may have it
        logits = model(images)
        grad_cam(model, layers_to_explain(model, images), images, torch.tensor([0, 1]))
        assert torch.equal(model(images), logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_of_other_networks_it_takes_the_last_feature_map() -> None:
    model = build_model("resnet10t", num_classes=3, image_size_px=64, args={}).eval()
    images = torch.randn(1, 3, 64, 64)
    layers = layers_to_explain(model, images)
    assert list(layers) == ["last feature map"]
    assert layers["last feature map"].startswith("layer4")
    found = grad_cam(model, layers, images, torch.tensor([2]))["last feature map"]
    features = model.forward_features(images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(features)[0, 2], features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).clamp_min(0)[0].detach()
    np.testing.assert_allclose(found[0], (expected / expected.max().clamp_min(1e-30)).numpy(), atol=1e-5)


def test_a_network_on_tokens_has_none() -> None:
    model = build_model("vit_tiny_patch16_224", num_classes=3, image_size_px=32, args={"depth": 2}).eval()
    with pytest.raises(HarnessError, match="no features of channels, height and width near its end"):
        layers_to_explain(model, torch.randn(1, 3, 32, 32))


def test_where_it_is_strongest_is_said_in_words() -> None:
    heat = np.zeros((8, 8))
    assert where_strongest(heat) == "nothing speaks for the class"
    heat[7, 0] = 1
    assert where_strongest(heat) == "strongest in the lower left"
    assert where_strongest(np.ones((1, 1))) == "strongest in the centre"


def test_pictures() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decoded(data_uri(image)), image)  # small ones to the bit
    large = decoded(data_uri(rng.integers(0, 256, (600, 300, 3), dtype=np.uint8)))
    assert large.shape == (128, 64, 3)
    assert resized(image, 96)[::3, ::3].tolist() == image.tolist()
    assert resized(np.zeros((4, 4), np.float32), 96).shape == (96, 96)
    black = np.zeros((1, 50, 3), np.uint8)
    lightness = overlaid(black, np.linspace(0, 1, 50)[None]).astype(float)[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()  # more is lighter, also in greyscale
    difference = overlaid(image, np.zeros((32, 32))) - (1 - HEAT_SHARE) * image
    assert np.abs(difference - HEAT_SHARE * np.array([13, 8, 135])).max() <= 0.5 + 1e-9


def decoded(uri: str) -> np.ndarray:
    import base64
    import io

    from PIL import Image

    kind, data = uri.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
