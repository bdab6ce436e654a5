"""The peer airbench94: each part of the published method, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.data.prepare import prepare
from scripts.benchmarks.airbench import (
    AirbenchNet,
    Lookahead,
    Settings,
    Training,
    TrainingImages,
    evaluate,
    lr_share,
    normalised,
    whitening_filters,
)

SCALE: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def pixels_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)


def images_of(count: int) -> TrainingImages:
    return TrainingImages(pixels_of(count), np.arange(count), settings=Settings(), **SCALE)


def training_of(count: int, **settings: Any) -> Training:
    images = TrainingImages(pixels_of(count), np.arange(count) % 2, settings=Settings(), **SCALE)
    return Training(images, torch.randn(8, 3, 32, 32), settings=Settings(batch_size=2, widths=(24, 24, 24), **settings))


def second_moments(filters: Tensor, images_BCHW: Tensor) -> Tensor:
    """Of the filters' outputs on all patches."""
    outputs = nn.functional.conv2d(images_BCHW, filters).transpose(0, 1).flatten(1)
    return outputs @ outputs.T / outputs.shape[1]


def test_the_network_is_the_published_one() -> None:
    net = AirbenchNet()
    assert sum(p.numel() for p in net.parameters()) == 1_972_792
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert len(frozen) == 7  # the whitening filters and the scales of six normalisations
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, round(norm.momentum or 0, 6)) for norm in norms} == {(1e-12, 0.4)}
    assert all((norm.weight == 1).all() for norm in norms)
    x = torch.randn(1, 24, 8, 8)
    assert torch.equal(net.blocks[0][0](x)[:, :24], x)  # convolutions hand their channels on at first
    assert net.blocks[0](x).shape == (1, 64, 4, 4)


def test_whitening_whitens_and_does_not_blow_up_what_hardly_occurs() -> None:
    mixed = torch.randn(3, 3, dtype=torch.float64) @ torch.randn(50, 3, 16 * 16, dtype=torch.float64)
    images = mixed.reshape(50, 3, 16, 16) + 0.3  # correlated channels, no zero mean
    filters = whitening_filters(images, eps=0.0)
    assert filters.shape == (24, 3, 2, 2)
    assert torch.allclose(second_moments(filters[:12], images), torch.eye(12, dtype=torch.float64), atol=1e-8)
    assert torch.equal(filters[12:], -filters[:12])
    images = torch.randn(50, 3, 16, 16, dtype=torch.float64)
    images[:, 2] = images[:, 1]  # a direction that never occurs
    moments = second_moments(whitening_filters(images)[:12], images).diag()
    assert moments[:8].min() > 0.99
    assert moments[8:].max() < 1e-8


def test_the_schedule_is_a_triangle() -> None:
    shares = [lr_share(step, 384, Settings()) for step in range(385)]
    peak = int(0.23 * 384)
    assert [shares[0], shares[peak], shares[-1]] == pytest.approx([0.2, 1.0, 0.07])
    assert np.allclose(np.diff(shares[: peak + 1]), 0.8 / peak)
    assert np.allclose(np.diff(shares[peak:]), -0.93 / (384 - peak))


def test_lookahead_sets_the_network_back_to_its_average() -> None:
    net = nn.BatchNorm1d(1)
    lookahead, mean = Lookahead(net), net.running_mean
    assert mean is not None
    with torch.no_grad():
        net.weight.fill_(2.0)
        mean.fill_(4.0)
    lookahead.update(decay=0.75)
    assert (net.weight.item(), mean.item()) == pytest.approx((0.75 * 1 + 0.25 * 2, 0.25 * 4))
    with torch.no_grad():
        net.weight.fill_(9.0)
    lookahead.update(decay=1.0)
    assert net.weight.item() == pytest.approx(1.25)


