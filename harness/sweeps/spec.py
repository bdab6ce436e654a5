"""The file of a sweep: what it may say, the points that it makes, and the checked recipe of every run."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from harness.errors import HarnessError, ManyErrors
from harness.recipe import Recipe
from harness.recipe import document as yaml_document
from harness.recipe.document import Document, KeyPath, locate, parse_value
from harness.recipe.explaining import check
from harness.recipe.loading import fingerprint, load_variants
from harness.recipe.schema import DualBranchArgs, RecipeName, Section
from harness.runs import runs_of

MAX_RUNS = 10_000
ID_LETTERS = 10
TRIES_PER_POINT = 100  # draws: some repeat an earlier point
SIGNIFICANT_DIGITS = 6
PARAMETER_HINT = "A parameter is {values: [0.1, 0.2]} or, with method random, {min: 1e-5, max: 1e-3, scale: log}."
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Parameter(Section):
    """The values of one setting of the recipe."""

    values: Annotated[tuple[Any, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="the values to try, a list"
    )
    min: float | None = Field(None, description="smallest value of a range (method random)")
    max: float | None = Field(None, description="largest value of a range (method random)")
    scale: Literal["linear", "log"] = Field(
        "linear", description="what is drawn evenly from a range: values or their logarithms"
    )


class Metric(Section):
    """What the table compares: the figure of a run's epochs."""

    split: Literal["test", "test_ema", "train"] = Field("test", description="split of the data")
    key: Literal["accuracy", "loss"] = Field("accuracy", description="which figure")
    at: Literal["last", "best"] = Field("last", description="that of the last epoch, or the best of all")
    goal: Literal["maximize", "minimize"] = Field("maximize", description="whether higher or lower is better")


class Spec(Section):
    """The root of the file."""

    name: RecipeName = Field(description="names the folder of the runs; default: the file's name")
    recipe: Annotated[str, Field(min_length=1)] = Field(
        description="the recipe to begin with: a path relative to this file, or the name of a packaged one"
    )
    method: Literal["grid", "random"] = Field(
        description="grid: all combinations of values; random: points drawn from them"
    )
    points: int | None = Field(None, ge=1, description="how many points are drawn (method random)")
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
class SweepRun:
    """A point, by its id, trained with one seed: the values of its parameters, and all overrides of the recipe."""

    point: str
    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    recipe: Recipe
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, and its runs in the order of training: all seeds of a point, then the next point."""

    path: Path
    spec: Spec
    document: Document
    runs: tuple[SweepRun, ...] = ()

    @property
    def folder(self) -> Path:
        return runs_of(self.spec.name)

    @property
    def recipe_path(self) -> Path:
        return locate(self.spec.recipe, self.path.parent)

    def error(self, key: KeyPath, what: str, hint: str) -> HarnessError:
        """An error at the line of a key, or of the deepest part of it that is written in the file."""
        return self.document.error_at(key, what, hint)


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep and check the recipe of every run.

    Raises:
        HarnessError: all that is wrong with the sweep's file, or else with the recipes, each different error once.
    """
    sweep = _read(Path(path))
    spec = sweep.spec
    if not sweep.recipe_path.exists():
        hint = f"The path is relative to {sweep.path.parent}."
        raise sweep.error(("recipe",), f'there is no recipe "{spec.recipe}"', hint)
    points = points_of(spec)
    if len(points) < (spec.points or 0):
        what = f"points: {spec.points} asked for, but only {len(points)} different ones found"
        raise sweep.error(("points",), what, "Fewer points, more values, or method: grid.")
    seeds = [[f"seed={seed}"] for seed in spec.seeds] if spec.seeds else [[]]
    variants = [
        (point, (*(override_text(key, value) for key, value in {**spec.overrides, **values}.items()), *seed))
        for point, values in points.items()
        for seed in seeds
    ]
    found = load_variants(sweep.recipe_path, [overrides for _, overrides in variants])
    recipes = [recipe for recipe in found if isinstance(recipe, Recipe)]
    errors = _errors_of_recipes(sweep, (e for many in found if isinstance(many, ManyErrors) for e in many.errors))
    if spec.metric.split == "test_ema" and any(recipe.ema.decay is None for recipe in recipes):
        what = "metric.split: test_ema is of averaged weights, and some of the runs have none"
        errors.append(sweep.error(("metric", "split"), what, "split: test, or overrides: {ema.decay: 0.999}."))
    if any(recipe.name == spec.name for recipe in recipes):
        what = f"name: \"{spec.name}\" is the recipe's too: `harness train --resume auto` would resume the sweep's runs"
        errors.append(sweep.error(("name",), what, f"name: {spec.name}-sweep"))
    if errors:
        raise ManyErrors(str(path), errors)
    runs: dict[str, SweepRun] = {}
    for (point, overrides), recipe in zip(variants, recipes, strict=True):
        run = SweepRun(point, points[point], overrides, recipe, sweep.folder / f"{point}-seed_{recipe.seed}")
        twin = runs.setdefault(fingerprint(recipe), run)
        if twin is not run:
            what = f"two points are the same training: {label(twin.values)} and {label(run.values)}"
            raise sweep.error(("parameters",), what, "Write each value once.")
    return replace(sweep, runs=tuple(runs.values()))


