"""Going on with a run: nothing of another run, of a later step or of a broken start is lost or believed."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.cli import main
from harness.training.step import TrainingStep
from harness.training.stopping import StopVote
from tests.conftest import ROOT, RunRanks
from tests.models.without_kernels import closed
from tests.training.conftest import Train, metrics, result


def everything(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_checkpoint_does_not_overwrite_another_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = train("a", "training.epochs=1"), train("b", "optimizer.lr=0.01")
    before = everything(b)
    train("b", "training.epochs=3", resume=str(a), expect=2)
    assert "the run directory is not empty" in capsys.readouterr().err
    assert everything(b) == before


@pytest.mark.parametrize("what", ["foreign files", "another recipe", "nothing whole"])
def test_auto_starts_nothing_on_top_of_what_it_cannot_go_on_with(
    train: Train, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "foreign files":
        run = tmp_path / "run"
        run.mkdir()
        (run / "thesis.tex").write_text("years of work")
        overrides, text = [], "is not a run directory"
    elif what == "another recipe":
        run = train("run", "training.epochs=1")
        overrides, text = ["seed=7"], "seed: 0 → 7"
    else:
        run = train("run", "training.epochs=1")
        (run / "checkpoints/step_7/model.safetensors").write_bytes(b"")
        overrides, text = [], "no whole checkpoint is left"
    before = {k: v for k, v in everything(run).items() if "step_7" not in k}
    train("run", *overrides, resume="auto", expect=2)
    assert text in capsys.readouterr().err
    assert {k: v for k, v in everything(run).items() if "step_7" not in k} == before


def test_a_run_that_died_before_its_first_checkpoint_starts_again(train: Train) -> None:
    whole = train("whole")
    run = train("run")
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step_*"):
        path.rename(path.with_name(f"broken_{path.name}"))
    train("run", resume="auto")
    assert result(run)["loss"] == result(whole)["loss"]
    assert [r["step"] for r in metrics(run)] == list(range(1, 15))


def test_going_on_from_an_earlier_step_sets_later_ones_aside(train: Train) -> None:
    run = train("run", "training.epochs=3")
    earlier = run / "checkpoints" / "step_7"
    train("run", "training.epochs=2", "checkpoint.keep_last=1", resume=str(earlier))
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert {"step_14", "abandoned_step_14", "abandoned_step_21"} <= names
    assert (run / "result_step_21.json").exists()
    assert result(run)["step"] == 14


def test_the_best_is_kept_even_between_checkpoints(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=6", "checkpoint.every_epochs=3", "checkpoint.keep_last=1", "optimizer.lr=0.3")
    capsys.readouterr()
    assert main(["eval", str(run), "--checkpoint", "best", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == result(run)["best"]["step"]
    assert found["test"]["correct"] == result(run)["best"]["correct"]


def test_a_result_belongs_to_its_step(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=null", "training.steps=6", "checkpoint.every_steps=5")
    train(
        "run",
        *("training.epochs=null", "training.steps=5", "checkpoint.every_steps=5"),
        resume=str(run / "checkpoints" / "step_5"),
    )
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], result(run)["step"]) == (5, 5)
    assert found["test"]["loss"] == result(run)["loss"]


def test_every_start_is_told_and_the_wandb_run_stays_one(train: Train) -> None:
    run, other = train("run", "training.epochs=1"), train("other", "training.epochs=1")
    first = json.loads((run / "provenance.json").read_text())
    train("run", resume="auto")
    second = json.loads((run / "provenance.json").read_text())
    assert second["starts"][0] == first["starts"][0]
    assert [s["from_step"] for s in second["starts"]] == [0, 7]
    assert second["wandb_run_id"] == first["wandb_run_id"]
    assert json.loads((other / "provenance.json").read_text())["wandb_run_id"] != first["wandb_run_id"]
    assert (run / "result_step_7.json").exists()


def test_another_loader_may_go_on(train: Train) -> None:
    whole = train("whole")
    train("run", "training.epochs=1")
    run = train("run", "data.loader=torch", "data.workers=0", resume="auto")
    assert result(run)["loss"] == result(whole)["loss"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run"])
def test_a_run_directory_that_cannot_be(train: Train, tmp_path: Path, place: str, tiny: Path) -> None:
    (tmp_path / "file").write_text("a file")
    assert main(["train", str(tiny), "--run-dir", str(tmp_path / place)]) == 2
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("overrides", [("training.epochs=null", "training.steps=1"), ("training.epochs=2",)])
def test_divergence_at_the_very_end_of_a_step_is_no_traceback(train: Train, overrides: tuple[str, ...]) -> None:
    run = train("run", "optimizer.lr=1e30", *overrides, expect=3)
    assert not (run / "result.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(train: Train, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=1", "tracking.log_every_steps=7")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = everything(run / "checkpoints")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))  # larger files fail, as on a full disk
    try:
        train("run", "tracking.log_every_steps=7", resume="auto", expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in capsys.readouterr().err
    assert everything(run / "checkpoints") == before


def test_without_sync_batch_norm_the_saved_network_is_the_evaluated_one(
    tiny: Path, tmp_path: Path, run_ranks: RunRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = ["training.sync_batch_norm=false", "training.global_batch_size=8", "training.epochs=1", "ema.decay=0.5"]
    done = run_ranks(2, "-m", "harness", "train", tiny, *overrides, "--run-dir", run, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["correct"] == result(run)["correct"]
    assert found["test"]["loss"] == pytest.approx(result(run)["loss"], rel=1e-5)
    assert found["test_ema"]["loss"] == pytest.approx(result(run)["ema"]["loss"], rel=1e-5)


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


def test_other_images_are_noticed(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_other_kernels_are_warned_of(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gone on with on a machine without a compiler: dropout draws anew there."""
    run = train("run", "training.epochs=1")
    assert result(run)["kernels"].startswith("compiled")
    train("run", "training.epochs=2", resume="auto")
    assert "other kernels" not in capsys.readouterr().err
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with closed():
        train("run", "training.epochs=3", resume="auto")
    assert "WARNING the run had other kernels before (compiled" in capsys.readouterr().err
    assert "nowhere" in result(run)["kernels"]


