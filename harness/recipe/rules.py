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
    shrinks_by = recipe.optimizer.lr * recipe.optimizer.weight_decay
    if shrinks_by >= 1:
        yield (
            "optimizer.weight_decay",
            f"at the peak lr it would take {shrinks_by:.0%} of the weights at each step",
            "5e-4 is common for sgd, 0.05 for adamw.",
        )
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
    for key in ("image_column", "label_column"):
        if getattr(data, key) is not None and data.source != "parquet":
            yield f"data.{key}", f"the source {data.source} has no columns", "Leave it out, or data.source: parquet."
    if data.path is not None and ("\x00" in data.path or not data.path):
        yield "data.path", "is no path", "data.path: /folder/of/the/images"
    for key, size_px, usual in (
        ("crop_padding_px", data.crop_padding_px, 4),
        ("cutout_size_px", data.cutout_size_px, 8),
    ):
        if size_px >= data.image_size_px:
            yield (
                f"data.{key}",
                f"must be smaller than the image ({data.image_size_px} px), got {size_px}",
                f"It is in pixels, for example data.{key}: {usual}.",
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
    for key in ("min_lr", "warmup_lr"):
        if getattr(schedule, key) > recipe.optimizer.lr:
            yield f"schedule.{key}", f"above the peak lr {recipe.optimizer.lr}", "Lower it, or raise optimizer.lr."
    if schedule.name in ("step", "multistep") and schedule.decay_rate > 1:
        yield (
            "schedule.decay_rate",
            f"{schedule.decay_rate:g} would multiply the learning rate at each step of the schedule",
            f"To divide by {schedule.decay_rate:g}, write {1 / schedule.decay_rate:g}.",
        )
    first_decay = {"multistep": min(schedule.milestones_epochs, default=0), "step": schedule.decay_epochs}
    if epochs and first_decay.get(schedule.name, 0) >= epochs:
        key = "milestones_epochs" if schedule.name == "multistep" else "decay_epochs"
        yield (
            f"schedule.{key}",
            f"the first decay, after {first_decay[schedule.name]:g} epochs, is beyond the training ({epochs} epochs)",
            "It is in epochs, not steps; for a shorter trial add schedule.name=constant.",
        )
