"""What W&B is told of a record, what a run is called there, and how a server's history is compared."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness.recipe.schema import Recipe
from harness.tracking.identity import identity_of, settings_digest
from harness.tracking.rows import Best, Summaries, result_summary, row_number, values_of
from harness.tracking.wandb_server import compare


def record(kind: str, split: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "split": split, "step": step, "epoch": step / 4, **values}


def test_names_of_a_log_step() -> None:
    values = {"loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "param_norm": 3.0, "images_per_second": 9.5}
    assert values_of(record("step", "train", 2, **values, time_unix_seconds=7.25)) == {
        "step": 2,
        "epoch": 0.5,
        "train/loss": 1.5,
        "lr/learning_rate": 0.1,
        "train/grad_norm": 2.0,
        "train/param_norm": 3.0,
        "perf/images_per_second": 9.5,
        "_timestamp": 7.25,
    }


@pytest.mark.parametrize(
    ("split", "loss", "seconds"),
    [
        ("train", "train/epoch_loss", "perf/epoch_seconds"),
        ("test", "test/loss", "perf/test_seconds"),
        ("test_ema", "test_ema/loss", "perf/test_ema_seconds"),
    ],
)
def test_names_of_an_epoch(split: str, loss: str, seconds: str) -> None:
    assert values_of(record("epoch", split, 4, loss=1, seconds=2)) == {"step": 4, "epoch": 1, loss: 1, seconds: 2}


def test_numbers_that_are_not_finite_are_the_same_made_and_read() -> None:
    made = values_of(record("step", "train", 1, loss=float("nan"), grad_norm=float("inf")))
    read = values_of(record("step", "train", 1, loss="nan", grad_norm="inf"))
    assert math.isnan(made["train/loss"])
    assert math.isnan(read["train/loss"])
    assert made["train/grad_norm"] == read["train/grad_norm"] == math.inf


def test_what_is_no_number_is_left_out() -> None:
    assert values_of(record("step", "train", 1, grad_norm=None, name="x", flag=True)).keys() == {"step", "epoch"}


def test_every_record_has_a_place_and_they_go_up() -> None:
    order = [("step", "train"), ("epoch", "train"), ("epoch", "test"), ("epoch", "test_ema")]
    numbers = [row_number(record(*place, step)) for step in (1, 2) for place in order]
    assert numbers == sorted(set(numbers))
    with pytest.raises(ValueError, match="kind epoch and split validation has no place"):
        row_number(record("epoch", "validation", 1))


def test_the_best_is_the_first_of_equals_of_its_split() -> None:
    best = Best("test")
    assert best.summary() == {}
    assert best.take(record("epoch", "test", 4, accuracy=0.5))
    assert not best.take(record("epoch", "test", 8, accuracy=0.5))
    assert not best.take(record("epoch", "test_ema", 8, accuracy=0.9))
    assert not best.take(record("step", "train", 9, accuracy=0.9))
    assert not best.take({"kind": "epoch", "split": "test", "step": 8})  # another version's
    assert best.summary() == {"best/accuracy": 0.5, "best/epoch": 1, "best/step": 4}


def test_summaries_are_of_all_finite_values() -> None:
    found = Summaries()
    assert found.summary() == {}
    for step, accuracy, loss in ((4, 0.9, 0.5), (8, 0.5, math.nan), (18, 0.7, 0.2), (22, 0.8, 0.4)):
        found.take(record("step", "train", step, accuracy=1.0, images_per_second=step))
        found.take(record("epoch", "test", step, accuracy=accuracy, loss=loss))
    assert found.summary() == {
        "test/accuracy": {"max": 0.9},
        "test/loss": {"min": 0.2},
        "perf/images_per_second": {"mean": pytest.approx(13)},
    }


def test_a_result_is_flat_summary_values() -> None:
    flat = result_summary({"accuracy": 0.5, "ema": None, "best": {"epoch": 2}})
    assert flat == {"result/accuracy": 0.5, "result/best/epoch": 2}


def settings(**changes: Any) -> dict[str, Any]:
    return Recipe(name="digits", **changes).model_dump(mode="json")


def test_a_run_is_named_after_its_recipe() -> None:
    found = identity_of(settings(), run_id="20260101-aaaa", world_size=2)
    assert (found.entity, found.project, found.name) == (None, "dual-branch-harness", "digits-20260101-aaaa")
    assert found.group == f"digits-{settings_digest(settings())}"
    assert found.job_type == "train"
    assert found.tags == ("model:dual_branch_seed", "data:cifar10", "precision:no", "ranks:2")


def test_what_the_recipe_says_wins() -> None:
    tracking = {"entity": "e", "project": "p", "run_name": "n", "group": "g", "job_type": "j", "tags": ["t"]}
    found = identity_of(settings(tracking=tracking), run_id="x", world_size=1)
    assert (found.entity, found.project, found.name, found.group) == ("e", "p", "n", "g")
    assert (found.job_type, found.tags) == ("j", ("t",))


def test_a_tag_is_no_longer_than_the_server_takes() -> None:
    found = identity_of(settings(model={"name": "m" * 90}), run_id="x", world_size=1)
    assert max(map(len, found.tags)) == 64


def test_seeds_are_one_group_and_other_settings_another() -> None:
    digest = settings_digest(settings())
    for same in ({"seed": 7}, {"tracking": {"wandb": "offline"}}, {"data": {"workers": 3}}, {"checkpoint": {}}):
        assert settings_digest(settings(**same)) == digest
    for other in ({"optimizer": {"lr": 0.2}}, {"data": {"flip": "random"}}, {"training": {"epochs": 3}}):
        assert settings_digest(settings(**other)) != digest


RECORDS = [record("step", "train", step, loss=1 / step, images_per_second=step) for step in (1, 2, 3)]
ROWS = [{"_step": row_number(r), "_runtime": 1.0, **values_of(r)} for r in RECORDS]


def test_a_history_that_is_complete_or_cut_off() -> None:
    assert compare(RECORDS, ROWS) == compare([], [])
    assert compare(RECORDS, ROWS[:1]).missing == tuple(RECORDS[1:])
    slower = [{**row, "perf/images_per_second": 1.0} for row in ROWS]
    assert compare(RECORDS, slower).wrong == ()  # a resumed run measures times anew


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ([ROWS[0], ROWS[2]], "it lacks 1 of the records"),
        ([*ROWS, ROWS[2]], "it repeats 1 rows"),
        ([{**ROWS[0], "_step": 5}, *ROWS], "it has 1 rows that"),
        ([{**ROWS[0], "train/loss": 0.9}, *ROWS[1:]], "it has other values in 1 rows"),
        ([{**ROWS[0], "train/loss": "NaN"}, *ROWS[1:]], "it has other values in 1 rows"),
    ],
)
def test_a_history_that_adding_cannot_mend(rows: list[dict[str, Any]], wrong: str) -> None:
    (found,) = compare(RECORDS, rows).wrong
    assert found.startswith(wrong)