def _read(path: Path) -> Sweep:
    """The file without its runs; the recipe is not looked at yet."""
    document = yaml_document.read(path)
    keys = document.data.keys()
    if keys & {"base", *Recipe.model_fields} - {"name"} and not keys & {"recipe", "method", "parameters"}:
        raise HarnessError("this is a recipe, not a sweep", where=str(path), hint=f"harness train {path}")
    document.data.setdefault("name", path.stem)
    spec = check(Spec, document.data, document, otherwise=PARAMETER_HINT)
    document.errors += [document.error_at(*broken) for broken in (_broken_rules(spec) if spec else ())]
    if spec is None or document.errors:
        raise ManyErrors(str(path), document.errors)
    return Sweep(path, spec, document)


def _errors_of_recipes(sweep: Sweep, found: Iterable[HarnessError]) -> list[HarnessError]:
    """What is wrong with recipes, at the lines of the sweep's file; each once, however many runs it is in."""
    spec = sweep.spec
    keys: dict[str, KeyPath] = {override_text(key, value): ("overrides", key) for key, value in spec.overrides.items()}
    for key, parameter in spec.parameters.items():
        for index, value in enumerate(parameter.values or ()):
            keys[override_text(key, value)] = ("parameters", key, "values", index)
    errors: dict[str, HarnessError] = {}
    for error in found:
        where = error.where
        if override := re.fullmatch(r'override "((.*?)=.*)"', where or "", re.DOTALL):
            where = sweep.error(keys.get(override[1], ("parameters", override[2])), "", "").where
        placed = HarnessError(error.what, where=where, hint=error.hint or "See the recipe.")
        errors.setdefault(placed.render(), placed)
    return list(errors.values())


# --- points


