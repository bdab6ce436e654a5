"""Groups of runs, what their recipes differ in, and their figures, from runs written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.comparing.groups import (
    NOT_SET,
    differing_settings,
    group_runs,
    headline_figures,
    recorded_accuracy,
)
from harness.runs import Run, open_run
from tests.handmade import write_run


def run_of(folder: Path, accuracies: tuple[float, ...] = (0.5, 0.6), **settings: object) -> Run:
    number = len(list(folder.glob("*/*")))
    return open_run(write_run(folder / "small" / f"run-{number}", accuracies, settings=settings))


def test_the_seed_the_name_and_tracking_do_not_make_another_group(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path, seed=0, optimizer={"lr": 0.1}),
        run_of(tmp_path, seed=0, optimizer={"lr": 0.2}),
        run_of(tmp_path, seed=1, optimizer={"lr": 0.1}, name="other", tracking={"tags": ["x"]}),
        run_of(tmp_path, seed=1, optimizer={"lr": 0.1, "momentum": 0.9}),
    ]
    groups = group_runs(runs)
    assert [(g.letter, [r.run_id for r in g.runs]) for g in groups] == [
        ("A", ["run-0", "run-2"]),
        ("B", ["run-1"]),
        ("C", ["run-3"]),
    ]
    assert groups[0].seeds == [0, 1]
    assert groups[0].name == "small, other"
    assert differing_settings(groups) == {
        "optimizer.lr": [0.1, 0.2, 0.1],
        "optimizer.momentum": [NOT_SET, NOT_SET, 0.9],
    }


def test_values_that_print_alike_are_told_apart(tmp_path: Path) -> None:
    groups = group_runs([run_of(tmp_path, a="1"), run_of(tmp_path, a=1), run_of(tmp_path, a=True)])
    assert len(groups) == 3
    assert differing_settings(groups) == {"a": ["1", 1, True]}


def test_runs_of_unknown_recipes_are_groups_of_their_own(tmp_path: Path) -> None:
    runs = [run_of(tmp_path), run_of(tmp_path), run_of(tmp_path)]
    for run in runs[1:]:
        (run.path / "recipe.yaml").write_text("[")
    groups = group_runs([open_run(run.path) for run in runs])
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    assert differing_settings(groups) == {}


def test_precision_no_is_a_word(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (run.path / "recipe.yaml").write_text("training: {precision: no, lr: 1e-3}\n")
    groups = group_runs([open_run(run.path)])
    assert groups[0].settings == {"training.precision": "no", "training.lr": 0.001}


def test_figures_by_hand(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, (0.5, 0.7, 0.6)), run_of(tmp_path, (0.5, 0.5, 0.8)), run_of(tmp_path, lr=1)]
    figures = {figure.key: figure for figure in headline_figures(group_runs(runs))}
    assert figures["last_accuracy"].values == {"A": [0.6, 0.8], "B": [0.6]}
    assert figures["best_accuracy"].values["A"] == [0.7, 0.8]
    assert figures["last_loss"].values["A"] == pytest.approx([1.4, 1.2])
    assert figures["seconds"].values["A"] == [100, 100]
    assert figures["images_per_second"].values["A"] == [900, 900]
    assert figures["parameters"].values["B"] == [1234]
    assert "last_ema_accuracy" not in figures
    told = figures["last_accuracy"].to_json()["groups"]
    assert told["A"]["n"] == 2
    assert told["A"]["mean"] == pytest.approx(0.7)
    assert told["A"]["standard_deviation"] == pytest.approx(0.02**0.5)  # (0.1² + 0.1²) / (2 - 1)
    assert told["B"]["standard_deviation"] is None


def test_figures_of_a_run_that_grows_come_from_its_records(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "small" / "run", (0.5, 0.6), finished=False))
    figures = {figure.key: figure.values["A"] for figure in headline_figures(group_runs([run]))}
    assert figures["seconds"] == [100]  # two epochs of 50
    assert figures["images_per_second"] == [1000]
    assert "parameters" not in figures


def test_the_recorded_accuracy_of_a_checkpoint(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "small" / "run", (0.5, 0.7, 0.6), ema=True))
    assert recorded_accuracy(run, "last", "raw") == 0.6
    assert recorded_accuracy(run, "best", "raw") == 0.7
    assert recorded_accuracy(run, "best", "ema") == pytest.approx(0.71)
    assert (
        recorded_accuracy(open_run(write_run(tmp_path / "small" / "none", (), finished=False)), "last", "raw") is None
    )


def test_letters_go_on_after_z(tmp_path: Path) -> None:
    groups = group_runs([run_of(tmp_path, a=i) for i in range(28)])
    assert [group.letter for group in groups[24:]] == ["Y", "Z", "A2", "B2"]
