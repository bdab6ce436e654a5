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
from harness.sweeps.spec import Parameter, Sweep, ends, load_sweep, override_text, points_of

SWEEP = """recipe: tiny.yaml
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
  checkpoint.keep_last: {min: 1, max: 64, scale: log}
  data.flip: {values: [none, random]}
"""


def load(sweep: Path, text: str) -> Sweep:
    sweep.write_text(text)
    return load_sweep("sweep.yaml")


def errors_of(sweep: Path, text: str) -> list[str]:
    with pytest.raises(HarnessError) as caught:
        load(sweep, text)
    error = caught.value
    assert error.exit_code == 2
    return [e.render() for e in error.errors] if isinstance(error, ManyErrors) else [error.render()]


def test_a_grid_has_all_combinations_the_last_parameter_fastest(sweep: Path) -> None:
    found = load_sweep("sweep.yaml")
    points = points_of(found.spec)
    assert [tuple(values.values()) for values in points.values()] == list(
        itertools.product([0.1, 0.2], ["none", "random"])
    )
    assert [(run.point, run.recipe.seed) for run in found.runs] == list(itertools.product(points, (0, 1)))
    run = found.runs[1]
    assert run.overrides == ("training.epochs=1", "optimizer.lr=0.1", "data.flip=none", "seed=1")
    assert (run.recipe.optimizer.lr, run.recipe.training.epochs) == (0.1, 1)
    assert run.directory == Path("runs", "sweep", "f99bf7b9db-seed_1")
    (run, *_) = load(sweep, SWEEP.replace("seeds: [0, 1]\n", "")).runs
    assert (run.overrides[-1], run.name) == ("data.flip=none", "f99bf7b9db-seed_0")  # the recipe's own


def test_ids_are_those_of_the_settings_whatever_else_changes(sweep: Path) -> None:
    """With other ids, all runs of a sweep on disk would start again."""
    ids = list(points_of(load_sweep("sweep.yaml").spec))
    assert ids == ["f99bf7b9db", "ec5dfbe927", "67d578f571", "b8a89f276f"]
    more = SWEEP.replace("[0.1, 0.2]", "[0.3, 0.2, 0.1]").replace("[0, 1]", "[5]")
    assert set(ids) < points_of(load(sweep, f"{more}metric: {{key: accuracy, at: best}}\n").spec).keys()
    assert not set(ids) & points_of(load(sweep, SWEEP.replace("epochs: 1", "epochs: 2")).spec).keys()


def test_random_points_are_a_function_of_the_file_and_more_of_them_keep_the_first(sweep: Path) -> None:
    points = points_of(load(sweep, RANDOM).spec)
    assert {key: tuple(values.values()) for key, values in itertools.islice(points.items(), 2)} == {
        "350854ee44": (0.000117663, 4, 4, "random"),
        "133f79d1ea": (0.000167469, 6, 31, "none"),
    }
    more = points_of(load(sweep, RANDOM.replace("points: 6", "points: 40")).spec)
    assert list(more.items())[:6] == list(points.items())
    assert not points.keys() & points_of(load(sweep, f"{RANDOM}sampling_seed: 1\n").spec).keys()
    decays = [values["optimizer.weight_decay"] for values in more.values()]
    assert all(1e-5 <= decay <= 1e-3 for decay in decays)
    assert 10 < sum(decay < 1e-4 for decay in decays) < 30  # the middle of the logarithms
    sizes = {values["training.global_batch_size"] for values in more.values()}
    assert sizes <= set(range(4, 17))
    assert len(sizes) > 8
    few = "recipe: tiny.yaml\nmethod: random\npoints: 2\nparameters: {data.flip: {values: [none, random]}}\n"
    assert {run.values["data.flip"] for run in load(sweep, few).runs} == {"none", "random"}
    (error,) = errors_of(sweep, few.replace("points: 2", "points: 3"))
    assert "sweep.yaml:3: points: 3 asked for, but only 2 different ones found" in error


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
    found = ends(key, Parameter(min=low, max=high))
    assert found == ((int(low), int(high)) if whole else (low, high))
    assert isinstance(found[0], int) is whole


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(plain | st.text(st.characters(exclude_categories=["C"])), st.lists, max_leaves=5)


@given(values)
def test_a_value_is_the_same_after_an_override(value: object) -> None:
    text = override_text("key", value).removeprefix("key=")
    assert parse_value(text, "key") == value
    assert "\n" not in text


