"""Contestants in real processes: turns, isolation, answers, failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.benchmarks.contest import Contestant, Times, run_contest
from harness.errors import HarnessError
from tests.conftest import ROOT

HERE = "tests.benchmarks.contestants"


@pytest.fixture(autouse=True)
def _tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_they_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    contestants = {
        name: Contestant(f"{HERE}:note", {"file": str(file), "name": name}, environment={"OWN": name}) for name in "ab"
    }
    absent = Contestant(f"{HERE}:note", {"file": str(file), "name": "c"}, needs="a_package_that_is_not_there")
    times = run_contest({**contestants, "c": absent}, rounds=3, threads=1)
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [line[0] for line in lines] == ["a", "b"] * 3
    assert len({line[1] for line in lines}) == 2
    assert {(line[0], line[2], line[3]) for line in lines} == {("a", "1", "a"), ("b", "1", "b")}
    assert times == {"a": Times([0.5] * 3, [4] * 3), "b": Times([0.5] * 3, [4] * 3), "c": None}


def test_each_has_its_own_number_of_rounds_and_may_tell_more(tmp_path: Path) -> None:
    file, seen = tmp_path / "lines", []
    rounds: dict[str, int | None] = {"a": 1, "b": None, "c": 4}
    contestants = {
        name: Contestant(f"{HERE}:{'note' if name == 'a' else 'tell'}", {"file": str(file), "name": name}, rounds=own)
        for name, own in rounds.items()
    }
    times = run_contest(
        contestants, rounds=2, threads=1, after_round=lambda name, each: seen.append((name, len(each.seconds)))
    )
    assert [line.split()[0] for line in file.read_text().splitlines()] == list("abcbccc")
    assert seen == [("a", 1), ("b", 1), ("c", 1), ("b", 2), ("c", 2), ("c", 3), ("c", 4)]
    assert times["a"] == Times([0.5], [4])
    assert times["b"] == Times([0.5] * 2, [4] * 2, [{"turns": 1}, {"turns": 2}])
    assert times["c"] == Times([0.5] * 4, [4] * 4, [{"turns": n} for n in range(1, 5)])


def test_rates_are_counts_over_seconds() -> None:
    times = Times([1.0, 2.0, 4.0], [8, 8, 8])
    assert times.per_second("images") == {
        "images_per_second_median": 4.0,
        "images_per_second_min": 2.0,
        "images_per_second_max": 8.0,
    }


@pytest.mark.parametrize("late", [False, True])
def test_a_failure_is_named_with_its_reason(late: bool) -> None:
    with pytest.raises(HarnessError, match='contestant "x" failed: ValueError: the reason of the failure') as error:
        run_contest({"x": Contestant(f"{HERE}:fail", {"late": late})}, rounds=1, threads=1)
    assert error.value.exit_code == 1


def test_one_that_vanishes_between_rounds_is_named(tmp_path: Path) -> None:
    slow = Contestant(f"{HERE}:note", {"file": str(tmp_path / "lines"), "name": "a"})
    contestants = {"x": Contestant(f"{HERE}:vanish"), **{f"a{n}": slow for n in range(20)}}
    with pytest.raises(HarnessError, match='contestant "x" failed: it said nothing'):
        run_contest(contestants, rounds=2, threads=1)


def test_numbers_must_be_positive() -> None:
    for numbers in ({"rounds": 0, "threads": 1}, {"rounds": 1, "threads": 0}):
        with pytest.raises(HarnessError, match="must be at least 1"):
            run_contest({}, **numbers)


def test_ranks_work_together_and_the_first_one_answers() -> None:
    several = Contestant("tests.benchmarks.contestants:add_up_ranks", ranks=2)
    times = run_contest({"several": several}, rounds=2, threads=1)["several"]
    assert times is not None
    assert times.counts == [2, 2]
