"""Contestants in real processes: turns, isolation, answers, failures; and their figures as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.bench.contest import Contestant, Times, ratios, render, run_contest
from harness.errors import HarnessError

HERE = "tests.bench.contestants"


def test_they_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    """One round each in turn, each as often as it has rounds; who lacks its package is left out."""
    file, seen = tmp_path / "lines", []
    own_rounds = {"a": 1, "b": None, "c": 4}
    contestants = {
        name: Contestant(f"{HERE}:note", {"file": str(file), "name": name, "tells": name != "a"}, rounds=rounds)
        for name, rounds in own_rounds.items()
    }
    absent = Contestant(f"{HERE}:note", {"file": str(file), "name": "d"}, needs="a_package_that_is_not_there")
    times = run_contest(
        {**contestants, "d": absent}, rounds=2, threads=1, after_round=lambda name, each: seen.append((name, each))
    )
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [line[0] for line in lines] == list("abcbccc")
    assert [name for name, _ in seen] == list("abcbccc")
    assert len({process for _, process, _ in lines}) == 3
    assert {threads for *_, threads in lines} == {"1"}
    assert times["a"] == Times([0.5], [4])
    assert times["b"] == Times([0.5] * 2, [4] * 2, [{"turns": 1}, {"turns": 2}])
    assert times["c"] == Times([0.5] * 4, [4] * 4, [{"turns": n} for n in range(1, 5)])
    assert times["d"] is None


@pytest.mark.parametrize("late", [False, True])
def test_a_failure_is_named_with_its_reason(late: bool) -> None:
    with pytest.raises(HarnessError, match='contestant "x" failed: ValueError: the reason of the failure') as error:
        run_contest({"x": Contestant(f"{HERE}:fail", {"late": late})}, rounds=1, threads=1)
    assert error.value.exit_code == 1


def test_one_that_vanishes_between_rounds_is_named(tmp_path: Path) -> None:
    slow = Contestant(f"{HERE}:note", {"file": str(tmp_path / "lines"), "name": "a"}, rounds=30)
    contestants = {"x": Contestant(f"{HERE}:vanish", rounds=30), "a": slow}
    with pytest.raises(HarnessError, match='contestant "x" failed: it said nothing'):
        run_contest(contestants, rounds=1, threads=1)


@pytest.mark.parametrize("numbers", [{"rounds": 0, "threads": 1}, {"rounds": 1, "threads": 0}])
def test_numbers_must_be_positive(numbers: dict[str, int]) -> None:
    with pytest.raises(HarnessError, match="must be at least 1"):
        run_contest({}, **numbers)


def test_ranks_work_together_and_the_first_one_answers() -> None:
    times = run_contest({"several": Contestant(f"{HERE}:add_up_ranks", ranks=2)}, rounds=2, threads=1)["several"]
    assert times is not None
    assert times.counts == [2, 2]


def test_figures_are_medians_with_their_spread() -> None:
    """Rates are counts over seconds; what was not measured has no ratio and is said in the table."""
    fast = Times([1.0, 2.0, 4.0], [8, 8, 8]).per_second("images")
    assert list(fast.items()) == [
        ("images_per_second_median", 4.0), ("images_per_second_min", 2.0), ("images_per_second_max", 8.0)
    ]  # fmt: skip
    results = {"ours": Times([1.0], [4321]).per_second("images"), "theirs": fast, "absent": None}
    assert ratios(results, ours=("ours", "other")) == {"ours_over_theirs": 4321 / 4.0}
    table = render({"contestants": results, "ratios": {"ours_over_theirs": 2.0}, "settings": {"rounds": 1}})
    assert [line.split() for line in table.splitlines()] == [
        ["images_per_second", "median", "lowest", "highest"],
        ["ours", "4,321", "4,321", "4,321"],
        ["theirs", "4", "2", "8"],
        ["absent", "not", "installed"],
        ["ratios:"],
        ["ours_over_theirs:", "2"],
        ["settings:"],
        ["rounds:", "1"],
    ]
