"""One optimizer step: mix, forward, backward, clip, update, average. No wait for the device except at log steps.

With it: what to say of numbers that are not finite, and the vote by which all ranks stop at the same step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from harness import signals
from harness.data.loaders import Batch
from harness.distributed.runtime import Runtime, seed_step
from harness.errors import EXIT_REQUEUE, Diverged, HarnessError
from harness.training.optim import Mix
from harness.training.profiler import NullProfiler
from harness.training.state import Meter

# On a GPU the answer is read this many steps later, when it has long arrived: reading it at once would be a wait for
# the device at every step. All ranks use the same number, so they still agree.
GPU_LAG_STEPS = 8


@dataclass(eq=False)
class TrainingStep:
    """Performs optimizer steps on a prepared model.

    `model` and `optimizer` are what `accelerator.prepare` made of `unwrapped_model` and `raw_optimizer`; `seed` keys
    dropout and mixing together with the step and the rank; `grad_norm` is the L2 norm at the latest checked step,
    before clipping to `clip_grad_norm`.
    """

    runtime: Runtime
    model: nn.Module
    unwrapped_model: nn.Module
    optimizer: torch.optim.Optimizer
    raw_optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    mix: Mix
    ema: ModelEmaV3 | None
    seed: int
    memory_format: torch.memory_format
    clip_grad_norm: float | None
    fp16: bool
    profiler: NullProfiler = field(default_factory=NullProfiler)
    lr: float = 0.0
    grad_norm: Tensor | None = None

    def __post_init__(self) -> None:
        # Accelerate's wrapper is for the gradient scaler of fp16; it looks for a package on disk twice a step.
        self._update = self.optimizer if self.fp16 else self.raw_optimizer
        self._parameters = [p for p in self.unwrapped_model.parameters() if p.requires_grad]
        # A CPU has nothing to wait for, so that every step is checked there; elsewhere log steps are.
        self._check_always = self.runtime.device.type == "cpu"

    def __call__(
        self,
        batches: Iterator[Batch],
        *,
        refetch: Callable[[], Iterator[Batch]],
        micro_batches: int,
        step: int,
        global_count: int,
        meter: Meter,
        check: bool,
    ) -> None:
        """Perform step number `step` (0 is the first).

        Args:
            batches: gives this rank's batches; `micro_batches` of them are taken, one for each accumulation step.
            refetch: gives the same batches once more, for the search after a non-finite value.
            global_count: images of the step over all ranks: each weighs the same whatever the sharding.
            meter: takes loss and correct answers of this rank.
            check: whether this is a log step.

        Raises:
            Diverged: loss or gradient is not finite; names the step and the first layer. Weights are as before it.
        """
        self.lr = self.schedule(step)
        for micro in range(micro_batches):
            with self.profiler.phase("loader_wait"):
                batch = next(batches)
            self.runtime.tick()  # the batch is here: what may be late now is another rank
            seed_step(self.seed, step, self.runtime.rank, micro, self.runtime.device)
            last = micro == micro_batches - 1
            with nullcontext() if last else self.runtime.accelerator.no_sync(self.model):
                self._forward_backward(batch, self.runtime.world_size / global_count, meter)
        with self.profiler.phase("optimizer"):
            self._clip(check=check)
            if not self._finite(check=check):
                self.raise_diverged(refetch(), step + 1)
            self._update.step()
            self._update.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update(self.unwrapped_model, step=step + 1)

    def norms(self) -> dict[str, float | None]:
        """The L2 norms of the gradient and of all trainable parameters (waits for the device)."""
        with torch.no_grad():
            param_norm = float(get_total_norm(self._parameters))
        return {"grad_norm": None if self.grad_norm is None else float(self.grad_norm), "param_norm": param_norm}

    def _forward_backward(self, batch: Batch, scale: float, meter: Meter) -> None:
        with self.profiler.phase("forward"):
            images, target = self._mixed(batch)
            logits_BK = self.model(images)
            loss_sum = self.mix.loss_sum(logits_BK, target)
        with self.profiler.phase("backward"):
            # DDP averages over ranks: times the world size, over the count of all ranks, is the mean over images.
            self.runtime.accelerator.backward(loss_sum * scale)
        meter.add(loss_sum, logits_BK, batch.labels_B)

    def _clip(self, *, check: bool) -> None:
        """Clip where asked, and know the gradient's norm where it is wanted."""
        if self.clip_grad_norm is not None:
            self.grad_norm = self.runtime.accelerator.clip_grad_norm_(self._parameters, self.clip_grad_norm)
        elif check:
            self.runtime.accelerator.unscale_gradients()
            self.grad_norm = get_total_norm(self._gradients())

    def _finite(self, *, check: bool) -> bool:
        # With fp16 the scaler meets overflowing gradients by itself: it skips the step and lowers the scale.
        if self.fp16 or not (check or self._check_always):
            return True
        if check or self.clip_grad_norm is not None:
            return self.grad_norm is None or math.isfinite(float(self.grad_norm))
        # Between log steps nobody wants the norm. This is torch's own check for gradient scalers, which costs
        # less; what it multiplies by is one.
        found = torch.zeros(())
        torch._amp_foreach_non_finite_check_and_unscale_(self._gradients(), found, torch.ones(()))
        return not found.item()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.mix(batch.images_BCHW.contiguous(memory_format=self.memory_format), batch.labels_B)

    def raise_diverged(self, batches: Iterator[Batch], step: int) -> NoReturn:
        """Search the batches of step number `step` (1 is the first) for the layer where numbers stop being finite."""

        def forward() -> None:
            for micro, batch in enumerate(batches):
                seed_step(self.seed, step - 1, self.runtime.rank, micro, self.runtime.device)
                with self.runtime.accelerator.autocast():
                    self.unwrapped_model(self._mixed(batch)[0])

        raise Diverged(
            f"training diverged at step {step}: {first_bad_layer(self.unwrapped_model, forward)}",
            hint="Lower optimizer.lr, add warm-up or training.clip_grad_norm, or try training.precision=no; "
            "--resume auto resumes from the last checkpoint.",
        )


