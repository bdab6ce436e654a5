"""Numbers that are not finite: named with step and layer, and nothing of them in a checkpoint."""

from __future__ import annotations

import re
import time

from tests.faults.check import restarted, said_well
from tests.faults.fault import Outcome, fault
from tests.faults.runs import STEPS, Stage

DIVERGED = 3


def _named(stage: Stage, text: str, code: int, step: int | None) -> list[str]:
    """What is missing in the report of a divergence."""
    wrong = said_well(text)
    found = re.search(r"diverged at step (\d+): .* layer \"", text)
    if code != DIVERGED:
        wrong.append(f"exit code {code}")
    if found is None or (step is not None and int(found[1]) != step):
        wrong.append(f"step {step} and a layer are not named: {text[-400:]}")
    if (stage.run / "result.json").exists():
        wrong.append("there is a result.json")
    return wrong


@fault(
    "nan-in-a-batch",
    "NaN in a batch",
    "in the process itself, one pixel from a random training batch on: code 3 with step and layer; the restart, "
    "without the NaN, ends as undisturbed",
    trials=8,
)
def nan_in_a_batch(stage: Stage, index: int) -> Outcome:
    reference = stage.reference()
    step = stage.rng.randrange(1, STEPS + 1)
    batch = 2 * (step - 1) + stage.rng.randrange(1, 3)  # two micro-batches a step
    # BatchNorm's re-estimation before an evaluation is a training pass as well: off here, so that batches are steps.
    overrides = ("evaluation.recalibrate_batch_norm_batches=0",)
    reference = stage.reference(*overrides)
    process = stage.train(*overrides, faults=[{"kind": "batch", "batch": batch, "value": "nan"}])
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = _named(stage, process.text(), code, step)
    again = stage.train(*overrides)
    outcome = restarted(stage, again, reference, lost_from=step - 1, detect=detect, note=f"batch {batch}, step {step}")
    return Outcome(False, note=f"{outcome.note} {wrong}") if wrong else outcome


@fault(
    "huge-learning-rate",
    "Learning rate so large that the training diverges",
    "optimizer.lr from 1e15 to 1e35 without normalisation and clipping: code 3 with step and layer, no result",
    trials=8,
)
def huge_learning_rate(stage: Stage, index: int) -> Outcome:
    lr = f"optimizer.lr=1.0e+{stage.rng.randrange(15, 36)}"
    overrides = (lr, "model.args.norm=none", "training.clip_grad_norm=null", "schedule.warmup_steps=0")
    overrides += ("optimizer.weight_decay=0",)  # with such a rate any other is refused
    process = stage.train(*overrides)
    code = process.wait()
    wrong = _named(stage, process.text(), code, None)
    return Outcome(not wrong, 0, time.monotonic() - process.started_at, None, "; ".join([lr, *wrong]))


@fault(
    "overflow",
    "fp16-style overflow",
    "as far as a CPU can: fp16 itself is refused with code 2 there (every fourth trial); in bf16, pixels times 3e38 "
    "from a random batch on give infinities: code 3 with step and layer, and the restart without them ends as "
    "undisturbed. Loss scaling in fp16 needs a GPU and is not tried here",
    trials=12,
    short=2,
)
def overflow(stage: Stage, index: int) -> Outcome:
    if index % 4 == 1:
        process = stage.train("training.precision=fp16")
        code = process.wait()
        wrong = said_well(process.text())
        wrong += [f"exit code {code}"] if code != 2 or stage.run.exists() else []
        return Outcome(not wrong, 0, time.monotonic() - process.started_at, None, "; ".join(wrong))
    overrides = ("training.precision=bf16", "evaluation.recalibrate_batch_norm_batches=0")
    reference = stage.reference(*overrides)
    step = stage.rng.randrange(1, STEPS + 1)
    process = stage.train(*overrides, faults=[{"kind": "batch", "batch": 2 * step, "value": 3e38}])
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = _named(stage, process.text(), code, step)
    again = stage.train(*overrides)
    outcome = restarted(stage, again, reference, lost_from=step - 1, detect=detect, note=f"step {step}")
    return Outcome(False, note=f"{outcome.note} {wrong}") if wrong else outcome
