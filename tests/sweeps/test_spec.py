"""The file of a sweep: its errors, all at once and at their lines, and its points, a pure function of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import main
from harness.errors import HarnessError, ManyErrors
from harness.recipe.document import parse_value
from harness.sweeps.plan import Plan, check_ranks, check_unchanged, plan_sweep
from harness.sweeps.points import override_text, points_of, whole_numbers
from harness.sweeps.spec import Parameter

GRID = """recipe: tiny.yaml
method: grid
seeds: [0, 1]
overrides: {training.epochs: 1}
parameters:
  optimizer.lr: {values: [0.1, 0.2]}
  data.flip:
    values: [none, random]
"""
RANDOM = """recipe: tiny.yaml
method: random
points: 6
parameters:
  optimizer.weight_decay: {min: 1e-5, max: 1e-3, scale: log}
  training.global_batch_size: {min: 4, max: 16}
  data.flip: {values: [none, random]}
"""


def write(tiny: Path, text: str) -> Path:
    path = tiny.with_name("sweep.yaml")
    path.write_text(text)
    return path


def plan_of(tiny: Path, text: str) -> Plan:
    return plan_sweep(write(tiny, text))


def errors_of(tiny: Path, text: str) -> list[str]:
    with pytest.raises(HarnessError) as caught:
        plan_of(tiny, text)
    error = caught.value
    assert error.exit_code == 2
    return [e.render() for e in error.errors] if isinstance(error, ManyErrors) else [error.render()]


def test_a_grid_has_all_combinations_the_last_parameter_fastest(tiny: Path) -> None:
    plan = plan_of(tiny, GRID)
    values = [tuple(point.values.values()) for point in plan.points]
    assert values == list(itertools.product([0.1, 0.2], ["none", "random"]))
    assert [(t.point.id, t.seed) for t in plan.trials] == [(p.id, seed) for p in plan.points for seed in (0, 1)]
    first = plan.trials[1]
    assert first.overrides == ("training.epochs=1", "optimizer.lr=0.1", "data.flip=none", "seed=1")
    assert (first.recipe.optimizer.lr, first.recipe.training.epochs, first.recipe.seed) == (0.1, 1, 1)
    assert first.directory == Path("runs", "sweep", f"{first.point.id}-seed_1")


def test_ids_are_those_of_the_settings_whatever_else_changes(tiny: Path) -> None:
    ids = [point.id for point in plan_of(tiny, GRID).points]
    assert ids == ["f99bf7b9db", "ec5dfbe927", "67d578f571", "b8a89f276f"]  # other ones would start all runs anew
    more = GRID.replace("[0.1, 0.2]", "[0.3, 0.2, 0.1]").replace("[0, 1]", "[5]")
    assert set(ids) < {point.id for point in plan_of(tiny, f"{more}metric: {{key: accuracy, at: best}}\n").points}
    other = GRID.replace("epochs: 1", "epochs: 2")
    assert not set(ids) & {point.id for point in plan_of(tiny, other).points}


def test_random_points_are_the_same_each_time_and_more_of_them_keep_the_first(tiny: Path) -> None:
    values = [dict(point.values) for point in plan_of(tiny, RANDOM).points]
    assert values == [dict(point.values) for point in plan_of(tiny, RANDOM).points]
    more = [dict(point.values) for point in plan_of(tiny, RANDOM.replace("points: 6", "points: 40")).points]
    assert more[:6] == values
    other = [dict(point.values) for point in plan_of(tiny, f"{RANDOM}sampling_seed: 1\n").points]
    assert other != values
    decays = [float(str(row["optimizer.weight_decay"])) for row in more]
    assert all(1e-5 <= decay <= 1e-3 for decay in decays)
    assert 10 < sum(decay < 1e-4 for decay in decays) < 30  # the middle of the logarithms
    sizes = {row["training.global_batch_size"] for row in more}
    assert sizes <= set(range(4, 17))
    assert len(sizes) > 8


def test_random_points_differ(tiny: Path) -> None:
    text = "recipe: tiny.yaml\nmethod: random\npoints: 2\nparameters: {data.flip: {values: [none, random]}}\n"
    assert {point.values["data.flip"] for point in plan_of(tiny, text).points} == {"none", "random"}
    (error,) = errors_of(tiny, text.replace("points: 2", "points: 3"))
    assert "sweep.yaml:3: points: 3 are asked for, and no more than 2 different ones were found" in error


def test_a_range_without_a_whole_number_is_refused_where_it_needs_one(tiny: Path) -> None:
    errors = errors_of(tiny, RANDOM.replace("{min: 4, max: 16}", "{min: 4.2, max: 4.8}"))
    assert ["parameters.training.global_batch_size: takes whole numbers" in error for error in errors] == [True]


@pytest.mark.parametrize(
    ("key", "low", "high", "whole"),
    [
        ("optimizer.lr", 0, 1, False),  # written as whole numbers, and yet a rate
        ("training.global_batch_size", 1.0, 2.5, True),
        ("checkpoint.every_steps", 1, 2, True),
        ("model.args.dropout", 0, 1, False),
        ("model.args.head_width", 8, 64, True),
        ("optimizer.args.k", 2, 9, True),
        ("optimizer.args.k", 2, 9.5, False),
    ],
)
def test_whole_numbers_are_for_settings_that_take_them(key: str, low: float, high: float, whole: bool) -> None:
    assert whole_numbers(key, Parameter(min=low, max=high)) is whole


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(plain | st.text(st.characters(exclude_categories=["C"])), st.lists, max_leaves=5)


@given(values)
def test_a_value_is_the_same_behind_an_override(value: object) -> None:
    text = override_text("key", value).removeprefix("key=")
    assert parse_value(text, "key") == value
    assert "\n" not in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("method: grid", "methd: grid"), ['unknown key "methd"', 'Did you mean "method"?']),
        (("method: grid", "method: grit"), ["sweep.yaml:2: method: 'grit' is not one of its values", '"grid"']),
        (("method: grid", "method: grid\npoints: 3"), ["sweep.yaml:3: points: a grid has all combinations"]),
        (("method: grid", "method: random"), ["sweep.yaml:2: method: random needs a number of points"]),
        (
            ("{values: [0.1, 0.2]}", "{value: [0.1]}"),
            ['unknown key "parameters.optimizer.lr.value"', '"parameters.optimizer.lr.values"'],
        ),
        (("{values: [0.1, 0.2]}", "0.1"), ["sweep.yaml:6: parameters.optimizer.lr:", "{values: [0.1, 0.2]}"]),
        (("{values: [0.1, 0.2]}", "{values: []}"), ["sweep.yaml:6: parameters.optimizer.lr.values"]),
        (("{values: [0.1, 0.2]}", "{min: 0.1, max: 0.2}"), ["sweep.yaml:6: parameters.optimizer.lr: a grid needs"]),
        (("{values: [0.1, 0.2]}", "{min: 0.1}"), ["needs values, or both min and max"]),
        (("{values: [0.1, 0.2]}", "{values: [0.1], scale: log}"), ["has values and a range"]),
        (("{values: [0.1, 0.2]}", "{values: [0.1, 1e-1]}"), ["sweep.yaml:6: ", "0.1 is given twice"]),
        (("{values: [0.1, 0.2]}", "{values: [.inf]}"), ["is no finite number"]),
        (("seeds: [0, 1]", "seeds: [1, 1]"), ["sweep.yaml:3: seeds: one is given twice"]),
        (("seeds: [0, 1]", "seeds: [-1]"), ["sweep.yaml:3: seeds.0: must be ≥ 0"]),
        (("overrides: {", "overrides: {seed: 3, "), ["overrides.seed: seeds have their own place"]),
        (("overrides: {", "overrides: {optimizer.lr: 3, "), ["optimizer.lr: is one of the parameters too"]),
        (("method: grid", "method: grid\nmetric: {key: loss}"), ["metric.goal: a loss is good when it is small"]),
        (("method: grid", "method: grid\nmetric: {split: test_ema}"), ["sweep.yaml:3: metric.split: test_ema"]),
        (
            ("method: grid", "method: grid\nname: tiny"),
            ['sweep.yaml:3: name: "tiny" is the recipe\'s too', "tiny-sweep"],
        ),
        (("recipe: tiny.yaml", "recipe: tini.yaml"), ['sweep.yaml:1: there is no recipe "tini.yaml"']),
        (
            ("optimizer.lr:", "optimizer.lrr:"),
            ['sweep.yaml:6: unknown key "optimizer.lrr"', 'Did you mean "optimizer.lr"?'],
        ),
        (("[0.1, 0.2]", "[0.1, -0.2]"), ["sweep.yaml:6: optimizer.lr: must be > 0.0, got -0.2"]),
        (("epochs: 1", "epochs: -1"), ["sweep.yaml:4: training.epochs: must be ≥ 0"]),
        (("[0.1, 0.2]", f"[{', '.join(map(str, range(1, 2600)))}]"), ["10,396 runs are more than 10,000"]),
    ],
    ids=lambda case: case[1][:40] if isinstance(case, tuple) else "",
)
def test_what_is_wrong_is_told_once_at_its_line(tiny: Path, change: tuple[str, str], expected: list[str]) -> None:
    assert change[0] in GRID
    errors = errors_of(tiny, GRID.replace(*change))
    matching = [error for error in errors if all(part in error for part in expected)]
    assert len(matching) == 1, errors
    assert all("HINT:" in error for error in errors)


def test_a_file_of_the_other_kind_is_one_error(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write(tiny, GRID)
    assert main(["recipe", "validate", str(sweep)]) == 2
    assert capsys.readouterr().err == f"ERROR {sweep}: this is a sweep, not a recipe\n  HINT: harness sweep {sweep}\n"
    assert main(["sweep", str(tiny)]) == 2
    assert capsys.readouterr().err == f"ERROR {tiny}: this is a recipe, not a sweep\n  HINT: harness train {tiny}\n"


def test_all_errors_of_all_points_come_at_once_and_each_once(tiny: Path) -> None:
    text = GRID.replace("[0.1, 0.2]", "[0.1, -1, x]").replace("[none, random]", "[none, upside]")
    errors = errors_of(tiny, text.replace("epochs: 1", "epoch: 1"))
    assert len(errors) == 4, errors  # of 3 × 2 points × 2 seeds
    assert [error.split(": ")[0].rpartition("/")[2] for error in errors] == [
        "sweep.yaml:4", "sweep.yaml:8", "sweep.yaml:6", "sweep.yaml:6"
    ]  # fmt: skip


def test_points_that_are_the_same_training_are_refused(tiny: Path) -> None:
    text = (
        "recipe: tiny.yaml\nmethod: grid\nparameters:\n  optimizer: {values: [{lr: 0.1}, {lr: 0.1, momentum: 0.9}]}\n"
    )
    (error,) = errors_of(tiny, text)
    assert "sweep.yaml:3: two points are the same training" in error


def test_batches_must_go_with_the_ranks(tiny: Path) -> None:
    plan = plan_of(tiny, GRID)
    check_ranks(plan, 2)
    with pytest.raises(HarnessError, match="global_batch_size cannot be shared out among 3 ranks: 16") as caught:
        check_ranks(plan, 3)
    assert caught.value.hint


def test_runs_of_another_recipe_are_not_gone_on_with(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.recipe.loading import resolved_yaml

    monkeypatch.chdir(tiny.parent)
    plan = plan_of(tiny, GRID)
    run = plan.trials[0].directory
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(resolved_yaml(plan.trials[0].recipe))
    check_unchanged(plan)
    tiny.write_text(tiny.read_text().replace("log_every_steps: 1", "log_every_steps: 2"))
    check_unchanged(plan_sweep("sweep.yaml"))  # how a training is told of does not change it
    tiny.write_text(tiny.read_text().replace("dropout: 0.2", "dropout: 0.3"))
    with pytest.raises(ManyErrors, match=r"other settings: model\.args\.dropout: 0\.2 → 0\.3"):
        check_unchanged(plan_sweep("sweep.yaml"))


def test_the_order_of_points_is_that_of_the_file(tiny: Path) -> None:
    plan = plan_of(tiny, GRID)
    assert points_of(plan.file) == list(plan.points)