def first_bad_layer(model: nn.Module, forward: Callable[[], None]) -> str:
    """Name the first layer whose weights, output or gradient is not finite, as a phrase.

    `model` is in the state before the update, gradients in place; `forward` runs it on the step's batches once more.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f'the weights of layer "{_layer(name)}" are not finite (after an earlier step)'
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(partial(look, name)) for name, module in leaves]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f'the output of layer "{found[0]}" is not finite (the first in the forward pass)'
    # In the backward pass, the layer met first stands last in the network.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f'the gradient of layer "{_layer(name)}" is not finite (the first in the backward pass)'
    return "the loss is not finite, though every layer's output is (its sum over the batch overflows)"


def _layer(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0] or parameter_name


class Stopped(HarnessError):
    """The training stopped between two steps because a signal asked it to; its checkpoint is written."""

    def __init__(self, step: int) -> None:
        what = f"stopped by {signals.received() or 'a signal to another rank'} after step {step}"
        hint = "The same command with --resume auto resumes from there."
        super().__init__(f"{what}; the checkpoint is written", hint=hint, exit_code=EXIT_REQUEUE)


class StopVote:
    """Asks at every step whether any rank has received a stop signal; all ranks get the same answer."""

    def __init__(self, runtime: Runtime) -> None:
        self._device, self._world_size = runtime.device, runtime.world_size
        self._on_the_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def agreed(self) -> bool:
        """Whether to stop before the next step. A collective where there are several ranks."""
        mine = signals.received() is not None
        if self._world_size == 1:
            return mine
        vote = torch.full((), int(mine), dtype=torch.int32, device=self._device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        if self._device.type != "cuda":
            return bool(vote.item())
        # A copy that waits for nothing, and the event of its arrival; `vote.item()` would wait for all queued work.
        answer = torch.empty_like(vote, device="cpu", pin_memory=True).copy_(vote, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._device))
        self._on_the_way.append((answer, arrived))
        if len(self._on_the_way) <= GPU_LAG_STEPS:
            return False
        answer, arrived = self._on_the_way.popleft()
        arrived.synchronize()
        return bool(answer.item())
