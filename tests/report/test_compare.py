"""`harness compare`: groups and figures of runs written by hand, what real trainings say of themselves, the page."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from html import escape, unescape
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
    compare,
    differing_settings,
    group_runs,
    headline_figures,
    over_images,
    over_seeds,
    why_not_paired,
)
from harness.report.comparison_view import comparison_page, p_text, pair_sentences, points, render, spread_text
from harness.report.terminal import QUANTITIES, draw_runs
from harness.runs import Run, open_run
from harness.training.inference import predict_test_split
from tests.handmade import ANY_CONTENT, write_contents, write_run
from tests.report.conftest import OpenPage

NAMES = ("a-0", "a-1", "a-2", "b-0", "b-1", "b-2")
EVIL = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"


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


def as_text(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["compare", *map(str, arguments)]) == 0
    return capsys.readouterr().out


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
    in_groups = [(g.letter, [r.run_id for r in g.runs]) for g in groups]
    assert in_groups == [("A", ["run-0", "run-2"]), ("B", ["run-1"]), ("C", ["run-3"])]
    assert groups[0].name == "small, other"
    assert differing_settings(groups) == {
        "optimizer.lr": {"A": 0.1, "B": 0.2, "C": 0.1},
        "optimizer.momentum": {"A": NOT_SET, "B": NOT_SET, "C": 0.9},
    }


def test_values_that_print_alike_are_told_apart_and_unknown_recipes_are_groups_of_their_own(tmp_path: Path) -> None:
    groups = group_runs([run_of(tmp_path, a="1"), run_of(tmp_path, a=1), run_of(tmp_path, a=True)])
    assert differing_settings(groups) == {"a": {"A": "1", "B": 1, "C": True}}
    many = group_runs([run_of(tmp_path, a=i) for i in range(28)])
    assert [group.letter for group in many[24:]] == ["Y", "Z", "A2", "B2"]
    for group in groups[1:]:
        (group.runs[0].path / "recipe.yaml").write_text("[")
    groups = group_runs([open_run(group.runs[0].path) for group in groups])
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    assert differing_settings(groups) == {}


def test_figures_by_hand(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, (0.5, 0.7, 0.6)), run_of(tmp_path, (0.5, 0.5, 0.8)), run_of(tmp_path, lr=1)]
    runs.append(open_run(write_run(tmp_path / "x" / "grows", (0.5, 0.6), settings={"lr": 2}, finished=False)))
    figures = {figure["key"]: figure["groups"] for figure in headline_figures(group_runs(runs))}
    values = {key: {letter: group["values"] for letter, group in groups.items()} for key, groups in figures.items()}
    assert values["last_accuracy"] == {"A": [0.6, 0.8], "B": [0.6], "C": [0.6]}
    assert values["best_accuracy"]["A"] == [0.7, 0.8]
    assert values["last_loss"]["A"] == pytest.approx([1.4, 1.2])
    assert values["seconds"] == {"A": [100, 100], "B": [100], "C": [100]}  # of the last two epochs of 50
    assert values["images_per_second"] == {"A": [900, 900], "B": [900], "C": [1000]}
    assert values["parameters"] == {"A": [1234, 1234], "B": [1234], "C": []}
    assert "last_ema_accuracy" not in figures
    accuracy = figures["last_accuracy"]
    assert (accuracy["A"]["n"], accuracy["A"]["mean"]) == (2, pytest.approx(0.7))
    assert accuracy["A"]["standard_deviation"] == pytest.approx(0.02**0.5)  # (0.1² + 0.1²) / (2 - 1)
    assert accuracy["B"]["standard_deviation"] is None


def test_figures_have_no_more_digits_than_they_mean() -> None:
    def figure(key: str, mean: float, deviation: float) -> str:
        return spread_text(key, {"values": [mean], "mean": mean, "standard_deviation": deviation})

    assert figure("seconds", 8.5011, 1.961) == "8.5 ± 2.0"
    assert figure("seconds", 341.04, 1.03) == "341.0 ± 1.0"
    assert figure("last_loss", 1.50022, 0.10213) == "1.5002 ± 0.1021"
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

    text = as_text(capsys, *paths(seeds))
    assert "A  tiny: 3 runs, seeds 0, 1, 2" in text
    assert "optimizer.lr  0.1  0.0001" in text
    assert "sample standard deviation over the runs of a group, n = 3" in text
    assert re.search(r"over 37 test images, .* \(paired permutation\s+test", text, re.DOTALL)
    assert re.search(r"over seeds \(3 and 3 runs\): .* at the 5% level", text, re.DOTALL)
    assert max(map(len, text.splitlines())) <= 100
    narrow = render(compare(paths(seeds), checkpoint="last", weights="raw"), width=44)
    assert max(map(len, narrow.splitlines())) <= 44


def test_a_run_each_by_best_checkpoints_and_averaged_weights(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *paths(seeds, "a-0", "b-0"), "--checkpoint", "best", "--weights", "ema")
    (pair,) = found["pairs"]
    expected = predict_test_split(seeds / "a-0", which="best", weights="ema").correct_N.float().mean().item()
    assert pair["first_accuracy"] == pytest.approx(expected)
    assert (found["checkpoint"], found["weights"]) == ("best", "ema")
    assert pair["images"]["method"] == "McNemar's mid-p test"
    assert pair["seeds"]["p_value"] is None
    assert "not tested, it takes two runs in each group" in as_text(capsys, *paths(seeds, "a-0", "b-0"))


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
    assert "by Holm's correction" in as_text(capsys, *paths(runs))


def test_other_test_images_are_not_paired(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.synthetic.num_classes=3", "training.epochs=1"]
    assert main(["train", str(runs / "tiny.yaml"), *overrides, "--run-dir", str(tmp_path / "other")]) == 0
    (pair,) = as_json(capsys, runs / "a-0", tmp_path / "other")["pairs"]
    assert (pair["images"], pair["other_images"]) == (None, True)
    assert None not in (pair["first_accuracy"], pair["second_accuracy"])
    text = " ".join(as_text(capsys, runs / "a-0", tmp_path / "other").split())
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
    written_down = [json.loads((runs / name / "result.json").read_text())["accuracy"] for name in ("a-1", "a-2")]
    assert pair["first_accuracy"] == pytest.approx(np.mean(written_down))
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
    assert found.pairs[0].counts == [2, 1]
    text = render(found, width=200)
    assert "over seeds (2 and 1 runs): not tested, it takes two runs in each group" in text
    assert "n differs, see above)" in text
    assert "several runs of seed" not in text  # one of them is not finished


def test_runs_of_other_versions_and_broken_ones_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = [write_run(tmp_path / name / "run", settings=settings) for name, settings in (
        ("new", {}), ("old", {"network": {"width": float("nan")}, "optimiser": "sgd"}), ("broken", {}),
    )]  # fmt: skip
    (there[2] / "recipe.yaml").write_text("[")
    found = as_json(capsys, *there)
    assert found["differences"]["network.width"] == {"A": "(not set)", "B": "NaN", "C": "(not set)"}
    assert "broken/run: recipe.yaml is broken." in found["notes"]
    assert "(not set)" in as_text(capsys, *there)


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


# --- the page


@pytest.fixture
def handmade(tmp_path: Path) -> list[Path]:
    """Three seeds of each of two groups, without checkpoints; a name and a setting that would be markup."""
    made = []
    for group, gain in (("a", 0.0), ("b", 0.1)):
        for seed in range(3):
            settings = {"seed": seed, "name": EVIL, "model": {"args": {"y" + EVIL: group + EVIL}}}
            accuracies = [0.3 + gain, 0.6 + gain + 0.01 * seed]
            made.append(write_run(tmp_path / "small" / f"{group}-{seed}", accuracies, settings=settings, ema=True))
    return made


def words(text: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_the_page_says_what_the_terminal_says(handmade: list[Path], tmp_path: Path) -> None:
    found = compare(handmade, checkpoint="last", weights="raw")
    page = words(comparison_page(found))
    assert all(sentence in page for sentence in pair_sentences(found.pairs[0], found))
    assert len(found.notes) == 6  # without checkpoints no run says anything of single images
    assert all(words(escape(note)) in page for note in found.notes)
    assert "61.00 ± 1.00%" in page
    assert "71.00 ± 1.00%" in page
    assert "Mean ± sample standard deviation over the runs of a group, n = 3." in page
    empty = write_run(tmp_path / "small" / "empty", (), finished=False)
    page = words(comparison_page(compare([empty], checkpoint="last", weights="raw")))
    for nothing in ("No run has any figures yet.", "No run has any records yet.", "All runs are of one recipe."):
        assert nothing in page


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_in_a_browser(
    open_page: OpenPage, handmade: list[Path], tmp_path: Path, width: int, scheme: str
) -> None:
    file = tmp_path / "comparison.html"
    for compared in (handmade[:2], handmade):  # an earlier page is written over
        assert main(["compare", *map(str, compared), "--html", str(file)]) == 0
    page = open_page(file, width, scheme)
    assert page.errors == []
    assert all(url.startswith("file:") for url in page.requests)
    assert page.evaluate("window.hacked") is None
    assert page.title() == f"Comparison: {EVIL}"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("main section").count() == 5
    accuracy = page.locator("figure.chart").filter(has=page.get_by_text("Test accuracy", exact=True)).first
    styles = [line.get_attribute("style") or "" for line in accuracy.locator("polyline.series").all()]
    assert len(set(styles)) == len(styles) == 6  # every run has a line of its own
    colours = [re.findall(r"series-\d", style) for style in styles]
    assert colours == [["series-0"]] * 3 + [["series-1"]] * 3  # a colour a group
    assert accuracy.locator("svg").first.bounding_box()["width"] > 250
