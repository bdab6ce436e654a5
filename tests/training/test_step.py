"""One optimizer step weighs every image alike, evaluation leaves no trace, and all ranks stop at the same step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from harness import signals
from harness.data.loaders import Batch
from harness.distributed.runtime import Runtime, distributed_context
from harness.errors import Diverged
from harness.training.evaluate import Evaluator
from harness.training.optim import Mix
from harness.training.state import Meter, Progress, Score
from harness.training.step import GPU_LAG_STEPS, StopVote, TrainingStep


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with distributed_context(precision="no", seed=0) as found:
        yield found


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return Batch(images, torch.randint(0, 3, (count,), generator=generator), np.arange(count))


def training_step(runtime: Runtime, model: nn.Module, *, lr: float = 0.5, clip: float | None = None) -> TrainingStep:
    raw_optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    prepared, optimizer = runtime.accelerator.prepare(model, raw_optimizer)
    mix = Mix(mixup_alpha=0, cutmix_alpha=0, probability=1, switch_probability=0.5, label_smoothing=0.1, num_classes=3)
    return TrainingStep(
        runtime,
        model=prepared,
        unwrapped_model=model,
        optimizer=optimizer,
        raw_optimizer=raw_optimizer,
        schedule=lambda step: lr,
        mix=mix,
        ema=None,
        seed=0,
        memory_format=torch.contiguous_format,
        clip_grad_norm=clip,
        fp16=False,
    )


def perform(step: TrainingStep, batches: list[Batch], number: int = 0, *, check: bool = True) -> Score:
    meter = Meter(torch.device("cpu"))
    step(
        iter(batches),
        refetch=lambda: iter(batches),
        micro_batches=len(batches),
        step=number,
        global_count=sum(len(b.labels_B) for b in batches),
        meter=meter,
        check=check,
    )
    return meter.take()


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3), (1,) * 12])
def test_accumulation_is_one_large_batch(runtime: Runtime, sizes: tuple[int, ...]) -> None:
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
    assert (score.loss, score.total) == (pytest.approx(loss.item(), rel=1e-6), 12)
    for new, old in zip(model.parameters(), reference.parameters(), strict=True):
        assert old.grad is not None
        torch.testing.assert_close(new.detach(), (old - 0.5 * old.grad).detach(), rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_update(runtime: Runtime) -> None:
    model = network()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    step = training_step(runtime, model, lr=1.0, clip=0.01)
    perform(step, [batch(8)])
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert (step.norms()["grad_norm"] or 0) > 0.01


class NoGradient(nn.Module):
    """Passes its input on and returns a gradient that is not a number: a broken kernel, planted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            x.register_hook(lambda g: g * float("nan"))
        return x * 1.0


@pytest.mark.parametrize("check", [True, False], ids=["a log step", "between log steps"])
def test_a_gradient_that_is_no_number_names_its_layer_and_changes_nothing(runtime: Runtime, check: bool) -> None:
    model = network()
    model.insert(1, NoGradient())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(Diverged, match='step 42: the gradient of layer "0" is not finite') as caught:
        perform(training_step(runtime, model), [batch(4), batch(4, 1)], number=41, check=check)
    assert caught.value.exit_code == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_image_that_is_no_number_names_the_first_layer(runtime: Runtime) -> None:
    bad = batch(4)
    bad.images_BCHW[2, 0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match='the output of layer "0" is not finite'):
        perform(training_step(runtime, network()), [batch(4), bad])


def test_a_log_step_changes_no_bit(runtime: Runtime) -> None:
    models = network(), network()
    for model, check in zip(models, (True, False), strict=True):
        step = training_step(runtime, model)
        for number in range(3):
            perform(step, [batch(8, number)], number, check=check)
        assert (step.norms()["grad_norm"] is not None) == check
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_recalibrated_statistics_are_those_without_dropout(runtime: Runtime) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    images = torch.randn(40, 3, 8, 8) * 2 + 1
    batches = [Batch(i, torch.zeros(10), np.arange(10)) for i in images.split(10)]
    loader: Any = None
    Evaluator(runtime, loader, (), 0, torch.contiguous_format).recalibrate_batch_norm(model, batches)
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    expected = torch.stack([b.images_BCHW.var((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(model[1].running_var, expected, rtol=1e-3, atol=1e-3)
    assert model[1].momentum == 0.1
    assert model.training


def test_progress_knows_the_first_of_the_best() -> None:
    progress = Progress()
    for step, correct in ((1, 5), (2, 7), (3, 7), (4, 6)):
        evaluation: Any = {"step": step, "test": {"correct": correct}}
        progress.take_evaluation(evaluation, judged_by="test")
    assert progress.best is not None
    assert progress.best["step"] == 2


@dataclass
class OneOfTwo:
    """A rank; the other one is left out, so the group below has one member and no answer but its own."""

    device: torch.device
    world_size: int = 2


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[None]:
    dist.init_process_group(request.param, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def vote(device: str, world_size: int = 2) -> StopVote:
    return StopVote(OneOfTwo(torch.device(device), world_size))  # type: ignore[arg-type]


def test_a_single_rank_asks_nobody() -> None:
    alone = vote("cpu", world_size=1)
    with signals.noticed():
        assert not alone.agreed()
        signal.raise_signal(signal.SIGUSR1)
        assert alone.agreed()


@pytest.mark.parametrize("group", ["gloo"], indirect=True)
@pytest.mark.usefixtures("group")
def test_on_a_cpu_the_answer_comes_at_once() -> None:
    ranks = vote("cpu")
    with signals.noticed():
        assert not any(ranks.agreed() for _ in range(20))
        signal.raise_signal(signal.SIGTERM)
        assert ranks.agreed()


@pytest.mark.gpu
@pytest.mark.parametrize("group", ["nccl"], indirect=True)
@pytest.mark.usefixtures("group")
def test_on_a_gpu_the_answer_comes_later_and_nothing_waits_for_queued_work() -> None:
    ranks = vote("cuda")
    with signals.noticed():
        assert not any(ranks.agreed() for _ in range(20))
        torch.cuda.synchronize()
        signal.raise_signal(signal.SIGTERM)
        torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds of queued work
        begin = time.perf_counter()
        assert not any(ranks.agreed() for _ in range(GPU_LAG_STEPS))
        assert time.perf_counter() - begin < 0.5
        assert ranks.agreed()
