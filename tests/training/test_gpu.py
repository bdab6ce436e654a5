"""Training on a GPU, through the parts that users run: it never waits between log steps, learns, and resumes."""

from __future__ import annotations

import json
import math
import statistics
from itertools import chain
from pathlib import Path

import pytest
import torch

from harness.distributed.runtime import distributed_context
from harness.recipe import load
from harness.training.build import TrainingComponents
from harness.training.state import Meter, Startup
from tests.training.conftest import Train, metrics, result

pytestmark = pytest.mark.gpu

EVERYTHING = (
    "mix.mixup_alpha=0.2",
    "mix.cutmix_alpha=1.0",
    "ema.decay=0.9",
    "training.clip_grad_norm=1.0",
    "training.label_smoothing=0.1",
    "data.cutout_size_px=4",
    "data.flip=alternating",
    "schedule.name=cosine",
)
STEPS_PER_EPOCH = 7  # 100 images in batches of 16


def an_epoch(components: TrainingComponents, meter: Meter, epoch: int, *, check: bool = False) -> None:
    """The steps of an epoch as `harness.training.loop` performs them; `check` makes each a log step."""
    micro_batches = components.plan.micro_batches(epoch)
    batches = components.train_loader.batches(list(chain.from_iterable(micro_batches)), epoch=epoch)
    for number, ids_per_micro in enumerate(micro_batches):
        components.step(
            batches,
            refetch=lambda: iter(()),
            micro_batches=len(ids_per_micro),
            step=epoch * components.plan.steps_per_epoch + number,
            global_count=components.plan.global_count(number),
            meter=meter,
            check=check,
        )


# Not fp16: its scaler asks the device after every step whether a gradient overflowed.
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("overrides", [(), EVERYTHING], ids=["plain", "everything"])
def test_no_step_between_log_steps_waits_for_the_gpu(
    precision: str, overrides: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    recipe = load(tiny, [f"training.precision={precision}", *overrides])
    with distributed_context(precision=precision, seed=0) as runtime:
        components = TrainingComponents(recipe, runtime, tmp_path / "checkpoints", Startup())
        try:
            components.step.model.train()
            meter = Meter(runtime.device)
            an_epoch(components, meter, 0)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            an_epoch(components, meter, 1)
            with pytest.raises(RuntimeError, match="synchroniz"):  # a log step does, or nothing was tested
                an_epoch(components, meter, 2, check=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            components.close()
        assert meter.take().total >= 200


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_learns(precision: str, train: Train) -> None:
    run = train("run", f"training.precision={precision}", "training.epochs=8")
    losses = [record["loss"] for record in metrics(run)]
    assert len(losses) == 8 * STEPS_PER_EPOCH
    assert all(map(math.isfinite, losses))
    assert statistics.mean(losses[-STEPS_PER_EPOCH:]) < 0.9 * statistics.mean(losses[:STEPS_PER_EPOCH])
    assert json.loads((run / "provenance.json").read_text())["starts"][0]["gpus"]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_goes_on_where_it_stood(precision: str, train: Train) -> None:
    """Close rather than equal: some of cuDNN's weight gradients add up in an order that changes."""
    how = f"training.precision={precision}"
    whole = train("whole", how, "training.epochs=3")
    train("run", how, "training.epochs=1")
    run = train("run", how, "training.epochs=3", resume="auto")
    starts = json.loads((run / "provenance.json").read_text())["starts"]
    assert [start["from_step"] for start in starts] == [0, STEPS_PER_EPOCH]
    assert [record["step"] for record in metrics(run)] == list(range(1, 3 * STEPS_PER_EPOCH + 1))
    losses, others = ([record["loss"] for record in metrics(each)] for each in (run, whole))
    assert losses == pytest.approx(others, rel=0.02)
    assert result(run)["step"] == result(whole)["step"] == 3 * STEPS_PER_EPOCH
