"""Where runs are kept, and when a run directory may be taken."""

from __future__ import annotations

from pathlib import Path

from harness.runs import RUN_FILES, is_unused, run_of


def test_whose_checkpoint_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step_3").mkdir(parents=True)
    for name in RUN_FILES:
        (run / name).touch()
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
