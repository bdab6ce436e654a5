"""`harness compare` on real trainings: its figures are those of the runs, and what cannot be paired is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.comparing.comparison import compare
from harness.comparing.groups import Figure
from harness.comparing.page import comparison_page
from harness.comparing.significance import over_images, over_seeds
from harness.comparing.text import p_text, points, render, spread_text
from harness.reporting.terminal_curves import QUANTITIES, draw_runs
from harness.training.predictions import predict_test_split
from tests.handmade import ANY_CONTENT, write_contents, write_run

NAMES = ("a-0", "a-1", "a-2", "b-0", "b-1", "b-2")


def paths(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names or NAMES]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_three_seeds_beside_three(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *paths(trained))
    assert [len(group["runs"]) for group in found["groups"]] == [3, 3]
    assert [run["seed"] for run in found["groups"][0]["runs"]] == [0, 1, 2]
    assert found["differences"] == {"optimizer.lr": {"A": 0.1, "B": 0.0001}}
    assert found["notes"] == []
    correct = {name: predict_test_split(trained / name, which="last").correct_N.numpy() for name in NAMES}
    results = {name: json.loads((trained / name / "result.json").read_text()) for name in NAMES}
    assert {name: int(correct[name].sum()) for name in NAMES} == {name: results[name]["correct"] for name in NAMES}

    (pair,) = found["pairs"]
    first, second = (np.stack([correct[f"{group}-{seed}"] for seed in range(3)]) for group in "ab")
    assert pair["images"] == over_images(first, second).to_json()
    assert pair["seeds"] == over_seeds(first.mean(1).tolist(), second.mean(1).tolist()).to_json()
    assert pair["images"]["count"] == 37
    accuracy = next(figure for figure in found["figures"] if figure["key"] == "last_accuracy")["groups"]["A"]
    expected = [results[f"a-{seed}"]["accuracy"] for seed in range(3)]
    assert accuracy["values"] == expected
    assert (accuracy["n"], accuracy["mean"]) == (3, pytest.approx(np.mean(expected)))
    assert accuracy["standard_deviation"] == pytest.approx(np.std(expected, ddof=1))


def test_as_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, paths(trained))]) == 0
    text = capsys.readouterr().out
    assert "A  tiny: 3 runs, seeds 0, 1, 2" in text
    assert "optimizer.lr  0.1  0.0001" in text
    assert "sample standard deviation over the runs of a group, n = 3" in text
    assert "over 37 test images" in text
    assert "paired permutation test" in text
    assert "over seeds (3 and 3 runs)" in text
    assert "at the 5% level" in text
    assert max(map(len, text.splitlines())) <= 100
    narrow = render(compare(paths(trained), checkpoint="last", weights="raw"), width=44)
    assert max(map(len, narrow.splitlines())) <= 44


def test_it_is_the_same_every_time(trained: Path) -> None:
    texts = {render(compare(paths(trained), checkpoint="last", weights="raw"), width=80) for _ in range(2)}
    assert len(texts) == 1


def test_a_run_each_is_mcnemars_test(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pair,) = as_json(capsys, trained / "a-0", trained / "b-0")["pairs"]
    assert pair["images"]["method"] == "McNemar's mid-p test"
    assert pair["seeds"]["p_value"] is None
    assert main(["compare", str(trained / "a-0"), str(trained / "b-0")]) == 0
    assert "not tested, it takes two runs in each group" in capsys.readouterr().out


def test_best_checkpoints_and_averaged_weights(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *paths(trained, "a-0", "b-0"), "--checkpoint", "best", "--weights", "ema")
    expected = predict_test_split(trained / "a-0", which="best", weights="ema").correct_N.float().mean().item()
    assert found["pairs"][0]["first_accuracy"] == pytest.approx(expected)
    assert (found["checkpoint"], found["weights"]) == ("best", "ema")


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
    found = as_json(capsys, runs / "a-0", tmp_path / "other")
    (pair,) = found["pairs"]
    assert pair["images"] is None
    assert "other images" in pair["refusal"]
    assert None not in (pair["first_accuracy"], pair["second_accuracy"])
    assert main(["compare", str(runs / "a-0"), str(tmp_path / "other")]) == 0
    text = capsys.readouterr().out
    assert "cannot be paired, since they were tested on other images" in " ".join(text.split())
    assert "the figures above are unpaired" in " ".join(text.split())
    assert "over seeds (1 and 1 runs, on other test images)" in " ".join(text.split())
    assert pair["other_images"] is True


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


def test_a_cell_tells_how_many_runs_it_is_of_where_not_all_have_the_figure(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(seed) / "run", accuracies, settings={"seed": seed, "name": "x"}, finished=finished)
        for seed, accuracies, finished in ((10, (0.5,), True), (2, (0.6,), True), (0, (), False))
    ]
    found = compare(runs, checkpoint="last", weights="raw")
    page = comparison_page(found)
    text = render(found, width=200)
    assert "A  x: 3 runs, seeds 0, 2, 10" in text
    assert "seeds 0, 2, 10" in page
    for shown in (text, page):
        assert "55.00 ± 7.07% (n = 2)" in shown
        assert "n = 3 unless it is told" in shown
        assert "x/run is not finished (empty, epoch 0): its figures are those so far." in shown


def test_an_unfinished_run_of_the_same_seed_makes_nothing_too_sure(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i) / "run", settings={"name": "x"}, finished=i == 0) for i in range(2)]
    runs.append(write_run(tmp_path / "other" / "run", settings={"lr": 1}))
    found = compare(runs, checkpoint="last", weights="raw")
    assert "several runs of seed" not in " ".join(found.notes)
    assert "n differs, see above)" in render(found, width=200)


def test_only_runs_with_an_accuracy_are_counted_over_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{group}{i}" / "run", accuracies, settings={"seed": i, "lr": group, "name": "x"})
            for group, several in (("a", [(0.5,), (0.6,), ()]), ("b", [(0.7,), ()]))
            for i, accuracies in enumerate(several)]  # fmt: skip
    found = compare(runs, checkpoint="last", weights="raw")
    assert found.pairs[0].counts == (2, 1)
    assert "over seeds (2 and 1 runs): not tested, it takes two runs in each group" in render(found, width=200)


def test_figures_have_no_more_digits_than_they_mean() -> None:
    def figure(kind: str, values: list[float]) -> str:
        return spread_text(Figure("k", "t", kind, {"A": values}), "A")

    assert figure("measured", [7.1145, 9.8877]) == "8.5 ± 2.0"
    assert figure("measured", [340.31, 341.77]) == "341.0 ± 1.0"
    assert figure("number", [1.57243, 1.42801]) == "1.5002 ± 0.1021"
    assert [points(share) for share in (-1e-6, 0.0, 1e-6, -0.0123)] == ["+0.00", "+0.00", "+0.00", "−1.23"]


def test_runs_of_other_versions_and_broken_ones_are_shown(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_run(tmp_path / "old" / "run", settings={"network": {"width": float("nan")}, "optimiser": "sgd"})
    broken = write_run(tmp_path / "broken" / "run")
    (broken / "recipe.yaml").write_text("[")
    found = as_json(capsys, runs / "a-0", old, broken)
    assert found["differences"]["network.width"] == {"A": "(not set)", "B": "NaN", "C": "(not set)"}
    assert "broken/run: recipe.yaml is broken." in found["notes"]
    assert main(["compare", str(runs / "a-0"), str(old), str(broken)]) == 0
    assert "(not set)" in capsys.readouterr().out


def test_the_same_run_counts_once_and_equal_seeds_are_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, trained / "a-0", trained / "a-0" / ".", trained / "b-0")
    assert [len(group["runs"]) for group in found["groups"]] == [1, 1]
    shutil.copytree(trained / "a-0", trained / "copy")
    try:
        found = as_json(capsys, trained / "a-0", trained / "copy")
    finally:
        shutil.rmtree(trained / "copy")
    assert "A has several runs of seed 0" in found["notes"][0]
    assert found["pairs"] == []


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
    text, goes_on = draw_runs(there, tuple(QUANTITIES), size=os.terminal_size((80, 24)), colours=False)
    assert "accuracy by epoch" in text
    assert not goes_on


def test_mistakes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "x"), str(trained / "a-0"), str(tmp_path / "y")]) == 2
    error = capsys.readouterr().err
    assert "compare: 2 errors" in error
    assert str(tmp_path / "x") in error
    assert str(tmp_path / "y") in error
    other = tmp_path / "thesis.html"
    other.write_text("<html>")
    assert main(["compare", str(trained / "a-0"), "--html", str(other)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert other.read_text() == "<html>"
    assert main(["compare", str(trained / "a-0"), "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "is no folder that can be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("p", "text"), [(0.5, "p = 0.5"), (0.01234, "p = 0.012"), (0.00009, "p < 0.0001"), (1, "p = 1")]
)
def test_p_values(p: float, text: str) -> None:
    assert p_text(p) == text
