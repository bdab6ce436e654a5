"""Resuming: bit-equal, and nothing of another run, of a later step or of a broken start is lost or believed."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.cli import main
from harness.training.step import StopVote, TrainingStep
from tests.conftest import RunRanks
from tests.models.without_kernels import closed
from tests.training.conftest import (
    EVERYTHING,
    Capsys,
    Train,
    assert_same_state,
    everything,
    metrics,
    result,
    starts,
)


@pytest.mark.parametrize("stop", [4, 7, 9], ids=["mid-epoch", "epoch-end", "second-epoch"])
def test_resumed_training_ends_bit_equal(train: Train, stop: int) -> None:
    whole = train("whole", "training.epochs=null", "training.steps=14", *EVERYTHING)
    train("parts", "training.epochs=null", f"training.steps={stop}", *EVERYTHING)
    parts = train("parts", "training.epochs=null", "training.steps=14", *EVERYTHING, resume="auto")
    assert_same_state(whole, parts, 14)
    timing = {"time_unix_seconds", "images_per_second", "milliseconds_per_step", "seconds", "loader_wait_seconds"}
    a, b = ([{k: v for k, v in r.items() if k not in timing} for r in metrics(x)] for x in (whole, parts))
    assert [r["step"] for r in b] == list(range(1, 15))
    assert a == b
    assert result(parts)["accuracy"] == result(whole)["accuracy"]
    assert result(parts)["ema"] == result(whole)["ema"]


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_used(train: Train, capsys: Capsys) -> None:
    whole = train("whole")
    train("run", "training.epochs=1")
    run = train("run", "data.loader=torch", "data.workers=0", resume="auto")  # another loader may continue
    file = run / "checkpoints" / "step_14" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (run / "result.json").unlink()
    train("run", resume="auto")
    assert "broken checkpoint: model.safetensors has" in capsys.readouterr().err
    assert (run / "checkpoints" / "broken_step_14").is_dir()
    assert_same_state(whole, run, 14, ["model"])
    assert result(run)["loss"] == result(whole)["loss"]


def test_a_run_is_never_overwritten(train: Train, capsys: Capsys) -> None:
    run, other = train("run", "training.epochs=1"), train("other", "optimizer.lr=0.01")
    before = {p: p.stat().st_mtime_ns for each in (run, other) for p in each.rglob("*")}
    train("run", expect=2)
    assert "the run directory is not empty" in capsys.readouterr().err
    train("other", "training.epochs=3", resume=str(run), expect=2)
    assert "the run directory is not empty" in capsys.readouterr().err
    train("run", "optimizer.lr=0.1", resume="auto", expect=2)
    assert "optimizer.lr: 0.05 → 0.1" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for each in (run, other) for p in each.rglob("*")} == before


@pytest.mark.parametrize("what", ["foreign files", "another recipe", "nothing whole", "shorter"])
def test_auto_starts_nothing_on_top_of_what_it_cannot_resume(
    train: Train, tmp_path: Path, what: str, capsys: Capsys
) -> None:
    words, text = (), "is not a run directory"
    if what == "foreign files":
        run = tmp_path / "run"
        run.mkdir()
        (run / "thesis.tex").write_text("years of work")
    else:
        run = train("run", "training.epochs=1")
    if what == "another recipe":
        words, text = ("seed=7",), "seed: 0 → 7"
    elif what == "nothing whole":
        (run / "checkpoints/step_7/model.safetensors").write_bytes(b"")
        text = "no whole checkpoint is left"
    elif what == "shorter":
        words, text = ("training.epochs=0",), "the checkpoint is of step 7, the training has 0"
    before = {k.replace("broken_", ""): v for k, v in everything(run).items()}
    train("run", *words, resume="auto", expect=2)
    assert text in capsys.readouterr().err
    assert {k.replace("broken_", ""): v for k, v in everything(run).items()} == before


def test_a_run_that_died_before_its_first_checkpoint_starts_again(train: Train) -> None:
    whole, run = train("whole"), train("run")
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step_*"):
        path.rename(path.with_name(f"broken_{path.name}"))
    train("run", resume="auto")
    assert result(run)["loss"] == result(whole)["loss"]
    assert [r["step"] for r in metrics(run)] == list(range(1, 15))


def test_resuming_from_an_earlier_step_sets_later_ones_aside(train: Train) -> None:
    run = train("run", "training.epochs=3")
    train("run", "training.epochs=2", "checkpoint.keep_last=1", resume=str(run / "checkpoints" / "step_7"))
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"step_14", "abandoned_step_14", "abandoned_step_21"}
    assert (run / "result_step_21.json").exists()
    assert result(run)["step"] == 14


def test_a_result_belongs_to_its_step(train: Train, capsys: Capsys) -> None:
    words = ("training.epochs=null", "checkpoint.every_steps=5")
    run = train("run", "training.steps=6", *words)
    train("run", "training.steps=5", *words, resume=str(run / "checkpoints" / "step_5"))
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], result(run)["step"]) == (5, 5)
    assert found["test"]["loss"] == result(run)["loss"]


def test_every_start_is_noted_and_the_wandb_run_stays_one(train: Train) -> None:
    run, other = train("run", "training.epochs=1"), train("other", "training.epochs=1")
    first = json.loads((run / "provenance.json").read_text())
    train("run", resume="auto")
    second = json.loads((run / "provenance.json").read_text())
    assert second["starts"][0] == first["starts"][0]
    assert [s["from_step"] for s in second["starts"]] == [0, 7]
    assert second["wandb_run_id"] == first["wandb_run_id"]
    assert json.loads((other / "provenance.json").read_text())["wandb_run_id"] != first["wandb_run_id"]
    assert (run / "result_step_7.json").exists()


def test_a_checkpoint_of_another_network(train: Train, capsys: Capsys) -> None:
    run = train("run", "training.epochs=1")
    train("other", "model.args.head_width=9", resume=str(run), expect=2)
    assert "model.args.head_width: 8 → 9" in capsys.readouterr().err
    train("other", resume=str(run / "checkpoints" / "step_8"), expect=2)
    assert 'Did you mean "step_7"?' in capsys.readouterr().err
    (run / "recipe.yaml").unlink()  # a checkpoint alone is judged by its weights
    train("other", "model.args.head_width=9", resume=str(run / "checkpoints" / "step_7"), expect=2)
    assert "a checkpoint of another network" in capsys.readouterr().err


@contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    """Larger files fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("size_bytes", "said", "kept"),
    [
        (6000, "could not be written", ("checkpoints",)),
        (500, "cannot be written: File too large", ("checkpoints", "recipe.yaml")),
    ],
)
def test_a_full_disk_leaves_what_was_there(
    train: Train, capsys: Capsys, size_bytes: int, said: str, kept: tuple[str, ...]
) -> None:
    run = train("run", "training.epochs=1", "tracking.log_every_steps=7")
    before = {k: v for k, v in everything(run).items() if k.startswith(kept)}
    with files_up_to(size_bytes):
        train("run", "tracking.log_every_steps=7", resume="auto", expect=1)
    assert said in capsys.readouterr().err
    assert {k: v for k, v in everything(run).items() if k.startswith(kept)} == before


