"""From a recipe to the built parts of a training: the last place that sees a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

from harness.data.augment import Augmentation
from harness.data.loaders import Loader, build_loader
from harness.data.order import BatchPlan, evaluation_batches
from harness.data.prepare import PreparedDataset, prepare
from harness.errors import HarnessError
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe
from harness.runtime import Runtime
from harness.tracking.metrics import Tracker
from harness.training import checkpoint, optimizer_state
from harness.training.network import Network, open_network
from harness.training.optim import Mix, Schedule, build_optimizer, build_schedule
from harness.training.profiler import NullProfiler, Profiler
from harness.training.startup import Startup
from harness.training.state import Progress
from harness.training.step import TrainingStep
from harness.training.stopping import StopVote
from harness.training.writer import CheckpointWriter


@dataclass
class Parts:
    """Everything the loop works with, built and connected."""

    runtime: Runtime
    store: PreparedDataset
    plan: BatchPlan
    train_loader: Loader
    test_loader: Loader
    test_batches: list[np.ndarray]
    model: nn.Module
    bare_model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Any
    step: TrainingStep
    stop: StopVote
    memory_format: str
    recalibration_batches: int
    best_by: str
    checkpoint_directory: Path
    writer: CheckpointWriter
    keep_best: bool
    network: Network
    identity: dict[str, Any]
    startup: Startup
    tracker: Tracker = field(default_factory=Tracker)
    profiler: Profiler = field(default_factory=NullProfiler)

    def models_to_evaluate(self) -> Iterator[tuple[str, nn.Module]]:
        """Splits' names in the metrics and the networks: raw weights, then averaged ones where there are any."""
        yield "test", self.bare_model
        if self.ema is not None:
            yield "test_ema", self.ema.module

    @property
    def test_count(self) -> int:
        """Images in the whole test split."""
        return self.store.split("test").count

    def epochs_done(self, progress: Progress) -> float:
        return round(progress.step / self.plan.steps_per_epoch, 4)

    def save(self, progress: Progress) -> None:
        """Begin to write a checkpoint of this step (the first rank does); returns when it is copied to the host.

        Raises:
            HarnessError: the checkpoint before could not be written.
        """
        if not self.runtime.is_main:
            return
        scaler = self.runtime.accelerator.scaler
        saved = checkpoint.snapshot(
            progress.step,
            model=self.bare_model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema is not None else None,
            optimizer=self.optimizer.optimizer.state_dict(),
            state={
                "progress": progress.to_json(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                **self.identity,
            },
        )
        best = self.checkpoint_directory / f"step_{progress.best['step']}" if progress.best else None
        self.writer.submit(saved, keep=best if self.keep_best else None)

    def restore(self, saved: checkpoint.Saved) -> Progress:
        """Put a checkpoint into the parts and return where it stood.

        Raises:
            HarnessError: it belongs to another network or another kind of run.
        """
        if saved.state["data_sha256"] != self.identity["data_sha256"]:
            raise HarnessError(
                "the checkpoint was trained on other images (the SHA-256 of the converted data differs)",
                where=str(saved.path),
                hint="Resume with the data it was trained on, or start a new run.",
            )
        checkpoint.load_weights(self.bare_model, saved.model, saved.path)
        if (self.ema is None) != (saved.ema is None):
            raise HarnessError(
                "the checkpoint has averaged weights" if saved.ema else "the checkpoint has no averaged weights",
                where=str(saved.path),
                hint="Resume with the ema settings it was trained with.",
            )
        if self.ema is not None and saved.ema is not None:
            checkpoint.load_weights(self.ema.module, saved.ema, saved.path)
        optimizer_state.load(self.optimizer.optimizer, saved.optimizer, saved.state["optimizer"], saved.path)
        if self.runtime.accelerator.scaler is not None and saved.state["scaler"]:
            self.runtime.accelerator.scaler.load_state_dict(saved.state["scaler"])
        return Progress.from_json(saved.state["progress"])

    def close(self) -> None:
        self.writer.close()
        self.train_loader.close()
        self.test_loader.close()


def open_data(recipe: Recipe) -> PreparedDataset:
    """The recipe's data, converted once (ranks wait for one another by a file lock) and verified by each rank.

    Raises:
        HarnessError: no data, broken data, or another number of classes than the recipe says.
    """
    data = recipe.data
    store = prepare(
        data.source,
        path=data.path,
        image_size_px=data.image_size_px,
        image_column=data.image_column,
        label_column=data.label_column,
        synthetic=data.synthetic.model_dump(),
    )
    found = len(store.manifest.classes)
    if data.num_classes is not None and data.num_classes != found:
        raise HarnessError(
            f"the data has {found} classes, not {data.num_classes}",
            where="data.num_classes",
            hint=f"Classes found: {', '.join(store.manifest.classes[:10])}{' …' if found > 10 else ''}",
        )
    return store


def open_loader(
    recipe: Recipe, store: PreparedDataset, split: Literal["train", "test"], device: torch.device
) -> Loader:
    """A loader of one split; training images are augmented, test images only normalised."""
    data = recipe.data
    augmentation = Augmentation(
        seed=recipe.seed,
        crop_padding_px=data.crop_padding_px,
        crop_padding_mode=data.crop_padding_mode,
        flip=data.flip,
        cutout_size_px=data.cutout_size_px,
    )
    return build_loader(
        data.loader,
        store.split(split),
        mean=data.mean or store.manifest.mean,
        std=data.std or store.manifest.std,
        augmentation=augmentation if split == "train" else None,
        device=device,
        workers=data.workers,
    )


def assemble(recipe: Recipe, runtime: Runtime, checkpoint_directory: Path, startup: Startup) -> Parts:
    """Build all parts of a training.

    Raises:
        HarnessError: something in the recipe does not go with the data, the machine or the ranks.
    """
    store = open_data(recipe)
    plan = plan_batches(recipe, store, runtime)
    startup.lap("data")
    num_classes = len(store.manifest.classes)
    network = open_network(recipe, num_classes=num_classes, device=runtime.device, world_size=runtime.world_size)
    startup.lap("network")
    bare_model = network.model
    if recipe.training.sync_batch_norm and runtime.world_size > 1:
        bare_model = convert_sync_batch_norm(bare_model, runtime.device.type)
    ema = None
    if recipe.ema.decay is not None:  # copied before anything wraps the forward pass
        ema = ModelEmaV3(bare_model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
    raw_optimizer = build_optimizer(bare_model, **recipe.optimizer.model_dump())
    schedule = _schedule(recipe, plan, raw_optimizer)
    model, optimizer = runtime.accelerator.prepare(bare_model, raw_optimizer)
    if recipe.training.compile:
        bare_model.compile()
    step = TrainingStep(
        runtime,
        model=model,
        bare_model=bare_model,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        **_step_settings(recipe, num_classes),
    )
    parts = Parts(
        runtime=runtime,
        store=store,
        plan=plan,
        train_loader=open_loader(recipe, store, "train", runtime.device),
        test_loader=open_loader(recipe, store, "test", runtime.device),
        test_batches=share_of_test(recipe, store, runtime),
        model=model,
        bare_model=bare_model,
        ema=ema,
        optimizer=optimizer,
        step=step,
        stop=StopVote(runtime),
        memory_format=recipe.training.memory_format,
        recalibration_batches=recipe.evaluation.recalibrate_batch_norm_batches,
        best_by="test_ema" if recipe.checkpoint.best_by == "ema" else "test",
        checkpoint_directory=checkpoint_directory,
        writer=CheckpointWriter(checkpoint_directory, keep_last=recipe.checkpoint.keep_last),
        keep_best=recipe.checkpoint.keep_best,
        network=network,
        identity=_identity(recipe, store),
        startup=startup,
    )
    startup.lap("loaders")
    return parts


def _step_settings(recipe: Recipe, num_classes: int) -> dict[str, Any]:
    """What a training step takes from the recipe."""
    training = recipe.training
    return {
        "mix": Mix(**recipe.mix.model_dump(), label_smoothing=training.label_smoothing, num_classes=num_classes),
        "seed": recipe.seed,
        "memory_format": training.memory_format,
        "clip_grad_norm": training.clip_grad_norm,
        "fp16": training.precision == "fp16",
    }


def share_of_test(recipe: Recipe, store: PreparedDataset, runtime: Runtime) -> list[np.ndarray]:
    """This rank's share of the test split."""
    return evaluation_batches(
        store.split("test").count,
        batch_size=recipe.evaluation.per_device_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )


def plan_batches(recipe: Recipe, store: PreparedDataset, runtime: Runtime) -> BatchPlan:
    """Which training images this rank sees when."""
    return BatchPlan(
        count=store.split("train").count,
        global_batch_size=recipe.training.global_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        accumulation_steps=recipe.training.gradient_accumulation_steps,
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        drop_last=recipe.training.drop_last,
    )


def _identity(recipe: Recipe, store: PreparedDataset) -> dict[str, Any]:
    """What a checkpoint says of itself, enough to classify images with it."""
    return {
        "classes": list(store.manifest.classes),
        "mean": list(recipe.data.mean or store.manifest.mean),
        "std": list(recipe.data.std or store.manifest.std),
        "data_sha256": dict(store.manifest.sha256),
    }


def total_steps(recipe: Recipe, plan: BatchPlan) -> int:
    """Length of the run in optimizer steps."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    assert recipe.training.epochs is not None  # a rule of recipes
    return recipe.training.epochs * plan.steps_per_epoch


def _schedule(recipe: Recipe, plan: BatchPlan, optimizer: torch.optim.Optimizer) -> Schedule:
    settings = recipe.schedule
    warmup_steps = settings.warmup_steps or round((settings.warmup_epochs or 0) * plan.steps_per_epoch)
    return build_schedule(
        optimizer,
        name=settings.name,
        total_steps=total_steps(recipe, plan),
        steps_per_epoch=plan.steps_per_epoch,
        warmup_steps=warmup_steps,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        decay_rate=settings.decay_rate,
        decay_epochs=settings.decay_epochs,
        milestones_epochs=settings.milestones_epochs,
    )
