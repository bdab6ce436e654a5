"""From a recipe to a training's components, built from plain arguments: the last place that sees a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from timm.utils import ModelEmaV3
from torch import nn

from harness.data.augment import Augmentation
from harness.data.loaders import Loader, build_loader
from harness.data.order import BatchPlan, evaluation_batches
from harness.data.prepare import PreparedDataset, prepare
from harness.distributed.runtime import Runtime
from harness.errors import HarnessError
from harness.files import writable_cache_directory
from harness.models.build import build_model
from harness.models.fused_units import adopt_compiled_kernels, adopt_mask_dropout
from harness.models.numerics import NumericsReport, check_and_repair
from harness.models.sync_batch_norm import convert_sync_batch_norm
from harness.recipe import Recipe
from harness.tracking.metrics import Tracker
from harness.training.checkpoint import Checkpointer
from harness.training.evaluate import Evaluator
from harness.training.optim import Mix, build_optimizer, build_schedule
from harness.training.state import Startup
from harness.training.step import StopVote, TrainingStep

CPU = torch.device("cpu")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingComponents:
    """What the loop works with, connected; the first rank then sets `tracker` and `step.profiler`."""

    def __init__(self, recipe: Recipe, runtime: Runtime, checkpoint_directory: Path, startup: Startup) -> None:
        self.runtime, self.startup = runtime, startup
        self.store = open_data(recipe)
        self.plan = build_plan(recipe, self.store, runtime)
        startup.lap("data")
        manifest = self.store.manifest
        classes = len(manifest.classes)
        self.network = build_network(recipe, classes, device=runtime.device, world_size=runtime.world_size)
        startup.lap("network")
        self.step = _build_step(recipe, self.plan, runtime, self.network.model, num_classes=classes)
        self.stop_vote = StopVote(runtime)
        self.train_loader: Loader = open_loader(recipe, self.store, "train", runtime.device)
        self.evaluator = build_evaluator(recipe, self.store, runtime)
        self.recalibration_batches = recipe.evaluation.recalibrate_batch_norm_batches
        self.best_by = "test_ema" if recipe.checkpoint.best_by == "ema" else "test"
        self.checkpointer = Checkpointer(
            checkpoint_directory,
            self.step,
            identity={
                "classes": list(manifest.classes),
                "mean": list(recipe.data.mean or manifest.mean),
                "std": list(recipe.data.std or manifest.std),
                "data_sha256": dict(manifest.sha256),
            },
            keep_last=recipe.checkpoint.keep_last,
            keep_best=recipe.checkpoint.keep_best,
        )
        self.tracker: Tracker = Tracker()
        startup.lap("loaders")

    def close(self) -> None:
        """End the threads and processes of checkpoints and loaders."""
        self.checkpointer.close()
        self.train_loader.close()
        self.evaluator.loader.close()


def _build_step(
    recipe: Recipe, plan: BatchPlan, runtime: Runtime, model: nn.Module, *, num_classes: int
) -> TrainingStep:
    training = recipe.training
    if training.sync_batch_norm and runtime.world_size > 1:
        model = convert_sync_batch_norm(model, runtime.device.type)
    ema = None
    if recipe.ema.decay is not None:  # copied before anything wraps the forward pass
        ema = ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
    raw_optimizer = build_optimizer(model, **recipe.optimizer.model_dump())
    schedule = _build_schedule(recipe, plan, raw_optimizer)
    wrapped_model, optimizer = runtime.accelerator.prepare(model, raw_optimizer)
    if training.compile:
        model.compile()
    return TrainingStep(
        runtime,
        model=wrapped_model,
        unwrapped_model=model,
        optimizer=optimizer,
        raw_optimizer=raw_optimizer,
        schedule=schedule,
        mix=Mix(**recipe.mix.model_dump(), label_smoothing=training.label_smoothing, num_classes=num_classes),
        ema=ema,
        seed=recipe.seed,
        memory_format=MEMORY_FORMATS[training.memory_format],
        clip_grad_norm=training.clip_grad_norm,
        fp16=training.precision == "fp16",
    )


def _build_schedule(recipe: Recipe, plan: BatchPlan, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    settings = recipe.schedule.model_dump(exclude={"warmup_epochs"})
    settings["warmup_steps"] = settings["warmup_steps"] or round(
        (recipe.schedule.warmup_epochs or 0) * plan.steps_per_epoch
    )
    steps = total_steps(recipe, plan)
    return build_schedule(optimizer, total_steps=steps, steps_per_epoch=plan.steps_per_epoch, **settings)


def total_steps(recipe: Recipe, plan: BatchPlan) -> int:
    """Length of the run in optimizer steps."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    assert recipe.training.epochs is not None  # a rule of recipes
    return recipe.training.epochs * plan.steps_per_epoch


