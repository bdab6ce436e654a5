"""What `state.json` of a checkpoint must look like. A manifest that fits says only that nothing changed by accident."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Number = bool | int | float | str | None  # of an optimizer's settings


class Part(BaseModel):
    """Base of all parts: values are never coerced, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SavedScore(Part):
    """`Score.to_json()`."""

    loss: float
    accuracy: Share
    correct: Count
    total: Count


class SavedEvaluation(Part):
    """An entry of `Progress.last` and `Progress.best`."""

    step: Count
    epoch: Seconds
    test: SavedScore
    test_ema: SavedScore | None = None


class SavedSums(Part):
    """The fields of `Score`."""

    loss_sum: float
    correct: Count
    total: Count


class SavedProgress(Part):
    """The fields of `Progress`."""

    step: Count
    epoch: Count
    step_in_epoch: Count
    epoch_score: SavedSums
    epoch_seconds: Seconds
    epoch_loader_wait_seconds: Seconds = 0.0  # checkpoints from before it was counted lack it
    train_seconds: Seconds
    images_seen: Count
    last: SavedEvaluation | None
    best: SavedEvaluation | None


class SavedOptimizer(Part):
    """What is no tensor in an optimizer's state and groups."""

    scalars: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], dict[str, Number]]
    groups: list[dict[str, Number | list[Number] | list[Count]]]


class SavedState(Part):
    """The whole file."""

    format_version: int
    progress: SavedProgress
    scaler: dict[str, Number] | None
    classes: Annotated[list[str], Field(min_length=1)]
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    data_sha256: dict[str, str]
    optimizer: SavedOptimizer


def wrong_in(state: dict[str, Any]) -> str | None:
    """The first thing that is not as a training writes it, as a phrase; None where all is."""
    try:
        SavedState.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return None
