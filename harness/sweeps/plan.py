"""From the file of a sweep to its runs: each with its recipe, checked before anything starts, and its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError, ManyErrors
from harness.recipe import Recipe, load
from harness.recipe.loading import changed_settings, fingerprint, load_variants
from harness.run_directory import runs_of
from harness.sweeps.points import Point, override_text, points_of
from harness.sweeps.spec import SweepFile, read_sweep


@dataclass(frozen=True)
class Trial:
    """A point with a seed: one run.

    Attributes:
        overrides: all that makes the recipe of this run of the sweep's recipe, the seed included.
        recipe: with the overrides.
        directory: of the run, `runs/<sweep>/<point>-seed_<seed>`.
    """

    point: Point
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, in the order in which they are trained: all seeds of a point, then the next point."""

    file: SweepFile
    points: tuple[Point, ...]
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return self.file.sweep.name

    @property
    def folder(self) -> Path:
        return runs_of(self.name)


def plan_sweep(path: str | Path) -> Plan:
    """Read a sweep and check the recipe of every run.

    Raises:
        HarnessError: all that is wrong with the sweep's file, or then with the recipes, each different error once.
    """
    file = read_sweep(Path(path))
    _find_recipe(file)
    points = points_of(file)
    seeds = [(override_text("seed", seed),) for seed in file.sweep.seeds] if file.sweep.seeds else [()]
    pairs = [(point, seed) for point in points for seed in seeds]
    overrides = [(*point.overrides, *seed) for point, seed in pairs]
    found = load_variants(file.recipe_path, overrides)
    recipes = [recipe for recipe in found if isinstance(recipe, Recipe)]
    problems = [error for variant in found if isinstance(variant, ManyErrors) for error in variant.errors]
    errors = _each_once(file, points, problems)
    if file.sweep.metric.split == "test_ema" and any(recipe.ema.decay is None for recipe in recipes):
        errors.append(
            HarnessError(
                "metric.split: test_ema is of averaged weights, and some of the runs have none",
                where=file.place_of(("metric", "split")),
                hint="split: test, or overrides: {ema.decay: 0.999}.",
            )
        )
    if any(recipe.name == file.sweep.name for recipe in recipes):
        errors.append(
            HarnessError(
                f'name: "{file.sweep.name}" is the recipe\'s too, so that `harness train --resume auto` would go on '
                "with runs of the sweep",
                where=file.place_of(("name",)),
                hint=f"name: {file.sweep.name}-sweep",
            )
        )
    if errors:
        raise ManyErrors(str(path), errors)
    folder = runs_of(file.sweep.name)
    trials = tuple(
        Trial(point, recipe.seed, words, recipe, folder / f"{point.id}-seed_{recipe.seed}")
        for (point, _), words, recipe in zip(pairs, overrides, recipes, strict=True)
    )
    _refuse_twins(file, trials)
    return Plan(file, tuple(points), trials)


def check_ranks(plan: Plan, ranks: int) -> None:
    """See that each run's batch can be shared out among the ranks.

    Raises:
        HarnessError: all batches that cannot.
    """
    sizes: dict[tuple[int, int], None] = {}
    for trial in plan.trials:
        training = trial.recipe.training
        if training.global_batch_size % (training.gradient_accumulation_steps * ranks):
            sizes[training.global_batch_size, training.gradient_accumulation_steps] = None
    if sizes:
        listed = ", ".join(f"{size}" + (f" in {steps} micro-batches" if steps > 1 else "") for size, steps in sizes)
        raise HarnessError(
            f"training.global_batch_size cannot be shared out among {ranks} ranks: {listed}",
            where=str(plan.file.path),
            hint="Choose multiples, or another number of ranks.",
        )


def check_unchanged(plan: Plan) -> None:
    """See that what was trained so far is what the sweep asks for: its recipe may have been edited since.

    Raises:
        HarnessError: runs have other settings.
    """
    errors: dict[str, HarnessError] = {}
    for trial in plan.trials:
        file = trial.directory / "recipe.yaml"
        if not file.exists():
            continue
        before = load(file)
        if fingerprint(before) == fingerprint(trial.recipe):
            continue
        changed = changed_settings(before, trial.recipe, other_length=False)
        if changed:
            listed = "; ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in changed.items())
            errors.setdefault(
                listed,
                HarnessError(
                    f"{trial.name} was trained with other settings: {listed}",
                    where=str(trial.directory),
                    hint="Give the sweep another name, or undo the change in the recipe; nothing was overwritten.",
                ),
            )
    if errors:
        raise ManyErrors(str(plan.folder), list(errors.values()))


def _find_recipe(file: SweepFile) -> None:
    if not file.recipe_path.exists():
        raise HarnessError(
            f'there is no recipe "{file.sweep.recipe}"',
            where=file.place_of(("recipe",)),
            hint=f"The path is relative to {file.path.parent}.",
        )


def _each_once(file: SweepFile, points: list[Point], problems: list[HarnessError]) -> list[HarnessError]:
    """Errors of recipes at their lines of the sweep's file; one that several points share is said once."""
    places = _places(file, points)
    found: dict[str, HarnessError] = {}
    for problem in problems:
        where = places.get(problem.where or "", problem.where)
        error = HarnessError(problem.what, where=where, hint=problem.hint or "See the recipe.")
        found.setdefault(error.render(), error)
    return list(found.values())


def _places(file: SweepFile, points: list[Point]) -> Mapping[str, str]:
    """Where in the file each override comes from, by the way recipes name overrides in their errors."""
    sweep = file.sweep
    places = {
        f'override "{override_text(key, value)}"': file.place_of(("overrides", key))
        for key, value in sweep.overrides.items()
    }
    for point in points:
        for key, value in point.values.items():
            place = file.place_of(("parameters", key))
            values = sweep.parameters[key].values
            if values is not None:
                place = file.place_of(("parameters", key, "values", values.index(value)))
            places[f'override "{override_text(key, value)}"'] = place
    return places


def _refuse_twins(file: SweepFile, trials: tuple[Trial, ...]) -> None:
    """Two points with the same resolved recipe would be trained twice, and one would be called better."""
    seen: dict[str, Trial] = {}
    for trial in trials:
        twin = seen.setdefault(fingerprint(trial.recipe), trial)
        if twin is not trial:
            raise HarnessError(
                f"two points are the same training: {twin.point.label()} and {trial.point.label()}",
                where=file.place_of(("parameters",)),
                hint="Write each value once.",
            )
