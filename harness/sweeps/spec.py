"""The file of a sweep: which settings are tried, how often, and what is compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from harness.errors import HarnessError, ManyErrors
from harness.recipe import document as yaml_document
from harness.recipe.document import Document, KeyPath
from harness.recipe.explaining import at, explain
from harness.recipe.packaged import locate
from harness.recipe.schema import PositiveInt, Recipe, Section

MAX_RUNS = 10_000
SCHEMA_HINT = "A parameter is {values: [0.1, 0.2]} or, with method random, {min: 1e-5, max: 1e-3, scale: log}."
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Parameter(Section):
    """The values of one setting of the recipe."""

    values: Annotated[tuple[Any, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="the values to try, a list"
    )
    min: float | None = Field(None, description="smallest value of a range (method random)")
    max: float | None = Field(None, description="largest value of a range (method random)")
    scale: Literal["linear", "log"] = Field("linear", description="what is even in a range: values or their logarithms")


class Metric(Section):
    """What the table compares: the figure of a run's epochs."""

    split: Literal["test", "test_ema", "train"] = Field("test", description="split that it is of")
    key: Literal["accuracy", "loss"] = Field("accuracy", description="which figure")
    at: Literal["last", "best"] = Field("last", description="that of the last epoch, or the best of all")
    goal: Literal["maximize", "minimize"] = Field("maximize", description="whether much or little of it is good")


class Sweep(Section):
    """The root of the file."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")] = Field(
        description="names the folder of the runs; default: the file's name"
    )
    recipe: Annotated[str, Field(min_length=1)] = Field(
        description="the recipe to begin with: a path relative to this file, or the name of a packaged one"
    )
    method: Literal["grid", "random"] = Field(
        description="grid: all combinations of values; random: points drawn from them"
    )
    points: PositiveInt | None = Field(None, description="how many points are drawn (method random)")
    sampling_seed: Seed = Field(0, description="of the points that are drawn")
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="each point is trained with each of them; default: the recipe's own seed"
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="settings of the recipe for all points, as {training.epochs: 5}"
    )
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)] = Field(
        description="settings of the recipe that differ between points, by their dotted keys"
    )
    metric: Metric = Metric()


@dataclass(frozen=True)
class SweepFile:
    """A sweep, the file that it was read from, and the line of each key in it."""

    path: Path
    sweep: Sweep
    document: Document

    @property
    def recipe_path(self) -> Path:
        return locate(self.sweep.recipe, self.path.parent)

    def place_of(self, path: KeyPath) -> str:
        """`file:line` of the deepest part of a key that is written in the file."""
        found = at(self.document, str(self.path), path, "", None).where
        return found or str(self.path)


def read_sweep(path: Path) -> SweepFile:
    """Read the file of a sweep.

    Raises:
        HarnessError: all that is wrong with it, each with file:line and a hint; the recipe is not looked at yet.
    """
    document = yaml_document.read(path)
    keys = document.data.keys()
    if keys & {"base", *Recipe.model_fields} - {"name"} and not keys & {"recipe", "method", "parameters"}:
        raise HarnessError("this is a recipe, not a sweep", where=str(path), hint=f"harness train {path}")
    document.data.setdefault("name", path.stem)
    where = str(path)
    sweep: Sweep | None = None
    try:
        sweep = Sweep.model_validate(document.data)
    except ValidationError as error:
        document.errors += [
            explain(e, document, where, Sweep, (), otherwise=SCHEMA_HINT) for e in error.errors(include_url=False)
        ]
    if sweep is not None:
        document.errors += [at(document, where, key, what, hint) for key, what, hint in _broken_rules(sweep)]
    if document.errors or sweep is None:
        raise ManyErrors(where, document.errors)
    return SweepFile(path, sweep, document)


Broken = tuple[KeyPath, str, str]


def _broken_rules(sweep: Sweep) -> Iterator[Broken]:
    """Each broken rule between keys as (key, what is wrong, hint)."""
    if sweep.method == "grid" and sweep.points is not None:
        yield ("points",), "points: a grid has all combinations of its values", "Leave points out, or method: random."
    if sweep.method == "random" and sweep.points is None:
        yield ("method",), "method: random needs a number of points", "points: 20"
    if sweep.seeds is not None and len(set(sweep.seeds)) < len(sweep.seeds):
        yield ("seeds",), "seeds: one is given twice", "Each seed once, for example seeds: [0, 1, 2]."
    if sweep.metric.key == "loss" and sweep.metric.goal == "maximize":
        yield ("metric",), "metric.goal: a loss is good when it is small", "goal: minimize"
    for key, parameter in sweep.parameters.items():
        yield from _broken_parameter(("parameters", key), parameter, sweep)
    yield from _broken_keys(sweep)
    count = _count_runs(sweep)
    if count > MAX_RUNS:
        yield ("parameters",), f"{count:,} runs are more than {MAX_RUNS:,}", "Fewer values, points or seeds."


def _broken_parameter(path: KeyPath, parameter: Parameter, sweep: Sweep) -> Iterator[Broken]:
    name, low, high = ".".join(map(str, path)), parameter.min, parameter.max
    if parameter.values is not None:
        if low is not None or high is not None or "scale" in parameter.model_fields_set:
            yield path, f"{name}: has values and a range", "Give values alone, or min and max."
        for index, value in enumerate(parameter.values):
            if value in parameter.values[:index]:
                yield (*path, "values"), f"{name}: {value!r} is given twice", "Each value once."
            if not _is_plain(value):
                yield (*path, "values"), f"{name}: {value!r} is no finite number", "Give a finite one."
    elif low is None or high is None:
        yield path, f"{name}: needs values, or both min and max", SCHEMA_HINT
    elif sweep.method == "grid":
        yield path, f"{name}: a grid needs values, not a range", "Give values: [...], or method: random."
    elif low >= high:
        yield path, f"{name}: min {low:g} must be below max {high:g}", "Exchange them, or give values."
    elif parameter.scale == "log" and low <= 0:
        yield path, f"{name}: a logarithmic range must begin above 0, not at {low:g}", "For example min: 1e-5."


def _broken_keys(sweep: Sweep) -> Iterator[Broken]:
    for part, keys in (("overrides", sweep.overrides), ("parameters", sweep.parameters)):
        if "seed" in keys:
            yield (part, "seed"), f"{part}.seed: seeds have their own place", "seeds: [0, 1, 2]"
        if "name" in keys:
            yield (part, "name"), f"{part}.name: the sweep's name names the runs", "name: …, above."
    for key in sweep.overrides.keys() & sweep.parameters.keys():
        yield ("overrides", key), f"overrides.{key}: is one of the parameters too", "Keep one of them."


def _is_plain(value: Any) -> bool:
    """Whether a value from the file has no number that is infinite or none."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return not isinstance(value, float) or math.isfinite(value)


def _count_runs(sweep: Sweep) -> int:
    points = sweep.points or 0
    if sweep.method == "grid":
        points = math.prod(len(parameter.values or ()) for parameter in sweep.parameters.values())
    return points * len(sweep.seeds or (0,))
