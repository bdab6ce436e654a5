"""One optimizer step weighs every image alike, whatever the accumulation; evaluation leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import runtime as runtime_module
from harness.data.loaders import Batch
from harness.errors import Diverged
from harness.training.evaluate import eval_mode, recalibrate_batch_norm
from harness.training.optim import Mix, Schedule
from harness.training.state import Meter, Progress, Score
from harness.training.step import TrainingStep


@pytest.fixture
def runtime() -> Iterator[runtime_module.Runtime]:
    with runtime_module.joined(precision="no", seed=0) as joined:
        yield joined


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return Batch(images, torch.randint(0, 3, (count,), generator=generator), np.arange(count))


def training_step(
    runtime: runtime_module.Runtime, model: nn.Module, *, lr: float = 0.5, clip: float | None = None
) -> TrainingStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    prepared, prepared_optimizer = runtime.accelerator.prepare(model, optimizer)
    mix = Mix(mixup_alpha=0, cutmix_alpha=0, probability=1, switch_probability=0.5, label_smoothing=0.1, num_classes=3)
    return TrainingStep(
        runtime,
        model=prepared,
        bare_model=model,
        optimizer=prepared_optimizer,
        schedule=Schedule(None, optimizer),
        mix=mix,
        ema=None,
        seed=0,
        memory_format="contiguous",
        clip_grad_norm=clip,
        fp16=False,
    )


def perform(step: TrainingStep, batches: list[Batch], number: int = 0, *, check: bool = True) -> Score:
    meter = Meter(torch.device("cpu"))
    count = sum(len(b.labels_B) for b in batches)
    step(
        iter(batches),
        refetch=lambda: iter(batches),
        micro_batches=len(batches),
        step=number,
        global_count=count,
        meter=meter,
        check=check,
    )
    return meter.read()


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 4, 3), (1,) * 12])
def test_accumulation_is_one_large_batch(runtime: runtime_module.Runtime, sizes: tuple[int, ...]) -> None:
    whole = batch(12)
    reference = network()
    loss = F.cross_entropy(reference(whole.images_BCHW), whole.labels_B, label_smoothing=0.1)
    loss.backward()
    model = network()
    pieces = [
        Batch(images.clone(), labels, np.arange(len(labels)))
        for images, labels in zip(whole.images_BCHW.split(sizes), whole.labels_B.split(sizes), strict=True)
    ]
    score = perform(training_step(runtime, model), pieces)
    assert score.loss == pytest.approx(loss.item(), rel=1e-6)
    assert score.total == 12
    for new, old in zip(model.parameters(), reference.parameters(), strict=True):
        assert old.grad is not None
        torch.testing.assert_close(new.detach(), (old - 0.5 * old.grad).detach(), rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_update(runtime: runtime_module.Runtime) -> None:
    model = network()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    step = training_step(runtime, model, lr=1.0, clip=0.01)
    perform(step, [batch(8)])
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert step.grad_norm_value() is not None
    assert step.grad_norm_value() > 0.01  # type: ignore[operator]


class NoGradient(nn.Module):
    """Passes its input on and returns a gradient that is not a number: a broken kernel, planted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            x.register_hook(lambda g: g * float("nan"))
        return x * 1.0


@pytest.mark.parametrize("check", [True, False], ids=["a log step", "between log steps"])
def test_a_gradient_that_is_no_number_names_its_layer_and_changes_nothing(
    runtime: runtime_module.Runtime, check: bool
) -> None:
    model = network()
    model.insert(1, NoGradient())  # type: ignore[operator]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(Diverged) as caught:
        perform(training_step(runtime, model), [batch(4), batch(4, 1)], number=41, check=check)
    assert 'step 42: the gradient of layer "0" is not finite' in str(caught.value)
    assert caught.value.exit_code == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_log_step_changes_no_bit(runtime: runtime_module.Runtime) -> None:
    models = network(), network()
    for model, check in zip(models, (True, False), strict=True):
        step = training_step(runtime, model)
        for number in range(3):
            perform(step, [batch(8, number)], number, check=check)
        assert (step.grad_norm_value() is not None) == check
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_an_image_that_is_no_number_names_the_first_layer(runtime: runtime_module.Runtime) -> None:
    bad = batch(4)
    bad.images_BCHW[2, 0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match='the output of layer "0" is not finite'):
        perform(training_step(runtime, network()), [batch(4), bad])


def test_eval_mode_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    model[1].eval()
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


def test_recalibrated_statistics_are_those_without_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    images = torch.randn(40, 3, 8, 8) * 2 + 1
    batches = [Batch(i, torch.zeros(10), np.arange(10)) for i in images.split(10)]
    recalibrate_batch_norm(model, batches, autocast=torch.no_grad, memory_format="contiguous")
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    expected = torch.stack([b.images_BCHW.var((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(model[1].running_var, expected, rtol=1e-3, atol=1e-3)
    assert model[1].momentum == 0.1
    assert model.training


def test_progress_survives_json_and_knows_the_best() -> None:
    progress = Progress()
    progress.add(Score(3.0, 2, 4), 1.5, 0.25)
    for step, correct in ((1, 5), (2, 7), (3, 7), (4, 6)):
        progress.take_evaluation({"step": step, "test": {"correct": correct}}, judged_by="test")
    assert progress.best is not None
    assert progress.best["step"] == 2
    assert Progress.from_json(progress.to_json()) == progress