def points_of(spec: Spec) -> dict[str, dict[str, Any]]:
    """The values of each point by its id, in order: the last parameter of a grid changes fastest.

    Random points are fewer than asked for where no more different ones were found.
    """
    parameters = spec.parameters
    if spec.method == "grid":
        rows = itertools.product(*(parameter.values or () for parameter in parameters.values()))
        drawn: Iterator[dict[str, Any]] = (dict(zip(parameters, row, strict=True)) for row in rows)
    else:
        drawn = (
            {key: _draw(spec.sampling_seed, key, number, parameter) for key, parameter in parameters.items()}
            for number in range((spec.points or 0) * TRIES_PER_POINT)
        )
    points: dict[str, dict[str, Any]] = {}
    for values in drawn:
        text = json.dumps({**spec.overrides, **values}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        points.setdefault(hashlib.sha256(text.encode()).hexdigest()[:ID_LETTERS], values)
        if len(points) == spec.points:
            break
    return points


def _draw(sampling_seed: int, key: str, number: int, parameter: Parameter) -> Any:
    """A value of point `number`: a hash, so that more points, or another parameter, leave it as it is."""
    digest = hashlib.sha256(f"{sampling_seed}\n{key}\n{number}".encode()).digest()
    share = (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # in [0, 1), 53 random bits
    if parameter.values is not None:
        return parameter.values[int(share * len(parameter.values))]
    low, high = ends(key, parameter)
    whole = isinstance(low, int)
    edge = 0.5 if whole else 0.0  # so that the first and the last whole number are as likely as the others
    if parameter.scale == "log":
        first, last = math.log(low - edge), math.log(high + edge)
        value = math.exp(first + share * (last - first))
    else:
        value = low - edge + share * (high - low + 2 * edge)
    value = round(value) if whole else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return min(max(value, low), high)


def ends(key: str, parameter: Parameter) -> tuple[float, float]:
    """The first and last value of a range, both `int` where the setting takes whole numbers only.

    The schema of recipes, and of a dual-branch network's `model.args`, decides; where it is silent, whole ends do.
    """
    low, high = parameter.min, parameter.max
    assert low is not None
    assert high is not None
    schema, parts = (DualBranchArgs, key.split(".")[2:]) if key.startswith("model.args.") else (Recipe, key.split("."))
    annotation: Any = schema
    for part in parts:
        field = getattr(annotation, "model_fields", {}).get(part)
        annotation = None if field is None else field.annotation
    types = _types_of(annotation)
    whole = int in types and float not in types
    if annotation is None:
        whole = low.is_integer() and high.is_integer()
    return (math.ceil(low), math.floor(high)) if whole else (low, high)


def _types_of(annotation: Any) -> list[Any]:
    """The types that an annotation is made of."""
    return [leaf for part in get_args(annotation) for leaf in _types_of(part)] or [annotation]


def label(values: Mapping[str, Any]) -> str:
    """The values of a point on one line."""
    return " ".join(override_text(key, value) for key, value in values.items())


def override_text(key: str, value: Any) -> str:
    """`key=value` as a recipe's override, on the command line too.

    >>> override_text("optimizer.lr", 1e-05), override_text("model.name", "resnet18"), override_text("a", "1")
    ('optimizer.lr=1e-05', 'model.name=resnet18', 'a="1"')
    """
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", value) is not None
    text = value if plain and parse_value(value, key) == value else json.dumps(value, ensure_ascii=False)
    return f"{key}={text}"


# --- rules between keys

Broken = tuple[KeyPath, str, str]  # key, what is wrong, hint


def _broken_rules(spec: Spec) -> Iterator[Broken]:
    grid, points, seeds = spec.method == "grid", spec.points, spec.seeds or (0,)
    if grid and points is not None:
        yield ("points",), "points: a grid has all combinations of its values", "Leave points out, or method: random."
    if not grid and points is None:
        yield ("method",), "method: random needs a number of points", "points: 20"
    if len(set(seeds)) < len(seeds):
        yield ("seeds",), "seeds: one is given twice", "Each seed once, for example seeds: [0, 1, 2]."
    if spec.metric.key == "loss" and spec.metric.goal == "maximize":
        yield ("metric",), "metric.goal: a lower loss is better", "goal: minimize"
    for key, parameter in spec.parameters.items():
        for part, what, hint in _broken_parameter(key, parameter, grid):
            yield ("parameters", key, *part), f"parameters.{key}: {what}", hint
    for section, keys in (("overrides", spec.overrides), ("parameters", spec.parameters)):
        if "seed" in keys:
            yield (section, "seed"), f"{section}.seed: seeds have their own place", "seeds: [0, 1, 2]"
        if "name" in keys:
            yield (section, "name"), f"{section}.name: the sweep's name names the runs", "name: …, above."
    for key in spec.overrides.keys() & spec.parameters.keys():
        yield ("overrides", key), f"overrides.{key}: is one of the parameters too", "Keep one of them."
    count = len(seeds) * (points or math.prod(len(p.values or ()) for p in spec.parameters.values()))
    if count > MAX_RUNS:
        yield ("parameters",), f"{count:,} runs are more than {MAX_RUNS:,}", "Fewer values, points or seeds."


def _broken_parameter(key: str, parameter: Parameter, grid: bool) -> Iterator[Broken]:
    """Those within a parameter, whose key is left out."""
    low, high, values = parameter.min, parameter.max, parameter.values or ()
    if values and (low is not None or high is not None or "scale" in parameter.model_fields_set):
        yield (), "has values and a range", "Give values alone, or min and max."
    for index, value in enumerate(values):
        if value in values[:index]:
            yield ("values",), f"{value!r} is given twice", "Each value once."
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            yield ("values",), f"{value!r} is no finite number", "Give a finite one."
    if values:
        return
    if low is None or high is None:
        yield (), "needs values, or both min and max", PARAMETER_HINT
    elif grid:
        yield (), "a grid needs values, not a range", "Give values: [...], or method: random."
    elif low >= high:
        yield (), f"min {low:g} must be below max {high:g}", "Swap them, or give values."
    elif parameter.scale == "log" and low <= 0:
        yield (), f"a logarithmic range must begin above 0, not at {low:g}", "For example min: 1e-5."
    elif operator.gt(*ends(key, parameter)):
        what = f"takes whole numbers, and there is none from {low:g} to {high:g}"
        yield (), what, "For example {min: 4, max: 16}."
