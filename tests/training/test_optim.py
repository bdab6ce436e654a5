"""Optimizers, schedules and mixing: settings arrive, and the learning rate is a function of the step alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.errors import HarnessError
from harness.training.optim import Mix, build_optimizer, build_schedule

SGD = {
    "name": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.0,
    "decay_norm_and_bias": False,
    "args": {},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def optimizer(**changes: object) -> torch.optim.Optimizer:
    return build_optimizer(network(), **{**SGD, **changes})  # type: ignore[arg-type]


def test_sgd_is_torchs_sgd_of_the_seed() -> None:
    """The same weights, to the bit, as torch.optim.SGD with the seed's settings."""
    ours, theirs = network(), network()
    a = build_optimizer(ours, **{**SGD, "lr": 0.008, "momentum": 0.95})  # type: ignore[arg-type]
    b = torch.optim.SGD(theirs.parameters(), lr=0.008, momentum=0.95)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    for _ in range(5):
        for model, optim in ((ours, a), (theirs, b)):
            F.cross_entropy(model(images), labels).backward()
            optim.step()
            optim.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_nesterov_is_a_setting() -> None:
    assert [g["nesterov"] for g in optimizer().param_groups] == [False]
    assert [g["nesterov"] for g in optimizer(nesterov=True).param_groups] == [True]


def test_weight_decay_spares_norm_and_bias_unless_told() -> None:
    def decayed(optim: torch.optim.Optimizer) -> int:
        return sum(p.numel() for g in optim.param_groups if g["weight_decay"] > 0 for p in g["params"])

    assert decayed(optimizer(weight_decay=0.1)) == 8 * 27 + 4 * 8 * 36
    assert decayed(optimizer(weight_decay=0.1, decay_norm_and_bias=True)) == sum(
        p.numel() for p in network().parameters()
    )


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "lion", "rmsprop", "nadamw"])
def test_timms_optimizers_reduce_a_loss(name: str) -> None:
    model = network()
    optim = build_optimizer(model, **{**SGD, "name": name, "lr": 0.01})  # type: ignore[arg-type]
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        loss.backward()
        optim.step()
        optim.zero_grad()
    assert losses[-1] < losses[0] * 0.8


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "adamv"}, 'Did you mean "adam'),
        ({"name": "adamw", "nesterov": True}, 'Try "nadamw"'),
        ({"args": {"dampning": 0.1}}, 'Did you mean "dampening"?'),
        ({"name": "adamw", "args": {"betas": (2.0, 0.9)}}, "cannot be built"),
    ],
)
def test_wrong_settings_are_explained(changes: dict[str, object], text: str) -> None:
    with pytest.raises(HarnessError) as caught:
        optimizer(**changes)
    assert text in str(caught.value)


def lr_trace(name: str, steps: list[int] | None = None, **changes: object) -> list[float]:
    settings: dict[str, object] = {
        "total_steps": 100,
        "steps_per_epoch": 10,
        "warmup_steps": 0,
        "warmup_lr": 0.0,
        "min_lr": 0.0,
        "decay_rate": 0.1,
        "decay_epochs": 3.0,
        "milestones_epochs": (2, 5),
    }
    schedule = build_schedule(optimizer(), name=name, **{**settings, **changes})  # type: ignore[arg-type]
    return [schedule.apply(step) for step in steps or range(100)]


def test_constant_and_warmup() -> None:
    assert lr_trace("constant") == [0.1] * 100
    trace = lr_trace("constant", warmup_steps=10)
    assert trace[:10] == pytest.approx([0.01 * i for i in range(10)])
    assert trace[10:] == pytest.approx([0.1] * 90)


def test_cosine_is_the_formula() -> None:
    """Loshchilov and Hutter 2017 (https://arxiv.org/abs/1608.03983), one cycle."""
    expected = [0.01 + 0.5 * 0.09 * (1 + math.cos(math.pi * t / 100)) for t in range(100)]
    assert lr_trace("cosine", min_lr=0.01) == pytest.approx(expected)


def test_steps_fall_at_the_milestones() -> None:
    trace = lr_trace("multistep")
    assert (trace[19], trace[20], trace[49], trace[50]) == pytest.approx((0.1, 0.01, 0.01, 0.001))
    trace = lr_trace("step")
    assert (trace[29], trace[30], trace[60]) == pytest.approx((0.1, 0.01, 0.001))


@pytest.mark.parametrize("name", ["constant", "cosine", "multistep", "poly", "step", "tanh", "wsd"])
def test_the_rate_depends_on_the_step_alone(name: str) -> None:
    in_order = lr_trace(name, warmup_steps=7)
    steps = list(range(100))
    random.Random(0).shuffle(steps)
    assert lr_trace(name, steps, warmup_steps=7) == [in_order[s] for s in steps]


def mix(**changes: float) -> Mix:
    settings = {
        "mixup_alpha": 0.0,
        "cutmix_alpha": 0.0,
        "probability": 1.0,
        "switch_probability": 0.5,
        "label_smoothing": 0.1,
        "num_classes": 4,
    }
    return Mix(**{**settings, **changes})  # type: ignore[arg-type]


def test_without_mixing_the_loss_is_torchs() -> None:
    images, labels, logits = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,)), torch.randn(6, 4)
    same, target = mix()(images, labels)
    assert same is images
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    assert torch.equal(mix().loss_sum(logits, target), expected)


def test_mixup_mixes_images_and_labels_alike() -> None:
    np.random.seed(3)
    labels = torch.tensor([0, 1, 2, 3])
    images = F.one_hot(labels, 4).float()[:, :, None, None].repeat(1, 1, 8, 8)  # a pixel says the label
    mixed, target = mix(mixup_alpha=1.0, label_smoothing=0.0)(images, labels)
    torch.testing.assert_close(mixed[:, :, 0, 0], target)
    assert 0.05 < target[0].max() < 0.999


def test_cutmix_labels_are_the_share_of_the_area() -> None:
    np.random.seed(5)
    labels = torch.tensor([0, 1, 2, 3])
    images = F.one_hot(labels, 4).float()[:, :, None, None].repeat(1, 1, 16, 16)
    mixed, target = mix(cutmix_alpha=1.0, label_smoothing=0.0)(images, labels)
    torch.testing.assert_close(mixed.mean((2, 3)), target)


def test_an_odd_last_batch_stays_unmixed_but_smoothed() -> None:
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    same, target = mix(mixup_alpha=1.0)(images.clone(), labels)
    assert torch.equal(same, images)
    torch.testing.assert_close(target[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))
