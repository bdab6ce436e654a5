"""Optimizers, schedules and mixing: settings arrive, and the learning rate is a function of the step alone."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

from harness.errors import HarnessError
from harness.training.optim import Mix, build_optimizer, build_schedule, load_state, split_state

SGD = {
    "name": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.0,
    "decay_norm_and_bias": False,
    "args": {},
}
SCHEDULES = ["constant", "cosine", "multistep", "poly", "step", "tanh", "wsd"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 4))


def optimizer(model: nn.Module | None = None, **changes: object) -> torch.optim.Optimizer:
    return build_optimizer(model or network(), **{**SGD, **changes})  # type: ignore[arg-type]


def take_steps(model: nn.Module, optim: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3]))
        losses.append(loss.item())
        loss.backward()
        optim.step()
        optim.zero_grad()
    return losses


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_sgd_is_torchs_sgd_of_the_seed() -> None:
    """The same weights, to the bit, as torch.optim.SGD with the seed's settings."""
    ours, theirs = network(), network()
    take_steps(ours, optimizer(ours, lr=0.008, momentum=0.95), range(5))
    take_steps(theirs, torch.optim.SGD(theirs.parameters(), lr=0.008, momentum=0.95), range(5))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_tensors_at_once_keep_every_bit_of_the_loop_over_them(name: str) -> None:
    at_once, loop = network(), network()
    take_steps(at_once, optimizer(at_once, name=name), range(5))
    take_steps(loop, optimizer(loop, name=name, args={"foreach": False}), range(5))
    assert_equal(at_once, loop)


def nesterov_default(name: str) -> bool | None:
    return (get_optimizer_info(name).defaults or {}).get("nesterov")


def is_installed(name: str) -> bool:
    """apex and bitsandbytes are not; timm names their classes by a text."""
    return not isinstance(get_optimizer_info(name).opt_class, str)


@pytest.mark.parametrize("name", [n for n in list_optimizers() if nesterov_default(n) is not None and is_installed(n)])
def test_the_setting_decides_on_nesterov_wherever_the_registry_does(name: str) -> None:
    assert {g["nesterov"] for g in optimizer(name=name, nesterov=True).param_groups} == {True}
    if name.startswith("n"):
        with pytest.raises(HarnessError, match=r"(?s)means Nesterov.*optimizer\.nesterov=true"):
            optimizer(name=name)
    else:
        assert {g["nesterov"] for g in optimizer(name=name).param_groups} == {False}


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_resumes_from_its_saved_state_or_is_refused_at_once(name: str) -> None:
    settings: dict[str, Any] = {
        "name": name,
        "lr": 0.01,
        "nesterov": bool(nesterov_default(name)),
        "weight_decay": 0.01,
    }
    if not is_installed(name) or name == "adahessian" or name.startswith("kron") or "adafactorbv" in name:
        with pytest.raises(HarnessError, match=rf"(?s)optimizer.name: {name} cannot be (built|used): .+HINT: Try"):
            optimizer(**settings)
        return
    one_go, resumed = network(), network()
    optim, other = optimizer(one_go, **settings), optimizer(resumed, **settings)
    take_steps(one_go, optim, range(2))
    resumed.load_state_dict(one_go.state_dict())
    tensors, rest = split_state(optim.state_dict())
    load_state(other, {key: value.clone() for key, value in tensors.items()}, rest, Path("step_2"))
    take_steps(one_go, optim, range(2, 5))
    take_steps(resumed, other, range(2, 5))
    assert_equal(one_go, resumed)


@pytest.mark.parametrize("saved_how", [{"foreach": None}, {"foreach": None, "fused": True}, {"foreach": False}])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_how_a_step_is_computed_is_no_setting_of_a_checkpoint(name: str, saved_how: dict[str, bool | None]) -> None:
    """A run resumes from a checkpoint of another device, or of a version that took tensors one by one."""
    resuming = optimizer(name=name)
    tensors, rest = split_state(optimizer(name=name).state_dict())
    for group in rest["groups"]:
        group.update(saved_how)
    load_state(resuming, tensors, rest, Path("step_2"))
    assert [group["foreach"] for group in resuming.param_groups] == [True] * len(resuming.param_groups)
    assert not any(group["fused"] for group in resuming.param_groups)


def test_the_state_of_another_optimizer_is_explained() -> None:
    tensors, rest = split_state(optimizer(name="adamw").state_dict())
    with pytest.raises(HarnessError, match="step_2: the checkpoint's optimizer is another one"):
        load_state(optimizer(), tensors, rest, Path("step_2"))