def test_a_broken_checkpoint_on_two_ranks_is_set_aside_once(train: Train, tiny: Path, run_ranks: RunRanks) -> None:
    run = train("run")
    (run / "checkpoints/step_14/model.safetensors").write_bytes(b"")
    (run / "result.json").unlink()
    done = run_ranks(2, "-m", "harness", "train", tiny, "--run-dir", run, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("broken checkpoint") == 1
    assert result(run)["step"] == 14


def test_a_checkpoint_taken_out_of_its_run_begins_a_new_one(
    train: Train, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    shutil.copytree(train("run", "training.epochs=1") / "checkpoints/step_7", project / "models/best")
    for name in ("metrics.jsonl", "result.json"):
        (project / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = everything(project)
    assert main(["train", str(tiny), "--resume", str(project / "models/best")]) == 0
    assert everything(project) == before
    (run,) = Path("runs/tiny").iterdir()
    assert result(run)["step"] == 14


def image_folder(path: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for split, count in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{number}.png")
    return path


def test_other_images_are_noticed(train: Train, tmp_path: Path, capsys: Capsys) -> None:
    one, other = image_folder(tmp_path / "one", 1), image_folder(tmp_path / "other", 2)
    images = ("data.source=imagefolder", "training.global_batch_size=8")
    run = train("run", *images, f"data.path={one}", "training.epochs=1")
    before = everything(run)
    train("run", *images, f"data.path={other}", resume="auto", expect=2)
    assert "was trained on other images" in capsys.readouterr().err
    assert everything(run) == before
    shutil.rmtree(one)
    shutil.copytree(other, one)
    assert main(["eval", str(run)]) == 0
    assert "WARNING these are not the images" in capsys.readouterr().err


def test_other_kernels_are_warned_of(train: Train, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    """Resumed on a machine without a compiler: dropout draws anew there."""
    run = train("run", "training.epochs=1")
    assert result(run)["kernels"].startswith("compiled")
    train("run", "training.epochs=2", resume="auto")
    assert "other kernels" not in capsys.readouterr().err
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with closed():
        train("run", "training.epochs=3", resume="auto")
    assert "WARNING the run had other kernels before (compiled" in capsys.readouterr().err
    assert "nowhere" in result(run)["kernels"]
    assert [start["kernels"].split()[0] for start in starts(run)] == ["compiled", "compiled", "plain"]


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("cosine", "WARNING training.epochs: 1 → 2: the cosine schedule is shaped by the length"),
        ("constant", "resumes run to another length (training.epochs: 1 → 2)"),
    ],
)
def test_another_length_is_said_and_warned_of_where_it_shapes_the_schedule(
    train: Train, capsys: Capsys, schedule: str, said: str
) -> None:
    train("run", "training.epochs=1", f"schedule.name={schedule}")
    train("run", f"schedule.name={schedule}", resume="auto")
    err = capsys.readouterr().err
    assert said in err
    assert ("WARNING" in err) is (schedule == "cosine")


def test_auto_says_why_it_starts_a_new_run(
    train: Train, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(tiny.parent)
    auto = ["train", str(tiny), "training.epochs=1", "--resume", "auto"]
    assert main(auto) == 0
    assert "starting a new one" not in capsys.readouterr().err  # there was nothing to resume
    assert main(auto) == 0
    assert "all runs of this recipe are finished; starting a new one\n" in capsys.readouterr().err
    first, second = sorted(Path("runs/tiny").iterdir())
    (first / "result.json").unlink()
    assert main([*auto, "optimizer.lr=0.01"]) == 0
    said = f"no unfinished run with this recipe ({first.name} differs in optimizer.lr); starting a new one\n"
    assert said in capsys.readouterr().err
    shutil.rmtree(first / "checkpoints")
    assert main(auto) == 0
    assert f"({first.name} has no checkpoint); starting a new one\n" in capsys.readouterr().err
    assert len(list(Path("runs/tiny").iterdir())) == 4
    assert (second / "result.json").exists()


@pytest.mark.parametrize("name", ["provenance.json", "result.json"])
def test_a_broken_file_of_the_run_is_named(train: Train, capsys: Capsys, name: str) -> None:
    run = train("run", "training.epochs=1")
    for text in ("", "[]", '{"step": '):
        (run / name).write_text(text)
        before = everything(run)
        train("run", resume="auto", expect=2)
        assert f"{name}: is not a JSON object" in capsys.readouterr().err
        assert everything(run) == before


def test_stopping_a_training_that_has_diverged_saves_nothing(
    train: Train, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False] * 4 + [True])
    monkeypatch.setattr(StopVote, "agreed", lambda vote: next(answers))  # a signal just before the fifth step
    # On a GPU numbers are looked at at log steps alone; this makes a CPU do so too.
    monkeypatch.setattr(TrainingStep, "_finite", lambda step, check: True)
    run = train("run", "optimizer.lr=1e30", "tracking.log_every_steps=1000", expect=3)
    assert "diverged before it was stopped after step 4" in capsys.readouterr().err
    assert not list((run / "checkpoints").glob("step_*"))
