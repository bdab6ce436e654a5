"""The schema of a recipe: every key there is, its type, its range and what it means, and the rules between keys.

Keys are the field's standard terms; durations carry their unit in the key. `harness recipe schema`
prints this as a JSON Schema for editors. Unknown keys are refused, values are never coerced. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError

from harness.errors import HarnessError, ManyErrors, nearest

RecipeName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")]


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A key with its default, what it means, and pydantic's limits of its values."""
    return Field(default, description=meaning, **limits)


# Lists become tuples, so that the whole recipe is immutable; the numbers inside are never coerced.
PerChannel = Annotated[tuple[float, ...], Field(strict=False, min_length=3, max_length=3)]
Tags = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(strict=False)]
Epochs = Annotated[tuple[Annotated[int, Field(ge=0, le=10**9)], ...], Field(strict=False)]
Width = Annotated[int, Field(ge=1, le=8192)]
Widths = Annotated[tuple[Width, ...], Field(strict=False)]
UnitWidths = Annotated[tuple[Width, ...], Field(strict=False, min_length=1)]
Dilation = Annotated[int, Field(ge=1, le=64)]
UnitDilations = Annotated[tuple[Dilation, ...], Field(strict=False, min_length=1)]

DILATION_FORMS = "one number for all, one for each block, or a list of one for each unit of a block (1 to 64)"
# Of `args`, which belong to the thing that `name` names.
INHERITED_ARGS = (
    "inherited ones are merged key by key, dropped with another name, and replaced by an override that gives a mapping"
)