def test_images_are_crops_of_themselves_with_mirrored_borders_flipped_in_turn() -> None:
    images, orders = images_of(12), []
    padded = np.pad(pixels_of(12), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    views = {
        padded[label, y : y + 32, x : x + 32][:, ::step].tobytes(): (label, y, x, step == -1)
        for label in range(12) for y in range(5) for x in range(5) for step in (1, -1)
    }  # fmt: skip
    seen, coins = set(), dict[int, set[bool]]()
    for epoch in range(20):
        batches = list(images.batches(epoch, batch_size=5))
        orders.append(torch.cat([labels_B for _, labels_B in batches]).tolist())
        for images_BCHW, labels_B in batches:
            assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
            pixels = ((images_BCHW * 0.25 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            for label, image in zip(labels_B.tolist(), pixels, strict=True):
                found, y, x, flipped = views[image.tobytes()]
                assert found == label
                seen.add((y, x))
                coins.setdefault(label, set()).add(flipped != bool(epoch % 2))
    assert len(seen) == 25
    assert all(len(each) == 1 for each in coins.values())  # its coin, the other way round in every second epoch
    assert set().union(*coins.values()) == {False, True}
    assert {len(set(order)) for order in orders} == {10}  # what is left of an epoch is dropped
    assert len(set(map(tuple, orders))) == 20


class _Constant(nn.Module):
    """Answers by the pixels at one place, as no trained network is needed to tell views apart."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.stack([x_BCHW[:, 0, 0, 0], x_BCHW[:, 1, 5, 5]], dim=1)


def test_evaluation_counts_raw_answers_and_those_of_all_views() -> None:
    images = normalised(torch.from_numpy(pixels_of(200)), **SCALE)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    net, labels = _Constant(), torch.zeros(200, dtype=torch.int64)

    def mirrored(x: Tensor) -> Tensor:
        return (net(x) + net(x.flip(3))) / 2

    shifts = (mirrored(padded[:, :, :32, :32]) + mirrored(padded[:, :, 2:, 2:])) / 2
    wanted = {"raw": net(images), "tta": mirrored(images) / 2 + shifts / 2}
    correct = evaluate(net, images, labels)
    assert correct == {kind: int((logits.argmax(1) == labels).sum()) for kind, logits in wanted.items()}
    assert correct["raw"] != correct["tta"]


def test_the_optimizer_has_the_published_rates() -> None:
    training = training_of(8, epochs=2.5)
    biases, others = training.optimizer.param_groups
    unit = 1024 * (1 + 1 / 0.15)
    assert (len(biases["params"]), len(others["params"])) == (6, 8)  # six convolutions, the classifier, whiten.bias
    assert (biases["initial_lr"], others["initial_lr"]) == pytest.approx((64 * 11.5 / unit, 11.5 / unit))
    for group in (biases, others):
        assert group["initial_lr"] * group["weight_decay"] == pytest.approx(0.0153 * 2 / unit)
        assert (group["momentum"], group["nesterov"]) == (0.85, True)
    assert training.total_steps == 10
    assert [training.epoch() for _ in range(4)] == [8, 8, 4, 0]  # images: the last epoch is half of one


def test_the_whitening_bias_is_trained_in_the_first_epochs_alone() -> None:
    training = training_of(4, epochs=5, lr_end=1.0, lookahead_steps=1000)
    bias, filters, moved = training.net.whiten.bias, training.net.whiten.weight.clone(), []
    assert bias is not None
    for _ in range(4):  # Lookahead comes at the end of epoch 5
        before = bias.clone()
        training.epoch()
        moved.append(not torch.equal(before, bias))
    assert moved == [True, True, True, False]
    assert torch.equal(filters, training.net.whiten.weight)


def test_a_short_training_learns_the_digits() -> None:
    store = prepare("digits", image_size_px=32)
    train, test = store.split("train"), store.split("test")
    scale = {"mean": store.manifest.mean, "std": store.manifest.std}
    settings = Settings(epochs=3, batch_size=32, widths=(24, 32, 32))
    images = TrainingImages(train.images_BHWC, train.labels_B, settings=settings, **scale)
    few = normalised(torch.from_numpy(train.images_BHWC[:500].copy()), **scale)
    training = Training(images, few, settings=settings)
    for _ in range(3):
        training.epoch()
    labels = torch.from_numpy(test.labels_B.copy())
    correct = evaluate(training.net, normalised(torch.from_numpy(test.images_BHWC.copy()), **scale), labels)
    assert min(correct["raw"], correct["tta"]) > 0.65 * len(labels)
