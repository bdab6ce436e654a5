"""One optimizer step: mix, forward, backward, clip, update, average. No wait for the device but at log steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from harness.data.loaders import Batch
from harness.errors import Diverged
from harness.runtime import Runtime, seed_step
from harness.training.diagnosis import first_bad_layer
from harness.training.network import MEMORY_FORMATS
from harness.training.optim import Mix, Schedule
from harness.training.profiler import UNPROFILED, Phase
from harness.training.state import Meter


class TrainingStep:
    """Performs optimizer steps on a prepared model.

    Args:
        model: as `accelerator.prepare` returned it.
        bare_model: the same network without wrappers.
        optimizer: as prepared.
        schedule: sets the learning rate of each step.
        mix: mixup, CutMix and the loss.
        ema: average of the weights, or None.
        seed: keys dropout and mixing together with the step and the rank.
        memory_format: "contiguous" or "channels_last".
        clip_grad_norm: largest L2 norm of the whole gradient, or None.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        model: nn.Module,
        bare_model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        mix: Mix,
        ema: ModelEmaV3 | None,
        seed: int,
        memory_format: str,
        clip_grad_norm: float | None,
        fp16: bool,
    ) -> None:
        self._runtime, self._model, self._bare_model = runtime, model, bare_model
        self._schedule, self._mix, self._ema = schedule, mix, ema
        self._seed, self._memory_format = seed, MEMORY_FORMATS[memory_format]
        self._clip_grad_norm, self._fp16 = clip_grad_norm, fp16
        # Accelerate's wrapper is for the gradient scaler of fp16; it looks for a package on disk twice a step.
        self._update = optimizer if fp16 else getattr(optimizer, "optimizer", optimizer)
        self._parameters = [p for p in bare_model.parameters() if p.requires_grad]
        # A CPU has nothing to wait for, so that every step is checked there; elsewhere log steps are.
        self._check_always = runtime.device.type == "cpu"
        self.lr = 0.0
        self.grad_norm: Tensor | float | None = None

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
        phase: Phase = UNPROFILED.phase,
    ) -> None:
        """Perform step number `step` (0 is the first).

        Args:
            batches: gives this rank's batches; `micro_batches` of them are taken.
            refetch: gives the same batches of this step once more, for the search after a non-finite value.
            micro_batches: batches of this step, one for each accumulation step.
            global_count: images of the step over all ranks: each weighs the same whatever the sharding.
            meter: takes loss and correct answers of this rank.
            check: whether this is a log step.
            phase: is entered around each part of the step, see `harness.training.profiler`.

        Raises:
            Diverged: loss or gradient is not finite; names the step and the first layer. Weights are as before it.
        """
        self.lr = self._schedule.apply(step)
        for micro in range(micro_batches):
            with phase("loader_wait"):
                batch = next(batches)
            self._forward_backward(
                batch,
                step=step,
                micro=micro,
                scale=self._runtime.world_size / global_count,
                last=micro == micro_batches - 1,
                meter=meter,
                phase=phase,
            )
        with phase("optimizer"):
            self._clip(check=check)
            if not self._finite(check=check):
                self.raise_diverged(refetch(), step + 1)
            self._update.step()
            self._update.zero_grad(set_to_none=True)
            if self._ema is not None:
                self._ema.update(self._bare_model, step=step + 1)

    def grad_norm_value(self) -> float | None:
        """The gradient's L2 norm at the latest checked step, before clipping (waits for the device)."""
        return None if self.grad_norm is None else float(self.grad_norm)

    def param_norm_value(self) -> float:
        """The L2 norm of all trainable parameters (waits for the device)."""
        with torch.no_grad():
            return float(torch.nn.utils.get_total_norm(self._parameters))

    def _forward_backward(
        self, batch: Batch, *, step: int, micro: int, scale: float, last: bool, meter: Meter, phase: Phase
    ) -> None:
        runtime = self._runtime
        runtime.tick()  # the batch is here: what may be late now is another rank
        seed_step(self._seed, step, runtime.rank, micro, runtime.device)
        context = nullcontext() if last else runtime.accelerator.no_sync(self._model)
        with context:
            with phase("forward"):
                images, target = self._mixed(batch)
                logits_BK = self._model(images)
                loss_sum = self._mix.loss_sum(logits_BK, target)
            with phase("backward"):
                # DDP averages over ranks: times the world size, over the count of all ranks, is the mean over images.
                runtime.accelerator.backward(loss_sum * scale)
        meter.add(loss_sum, logits_BK, batch.labels_B)

    def _clip(self, *, check: bool) -> None:
        """Clip where asked, and know the gradient's norm where it is wanted."""
        if self._clip_grad_norm is not None:
            self.grad_norm = self._runtime.accelerator.clip_grad_norm_(self._parameters, self._clip_grad_norm)
        elif check:
            self._runtime.accelerator.unscale_gradients()
            self.grad_norm = torch.nn.utils.get_total_norm(self._gradients())

    def _finite(self, *, check: bool) -> bool:
        # With fp16 the scaler meets overflowing gradients by itself: it skips the step and lowers the scale.
        if self._fp16 or not (check or self._check_always):
            return True
        if check or self._clip_grad_norm is not None:
            return self.grad_norm is None or math.isfinite(float(self.grad_norm))
        # Between log steps nobody wants the norm. This is torch's own check for gradient scalers, which costs
        # less; what it multiplies by is one.
        found = torch.zeros(())
        torch._amp_foreach_non_finite_check_and_unscale_(self._gradients(), found, torch.ones(()))
        return not found.item()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def raise_diverged(self, batches: Iterator[Batch], step: int) -> NoReturn:
        """Search the batches of step number `step` (1 is the first) for the layer where numbers stop being finite."""

        def forward() -> None:
            for micro, batch in enumerate(batches):
                seed_step(self._seed, step - 1, self._runtime.rank, micro, self._runtime.device)
                with self._runtime.accelerator.autocast():
                    self._bare_model(self._mixed(batch)[0])

        found = first_bad_layer(self._bare_model, forward)
        raise Diverged(
            f"training diverged at step {step}: {found}",
            hint="Lower optimizer.lr, add warm-up or training.clip_grad_norm, or try training.precision=no; "
            "--resume auto goes on from the last checkpoint.",
        )

    def _mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._mix(batch.images_BCHW.contiguous(memory_format=self._memory_format), batch.labels_B)