def test_weight_decay_spares_norm_and_bias_unless_asked() -> None:
    def decayed(optim: torch.optim.Optimizer) -> int:
        return sum(p.numel() for g in optim.param_groups if g["weight_decay"] > 0 for p in g["params"])

    assert decayed(optimizer(weight_decay=0.1)) == 4 * 27 + 4 * 64
    everything = sum(p.numel() for p in network().parameters())
    assert decayed(optimizer(weight_decay=0.1, decay_norm_and_bias=True)) == everything


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "adamv"}, 'Did you mean "adam'),
        ({"name": "adamw", "nesterov": True}, 'Try "nadamw"'),
        ({"name": "rmsprop", "nesterov": True}, "Set optimizer.nesterov=false"),
        ({"args": {"dampning": 0.1}}, 'Did you mean "dampening"?'),
        ({"args": {"lr": 3}}, "optimizer.args.lr: lr must not be set in optimizer.args: optimizer.lr decides it"),
        ({"args": {"nesterov": True}}, "HINT: Set optimizer.nesterov."),
        ({"name": "adamw", "args": {"weight_decay": 0.1}}, "HINT: Set optimizer.weight_decay."),
        ({"args": {"zzz": 1}}, "Valid names: dampening, differentiable, foreach, fused, maximize."),
        ({"name": "adamw", "args": {"betas": (2.0, 0.9)}}, "cannot be built"),
        ({"name": "adamw", "args": {"betas": [0.9]}}, "cannot be built"),
        ({"args": {"layer_decay": 0.5}}, 'sgd has no argument "layer_decay"'),
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
    return [schedule(step) for step in steps or range(100)]


def test_schedules_are_their_formulas() -> None:
    """Cosine: Loshchilov and Hutter 2017 (https://arxiv.org/abs/1608.03983), one cycle."""
    assert lr_trace("constant") == [0.1] * 100
    warmed = lr_trace("constant", warmup_steps=10)
    assert warmed == pytest.approx([0.01 * i for i in range(10)] + [0.1] * 90)
    cosine = [0.01 + 0.5 * 0.09 * (1 + math.cos(math.pi * t / 100)) for t in range(100)]
    assert lr_trace("cosine", min_lr=0.01) == pytest.approx(cosine)
    assert lr_trace("multistep", [19, 20, 49, 50]) == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert lr_trace("step", [29, 30, 60]) == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_depends_on_the_step_alone(name: str) -> None:
    in_order = lr_trace(name, warmup_steps=7)
    steps = list(range(100))
    random.Random(0).shuffle(steps)
    assert lr_trace(name, steps, warmup_steps=7) == [in_order[s] for s in steps]


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("wsd", {"decay_epochs": 30.0}, "30 epochs (schedule.decay_epochs) is 300 steps"),
        ("cosine", {"min_lr": -1.0}, "cosine cannot be built: AssertionError"),
        ("constant", {"warmup_steps": 500}, "warm-up of 500 steps is longer than the training of 100"),
    ],
)
def test_impossible_schedules_are_explained(name: str, changes: dict[str, object], text: str) -> None:
    with pytest.raises(HarnessError) as caught:
        lr_trace(name, **changes)  # type: ignore[arg-type]
    assert text in str(caught.value)
    assert "HINT:" in str(caught.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_training_of_no_or_few_steps_has_a_schedule(name: str) -> None:
    assert lr_trace(name, [0], total_steps=0, warmup_steps=5) == [0.1]
    assert len(lr_trace(name, [0, 1], total_steps=2, warmup_steps=1, decay_epochs=0.1)) == 2


def mix(mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, **changes: float) -> Mix:
    settings = {"probability": 1.0, "switch_probability": 0.5, "label_smoothing": 0.0, "num_classes": 4}
    return Mix(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, **{**settings, **changes})  # type: ignore[arg-type]


def test_without_mixing_the_loss_is_torchs() -> None:
    images, labels, logits = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,)), torch.randn(6, 4)
    plain = mix(label_smoothing=0.1)
    same, target = plain(images, labels)
    assert same is images
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    assert torch.equal(plain.loss_sum(logits, target), expected)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2, 3, 1]], ids=["even", "odd"])
@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_images_and_labels_are_mixed_alike(alphas: tuple[float, float], labels: list[int]) -> None:
    """By the share of each image, or of its area."""
    np.random.seed(5)
    labels_B = torch.tensor(labels)
    images = F.one_hot(labels_B, 4).float()[:, :, None, None].repeat(1, 1, 16, 16)  # a pixel says the label
    mixed, target = mix(*alphas)(images, labels_B)
    torch.testing.assert_close(mixed.mean((2, 3)), target)
    assert 0.05 < target[0].max() < 0.999
    if len(labels) == 5:
        torch.testing.assert_close(target[2], torch.tensor([0.0, 0.0, 1.0, 0.0]))  # the middle one meets itself


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_even_batches_are_mixed_as_by_timm(alphas: tuple[float, float]) -> None:
    timms = Mixup(*alphas, prob=0.8, label_smoothing=0.1, num_classes=4)
    ours = mix(*alphas, probability=0.8, label_smoothing=0.1)
    for seed in range(12):
        images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
        np.random.seed(seed)
        expected = timms(images.clone(), labels)
        np.random.seed(seed)
        found = ours(images.clone(), labels)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mixed_labels_of_an_odd_batch_are_smoothed() -> None:
    odd = mix(1.0, probability=0.0, label_smoothing=0.1)
    _, target = odd(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(target[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))