class DualBranchArgs(Section):
    """What shapes a dual-branch network, apart from the data's image size, channels and classes.

    The defaults are the seed's network. Both branches of a block have the same unit widths.
    """

    widths: Annotated[tuple[UnitWidths, ...], Field(strict=False)] = setting(
        ((32, 64, 128), (64, 128, 256), (128, 256, 256)),
        "output channels of each unit: a list for each block, both branches alike",
    )
    dilations: Dilation | Annotated[tuple[Dilation | UnitDilations, ...], Field(strict=False)] = setting(
        2, f"dilation of the dilated branch, in taps: {DILATION_FORMS}"
    )
    transition_widths: Widths = setting(
        (32, 64), "channels after each transition (2×2 max-pooling, 1×1 convolution) between blocks"
    )
    head_width: Width = setting(64, "channels between the head's two 1×1 convolutions")
    merge: Literal["sum", "concat"] = setting("sum", "how the outputs of the two branches join")
    dropout: float = setting(0.25, "share of activations dropped at the end of each unit", ge=0, lt=1)
    norm: Literal["batch", "group", "layer", "none"] = setting(
        "batch", "normalisation in each unit; layer: over the channels of each pixel"
    )
    activation: Literal[
        "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish", "hard_swish"
    ] = setting("relu", "activation in each unit, by timm's names")
    stem: Width | None = setting(
        None, "channels of a 3×3 convolution, norm, activation before the first block; null: none"
    )

    @field_validator("widths")
    @classmethod
    def _some_block(cls, value: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        if not value:
            raise PydanticCustomError("widths", "needs at least one block")
        return value

    @field_validator("dilations", mode="wrap")
    @classmethod
    def _dilations_fit(cls, given: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            value = validate(given)
        except ValidationError as error:
            raise PydanticCustomError("dilations", f"must be {DILATION_FORMS}") from error
        widths = info.data.get("widths")
        if widths is None or isinstance(value, int):
            return value
        if len(value) != len(widths):
            raise PydanticCustomError("dilations", f"is for {len(value)} blocks, and widths has {len(widths)} blocks")
        for block, (entry, units) in enumerate(zip(value, widths, strict=True), start=1):
            if isinstance(entry, tuple) and len(entry) != len(units):
                what = f"block {block} has {len(entry)} dilations and {len(units)} units in widths"
                raise PydanticCustomError("dilations", what)
        return value

    @field_validator("transition_widths")
    @classmethod
    def _one_between_blocks(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        widths = info.data.get("widths")
        if widths is not None and len(value) != len(widths) - 1:
            raise PydanticCustomError(
                "transition_widths",
                f"needs one width between each two of the {len(widths)} blocks of widths, "
                f"so {len(widths) - 1}, and has {len(value)}",
            )
        return value

    def unit_dilations(self) -> tuple[tuple[int, ...], ...]:
        """The dilation of each unit of the dilated branch, as [block][unit]."""
        per_block = (self.dilations,) * len(self.widths) if isinstance(self.dilations, int) else self.dilations
        return tuple(
            (entry,) * len(units) if isinstance(entry, int) else entry
            for entry, units in zip(per_block, self.widths, strict=True)
        )


class UnknownSetting(HarnessError, TypeError):
    """A setting that there is not; timm's callers expect Python's own type for an unknown argument."""


def parse_settings(settings: Mapping[str, Any]) -> DualBranchArgs:
    """A dual-branch network's settings, for callers without a recipe.

    Raises:
        HarnessError: an unknown name (an UnknownSetting), or all that is wrong with the values, in one message.
    """
    fields = DualBranchArgs.model_fields
    for name in (name for name in settings if name not in fields):  # the first one as given
        raise UnknownSetting(f'the dual-branch network has no setting "{name}"', hint=nearest(name, fields))
    try:
        return DualBranchArgs.model_validate(dict(settings))
    except ValidationError as error:
        problems = []
        for e in error.errors():
            what = f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {repr(e['input'])[:60]}"
            problems.append(HarnessError(what, hint=fields[str(e["loc"][0])].description))
        raise ManyErrors("dual_branch", problems) from None


class Synthetic(Section):
    """Sizes of the `synthetic` source."""

    train_images: int = setting(512, "images in the training split", ge=1)
    test_images: int = setting(256, "images in the test split", ge=1)
    num_classes: int = setting(10, "classes", ge=2, le=1000)


class Data(Section):
    """Where images come from and how they are read and augmented."""

    source: Literal["cifar10", "parquet", "imagefolder", "digits", "synthetic"] = setting(
        "cifar10", "where images come from"
    )
    path: str | None = setting(None, "folder or file of the source; null looks under $HARNESS_DATA")
    image_column: str | None = setting(None, "column of the images (parquet); null finds img or image", min_length=1)
    label_column: str | None = setting(
        None, "column of the labels (parquet), such as fine_label; null takes label", min_length=1
    )
    num_classes: int | None = setting(None, "classes the data must have; null takes what it has", ge=1)
    image_size_px: int = setting(32, "height and width, pixels", ge=4, le=1024)
    synthetic: Synthetic = Synthetic()
    loader: Literal["ffcv", "device", "torch"] = setting(
        "ffcv", "ffcv: compiled, fastest on a CPU; device: data resident on the device; torch: DataLoader"
    )
    workers: int | None = setting(
        None, "loader threads (ffcv) or processes (torch) per rank; null takes the rank's cores", ge=0, le=512
    )
    mean: PerChannel | None = setting(None, "normalisation mean, pixels in [0, 1]; null measures the training split")
    std: PerChannel | None = setting(None, "normalisation standard deviation, pixels in [0, 1]; null measures")
    shuffle: bool = setting(True, "a new order each epoch, a pure function of (seed, epoch)")
    crop_padding_px: int = setting(0, "random crop after padding by this many pixels; 0 is off", ge=0, le=64)
    crop_padding_mode: Literal["zeros", "reflect"] = setting("zeros", "what the padding holds")
    flip: Literal["none", "random", "alternating"] = setting(
        "none", "horizontal flip; alternating flips each image in every second epoch"
    )
    cutout_size_px: int = setting(0, "side of the erased square; 0 is off", ge=0, le=1024)

    @field_validator("mean", "std")
    @classmethod
    def _of_pixels_from_0_to_1(cls, values: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        """Values that have the right type and another unit than the key's."""
        if values is None:
            return None
        what, hint = "", "Pixels are in [0, 1]"
        least, most, grey_levels = min(values), max(values), [round(value * 255, 4) for value in values]
        if least < 0 or most > 1:
            what = "must be between 0 and 1 in each channel"
            for whole in (255, 100):
                if least >= 0 and most <= whole:
                    hint += f"; divided by {whole} these are {[round(value / whole, 4) for value in values]}"
        elif info.field_name == "mean" and 0 < most < 1 / 255:
            what = "are all below one grey level (1/255)"
            hint += f"; times 255 these are {grey_levels}"
        elif info.field_name == "std" and least < 1 / 255:
            what = "must be > 0, and more than one grey level (1/255), in each channel"
            hint += "; 0.25 is common"
            if least > 0 and max(grey_levels) <= 1:
                hint += f". Times 255 these are {grey_levels}"
        if what:
            raise PydanticCustomError("other_unit", "{what}", {"what": what, "hint": f"{hint}."})
        return values


class Model(Section):
    """Which network: a dual-branch one or any that timm knows."""

    name: str = setting(
        "dual_branch_seed", "dual_branch, dual_branch_seed, or any timm model", min_length=1, max_length=200
    )
    args: dict[str, Any] = setting({}, f"arguments of the model's constructor; {INHERITED_ARGS}")


class Training(Section):
    """Length, batch and arithmetic of the training."""

    epochs: int | None = setting(None, "length in epochs; give this or steps", ge=0)
    steps: int | None = setting(None, "length in optimizer steps; give this or epochs", ge=0)
    global_batch_size: int = setting(128, "images an optimizer step, over all ranks and accumulation steps", ge=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches an optimizer step", ge=1)
    drop_last: bool = setting(False, "leave out the last, smaller batch of an epoch")
    precision: Literal["no", "bf16", "fp16"] = setting("no", "mixed precision, as Accelerate has it")
    memory_format: Literal["contiguous", "channels_last"] = setting(
        "channels_last", "layout of activations and convolution weights"
    )
    compile: bool = setting(False, "torch.compile the model")
    kernels: Literal["auto", "plain"] = setting(
        "auto",
        "on CPUs with a C++ compiler, auto has faster passes of the same functions (for channels_last, "
        "precision no or bf16); plain has torch's own",
    )
    sync_batch_norm: bool = setting(True, "batch statistics over all ranks, not each rank alone")
    label_smoothing: float = setting(0.0, "share of the label spread", ge=0, lt=1)
    clip_grad_norm: float | None = setting(None, "largest global L2 norm of the gradient; null is off", gt=0)


class Optimizer(Section):
    """timm's optimizers by their names; `sgd` has no Nesterov momentum unless it is asked for."""

    name: str = setting("sgd", "timm optimizer: sgd, adamw, lamb, muon, …", min_length=1, max_length=100)
    lr: float = setting(0.1, "peak learning rate for the global batch", gt=0)
    momentum: float = setting(0.9, "where the optimizer has one", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov momentum, for sgd and its kin")
    weight_decay: float = setting(0.0, "weight decay", ge=0)
    decay_norm_and_bias: bool = setting(False, "apply weight decay to biases and normalisation weights too")
    args: dict[str, Any] = setting({}, f"further arguments of the optimizer; {INHERITED_ARGS}")


class Schedule(Section):
    """Learning rate as a pure function of the optimizer step (timm's schedules)."""

    name: Literal["constant", "cosine", "multistep", "poly", "step", "tanh", "wsd"] = setting(
        "constant", "shape after the warm-up"
    )
    warmup_epochs: float | None = setting(None, "linear warm-up, epochs", ge=0)
    warmup_steps: int | None = setting(None, "linear warm-up, optimizer steps", ge=0)
    warmup_lr: float = setting(0.0, "learning rate the warm-up starts at", ge=0)
    min_lr: float = setting(0.0, "learning rate the schedule ends at", ge=0)
    decay_rate: float = setting(0.1, "factor of a step (step, multistep) or power (poly)", gt=0)
    decay_epochs: float = setting(30.0, "epochs between steps (step), or length of the decay (wsd)", gt=0)
    milestones_epochs: Epochs = setting((), "epochs at which multistep decays")


class Ema(Section):
    """Exponential moving average of the weights (timm's ModelEmaV3), evaluated next to the raw ones."""

    decay: float | None = setting(
        None, "share of the average that each step keeps, such as 0.999; null is off", ge=0.5, lt=1
    )
    warmup: bool = setting(True, "smaller decay in the first steps")


class Mix(Section):
    """Mixup and CutMix (timm's), a batch at a time; off unless an alpha is above 0."""

    mixup_alpha: float = setting(0.0, "Beta(alpha, alpha) of mixup", ge=0)
    cutmix_alpha: float = setting(0.0, "Beta(alpha, alpha) of CutMix", ge=0)
    probability: float = setting(1.0, "share of the batches that are mixed", ge=0, le=1)
    switch_probability: float = setting(0.5, "share of CutMix where both are on", ge=0, le=1)


class Evaluation(Section):
    """Evaluation on the test split: every image counted exactly once on any number of ranks."""

    every_epochs: int = setting(1, "epochs between evaluations; the last epoch always has one", ge=1)
    per_device_batch_size: int = setting(500, "images a forward pass on each rank", ge=1)
    recalibrate_batch_norm_batches: int = setting(
        0,
        "before evaluating, take BatchNorm statistics again over this many training batches "
        "with dropout off; 0 keeps the running ones",
        ge=0,
    )


class Checkpoint(Section):
    """What is kept under checkpoints/."""

    every_epochs: int | None = setting(1, "epochs between checkpoints; null: none by epoch", ge=1)
    every_steps: int | None = setting(None, "optimizer steps between checkpoints", ge=1)
    keep_last: int = setting(2, "newest checkpoints kept", ge=1)
    keep_best: bool = setting(True, "also keep the one with the best test accuracy")
    best_by: Literal["raw", "ema"] = setting("raw", "which weights' accuracy says what is best")


class Tracking(Section):
    """Console and Weights & Biases. metrics.jsonl is always written."""

    log_every_steps: int = setting(50, "optimizer steps between log lines", ge=1)
    wandb: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto", "auto: online with an API key, offline without one"
    )
    project: str = setting(
        "dual-branch-harness",
        "W&B project, a name without / \\ # ? % :",
        min_length=1,
        max_length=128,
        pattern=r"^[^/\\#?%:]*$",
    )
    entity: str | None = setting(None, "W&B user or team; null: $WANDB_ENTITY, else the key's own")
    run_name: str | None = setting(None, "W&B's name of the run; null: recipe and run directory")
    group: str | None = setting(None, "W&B group; null: recipe and digest of its settings, the same for seeds")
    job_type: str | None = setting(None, "W&B job type; null: train")
    tags: Tags = setting((), "W&B tags of up to 64 letters; none given: model, data source, precision, ranks")
    artifacts: Literal["none", "best", "all"] = setting(
        "none", "checkpoints uploaded to W&B at the end: the best one, or all that are kept"
    )
    predictions_table: bool = setting(
        False, "at the end, the worst misclassified test images and the confusion matrix as W&B tables"
    )


class Recipe(Section):
    """A whole recipe: the root of the YAML file."""

    name: RecipeName = Field(description="names the run's folder; default: the file's name")
    seed: int = setting(0, "of everything random", ge=0, lt=2**31)
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    mix: Mix = Mix()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()


ARGS_SCHEMAS: dict[str, type[BaseModel]] = {"dual_branch": DualBranchArgs, "dual_branch_seed": DualBranchArgs}


def broken_rules(recipe: Recipe) -> list[tuple[str, str, str]]:
    """The rules between keys, which no single field can know: each broken one as (key, what is wrong, hint)."""
    rules = (*_rules_of_data(recipe.data), *_rules_of_length(recipe), *_rules_of_learning_rate(recipe))
    return [(key, what, hint) for is_broken, key, what, hint in rules if is_broken]


Rule = tuple[bool, str, str, str]


def _rules_of_data(data: Data) -> Iterator[Rule]:
    source, path = data.source, data.path
    folder = "data.path: /folder/of/the/images"
    pathless = source in ("parquet", "imagefolder") and path is None
    yield pathless, "data.path", f"the source {source} needs a path", folder
    generated = source in ("digits", "synthetic")
    yield generated and path is not None, "data.path", f"the source {source} reads no files", "Leave data.path out."
    yield path is not None and ("\x00" in path or not path), "data.path", "is no path", folder
    for key, column in (("image_column", data.image_column), ("label_column", data.label_column)):
        hint = "Leave it out, or data.source: parquet."
        yield column is not None and source != "parquet", f"data.{key}", f"the source {source} has no columns", hint
    for key, size_px, usual in (
        ("crop_padding_px", data.crop_padding_px, 4),
        ("cutout_size_px", data.cutout_size_px, 8),
    ):
        what = f"must be smaller than the image ({data.image_size_px} px), got {size_px}"
        yield size_px >= data.image_size_px, f"data.{key}", what, f"It is in pixels, for example data.{key}: {usual}."


def _rules_of_length(recipe: Recipe) -> Iterator[Rule]:
    training, schedule = recipe.training, recipe.schedule
    epochs, steps = training.epochs, training.steps
    yield epochs is steps is None, "training", "says no length", "Give training.epochs or training.steps."
    what = f"the length is given twice (epochs {epochs}, steps {steps})"
    hint = "Set one of them to null, for example training.epochs=null."
    yield epochs is not None and steps is not None, "training.steps", what, hint
    batch, micro_batches = training.global_batch_size, training.gradient_accumulation_steps
    what = f"{batch} is not divisible by gradient_accumulation_steps {micro_batches}"
    yield batch % micro_batches != 0, "training.global_batch_size", what, "Choose a multiple."
    both = schedule.warmup_epochs is not None and schedule.warmup_steps is not None
    yield both, "schedule.warmup_steps", "the warm-up is given twice", "Keep warmup_epochs or warmup_steps."
    for unit, length, warmup in (("epochs", epochs, schedule.warmup_epochs), ("steps", steps, schedule.warmup_steps)):
        what = f"longer than the training ({length} {unit})"
        yield bool(length) and (warmup or 0) > (length or 0), f"schedule.warmup_{unit}", what, "Shorten the warm-up."


def _rules_of_learning_rate(recipe: Recipe) -> Iterator[Rule]:
    schedule, lr, epochs = recipe.schedule, recipe.optimizer.lr, recipe.training.epochs
    for key, value in (("min_lr", schedule.min_lr), ("warmup_lr", schedule.warmup_lr)):
        yield value > lr, f"schedule.{key}", f"above the peak lr {lr}", "Lower it, or raise optimizer.lr."
    if schedule.name in ("step", "multistep"):
        rate, milestones = schedule.decay_rate, schedule.milestones_epochs
        what = f"{rate:g} would multiply the learning rate at each step of the schedule"
        yield rate > 1, "schedule.decay_rate", what, f"To divide by {rate:g}, write {1 / rate:g}."
        key = "schedule.decay_epochs" if schedule.name == "step" else "schedule.milestones_epochs"
        first = schedule.decay_epochs if schedule.name == "step" else min(milestones, default=None)
        yield first is None, key, "multistep needs milestones", "schedule.milestones_epochs: [30, 60]"
        what = f"the first decay, after {first or 0:g} epochs, is beyond the training ({epochs} epochs)"
        hint = "It is in epochs, not steps; for a shorter trial add schedule.name=constant."
        yield bool(epochs) and (first or 0) >= (epochs or 0), key, what, hint
    shrinks_by = lr * recipe.optimizer.weight_decay
    what = f"at the peak lr it would take {shrinks_by:.0%} of the weights at each step"
    yield shrinks_by >= 1, "optimizer.weight_decay", what, "5e-4 is common for sgd, 0.05 for adamw."
    by_ema = recipe.checkpoint.best_by == "ema" and recipe.ema.decay is None
    what = "there are no averaged weights to judge by"
    yield by_ema, "checkpoint.best_by", what, "Set ema.decay, for example 0.999."
