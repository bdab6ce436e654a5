"""The schema of a recipe: every key there is, its type, its range and what it means.

Keys are the field's standard terms; durations carry their unit in the key. `harness recipe schema`
prints this as a JSON Schema for editors. Unknown keys are refused, values are never coerced.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from harness.recipe.dual_branch_args import DualBranchArgs

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


def cannot_be_meant(what: str, hint: str) -> PydanticCustomError:
    """The error of a value that has the right type and another unit than the key's."""
    return PydanticCustomError("cannot_be_meant", "{what}", {"what": what, "hint": hint})


def _in_unit_interval(values: tuple[float, ...]) -> tuple[float, ...]:
    if min(values) < 0 or max(values) > 1:
        hint = "Pixels are in [0, 1]"
        for whole in (255, 100):
            if min(values) >= 0 and max(values) <= whole:
                hint += f"; divided by {whole} these are {[round(value / whole, 4) for value in values]}"
        raise cannot_be_meant("must be between 0 and 1 in each channel", f"{hint}.")
    return values


def _means(values: tuple[float, ...]) -> tuple[float, ...]:
    if 0 < max(_in_unit_interval(values)) < 1 / 255:
        times = [round(value * 255, 4) for value in values]
        raise cannot_be_meant(
            "are all below one grey level (1/255)", f"Pixels are in [0, 1]; times 255 these are {times}."
        )
    return values


def _deviations(values: tuple[float, ...]) -> tuple[float, ...]:
    if min(_in_unit_interval(values)) < 1 / 255:
        times = [round(value * 255, 4) for value in values]
        hint = "Pixels are in [0, 1]; 0.25 is common." + (
            f" Times 255 these are {times}." if 0 < min(times) <= max(times) <= 1 else ""
        )
        raise cannot_be_meant("must be > 0, and more than one grey level (1/255), in each channel", hint)
    return values


def _share_kept(decay: float) -> float:
    if decay < 0.5:
        raise cannot_be_meant(
            "must be ≥ 0.5: it is the share of the average that each step keeps",
            f"0.999 is common; if each step is to add a share of {decay:g}, write {1 - decay:g}.",
        )
    return decay


# Lists become tuples, so that the whole recipe is immutable.
PerChannel = Annotated[tuple[float, ...], Field(strict=False, min_length=3, max_length=3)]
Tags = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False)]

# Of `args`, which belong to the thing that `name` names.
INHERITED_ARGS = (
    "inherited ones are merged key by key, dropped with another name, and replaced by an override that gives a mapping"
)


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Synthetic(Section):
    """Sizes of the `synthetic` source."""

    train_images: PositiveInt = Field(512, description="images in the training split")
    test_images: PositiveInt = Field(256, description="images in the test split")
    num_classes: Annotated[int, Field(ge=2, le=1000)] = Field(10, description="classes")


class Data(Section):
    """Where images come from and how they are read and augmented."""

    source: Literal["cifar10", "parquet", "imagefolder", "digits", "synthetic"] = Field(
        "cifar10", description="where images come from"
    )
    path: str | None = Field(None, description="folder or file of the source; null looks under $HARNESS_DATA")
    image_column: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="column of the images (parquet); null finds img or image"
    )
    label_column: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="column of the labels (parquet), such as fine_label; null takes label"
    )
    num_classes: PositiveInt | None = Field(None, description="classes the data must have; null takes what it has")
    image_size_px: Annotated[int, Field(ge=4, le=1024)] = Field(32, description="height and width, pixels")
    synthetic: Synthetic = Synthetic()
    loader: Literal["ffcv", "device", "torch"] = Field(
        "ffcv",
        description="ffcv: compiled, fastest on a CPU; device: data resident on the device; torch: DataLoader",
    )
    workers: Annotated[int, Field(ge=0, le=512)] | None = Field(
        None, description="loader threads (ffcv) or processes (torch) per rank; null takes the rank's cores"
    )
    mean: Annotated[PerChannel, AfterValidator(_means)] | None = Field(
        None, description="normalisation mean, pixels in [0, 1]; null measures the training split"
    )
    std: Annotated[PerChannel, AfterValidator(_deviations)] | None = Field(
        None, description="normalisation standard deviation, pixels in [0, 1]; null measures"
    )
    shuffle: bool = Field(True, description="a new order each epoch, a pure function of (seed, epoch)")
    crop_padding_px: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="random crop after padding by this many pixels; 0 is off"
    )
    crop_padding_mode: Literal["zeros", "reflect"] = Field("zeros", description="what the padding holds")
    flip: Literal["none", "random", "alternating"] = Field(
        "none", description="horizontal flip; alternating flips each image in every second epoch"
    )
    cutout_size_px: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="side of the erased square; 0 is off")


