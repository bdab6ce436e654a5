"""Training steps of one network on the same random batch, plain PyTorch's and ours in each precision: images a second.

Ours is the epoch of `harness train` with its logging, signals and checks, and a loader that gives the batch.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.bench import Contestant, Round, rates, run_contest
from harness.data.loaders import Batch
from harness.distributed.runtime import distributed_context
from harness.machine import seconds_of, usable_cores
from harness.models.build import build_model
from harness.recipe import Recipe, load
from harness.training.build import TrainingComponents
from harness.training.loop import Cadence, run_epoch
from harness.training.state import Progress, Startup

PYTORCH, HARNESS = "harness.bench.step:pytorch", "harness.bench.step:harness"
LR, MOMENTUM, CLASSES = 0.008, 0.95, 10
WARMUP_STEPS = 2
GPU_STEPS = 20  # of a round
SEED: dict[str, Any] = {"model": "dual_branch_seed", "args": {}, "size_px": 32}


@dataclass(frozen=True)
class Task:
    """What all contestants train."""

    model: str
    args: dict[str, Any]  # of the network's constructor
    size_px: int  # height and width of the images
    batch_size: int  # images a step, on each rank
    steps: int  # of a round
    channels_last: bool = False
    bf16: bool = False  # autocast
    compiled: bool = False  # by torch.compile
    device: str = "cpu"

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        net = build_model(self.model, num_classes=CLASSES, image_size_px=self.size_px, args=self.args)
        return net.to(self.device).to(memory_format=self._layout)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random images (batch_size, 3, size_px, size_px) float32 and labels int64, always the same."""
        generator = torch.Generator().manual_seed(0)
        images_BCHW = torch.randn(self.batch_size, 3, self.size_px, self.size_px, generator=generator)
        labels_B = torch.randint(CLASSES, (self.batch_size,), generator=generator)
        return images_BCHW.to(self.device, memory_format=self._layout), labels_B.to(self.device)

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def round_of(self, step: Callable[[], object]) -> Round:
        """Warm up, then time `steps` steps a round."""

        def work(steps: int) -> float:
            return seconds_of(lambda: [step() for _ in range(steps)], device=self.device)

        work(WARMUP_STEPS)
        return lambda: (work(self.steps), self.steps * self.batch_size)

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def pytorch(**settings: Any) -> Round:
    """A loop as short as it can be."""
    task = Task(**settings)
    net = task.network()
    return plain_loop(task, torch.compile(net) if task.compiled else net)  # type: ignore[arg-type]


def plain_loop(task: Task, net: nn.Module) -> Round:
    criterion, (images_BCHW, labels_B), optimizer = nn.CrossEntropyLoss(), task.batch(), sgd(net)

    def step() -> None:
        optimizer.zero_grad()
        with task.autocast():
            loss = criterion(net(images_BCHW), labels_B)
        loss.backward()
        optimizer.step()

    return task.round_of(step)


def harness(*, recipe: str, overrides: Sequence[str] = (), **settings: Any) -> Round:
    """An epoch of `harness train` of a recipe: `steps` steps with what the loop does around them."""
    task = Task(**settings)
    global_batch_size = task.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    images = task.steps * global_batch_size
    data = f"{{train_images: {images}, test_images: {CLASSES}, num_classes: {CLASSES}}}"
    own = [
        f"data.synthetic={data}",
        "data.source=synthetic",
        f"data.image_size_px={task.size_px}",
        "data.loader=device",
    ]
    own += [f"training.global_batch_size={global_batch_size}", f"optimizer.lr={LR}", f"optimizer.momentum={MOMENTUM}"]
    loaded, batch = load(recipe, [*own, *overrides]), Batch(*task.batch(), np.arange(task.batch_size))
    loader: Any = SimpleNamespace(
        batches=lambda ids_per_batch, epoch: (batch for _ in ids_per_batch), close=lambda: None
    )
    components = built(loaded)
    components.train_loader.close()
    components.train_loader = loader
    cadence, progress = epochs_alone(loaded), Progress()

    def one_round() -> tuple[float, int]:
        return seconds_of(lambda: run_epoch(components, cadence, progress), device=task.device), images

    one_round()
    return one_round


def built(recipe: Recipe) -> TrainingComponents:
    """All components of a recipe's training, as `harness train` builds them; they stay open until the process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-bench-")))
    runtime = stack.enter_context(distributed_context(precision=recipe.training.precision, seed=recipe.seed))
    components = TrainingComponents(recipe, runtime, directory, Startup())
    stack.callback(components.close)
    return components


def epochs_alone(recipe: Recipe) -> Cadence:
    """A cadence by which `run_epoch` trains and logs, and neither evaluates nor saves."""
    never = 1 << 60
    return Cadence(never, recipe.tracking.log_every_steps, never, checkpoint_steps=())


def bench_step(*, rounds: int, batch_size: int = 128, peers: Mapping[str, Contestant] = {}) -> dict[str, Any]:
    """The seed's network: a plain PyTorch loop against `harness train` of the seed's recipe, in each precision.

    `harness_bf16_plain` is `harness_bf16` without our kernels. Where torch's own bf16 kernels are wrong on this
    processor (`harness doctor --numerics`), PyTorch's bf16 figures are of wrong gradients; ours are checked. `peers`
    train in bf16 and channels_last. Returns and raises as `rates` and `run_contest`.
    """
    on_gpu, threads = torch.cuda.is_available(), usable_cores()
    device, last = "cuda" if on_gpu else "cpu", {"channels_last": True}

    def contestant(each: Contestant, steps: int, **how: Any) -> Contestant:
        task = {**SEED, "batch_size": batch_size, "device": device, "steps": GPU_STEPS if on_gpu else steps, **how}
        return replace(each, arguments=task)

    def ours(steps: int, *overrides: str) -> Contestant:
        return contestant(Contestant(HARNESS), steps, recipe="seed", overrides=overrides, **last)

    plain, fast, bf16 = Contestant(PYTORCH), {"bf16": True, **last}, "training.precision=bf16"
    contestants = {
        "pytorch_fp32": contestant(plain, 1),
        "pytorch_fp32_channels_last": contestant(plain, 1, **last),
        **{name: contestant(each, 3, **fast) for name, each in {"pytorch_bf16_channels_last": plain, **peers}.items()},
        "harness_fp32": ours(3),
        "harness_bf16": ours(8, bf16),
        "harness_bf16_plain": ours(3, bf16, "training.kernels=plain"),
    }
    times = run_contest(contestants, rounds=rounds, threads=threads)
    settings = {"rounds": rounds, "batch_size": batch_size, "threads": threads, "model": SEED["model"]}
    return rates(times, ("harness_bf16", "harness_fp32"), settings)