def test_a_shorter_training_than_what_is_done_is_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run")
    before = everything(run)
    train("run", "training.epochs=1", resume="auto", expect=2)
    assert "the checkpoint is of step 14, the training has 7" in capsys.readouterr().err
    assert everything(run) == before


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("cosine", "WARNING training.epochs: 1 → 2: the cosine schedule is shaped by the length"),
        ("constant", "goes on with run to another length (training.epochs: 1 → 2)"),
    ],
)
def test_another_length_is_told_and_warned_of_where_it_shapes_the_schedule(
    train: Train, capsys: pytest.CaptureFixture[str], schedule: str, said: str
) -> None:
    train("run", "training.epochs=1", f"schedule.name={schedule}")
    train("run", f"schedule.name={schedule}", resume="auto")
    err = capsys.readouterr().err
    assert said in err
    assert ("WARNING" in err) is (schedule == "cosine")


def test_auto_says_why_it_starts_anew(
    train: Train, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.parent)
    auto = ["train", str(tiny), "training.epochs=1", "--resume", "auto"]
    assert main(auto) == 0
    assert "starting anew" not in capsys.readouterr().err  # there was nothing to go on with
    assert main(auto) == 0
    assert "all runs of this recipe are finished; starting anew\n" in capsys.readouterr().err
    first, second = sorted(Path("runs/tiny").iterdir())
    (first / "result.json").unlink()
    assert main([*auto, "optimizer.lr=0.01"]) == 0
    said = f"no unfinished run with this recipe ({first.name} differs in optimizer.lr); starting anew\n"
    assert said in capsys.readouterr().err
    shutil.rmtree(first / "checkpoints")
    assert main(auto) == 0
    assert f"({first.name} has no checkpoint); starting anew\n" in capsys.readouterr().err
    assert len(list(Path("runs/tiny").iterdir())) == 4
    assert (second / "result.json").exists()


def test_a_full_disk_at_the_start_leaves_the_recipe_whole(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=1")
    before = everything(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        train("run", resume="auto", expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large" in capsys.readouterr().err
    assert {k: v for k, v in everything(run).items() if not k.endswith(".tmp")} == before


@pytest.mark.parametrize("name", ["provenance.json", "result.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"step": '])
def test_a_broken_file_of_the_run_is_named(
    train: Train, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    run = train("run", "training.epochs=1")
    (run / name).write_text(text)
    before = everything(run)
    train("run", resume="auto", expect=2)
    assert f"{name}: is not a JSON object" in capsys.readouterr().err
    assert everything(run) == before


def test_stopping_a_training_that_has_diverged_saves_nothing(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def agreed(vote: StopVote) -> bool:
        called.append(vote)
        return len(called) > 4

    monkeypatch.setattr(StopVote, "agreed", agreed)  # a signal just before the fifth step
    # On a GPU numbers are looked at at log steps alone; this makes a CPU do so too.
    monkeypatch.setattr(TrainingStep, "_finite", lambda step, check: True)
    run = train("run", "optimizer.lr=1e30", "tracking.log_every_steps=1000", expect=3)
    assert "diverged before it was stopped after step 4" in capsys.readouterr().err
    assert not list((run / "checkpoints").glob("step_*"))