class Model(Section):
    """Which network: a dual-branch one or any that timm knows."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        "dual_branch_seed", description="dual_branch, dual_branch_seed, or any timm model"
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description=f"arguments of the model's constructor; {INHERITED_ARGS}"
    )


class Training(Section):
    """Length, batch and arithmetic of the training."""

    epochs: Count | None = Field(None, description="length in epochs; give this or steps")
    steps: Count | None = Field(None, description="length in optimizer steps; give this or epochs")
    global_batch_size: PositiveInt = Field(
        128, description="images an optimizer step, over all ranks and accumulation steps"
    )
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches an optimizer step")
    drop_last: bool = Field(False, description="leave out the last, smaller batch of an epoch")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision, as Accelerate has it")
    memory_format: Literal["contiguous", "channels_last"] = Field(
        "channels_last", description="layout of activations and convolution weights"
    )
    compile: bool = Field(False, description="torch.compile the model")
    kernels: Literal["auto", "plain"] = Field(
        "auto",
        description="on CPUs with a C++ compiler, auto has faster passes of the same functions (for channels_last, "
        "precision no or bf16); plain has torch's own",
    )
    sync_batch_norm: bool = Field(True, description="batch statistics over all ranks, not each rank alone")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the label spread")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest global L2 norm of the gradient; null is off"
    )


class Optimizer(Section):
    """timm's optimizers by their names; `sgd` has no Nesterov momentum unless it is asked for."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        "sgd", description="timm optimizer: sgd, adamw, lamb, muon, …"
    )
    lr: Annotated[float, Field(gt=0)] = Field(0.1, description="peak learning rate for the global batch")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="where the optimizer has one")
    nesterov: bool = Field(False, description="Nesterov momentum, for sgd and its kin")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay")
    decay_norm_and_bias: bool = Field(False, description="apply weight decay to biases and normalisation weights too")
    args: dict[str, Any] = Field(
        default_factory=dict, description=f"further arguments of the optimizer; {INHERITED_ARGS}"
    )


class Schedule(Section):
    """Learning rate as a pure function of the optimizer step (timm's schedules)."""

    name: Literal["constant", "cosine", "multistep", "poly", "step", "tanh", "wsd"] = Field(
        "constant", description="shape after the warm-up"
    )
    warmup_epochs: Annotated[float, Field(ge=0)] | None = Field(None, description="linear warm-up, epochs")
    warmup_steps: Count | None = Field(None, description="linear warm-up, optimizer steps")
    warmup_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate the warm-up starts at")
    min_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate the schedule ends at")
    decay_rate: Annotated[float, Field(gt=0)] = Field(
        0.1, description="factor of a step (step, multistep) or power (poly)"
    )
    decay_epochs: Annotated[float, Field(gt=0)] = Field(
        30.0, description="epochs between steps (step), or length of the decay (wsd)"
    )
    milestones_epochs: Counts = Field((), description="epochs at which multistep decays")


class Ema(Section):
    """Exponential moving average of the weights (timm's ModelEmaV3), evaluated beside the raw ones."""

    decay: Annotated[float, Field(lt=1), AfterValidator(_share_kept)] | None = Field(
        None, description="share of the average that each step keeps, such as 0.999; null is off"
    )
    warmup: bool = Field(True, description="smaller decay in the first steps")


class Mix(Section):
    """Mixup and CutMix (timm's), a batch at a time; off unless an alpha is above 0."""

    mixup_alpha: Annotated[float, Field(ge=0)] = Field(0.0, description="Beta(alpha, alpha) of mixup")
    cutmix_alpha: Annotated[float, Field(ge=0)] = Field(0.0, description="Beta(alpha, alpha) of CutMix")
    probability: Fraction = Field(1.0, description="share of the batches that are mixed")
    switch_probability: Fraction = Field(0.5, description="share of CutMix where both are on")


class Evaluation(Section):
    """Evaluation on the test split: every image counted exactly once on any number of ranks."""

    every_epochs: PositiveInt = Field(1, description="epochs between evaluations; the last epoch always has one")
    per_device_batch_size: PositiveInt = Field(500, description="images a forward pass on each rank")
    recalibrate_batch_norm_batches: Count = Field(
        0,
        description="before evaluating, take BatchNorm statistics anew over this many training batches "
        "with dropout off; 0 keeps the running ones",
    )


class Checkpoint(Section):
    """What is kept under checkpoints/."""

    every_epochs: PositiveInt | None = Field(1, description="epochs between checkpoints; null: none by epoch")
    every_steps: PositiveInt | None = Field(None, description="optimizer steps between checkpoints")
    keep_last: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="also keep the one with the best test accuracy")
    best_by: Literal["raw", "ema"] = Field("raw", description="which weights' accuracy says what is best")


class Tracking(Section):
    """Console and Weights & Biases. metrics.jsonl is always written."""

    log_every_steps: PositiveInt = Field(50, description="optimizer steps between log lines")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with an API key, offline without one"
    )
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]*$")] = Field(
        "dual-branch-harness", description="W&B project, a name without / \\ # ? % :"
    )
    entity: str | None = Field(None, description="W&B user or team; null: $WANDB_ENTITY, else the key's own")
    run_name: str | None = Field(None, description="W&B's name of the run; null: recipe and run directory")
    group: str | None = Field(
        None, description="W&B group; null: recipe and digest of its settings, the same for seeds"
    )
    job_type: str | None = Field(None, description="W&B job type; null: train")
    tags: Tags = Field((), description="W&B tags of up to 64 letters; none given: model, data source, precision, ranks")
    artifacts: Literal["none", "best", "all"] = Field(
        "none", description="checkpoints uploaded to W&B at the end: the best one, or all that are kept"
    )
    predictions_table: bool = Field(
        False, description="at the end, the worst misclassified test images and the confusion matrix as W&B tables"
    )


class Recipe(Section):
    """A whole recipe: the root of the YAML file."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")] = Field(
        description="names the run's folder; default: the file's name"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of everything random")
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
