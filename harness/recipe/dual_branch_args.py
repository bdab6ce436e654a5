"""Settings of the dual-branch family, typed and validated. The defaults are the seed's network.

No torch here: a recipe's `model.args` is checked against this class before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from pydantic_core import ErrorDetails, PydanticCustomError

from harness.errors import HarnessError, ManyErrors, nearest

# Lists become tuples, so that the settings are immutable; the numbers inside are never coerced.
Width = Annotated[int, Field(ge=1, le=8192)]
Widths = Annotated[tuple[Width, ...], Field(strict=False)]
UnitWidths = Annotated[tuple[Width, ...], Field(strict=False, min_length=1)]
Dilation = Annotated[int, Field(ge=1, le=64)]
UnitDilations = Annotated[tuple[Dilation, ...], Field(strict=False, min_length=1)]

DILATION_FORMS = "one number for all, one for each block, or a list of one for each unit of a block (1 to 64)"


class DualBranchArgs(BaseModel):
    """What shapes a dual-branch network, apart from the data's image size, channels and classes.

    Both branches of a block have the same unit widths. Raises pydantic's ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    widths: Annotated[tuple[UnitWidths, ...], Field(strict=False)] = Field(
        ((32, 64, 128), (64, 128, 256), (128, 256, 256)),
        description="output channels of each unit: a list for each block, both branches alike",
    )
    dilations: Dilation | Annotated[tuple[Dilation | UnitDilations, ...], Field(strict=False)] = Field(
        2, description=f"dilation of the dilated branch, in taps: {DILATION_FORMS}"
    )
    transition_widths: Widths = Field(
        (32, 64),
        description="channels after each transition (2×2 max-pooling, 1×1 convolution) between blocks",
    )
    head_width: Width = Field(64, description="channels between the head's two 1×1 convolutions")
    merge: Literal["sum", "concat"] = Field("sum", description="how the outputs of the two branches join")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.25, description="share of activations dropped at the end of each unit"
    )
    norm: Literal["batch", "group", "layer", "none"] = Field(
        "batch", description="normalisation in each unit; layer: over the channels of each pixel"
    )
    activation: Literal[
        "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish", "hard_swish"
    ] = Field("relu", description="activation in each unit, by timm's names")
    stem: Width | None = Field(
        None, description="channels of a 3×3 convolution, norm, activation before the first block; null: none"
    )

    @field_validator("widths", mode="after")
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
                raise PydanticCustomError(
                    "dilations", f"block {block} has {len(entry)} dilations and {len(units)} units in widths"
                )
        return value

    @field_validator("transition_widths", mode="after")
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
    """Settings as typed ones.

    Raises:
        HarnessError: an unknown name (an UnknownSetting), or all that is wrong with the values, in one message.
    """
    for name in settings:
        if name not in DualBranchArgs.model_fields:
            hint = nearest(name, DualBranchArgs.model_fields)
            raise UnknownSetting(f'the dual-branch network has no setting "{name}"', hint=hint)
    try:
        return DualBranchArgs.model_validate(dict(settings))
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors(include_url=False)]
        raise problems[0] if len(problems) == 1 else ManyErrors("dual_branch", problems) from None


def _explain(error: ErrorDetails) -> HarnessError:
    name = str(error["loc"][0])
    key = ".".join(map(str, error["loc"]))
    message = error["msg"][0].lower() + error["msg"][1:]
    given = repr(error["input"])
    given = given if len(given) <= 60 else given[:57] + "…"
    return HarnessError(f"{key}: {message}, got {given}", hint=DualBranchArgs.model_fields[name].description)
