"""What a report says of predictions, against plain loops; Grad-CAM against a plain computation by autograd, on the
branches and on networks of timm."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from harness.errors import HarnessError
from harness.models.build import build_model
from harness.report.explain import (
    HEAT_SHARE,
    calibration,
    data_uri,
    grad_cam,
    layers_to_explain,
    most_confused,
    overlaid,
    reliability_diagram,
    resized,
    sureness,
    where_strongest,
)
from harness.training.inference import worst_mistakes

SMALL = {"widths": [[4, 8], [8, 6]], "transition_widths": [5], "head_width": 8}

# --- predictions


def naive_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Equation 3 of Guo et al. 2017, an image at a time, in float64."""
    members: list[list[int]] = [[] for _ in range(bins)]
    for i, row in enumerate(probabilities):
        confidence = float(max(row))
        for m in range(bins):
            if m / bins < confidence <= (m + 1) / bins or (m == bins - 1 and confidence > 1):
                members[m].append(i)
    total = 0.0
    for inside in filter(None, members):
        accuracy = sum(int(np.argmax(probabilities[i])) == labels[i] for i in inside) / len(inside)
        confidence = sum(float(max(probabilities[i])) for i in inside) / len(inside)
        total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


def test_calibration_by_hand() -> None:
    """Ten images at 90 % of which seven are right, ten at 60 % of which six are: (0.2 + 0) / 2."""
    rows = [[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10
    labels = [0] * 7 + [1] * 3 + [1] * 6 + [0] * 4
    found = calibration(np.array(rows), np.array(labels), bins=5)
    assert found.ece == pytest.approx(0.1)
    assert found.counts_M.tolist() == [0, 0, 10, 0, 10]
    assert math.isnan(found.confidence_M[0])
    edges = calibration(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([0, 0]), bins=4)
    assert edges.counts_M.tolist() == [0, 1, 0, 1]  # an edge belongs to the bin below


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(2, 12), st.integers(1, 20))
def test_calibration_is_that_of_a_plain_loop(seed: int, images: int, classes: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.3), images).astype(np.float32)
    labels = rng.integers(0, classes, images)
    found = calibration(probabilities, labels, bins=bins)
    assert found.ece == pytest.approx(naive_ece(probabilities, labels, bins), abs=1e-12)
    assert found.counts_M.sum() == images


def test_in_the_diagram_no_gap_lies_over_a_bar_and_each_colour_is_explained() -> None:
    sure, unsure = [0.9, 0.1], [0.6, 0.4]  # half of the former are right, all of the latter
    drawn = str(reliability_diagram(calibration(np.array([sure, sure, unsure, unsure]), np.array([0, 1, 0, 0]))))
    assert "Expected calibration error 40%" in drawn
    assert "nan" not in drawn
    pairs = re.findall(r'<rect class="bar"([^>]*)/><rect class="gap[^"]*"([^>]*)/>', drawn)
    assert len(pairs) == 2
    for bar, gap in pairs:
        place = [{n: float(v) for n, v in re.findall(r'(y|height)="([\d.]+)"', rect)} for rect in (bar, gap)]
        assert place[1]["y"] + place[1]["height"] == pytest.approx(place[0]["y"], abs=0.11)
    legend = drawn.split('class="legend"')[1]
    for kind in ("bar", "gap", "gap unsure"):
        assert drawn.count(f'<rect class="{kind}"') == (2 if kind == "bar" else 1)
        assert f'class="patch {kind}"' in legend


def test_words_and_the_commonest_and_worst_mistakes() -> None:
    assert [sureness(*pair) for pair in ((0.6, 0.5), (0.5, 0.6))] == ["too sure", "not sure enough"]
    assert sureness(0.99999, 1.0) == "as sure as it is right"
    matrix = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    assert most_confused(matrix, most=10) == [(1, 0, 5), (0, 1, 2)]
    assert most_confused(matrix, most=1) == [(1, 0, 5)]
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.9, 0.1]])
    assert worst_mistakes(probabilities, np.array([1, 1, 1, 1]), most=5).tolist() == [0, 3, 2]
    assert worst_mistakes(probabilities, np.array([1, 1, 1, 1]), most=1).tolist() == [0]
    assert worst_mistakes(probabilities, np.array([0, 1, 0, 0]), most=5).tolist() == []
    heat = np.zeros((8, 8))
    assert where_strongest(heat) == "nothing speaks for the class"
    heat[7, 0] = 1
    assert where_strongest(heat) == "strongest in the lower left"
    assert where_strongest(np.ones((1, 1))) == "strongest in the centre"


# --- Grad-CAM


def network(merge: str = "sum") -> nn.Module:
    torch.manual_seed(0)
    model = build_model("dual_branch", num_classes=4, image_size_px=16, args={**SMALL, "merge": merge}).eval()
    for module in model.modules():  # statistics as after a training, so that the layer is no identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def by_hand(features: torch.Tensor, logit: torch.Tensor) -> np.ndarray:
    """Equations 1 and 2 of Selvaraju et al. 2017 for one image, a channel at a time."""
    (gradient,) = torch.autograd.grad(logit, features, retain_graph=True)
    heat = sum(gradient[0, c].mean() * features[0, c].detach() for c in range(features.shape[1])).clamp_min(0)
    return (heat / heat.max().clamp_min(1e-30)).numpy()


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
            np.testing.assert_allclose(found[name][i], by_hand(features, logit), atol=1e-5)


def test_it_explains_both_branches_of_the_last_block_and_leaves_the_network_as_it_was() -> None:
    model, images = network(), torch.randn(2, 3, 16, 16)
    layers = layers_to_explain(model, images)
    assert layers == {"depthwise branch": "depthwise_branches.1", "dilated branch": "dilated_branches.1"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # as callers may have it
        logits = model(images)
        grad_cam(model, layers, images, torch.tensor([0, 1]))
        assert torch.equal(model(images), logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_of_other_networks_it_takes_the_last_feature_map() -> None:
    model = build_model("resnet10t", num_classes=3, image_size_px=64, args={}).eval()
    images = torch.randn(1, 3, 64, 64)
    ((name, path),) = layers_to_explain(model, images).items()
    assert (name, path.split(".")[0]) == ("last feature map", "layer4")
    found = grad_cam(model, {name: path}, images, torch.tensor([2]))[name]
    features = model.forward_features(images).detach().requires_grad_()
    np.testing.assert_allclose(found[0], by_hand(features, model.forward_head(features)[0, 2]), atol=1e-5)


def test_a_network_on_tokens_has_none() -> None:
    model = build_model("vit_tiny_patch16_224", num_classes=3, image_size_px=32, args={"depth": 2}).eval()
    with pytest.raises(HarnessError, match="no features of channels, height and width near its end"):
        layers_to_explain(model, torch.randn(1, 3, 32, 32))


def test_pictures() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decoded(data_uri(image)), image)  # small ones to the bit
    assert decoded(data_uri(rng.integers(0, 256, (600, 300, 3), dtype=np.uint8))).shape == (128, 64, 3)
    assert resized(image, 96)[::3, ::3].tolist() == image.tolist()
    assert resized(np.zeros((4, 4), np.float32), 96).shape == (96, 96)
    lightness = overlaid(np.zeros((1, 50, 3), np.uint8), np.linspace(0, 1, 50)[None])[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()  # more is lighter, also in greyscale
    difference = overlaid(image, np.zeros((32, 32))) - (1 - HEAT_SHARE) * image
    assert np.abs(difference - HEAT_SHARE * np.array([13, 8, 135])).max() <= 0.5 + 1e-9


def decoded(uri: str) -> np.ndarray:
    kind, data = uri.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
