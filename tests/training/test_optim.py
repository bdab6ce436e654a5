"""Optimizers, schedules and mixing: settings arrive, and the learning rate is a function of the step alone."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

from harness.errors import HarnessError
from harness.training import checkpoint, optimizer_state
from harness.training.optim import Mix, build_optimizer, build_schedule
from tests.training.states import whole_state

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


def continued(name: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """The network trained in one go, and the one that went on from a checkpoint after two steps."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 4))
        settings = {**SGD, "name": name, "lr": 0.01, "nesterov": bool(nesterov_default(name)), "weight_decay": 0.01}
        return model, build_optimizer(model, **settings)  # type: ignore[arg-type]

    def train(model: nn.Module, optim: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
            F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
            optim.step()
            optim.zero_grad()

    torch.manual_seed(0)
    model, optim = start()
    other, other_optim = start()
    train(model, optim, range(2))
    weights, state = model.state_dict(), optim.state_dict()
    taken = checkpoint.snapshot(2, model=weights, ema=None, optimizer=state, state=whole_state())
    saved = checkpoint.load(checkpoint.write(folder, taken))
    checkpoint.load_weights(other, saved.model, saved.path)
    optimizer_state.load(other_optim, saved.optimizer, saved.state["optimizer"], saved.path)
    train(model, optim, range(2, 5))
    train(other, other_optim, range(2, 5))
    return model, other


@pytest.mark.parametrize("saved_how", [{"foreach": None}, {"foreach": None, "fused": True}, {"foreach": False}])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_how_a_step_is_computed_is_no_setting_of_a_checkpoint(
    name: str, saved_how: dict[str, bool | None], tmp_path: Path
) -> None:
    """A run goes on from a checkpoint of another device, or of a version that took tensors one by one."""
    saving, going_on = optimizer(name=name), optimizer(name=name)
    tensors, rest = optimizer_state.split(saving.state_dict())
    for group in rest["groups"]:
        group.update(saved_how)
    optimizer_state.load(going_on, tensors, rest, tmp_path)
    assert [group["foreach"] for group in going_on.param_groups] == [True] * len(going_on.param_groups)
    assert not any(group["fused"] for group in going_on.param_groups)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_tensors_at_once_keep_every_bit_of_the_loop_over_them(name: str) -> None:
    at_once, loop = network(), network()
    a = build_optimizer(at_once, **{**SGD, "name": name})  # type: ignore[arg-type]
    b = build_optimizer(loop, **{**SGD, "name": name, "args": {"foreach": False}})  # type: ignore[arg-type]
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    for _ in range(5):
        for model, optim in ((at_once, a), (loop, b)):
            F.cross_entropy(model(images), labels).backward()
            optim.step()
            optim.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(at_once.parameters(), loop.parameters(), strict=True))


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_goes_on_from_a_checkpoint_or_is_refused_at_once(name: str, tmp_path: Path) -> None:
    if not is_installed(name) or name == "adahessian" or name.startswith("kron") or "adafactorbv" in name:
        with pytest.raises(HarnessError, match=rf"(?s)optimizer.name: {name} cannot be (built|used): .+HINT: Try"):
            optimizer(name=name, nesterov=bool(nesterov_default(name)))
        return
    one_go, resumed = continued(name, tmp_path)
    for (key, a), b in zip(one_go.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


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
        ({"name": "rmsprop", "nesterov": True}, "Set optimizer.nesterov=false"),
        ({"args": {"dampning": 0.1}}, 'Did you mean "dampening"?'),
        ({"args": {"lr": 3}}, "optimizer.args.lr: lr must not be set in optimizer.args: optimizer.lr decides it"),
        ({"args": {"momentum": 0.5}}, "HINT: Set optimizer.momentum."),
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


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("wsd", {"decay_epochs": 30.0}, "30 epochs (schedule.decay_epochs) is 300 steps"),
        ("cosine", {"min_lr": -1.0}, "cosine cannot be built: AssertionError"),
        (
            "constant",
            {"total_steps": 10, "warmup_steps": 500},
            "warm-up of 500 steps is longer than the training of 10",
        ),
    ],
)
def test_impossible_schedules_are_explained(name: str, changes: dict[str, object], text: str) -> None:
    with pytest.raises(HarnessError) as caught:
        lr_trace(name, **changes)  # type: ignore[arg-type]
    assert text in str(caught.value)
    assert "HINT:" in str(caught.value)


@pytest.mark.parametrize("name", ["constant", "cosine", "multistep", "poly", "step", "tanh", "wsd"])
def test_a_training_of_no_or_few_steps_has_a_schedule(name: str) -> None:
    assert lr_trace(name, [0], total_steps=0, warmup_steps=5) == [0.1]
    assert len(lr_trace(name, [0, 1], total_steps=2, warmup_steps=1, decay_epochs=0.1)) == 2


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


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_even_batches_are_mixed_as_by_timm(alphas: tuple[float, float]) -> None:
    timms = Mixup(*alphas, prob=0.8, label_smoothing=0.1, num_classes=4)
    ours = mix(mixup_alpha=alphas[0], cutmix_alpha=alphas[1], probability=0.8)
    for seed in range(12):
        images, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
        np.random.seed(seed)
        expected = timms(images.clone(), labels)
        np.random.seed(seed)
        found = ours(images.clone(), labels)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_odd_batches_are_mixed_and_their_labels_agree(alphas: tuple[float, float]) -> None:
    np.random.seed(5)
    labels = torch.tensor([0, 1, 2, 3, 1])
    images = F.one_hot(labels, 4).float()[:, :, None, None].repeat(1, 1, 16, 16)  # a pixel says the label
    mixed, target = mix(mixup_alpha=alphas[0], cutmix_alpha=alphas[1], label_smoothing=0.0)(images, labels)
    torch.testing.assert_close(mixed.mean((2, 3)), target)
    assert 0.05 < target[0].max() < 0.999
    torch.testing.assert_close(target[2], torch.tensor([0.0, 0.0, 1.0, 0.0]))  # the middle one meets itself


def test_mixed_labels_of_an_odd_batch_are_smoothed() -> None:
    _, target = mix(mixup_alpha=1.0, probability=0.0)(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(target[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))