def open_data(recipe: Recipe) -> PreparedDataset:
    """The recipe's data, converted once (ranks wait for one another by a file lock) and verified by each rank."""
    settings = {"path", "image_size_px", "image_column", "label_column", "synthetic"}
    store = prepare(recipe.data.source, **recipe.data.model_dump(include=settings))
    found, wanted = store.manifest.classes, recipe.data.num_classes
    if wanted is not None and wanted != len(found):
        hint = f"Classes found: {', '.join(found[:10])}{' …' if len(found) > 10 else ''}"
        raise HarnessError(f"the data has {len(found)} classes, not {wanted}", where="data.num_classes", hint=hint)
    return store


def open_loader(
    recipe: Recipe, store: PreparedDataset, split: Literal["train", "test"], device: torch.device
) -> Loader:
    """A loader of one split; training images are augmented, test images only normalised."""
    data = recipe.data
    settings = data.model_dump(include={"crop_padding_px", "crop_padding_mode", "flip", "cutout_size_px"})
    return build_loader(
        data.loader,
        store.split(split),
        mean=data.mean or store.manifest.mean,
        std=data.std or store.manifest.std,
        augmentation=Augmentation(seed=recipe.seed, **settings) if split == "train" else None,
        device=device,
        workers=data.workers,
    )


def build_plan(recipe: Recipe, store: PreparedDataset, runtime: Runtime) -> BatchPlan:
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


def build_evaluator(recipe: Recipe, store: PreparedDataset, runtime: Runtime) -> Evaluator:
    """Evaluation on this rank's share of the test split; its loader is to be closed."""
    total, batch_size = store.split("test").count, recipe.evaluation.per_device_batch_size
    ids = evaluation_batches(total, batch_size=batch_size, rank=runtime.rank, world_size=runtime.world_size)
    loader = open_loader(recipe, store, "test", runtime.device)
    return Evaluator(runtime, loader, ids, total, MEMORY_FORMATS[recipe.training.memory_format])


@dataclass(frozen=True)
class Network:
    """A network on its device, with correct paths where a kernel is wrong; `kernels` names its passes in a phrase."""

    model: nn.Module
    numerics: NumericsReport
    kernels: str

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def build_network(
    recipe: Recipe, num_classes: int, *, device: torch.device, world_size: int = 1, remember: bool = True
) -> Network:
    """Build the network on the device and check each of its layers there, in the recipe's precision and layout.

    `world_size` ranks share the recipe's global batch; `remember` takes and keeps this machine's verdicts in the cache.
    Raises HarnessError: an unknown network or argument, or a wrong kernel without a correct path.
    """
    training, size_px = recipe.training, recipe.data.image_size_px
    model = build_model(recipe.model.name, num_classes=num_classes, image_size_px=size_px, args=recipe.model.args)
    model = model.to(device).to(memory_format=MEMORY_FORMATS[training.memory_format])
    cache = writable_cache_directory()
    kernels = "torch's own"
    if device.type == "cpu":
        adopt_mask_dropout(model)
        if training.kernels == "plain":
            kernels = "plain (training.kernels)"
        elif training.compile:  # which fuses by itself
            kernels = "plain (training.compile)"
        elif training.precision == "fp16" or training.memory_format != "channels_last":
            kernels = "plain (they are for channels_last, precision no or bf16)"
        else:
            kernels = adopt_compiled_kernels(model, cache)
    with FileLock(cache / "numerics.lock"):  # one rank of a machine checks, the others find its verdict
        report = check_and_repair(
            model,
            batch_size=max(1, training.global_batch_size // training.gradient_accumulation_steps // world_size),
            image_size_px=size_px,
            device=device,
            precision=training.precision,
            memory_format=training.memory_format,
            cache_directory=cache if remember else None,
        )
    return Network(model, report, kernels)


def trial_network(recipe: Recipe, device: torch.device = CPU) -> nn.Module:
    """The recipe's network as training has it on this device, with its seed's weights; errors as `build_network`."""
    torch.manual_seed(recipe.seed)
    return build_network(recipe, recipe.data.num_classes or 10, device=device).model


def trial_step(model: nn.Module, recipe: Recipe, *, images: int, device: torch.device = CPU) -> Callable[[], None]:
    """The recipe's training step on so many fixed random images, for measuring its time: nothing is read or learnt.

    Forward, backward (with DDP's exchange where the model has it) and SGD; on a GPU it returns before the step is done.
    """
    size, dtype = recipe.data.image_size_px, AUTOCAST_DTYPES.get(recipe.training.precision)
    memory_format = MEMORY_FORMATS[recipe.training.memory_format]
    images_BCHW = torch.randn(images, 3, size, size, device=device).contiguous(memory_format=memory_format)
    labels_B = torch.arange(images, device=device) % (recipe.data.num_classes or 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits_BK = model(images_BCHW)
        nn.functional.cross_entropy(logits_BK.float(), labels_B).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
