"""Training steps of one network, plain PyTorch's and ours in each precision: images a second.

Each contestant warms up and returns a round, see `contest`. All train the same network with SGD and momentum on the
same random batch in memory. Ours is the epoch of `harness train` with its logging, signals and checks, and a loader
that gives the batch.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.bench.contest import Contestant, Round, describe_machine, ratios, run_contest
from harness.data.batches import Batch
from harness.distributed.runtime import distributed_context
from harness.errors import HarnessError
from harness.machine import usable_cores
from harness.models.build import build_model
from harness.recipe import Recipe, load
from harness.training.build import TrainingComponents
from harness.training.loop import Cadence, run_epoch
from harness.training.state import Progress, Startup

HERE = "harness.bench.step"
PACKAGES = ("torch", "accelerate", "timm", "lightning", "numpy")
LR, MOMENTUM, CLASSES = 0.008, 0.95, 10
WARMUP_STEPS = 2
GPU_STEPS = 20  # of a round
SEED: dict[str, Any] = {"model": "dual_branch_seed", "args": {}, "size_px": 32}


@dataclass(frozen=True)
class Task:
    """What all contestants train.

    Attributes:
        model, args: the network's name and the arguments of its constructor.
        size_px: height and width of the images.
        batch_size: images a step, on each rank.
        steps: of a round.
        channels_last: layout of images and weights, rather than contiguous.
        bf16: autocast, rather than float32.
        compiled: by torch.compile.
        device: "cpu" or "cuda".
    """

    model: str
    args: dict[str, Any]
    size_px: int
    batch_size: int
    steps: int
    channels_last: bool = False
    bf16: bool = False
    compiled: bool = False
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
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

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
    criterion, (images_BCHW, labels_B) = nn.CrossEntropyLoss(), task.batch()
    optimizer = sgd(net)

    def step() -> None:
        optimizer.zero_grad()
        with task.autocast():
            loss = criterion(net(images_BCHW), labels_B)
        loss.backward()
        optimizer.step()

    return task.round_of(step)


class _OneBatch:
    """A loader of a batch that is there already."""

    def __init__(self, images_BCHW: Tensor, labels_B: Tensor) -> None:
        self._batch = Batch(images_BCHW, labels_B, np.arange(len(labels_B)))

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        return (self._batch for _ in ids_per_batch)

    def close(self) -> None:
        """Nothing is open."""


def harness(*, recipe: str, overrides: Sequence[str] = (), **settings: Any) -> Round:
    """An epoch of `harness train` of a recipe: `steps` steps with what the loop does around them."""
    task = Task(**settings)
    global_batch_size = task.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    images = task.steps * global_batch_size
    own = (
        f"data.synthetic={{train_images: {images}, test_images: {CLASSES}, num_classes: {CLASSES}}}",
        "data.source=synthetic",
        f"data.image_size_px={task.size_px}",
        "data.loader=device",
        f"training.global_batch_size={global_batch_size}",
        f"optimizer.lr={LR}",
        f"optimizer.momentum={MOMENTUM}",
    )
    loaded = load(recipe, [*own, *overrides])
    components = built(loaded)
    components.train_loader.close()
    components.train_loader = _OneBatch(*task.batch())
    cadence, progress = epochs_alone(loaded), Progress()

    def one_round() -> tuple[float, int]:
        start = time.perf_counter()
        run_epoch(components, cadence, progress)
        if task.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, images

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


def bench_step(
    *,
    rounds: int = 5,
    batch_size: int = 128,
    threads: int | None = None,
    peers: Mapping[str, tuple[str, str | None]] | None = None,
) -> dict[str, Any]:
    """The seed's network: a plain PyTorch loop against `harness train` of the seed's recipe, in each precision.

    All have dropout, batch statistics and SGD with momentum. `harness_bf16` is the recipe with training.precision=bf16,
    `harness_bf16_plain` the same without our kernels. Where torch's own bf16 kernels are wrong on this processor
    (`harness doctor --numerics`), PyTorch's bf16 figures are of wrong gradients; ours are checked.

    Args:
        rounds: of each contestant, in turn, after a warm-up.
        batch_size: images a step.
        threads: None is one for each core that this process may use.
        peers: more contestants, in bf16 and channels_last: for each name its target and the package that it needs.

    Returns:
        A dict for JSON: "contestants" (images_per_second as median, min and max over the rounds; None for one whose
        package is not installed), "ratios" of medians, "settings" and "machine".

    Raises:
        HarnessError: numbers below 1, or a contestant that failed.
    """
    if batch_size < 2:
        raise HarnessError(
            f"batch_size must be at least 2, it is {batch_size}", hint="Batch statistics need two images."
        )
    on_gpu = torch.cuda.is_available()

    def task(steps: int, **more: Any) -> dict[str, Any]:
        device = "cuda" if on_gpu else "cpu"
        return {**SEED, "batch_size": batch_size, "device": device, "steps": GPU_STEPS if on_gpu else steps, **more}

    fast = task(3, channels_last=True, bf16=True)
    bf16 = ["training.precision=bf16"]
    ours = {"channels_last": True, "recipe": "seed"}
    contestants = {
        "pytorch_fp32": Contestant(f"{HERE}:pytorch", task(1)),
        "pytorch_fp32_channels_last": Contestant(f"{HERE}:pytorch", task(1, channels_last=True)),
        "pytorch_bf16_channels_last": Contestant(f"{HERE}:pytorch", fast),
        **{name: Contestant(target, fast, needs) for name, (target, needs) in (peers or {}).items()},
        "harness_fp32": Contestant(f"{HERE}:harness", task(3, **ours)),
        "harness_bf16": Contestant(f"{HERE}:harness", task(8, **ours, overrides=bf16)),
        "harness_bf16_plain": Contestant(
            f"{HERE}:harness", task(3, **ours, overrides=[*bf16, "training.kernels=plain"])
        ),
    }
    threads = usable_cores() if threads is None else threads
    times = run_contest(contestants, rounds=rounds, threads=threads)
    results = {name: None if each is None else each.per_second("images") for name, each in times.items()}
    return {
        "contestants": results,
        "ratios": ratios(results, ours=("harness_bf16", "harness_fp32")),
        "settings": {"rounds": rounds, "batch_size": batch_size, "threads": threads, "model": SEED["model"]},
        "machine": describe_machine(PACKAGES),
    }
