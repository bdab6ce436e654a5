"""Sweeps that really train: two ranks over gloo, interrupted and resumed; failures; two sweeps at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from harness.cli import main
from harness.errors import HarnessError
from harness.files import LOCK
from harness.launch.local import Ranks
from harness.recipe.loading import resolved_yaml
from harness.runs import EXIT_CODE
from harness.sweeps.run import Trainer, check_ranks, check_unchanged, held, run_here
from harness.sweeps.spec import load_sweep
from harness.sweeps.table import status_of, statuses
from tests.conftest import ROOT, kill_tree, run_limited
from tests.sweeps.conftest import finish

LIMIT_SECONDS = 400
STEPS = 40
SWEEP = f"""recipe: tiny.yaml
method: grid
overrides: {{training.epochs: null, training.steps: {STEPS}}}
parameters:
  optimizer.momentum: {{values: [0.5]}}
  optimizer.lr: {{values: [0.1, 0.05, 0.02]}}
"""


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def starts_of(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "provenance.json").read_text())["starts"])


def test_states_and_what_is_due(sweep: Path) -> None:
    sweep.write_text(SWEEP.replace("[0.1,", "[1, 0.9, 0.8, 0.7, 0.1,"))
    found = load_sweep("sweep.yaml")
    _, failed, killed, stopped, queued, finished, running = (run.directory for run in found.runs)
    for run, code in ((failed, 3), (killed, 137), (queued, 3)):
        run.mkdir(parents=True)
        (run / EXIT_CODE).write_text(f"{code}\n")
    for run in (stopped, finished, running):
        finish(run)
    (stopped / "result.json").unlink()
    with FileLock(running / LOCK):
        states = statuses(found, {queued.name, finished.name})
    failure = "failed: diverged (exit code 3)"
    assert [s.in_words for s in states] == ["new", failure, "new", "stopped", "queued", "finished", "running"]
    assert [s.in_words for s in states if s.is_due(retry_failed=False)] == ["new", "new", "stopped"]
    assert [s.in_words for s in states if s.is_due(retry_failed=True)] == ["new", failure, "new", "stopped"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_points_on_two_ranks_are_interrupted_and_resumed(sweep: Path) -> None:
    runs = load_sweep("sweep.yaml").runs
    first, second, _ = (run.directory for run in runs)
    command = [sys.executable, "-m", "harness", "sweep", "sweep.yaml", "--ranks", "2", "--retry-failed", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = second / "metrics.jsonl"
        wait_for(lambda: (metrics.exists() and bool(metrics.read_text())) or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        kill_tree(process.pid)
    assert process.returncode == 75, said
    assert f"stopped at {second.name}, with a checkpoint; 1 finished, 1 stopped, 1 new" in said
    assert "the same command resumes: harness sweep sweep.yaml --ranks 2 --retry-failed --json\n" in said
    reached = max(int(p.name.removeprefix("step_")) for p in (second / "checkpoints").glob("step_*"))
    assert 0 < reached < STEPS
    result = (first / "result.json").read_bytes()

    done = run_limited(command, LIMIT_SECONDS, environment, sweep.parent)
    assert done.returncode == 0, done.stderr
    assert (first / "result.json").read_bytes() == result  # skipped
    assert [start["from_step"] for start in starts_of(second)] == [0, reached]
    for run in runs:
        settings = yaml.safe_load((run.directory / "recipe.yaml").read_text())["optimizer"]
        assert {f"optimizer.{key}": settings[key] for key in ("momentum", "lr")} == run.values
        assert json.loads((run.directory / "result.json").read_text())["step"] == STEPS
        # The launcher gives all ranks the same words, and before the first step the ranks compare their recipes.
        assert f"optimizer.lr={run.values['optimizer.lr']}" in starts_of(run.directory)[-1]["command"]
    points = json.loads(done.stdout)["points"]
    assert [run["world_size"] for point in points for run in point["runs"]] == [2] * 3
    means = [point["mean"] for point in points]
    assert means == sorted(means, reverse=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_point_that_fails_is_reported_and_not_repeated_unless_asked(
    sweep: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep.write_text(
        "recipe: tiny.yaml\nmethod: grid\noverrides: {training.epochs: 1}\n"
        "parameters: {optimizer.lr: {values: [1.0e+30, 0.05]}}\n"
    )
    command = ["sweep", "sweep.yaml", "--ranks", "1"]
    assert main(command) == 1
    bad, good = load_sweep("sweep.yaml").runs
    said = capfd.readouterr()
    assert f"{bad.name}: failed: diverged (exit code 3)" in said.err
    assert "--retry-failed" in said.err
    assert status_of(good).state == "finished"
    assert "(0 of 1 seeds; seed 0 failed: diverged (exit code 3))" in said.out
    began = len(starts_of(bad.directory))
    assert main(command) == 1
    assert len(starts_of(bad.directory)) == began
    assert main([*command, "--retry-failed"]) == 1
    assert len(starts_of(bad.directory)) == began + 1
    assert len(starts_of(good.directory)) == 1


STUBBORN = """
import signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda n, f: got.append(n))
signal.signal(signal.SIGINT, lambda n, f: got.append(n))
open(sys.argv[1] + "/ready", "w").close()
end = time.monotonic() + 60
while not got and time.monotonic() < end:
    time.sleep(0.01)
