"""The points of a sweep and their order: pure functions of its file."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from harness.errors import HarnessError, ManyErrors
from harness.recipe import Recipe
from harness.recipe.document import parse_value
from harness.recipe.dual_branch_args import DualBranchArgs
from harness.sweeps.spec import Parameter, Sweep, SweepFile

ID_LETTERS = 10
TRIES_PER_POINT = 100  # until a point that was drawn before gives way to another one
SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True)
class Point:
    """Settings of the parameters, and those of all points.

    Attributes:
        id: digest of all these settings; the same for the same ones, whatever else the file holds.
    """

    id: str
    values: Mapping[str, Any]
    overrides: tuple[str, ...]

    def label(self) -> str:
        """What sets it apart, on one line."""
        return " ".join(override_text(key, value) for key, value in self.values.items())


def points_of(file: SweepFile) -> list[Point]:
    """All points in their order: the last parameter of a grid changes fastest.

    Raises:
        HarnessError: random points are asked for, and there are not so many, or a range has no whole number.
    """
    sweep = file.sweep
    if sweep.method == "grid":
        keys = list(sweep.parameters)
        rows = itertools.product(*(parameter.values or () for parameter in sweep.parameters.values()))
        settings: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in rows]
    else:
        _refuse_empty_ranges(file)
        settings = list(_drawn(sweep))
        if len(settings) < (sweep.points or 0):
            raise HarnessError(
                f"points: {sweep.points} are asked for, and no more than {len(settings)} different ones were found",
                where=file.place_of(("points",)),
                hint="Fewer points, more values, or method: grid.",
            )
    return [_point(sweep.overrides, values) for values in settings]


def override_text(key: str, value: Any) -> str:
    """`key=value` as a recipe's override, on the command line too.

    >>> override_text("optimizer.lr", 1e-05), override_text("model.name", "resnet18"), override_text("a", "1")
    ('optimizer.lr=1e-05', 'model.name=resnet18', 'a="1"')
    """
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", value) is not None
    if plain and parse_value(value, key) == value:
        return f"{key}={value}"
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def whole_numbers(key: str, parameter: Parameter) -> bool:
    """Whether a range is one of whole numbers: where the recipe takes nothing else, or cannot tell and both ends are.

    The recipe can tell of its own keys and of `model.args` of a dual-branch network.
    """
    parts = key.split(".")
    schema: Any = Recipe
    if parts[:2] == ["model", "args"]:
        schema, parts = DualBranchArgs, parts[2:]
    for part in parts:
        fields = getattr(schema, "model_fields", {})
        if part not in fields:
            return all(end is not None and end.is_integer() for end in (parameter.min, parameter.max))
        schema = fields[part].annotation
    leaves = [leaf for leaf in _leaves(schema) if isinstance(leaf, type)]
    return int in leaves and float not in leaves


def _point(common: Mapping[str, Any], values: Mapping[str, Any]) -> Point:
    settings = {**common, **values}
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:ID_LETTERS]
    return Point(digest, values, tuple(override_text(key, value) for key, value in settings.items()))


def _drawn(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Points that differ. Each value is a hash of (sampling seed, key, number), so that more points, or another
    parameter, leave the values of the others as they are."""
    seen: set[str] = set()
    wanted = sweep.points or 0
    for number in range(wanted * TRIES_PER_POINT):
        values = {
            key: _value(parameter, _share(sweep.sampling_seed, key, number), whole_numbers(key, parameter))
            for key, parameter in sweep.parameters.items()
        }
        text = json.dumps(values, sort_keys=True)
        if text not in seen:
            seen.add(text)
            yield values
        if len(seen) == wanted:
            return


def _refuse_empty_ranges(file: SweepFile) -> None:
    """See that a range of a setting that takes whole numbers holds one."""
    errors = [
        HarnessError(
            f"parameters.{key}: takes whole numbers, and there is none from {parameter.min:g} to {parameter.max:g}",
            where=file.place_of(("parameters", key)),
            hint="For example {min: 4, max: 16}.",
        )
        for key, parameter in file.sweep.parameters.items()
        if parameter.min is not None and parameter.max is not None and whole_numbers(key, parameter)
        if math.ceil(parameter.min) > math.floor(parameter.max)
    ]
    if errors:
        raise ManyErrors(str(file.path), errors)


def _share(seed: int, key: str, number: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    digest = hashlib.sha256(f"{seed}\n{key}\n{number}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _value(parameter: Parameter, share: float, whole: bool) -> Any:
    """The value at a share of a parameter's range; whole numbers are each as likely on a linear scale."""
    if parameter.values is not None:
        return parameter.values[int(share * len(parameter.values))]
    assert parameter.min is not None
    assert parameter.max is not None
    low, high = parameter.min, parameter.max
    if whole:
        low, high = math.ceil(low), math.floor(high)
    edge = 0.5 if whole else 0.0  # so that the first and the last number are as likely as the others
    if parameter.scale == "log":
        first, last = math.log(max(low - edge, 0.5) if whole else low), math.log(high + edge)
        value = math.exp(first + share * (last - first))
    else:
        value = low - edge + share * (high - low + 2 * edge)
    value = round(value) if whole else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return min(max(value, low), high)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)
