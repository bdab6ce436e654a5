"""A second attempt goes on with the run of the first, and with no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.launching.attempts import next_attempt, value_of, with_run_directory
from harness.runs import RUN_FILES, is_unused, run_of

TRAIN = ["python", "-m", "harness", "train"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint."""
    (tmp_path / "run/checkpoints/step_3").mkdir(parents=True)
    for name in RUN_FILES:
        (tmp_path / "run" / name).touch()
    return tmp_path / "run"


@pytest.mark.parametrize("words", [[], ["--resume", "never"], ["--resume=never"]])
def test_a_new_run_gets_a_directory_that_is_found_again(tiny: Path, words: list[str]) -> None:
    first = with_run_directory([*TRAIN, str(tiny), "seed=3", *words])
    assert str(value_of(first, "--run-dir")).startswith("runs/tiny/")
    again = next_attempt(first)
    assert again is not None
    assert value_of(again, "--run-dir") == value_of(first, "--run-dir")
    assert value_of(again, "--resume") == "auto"
    assert "never" not in again
    assert again[: len(TRAIN) + 2] == [*TRAIN, str(tiny), "seed=3"]


def test_what_names_a_run_already_stays(tiny: Path) -> None:
    for words in (["--run-dir", "here"], ["--resume", "auto"]):
        assert with_run_directory([*TRAIN, str(tiny), *words]) == [*TRAIN, str(tiny), *words]
    assert with_run_directory(["python", "script.py"]) == ["python", "script.py"]
    assert with_run_directory([*TRAIN, "nowhere.yaml"]) == [*TRAIN, "nowhere.yaml"]


@pytest.mark.parametrize("inside", ["", "checkpoints/step_3"])
def test_a_run_that_is_gone_on_with_is_gone_on_with_again(tiny: Path, run: Path, inside: str) -> None:
    first = with_run_directory([*TRAIN, str(tiny), "--resume", str(run / inside)])
    assert value_of(first, "--run-dir") == str(run)
    assert next_attempt(first) == [*TRAIN, str(tiny), "--run-dir", str(run), "--resume", "auto"]


def test_a_start_from_another_runs_checkpoint_is_not_forgotten(tiny: Path, run: Path, tmp_path: Path) -> None:
    """Gone on with by `auto`, the new run would begin from nothing."""
    first = [*TRAIN, str(tiny), "--resume", str(run), "--run-dir", str(tmp_path / "new")]
    assert next_attempt(first) is None
    (tmp_path / "new/checkpoints/step_5").mkdir(parents=True)
    assert next_attempt(first) == [*TRAIN, str(tiny), "--run-dir", str(tmp_path / "new"), "--resume", "auto"]


def test_whose_checkpoint_it_is(run: Path, tmp_path: Path) -> None:
    assert run_of(run / "checkpoints/step_3") == run_of(run) == run
    (tmp_path / "elsewhere/step_3").mkdir(parents=True)
    assert run_of(tmp_path / "elsewhere/step_3") is None


def test_half_written_files_are_no_run(tmp_path: Path) -> None:
    assert is_unused(tmp_path / "absent")
    (tmp_path / ".recipe.yaml.0123.tmp").touch()
    (tmp_path / ".lock").touch()
    (tmp_path / "slurm").mkdir()
    assert is_unused(tmp_path)
    (tmp_path / "thesis.tex").touch()
    assert not is_unused(tmp_path)