open(sys.argv[1] + "/" + signal.Signals(got[0]).name, "w").close()
sys.exit(75)
"""


@contextmanager
def sent_when(number: signal.Signals, file: Path) -> Iterator[None]:
    """Send this process a signal once a file is there."""

    def send() -> None:
        wait_for(file.exists)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    yield
    sender.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_the_code_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    with sent_when(number, tmp_path / "ready"), Trainer(quiet=False) as trainer:
        assert trainer.train([sys.executable, "-c", STUBBORN, str(tmp_path)], {}) == 75
        assert trainer.stopping
    assert (tmp_path / number.name).exists()


def test_a_training_does_not_outlive_the_sweep_that_is_killed(tmp_path: Path) -> None:
    """It is asked to stop, as by a scheduler, and has its time to write a checkpoint."""
    code = (
        "import sys; from harness.sweeps.run import Trainer\n"
        "with Trainer(quiet=False) as trainer: trainer.train([sys.executable, '-c', *sys.argv[1:]], {})"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code, STUBBORN, str(tmp_path)], cwd=ROOT)
    try:
        wait_for((tmp_path / "ready").exists)
    finally:
        sweep.kill()
        sweep.wait()
    wait_for((tmp_path / "SIGTERM").exists)


class WindingDown(Ranks):
    """A training that is done, and whose process is still there when the signal comes."""

    def command(self, words: Sequence[str]) -> list[str]:
        code = (
            "import sys, time; from harness.cli import main\n"
            "main(sys.argv[1:]); open('done', 'w').close(); time.sleep(60)"
        )
        return [sys.executable, "-c", code, *words]


def test_a_run_with_its_result_is_finished_whatever_signal_came_after(
    sweep: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = load_sweep("sweep.yaml")
    with sent_when(signal.SIGINT, sweep.with_name("done")):
        ranks = WindingDown(1, 1, gpu=False)
        assert run_here(found, ranks, retry_failed=False, quiet=False) == 75
    said = capfd.readouterr().err
    assert f"stopped at {found.runs[0].name}, which is finished; 1 finished, 2 new\n" in said
    assert (found.runs[0].directory / EXIT_CODE).read_text() == "0\n"


def test_a_sweep_is_held_by_one_process(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(load_sweep("sweep.yaml")):
        assert main(["sweep", "sweep.yaml", "--ranks", "1"]) == 2
        error = capsys.readouterr().err
        assert "another process runs this sweep" in error
        assert "HINT:" in error
        assert main(["sweep", "sweep.yaml", "--table"]) == 0  # which only reads


def test_batches_must_go_with_the_ranks(sweep: Path) -> None:
    sweep.write_text(SWEEP.replace("overrides: {", "overrides: {training.gradient_accumulation_steps: 4, "))
    check_ranks(load_sweep("sweep.yaml"), 4)
    with pytest.raises(HarnessError, match="cannot be shared out among 8 ranks: 16 in 4 micro-batches"):
        check_ranks(load_sweep("sweep.yaml"), 8)


def test_runs_of_another_recipe_are_not_resumed(sweep: Path, tiny: Path) -> None:
    run = load_sweep("sweep.yaml").runs[0]
    run.directory.mkdir(parents=True)
    (run.directory / "recipe.yaml").write_text(resolved_yaml(run.recipe))
    tiny.write_text(tiny.read_text().replace("log_every_steps: 1", "log_every_steps: 2"))
    check_unchanged(load_sweep("sweep.yaml"))  # how often a training reports does not change it
    tiny.write_text(tiny.read_text().replace("dropout: 0.2", "dropout: 0.3"))
    with pytest.raises(HarnessError, match=r"other settings: model\.args\.dropout: 0\.2 → 0\.3"):
        check_unchanged(load_sweep("sweep.yaml"))


def test_a_dry_run_shows_the_command_of_all_ranks_and_writes_nothing(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = sorted(sweep.parent.rglob("*"))
    assert main(["sweep", "sweep.yaml", "--ranks", "2", "--dry-run"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert len(listed) == 3
    assert "optimizer.momentum=0.5 optimizer.lr=0.05  new" in listed[1]
    assert "--num_processes 2 -m harness train tiny.yaml" in last
    assert f"training.steps={STEPS} optimizer.momentum=0.5 optimizer.lr=0.1 --run-dir runs/sweep/" in last
    assert sorted(sweep.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes 2", "--nodes: only with --slurm"),
        ("--time 10 --at-once 2", "--time, --at-once: only with --slurm"),
        ("--slurm --ranks 2", "--ranks is for this machine only"),
        ("--ranks 3", "cannot be shared out among 3 ranks: 16"),
        ("--slurm --tasks-per-node 5", "cannot be shared out among 5 ranks: 16"),
        ("--wandb-agent x --dry-run", "--dry-run: not with --wandb-agent"),
        ("--wandb-agent x --ranks 2", "--ranks: not with --wandb-agent"),
        ("--wandb --retry-failed", "--retry-failed: only with --local or --slurm"),
        ("--slurm --wandb", "not allowed with argument --slurm"),
        ("WORLD_SIZE=2", "starts ranks itself"),
    ],
)
def test_options_that_do_not_go_together(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    if words == "WORLD_SIZE=2":  # a sweep is started once, and not on each rank
        monkeypatch.setenv("WORLD_SIZE", "2")
        words = ""
    assert main(["sweep", "sweep.yaml", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "HINT:" in error
    assert not Path("runs").exists()


# --- as a SLURM array, without one; tests/cluster/test_sweeps.py has a real one


def test_json_is_json_where_nothing_is_submitted(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "sweep.yaml", "--slurm", "--json"]
    runs = load_sweep("sweep.yaml").runs
    assert main([*words, "--dry-run"]) == 0
    tasks = [{"run_directory": str(run.directory.absolute())} for run in runs]
    assert json.loads(capsys.readouterr().out) == {"job": None, "runs": tasks}
    assert not Path("runs").exists()
    for run in runs:
        finish(run.directory)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"job": None, "runs": []}
    assert main(words[:-1]) == 0
    assert "no run is due" in capsys.readouterr().out
    # A list of jobs that cannot be read, taken for none, would have its runs trained twice.
    file = Path("runs", "sweep", "slurm", "submitted.json")
    file.parent.mkdir(parents=True)
    file.write_text('[{"job_id": "1", ')
    assert main(["sweep", "sweep.yaml", "--table"]) == 2
    assert f"ERROR {file}: is broken\n  HINT:" in capsys.readouterr().err


def test_more_runs_than_tasks_of_an_array(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.write_text(f"{SWEEP}seeds: [{', '.join(map(str, range(334)))}]\n")
    assert main(["sweep", "sweep.yaml", "--slurm", "--dry-run"]) == 2
    assert "1,002 runs are more than the 1,001 tasks of an array" in capsys.readouterr().err
