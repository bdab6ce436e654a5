"""Rules between the keys of a recipe, which no single field can know."""

from __future__ import annotations

from collections.abc import Iterator

from harness.recipe.schema import Recipe


def broken_rules(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Each broken rule as (key, what is wrong, hint)."""
    yield from _length(recipe)
    yield from _data(recipe)
    yield from _batch(recipe)
    yield from _schedule(recipe)
    if recipe.checkpoint.best_by == "ema" and recipe.ema.decay is None:
        yield (
            "checkpoint.best_by",
            "there are no averaged weights to judge by",
            "Set ema.decay, for example 0.999.",
        )


def _length(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    training = recipe.training
    if training.epochs is None and training.steps is None:
        yield "training", "says no length", "Give training.epochs or training.steps."
    if training.epochs is not None and training.steps is not None:
        yield (
            "training.steps",
            f"the length is given twice (epochs {training.epochs}, steps {training.steps})",
            "Set one of them to null, for example training.epochs=null.",
        )


def _data(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    data = recipe.data
    if data.source in ("parquet", "imagefolder") and data.path is None:
        yield "data.path", f"the source {data.source} needs a path", "data.path: /folder/of/the/images"
    if data.source in ("digits", "synthetic") and data.path is not None:
        yield "data.path", f"the source {data.source} reads no files", "Leave data.path out."
    if data.path is not None and ("\x00" in data.path or not data.path):
        yield "data.path", "is no path", "data.path: /folder/of/the/images"
    if data.std is not None and min(data.std) <= 0:
        yield "data.std", f"must be > 0 in each channel, got {data.std}", "Pixels are in [0, 1]; try 0.25."
    if data.crop_padding_mode == "reflect" and data.crop_padding_px >= data.image_size_px:
        yield (
            "data.crop_padding_px",
            f"reflection needs a padding smaller than the image ({data.image_size_px} px)",
            "data.crop_padding_px: 4",
        )


def _batch(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    training = recipe.training
    if training.global_batch_size % training.gradient_accumulation_steps:
        yield (
            "training.global_batch_size",
            f"{training.global_batch_size} is not divisible by gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps}",
            "Choose a multiple.",
        )


def _schedule(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    schedule, epochs, steps = recipe.schedule, recipe.training.epochs, recipe.training.steps
    if schedule.warmup_epochs is not None and schedule.warmup_steps is not None:
        yield "schedule.warmup_steps", "the warm-up is given twice", "Keep warmup_epochs or warmup_steps."
    if epochs and schedule.warmup_epochs is not None and schedule.warmup_epochs > epochs:
        yield "schedule.warmup_epochs", f"longer than the training ({epochs} epochs)", "Shorten the warm-up."
    if steps and schedule.warmup_steps is not None and schedule.warmup_steps > steps:
        yield "schedule.warmup_steps", f"longer than the training ({steps} steps)", "Shorten the warm-up."
    if schedule.name == "multistep" and not schedule.milestones_epochs:
        yield (
            "schedule.milestones_epochs",
            "multistep needs milestones",
            "schedule.milestones_epochs: [30, 60]",
        )
    if schedule.min_lr > recipe.optimizer.lr:
        yield "schedule.min_lr", f"above the peak lr {recipe.optimizer.lr}", "Lower it."
