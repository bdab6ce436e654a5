"""`harness compare`: groups and figures of runs written by hand, and of real trainings what the runs themselves say."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.report.compare import (
    NOT_SET,
    Answers,
    Figure,
    compare,
    differing_settings,
    group_runs,
    headline_figures,
    why_not_paired,
)
from harness.report.compare_page import comparison_page
from harness.report.compare_text import p_text, points, render, spread_text
from harness.report.significance import over_images, over_seeds
from harness.report.terminal import QUANTITIES, draw_runs
from harness.runs import Run, open_run
from harness.training.inference import predict_test_split
from tests.handmade import ANY_CONTENT, write_contents, write_run

NAMES = ("a-0", "a-1", "a-2", "b-0", "b-1", "b-2")


@pytest.fixture
def runs(seeds: Path, tmp_path: Path) -> Path:
    """A copy of the runs, to be changed at will."""
    return Path(shutil.copytree(seeds, tmp_path / "runs"))


def paths(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names or NAMES]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run_of(folder: Path, accuracies: tuple[float, ...] = (0.5, 0.6), **settings: object) -> Run:
    number = len(list(folder.glob("*/*")))
    return open_run(write_run(folder / "small" / f"run-{number}", accuracies, settings=settings))


# --- groups and figures


def test_runs_of_one_experiment_are_a_group(tmp_path: Path) -> None:
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
    assert groups[0].name == "small, other"
    assert differing_settings(groups) == {
        "optimizer.lr": [0.1, 0.2, 0.1],
        "optimizer.momentum": [NOT_SET, NOT_SET, 0.9],
    }


def test_values_that_print_alike_are_told_apart(tmp_path: Path) -> None:
    groups = group_runs([run_of(tmp_path, a="1"), run_of(tmp_path, a=1), run_of(tmp_path, a=True)])
    assert differing_settings(groups) == {"a": ["1", 1, True]}
    many = group_runs([run_of(tmp_path, a=i) for i in range(28)])
    assert [group.letter for group in many[24:]] == ["Y", "Z", "A2", "B2"]


def test_runs_of_unknown_recipes_are_groups_of_their_own(tmp_path: Path) -> None:
    runs = [run_of(tmp_path), run_of(tmp_path), run_of(tmp_path)]
    for run in runs[1:]:
        (run.path / "recipe.yaml").write_text("[")
    groups = group_runs([open_run(run.path) for run in runs])
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    assert differing_settings(groups) == {}


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
    assert told["A"]["mean"] == pytest.approx(0.7)
    assert told["A"]["standard_deviation"] == pytest.approx(0.02**0.5)  # (0.1² + 0.1²) / (2 - 1)
    assert told["B"]["standard_deviation"] is None


def test_figures_of_a_run_that_grows_come_from_its_records(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "small" / "run", (0.5, 0.6), finished=False))
    figures = {figure.key: figure.values["A"] for figure in headline_figures(group_runs([run]))}
    assert figures["seconds"] == [100]  # two epochs of 50
    assert figures["images_per_second"] == [1000]
    assert "parameters" not in figures


def test_figures_have_no_more_digits_than_they_mean() -> None:
    def figure(kind: str, values: list[float]) -> str:
        return spread_text(Figure("k", "t", kind, {"A": values}), "A")

    assert figure("measured", [7.1145, 9.8877]) == "8.5 ± 2.0"
    assert figure("measured", [340.31, 341.77]) == "341.0 ± 1.0"
    assert figure("number", [1.57243, 1.42801]) == "1.5002 ± 0.1021"
    assert [points(share) for share in (-1e-6, 0.0, 1e-6, -0.0123)] == ["+0.00", "+0.00", "+0.00", "−1.23"]
    assert [p_text(p) for p in (0.5, 0.01234, 0.00009, 1)] == ["p = 0.5", "p = 0.012", "p < 0.0001", "p = 1"]


def answers(labels: list[int], digest: str = "1") -> Answers:
    return Answers({"test": digest}, np.array(labels), np.ones(len(labels), bool))


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([answers([1, 2]), answers([1, 2])], None),
        ([answers([1, 2]), answers([1, 2], "2")], "other images"),
        ([answers([2, 1])], "labels of their test images differ"),
        ([answers([1, 2, 3])], "tested on 2 and 3 images"),
    ],
)
def test_only_the_same_images_with_the_same_labels_are_paired(others: list[Answers], why: str | None) -> None:
    found = why_not_paired([answers([1, 2]), *others])
    assert (found is None) if why is None else (found is not None and why in found)


# --- real trainings


def test_three_seeds_beside_three(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *paths(seeds))
    assert [[run["seed"] for run in group["runs"]] for group in found["groups"]] == [[0, 1, 2]] * 2
    assert found["differences"] == {"optimizer.lr": {"A": 0.1, "B": 0.0001}}
    assert found["notes"] == []
    correct = {name: predict_test_split(seeds / name, which="last").correct_N.numpy() for name in NAMES}
    results = {name: json.loads((seeds / name / "result.json").read_text()) for name in NAMES}
    assert {name: int(correct[name].sum()) for name in NAMES} == {name: results[name]["correct"] for name in NAMES}

    (pair,) = found["pairs"]
    first, second = (np.stack([correct[f"{group}-{seed}"] for seed in range(3)]) for group in "ab")
    assert pair["images"] == asdict(over_images(first, second))
    assert pair["seeds"] == asdict(over_seeds(first.mean(1).tolist(), second.mean(1).tolist()))
    assert pair["images"]["count"] == 37
    accuracy = next(figure for figure in found["figures"] if figure["key"] == "last_accuracy")["groups"]["A"]
    assert accuracy["values"] == [results[f"a-{seed}"]["accuracy"] for seed in range(3)]


def test_as_text(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, paths(seeds))]) == 0
    text = capsys.readouterr().out
    assert "A  tiny: 3 runs, seeds 0, 1, 2" in text
    assert "optimizer.lr  0.1  0.0001" in text
    assert "sample standard deviation over the runs of a group, n = 3" in text
    assert "over 37 test images" in text
    assert "paired permutation test" in text
    assert "over seeds (3 and 3 runs)" in text
    assert "at the 5% level" in text
    assert max(map(len, text.splitlines())) <= 100
    narrow = [render(compare(paths(seeds), checkpoint="last", weights="raw"), width=44) for _ in range(2)]
    assert max(map(len, narrow[0].splitlines())) <= 44
    assert narrow[0] == narrow[1]


def test_a_run_each_by_best_checkpoints_and_averaged_weights(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *paths(seeds, "a-0", "b-0"), "--checkpoint", "best", "--weights", "ema")
    (pair,) = found["pairs"]
    expected = predict_test_split(seeds / "a-0", which="best", weights="ema").correct_N.float().mean().item()
    assert pair["first_accuracy"] == pytest.approx(expected)
    assert (found["checkpoint"], found["weights"]) == ("best", "ema")
    assert pair["images"]["method"] == "McNemar's mid-p test"
    assert pair["seeds"]["p_value"] is None
    assert main(["compare", str(seeds / "a-0"), str(seeds / "b-0")]) == 0
    assert "not tested, it takes two runs in each group" in capsys.readouterr().out


def test_more_than_two_groups_are_corrected(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs / "b-2" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    found = as_json(capsys, *paths(runs))
    assert [(p["first"], p["second"]) for p in found["pairs"]] == [("A", "B"), ("A", "C")]
    raw = [pair["images"]["p_value"] for pair in found["pairs"]]
    adjusted = [pair["images_p_adjusted"] for pair in found["pairs"]]
    small, large = sorted(raw)
    expected = {small: min(1, 2 * small), large: min(1, max(large, 2 * small))}
    assert adjusted == pytest.approx([expected[p] for p in raw])
    assert found["pairs"][0]["seeds_p_adjusted"] == found["pairs"][0]["seeds"]["p_value"]  # the only one tested
    assert main(["compare", *map(str, paths(runs))]) == 0
    assert "by Holm's correction" in capsys.readouterr().out


def test_other_test_images_are_not_paired(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.synthetic.num_classes=3", "training.epochs=1"]
    assert main(["train", str(runs / "tiny.yaml"), *overrides, "--run-dir", str(tmp_path / "other")]) == 0
    (pair,) = as_json(capsys, runs / "a-0", tmp_path / "other")["pairs"]
    assert (pair["images"], pair["other_images"]) == (None, True)
    assert None not in (pair["first_accuracy"], pair["second_accuracy"])
    assert main(["compare", str(runs / "a-0"), str(tmp_path / "other")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "cannot be paired, since they were tested on other images" in text
    assert "the figures above are unpaired" in text
    assert "over seeds (1 and 1 runs, on other test images)" in text


def test_runs_without_checkpoints_and_unfinished_ones(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(runs / "b-0" / "checkpoints")
    shutil.rmtree(runs / "b-0" / "predictions", ignore_errors=True)
    (runs / "a-0" / "result.json").unlink()
    found = as_json(capsys, *paths(runs))
    notes = "\n".join(found["notes"])
    assert "tiny/a-0 is not finished (stopped, epoch 2): its figures are those so far, and it is left out" in notes
    assert "tiny/b-0 says nothing of single images: no run with checkpoints here." in notes
    (pair,) = found["pairs"]
    assert pair["images"]["count"] == 37  # by the runs that have answers
    assert pair["counts"] == [2, 3]  # of finished runs, and all accuracies that were written down
    assert pair["first_accuracy"] == pytest.approx(
        np.mean([json.loads((runs / name / "result.json").read_text())["accuracy"] for name in ("a-1", "a-2")])
    )
    found = as_json(capsys, *paths(runs, "a-1", "b-0"))
    assert found["pairs"][0]["refusal"] == "no run of B has a checkpoint that could be asked"
    found = as_json(capsys, *paths(runs, "a-0", "b-1"))
    assert found["pairs"][0]["refusal"] == "no run of A is finished"
    assert (found["pairs"][0]["seeds"], found["pairs"][0]["first_accuracy"]) == (None, None)


def test_the_same_run_counts_once_and_equal_seeds_are_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, runs / "a-0", runs / "a-0" / ".", runs / "b-0")
    assert [len(group["runs"]) for group in found["groups"]] == [1, 1]
    shutil.copytree(runs / "a-0", runs / "copy")
    found = as_json(capsys, runs / "a-0", runs / "copy")
    assert "A has several runs of seed 0" in found["notes"][0]
    assert found["pairs"] == []


# --- what is missing or broken


def test_a_cell_tells_how_many_runs_it_is_of_where_not_all_have_the_figure(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(seed) / "run", accuracies, settings={"seed": seed, "name": "x"}, finished=finished)
        for seed, accuracies, finished in ((10, (0.5,), True), (2, (0.6,), True), (0, (), False))
    ]
    found = compare(runs, checkpoint="last", weights="raw")
    for shown in (render(found, width=200), comparison_page(found)):
        assert "x: 3 runs, seeds 0, 2, 10" in shown
        assert "55.00 ± 7.07% (n = 2)" in shown
        assert "n = 3 unless it is told" in shown
        assert "x/run is not finished (empty, epoch 0): its figures are those so far." in shown


def test_only_finished_runs_with_an_accuracy_are_counted_over_seeds(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{lr}{seed}", accuracies, settings={"seed": seed, "lr": lr}, finished=bool(accuracies))
        for lr, several in (("a", [(0.5,), (0.6,), ()]), ("b", [(0.7,), ()]))
        for seed, accuracies in enumerate(several)
    ]
    runs.append(write_run(tmp_path / "a-again", (0.5,), settings={"seed": 0, "lr": "a"}, finished=False))
    found = compare(runs, checkpoint="last", weights="raw")
    assert found.pairs[0].counts == (2, 1)
    text = render(found, width=200)
    assert "over seeds (2 and 1 runs): not tested, it takes two runs in each group" in text
    assert "n differs, see above)" in text
    assert "several runs of seed" not in text  # one of them is not finished


def test_runs_of_other_versions_and_broken_ones_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_run(tmp_path / "old" / "run", settings={"network": {"width": float("nan")}, "optimiser": "sgd"})
    broken = write_run(tmp_path / "broken" / "run")
    (broken / "recipe.yaml").write_text("[")
    there = [write_run(tmp_path / "new" / "run"), old, broken]
    found = as_json(capsys, *there)
    assert found["differences"]["network.width"] == {"A": "(not set)", "B": "NaN", "C": "(not set)"}
    assert "broken/run: recipe.yaml is broken." in found["notes"]
    assert main(["compare", *map(str, there)]) == 0
    assert "(not set)" in capsys.readouterr().out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.tuples(*[ANY_CONTENT] * 4), second=st.tuples(*[ANY_CONTENT] * 4))
def test_no_run_makes_a_comparison_or_a_drawing_fail(
    tmp_path: Path, first: tuple[bytes, ...], second: tuple[bytes, ...]
) -> None:
    there = [write_contents(tmp_path / "any" / str(i), *contents) for i, contents in enumerate((first, second))]
    there.append(tmp_path / "whole" / "run")
    if not there[-1].exists():
        write_run(there[-1])
    found = compare(there, checkpoint="best", weights="raw")
    json.dumps(found.to_json(), allow_nan=False)
    assert render(found, width=80)
    assert "</html>" in comparison_page(found)
    text, is_going = draw_runs(there, tuple(QUANTITIES), size=os.terminal_size((80, 24)), colours=False)
    assert "accuracy by epoch" in text
    assert not is_going


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["compare", str(tmp_path / "x"), str(run), str(tmp_path / "y")]) == 2
    error = capsys.readouterr().err
    assert "compare: 2 errors" in error
    assert str(tmp_path / "x") in error
    assert str(tmp_path / "y") in error
    other = tmp_path / "thesis.html"
    other.write_text("<html>")
    assert main(["compare", str(run), "--html", str(other)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert other.read_text() == "<html>"
    assert main(["compare", str(run), "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "is no folder that can be written to" in capsys.readouterr().err