LR = "{values: [0.1, 0.2]}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("method: grid", "methd: grid", ['unknown key "methd"', 'Did you mean "method"?']),
        ("method: grid", "method: grit", ["sweep.yaml:2: method: 'grit' is not one of its values", '"grid"']),
        ("method: grid", "method: grid\npoints: 3", ["sweep.yaml:3: points: a grid has all combinations"]),
        ("method: grid", "method: random", ["sweep.yaml:2: method: random needs a number of points"]),
        (LR, "{value: [0.1]}", ['unknown key "parameters.optimizer.lr.value"', '"parameters.optimizer.lr.values"']),
        (LR, "0.1", ["sweep.yaml:6: parameters.optimizer.lr:", LR]),
        (LR, "{values: []}", ["sweep.yaml:6: parameters.optimizer.lr.values"]),
        (LR, "{min: 0.1, max: 0.2}", ["sweep.yaml:6: parameters.optimizer.lr: a grid needs"]),
        (LR, "{min: 0.1}", ["needs values, or both min and max"]),
        (LR, "{values: [0.1], scale: log}", ["has values and a range"]),
        (LR, "{values: [0.1, 1e-1]}", ["sweep.yaml:6: ", "0.1 is given twice"]),
        (LR, "{values: [[{a: .inf}]]}", ["is no finite number"]),
        ("[0.1, 0.2]", f"[{', '.join(map(str, range(1, 2600)))}]", ["10,396 runs are more than 10,000"]),
        (LR, "\n    values:\n      - 0.1\n      - -0.2", ["sweep.yaml:9: optimizer.lr: must be > 0.0, got -0.2"]),
        ("optimizer.lr:", "optimizer.lrr:", ['sweep.yaml:6: unknown key "optimizer.lrr"', '"optimizer.lr"?']),
        ("optimizer.lr:", "seed:", ["sweep.yaml:6: parameters.seed: seeds have their own place"]),
        ("seeds: [0, 1]", "seeds: [1, 1]", ["sweep.yaml:3: seeds: one is given twice"]),
        ("seeds: [0, 1]", "seeds: [-1]", ["sweep.yaml:3: seeds.0: must be ≥ 0"]),
        ("overrides: {", "overrides: {name: x, ", ["overrides.name: the sweep's name names the runs"]),
        ("overrides: {", "overrides: {optimizer.lr: 3, ", ["optimizer.lr: is one of the parameters too"]),
        ("epochs: 1", "epochs: -1", ["sweep.yaml:4: training.epochs: must be ≥ 0"]),
        ("method: grid", "method: grid\nmetric: {key: loss}", ["metric.goal: a lower loss is better"]),
        ("method: grid", "method: grid\nmetric: {split: test_ema}", ["sweep.yaml:3: metric.split: test_ema"]),
        ("method: grid", "method: grid\nname: tiny", ['sweep.yaml:3: name: "tiny" is the recipe\'s', "tiny-sweep"]),
        ("recipe: tiny.yaml", "recipe: tini.yaml", ['sweep.yaml:1: there is no recipe "tini.yaml"']),
        (LR, "{values: [0.1]}\n  optimizer: {values: [{lr: 0.1}, {}]}", ["two points are the same training"]),
    ],
    ids=lambda case: case[:40] if isinstance(case, str) else "",
)
def test_what_is_wrong_is_reported_once_at_its_line(sweep: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in SWEEP
    errors = errors_of(sweep, SWEEP.replace(old, new))
    matching = [error for error in errors if all(part in error for part in expected)]
    assert len(matching) == 1, errors
    assert all("HINT:" in error for error in errors)


def test_ranges_without_a_value(sweep: Path) -> None:
    for size, expected in (
        ("{min: 4.2, max: 4.8}", "takes whole numbers, and there is none from 4.2 to 4.8"),
        ("{min: 16, max: 4}", "min 16 must be below max 4"),
        ("{min: 0, max: 4, scale: log}", "a logarithmic range must begin above 0, not at 0"),
    ):
        (error,) = errors_of(sweep, RANDOM.replace("{min: 4, max: 16}", size))
        assert f"sweep.yaml:6: parameters.training.global_batch_size: {expected}" in error


def test_a_file_of_the_other_kind_is_one_error(sweep: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "validate", str(sweep)]) == 2
    assert capsys.readouterr().err == f"ERROR {sweep}: this is a sweep, not a recipe\n  HINT: harness sweep {sweep}\n"
    assert main(["sweep", str(tiny)]) == 2
    assert capsys.readouterr().err == f"ERROR {tiny}: this is a recipe, not a sweep\n  HINT: harness train {tiny}\n"


def test_all_errors_of_all_points_come_at_once_and_each_once(sweep: Path) -> None:
    text = SWEEP.replace("[0.1, 0.2]", "[0.1, -1, x]").replace("[none, random]", "[none, upside]")
    errors = errors_of(sweep, text.replace("epochs: 1", "epoch: 1"))  # of 3 × 2 points × 2 seeds
    lines = ["sweep.yaml:4", "sweep.yaml:8", "sweep.yaml:6", "sweep.yaml:6"]
    assert [error.split(": ")[0] for error in errors] == lines, errors
