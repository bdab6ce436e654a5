"""Sweeps that really train: two ranks over gloo, interrupted and gone on with; failures; two sweeps at once."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import commands_sweep
from harness.cli import main
from harness.launching.training import Ranks
from harness.run_directory import is_unused
from harness.sweeps.plan import Plan, Trial, plan_sweep
from harness.sweeps.points import Point
from harness.sweeps.progress import read_exit_code, status_of, statuses, write_exit_code
from harness.sweeps.run import Trainer, held, run_here
from harness.sweeps.table import rows_of
from tests.conftest import ROOT, kill_tree, run_limited

LIMIT_SECONDS = 400
STEPS = 40
SWEEP = f"""recipe: tiny.yaml
method: grid
overrides: {{training.epochs: null, training.steps: {STEPS}}}
parameters:
  optimizer.lr: {{values: [0.1, 0.05]}}
  optimizer.momentum: {{values: [0.9, 0.5]}}
"""


@pytest.fixture
def sweep(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tiny.with_name("sweep.yaml")
    path.write_text(SWEEP)
    monkeypatch.chdir(tiny.parent)
    return path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "harness", "sweep", "sweep.yaml", *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def starts_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "provenance.json").read_text())["starts"]


def trials_of(plan: Plan, point: Point) -> list[Trial]:
    return [trial for trial in plan.trials if trial.point is point]


def finish(run: Path, accuracy: float, *, seed: int = 0) -> None:
    """A finished run, as far as the table looks."""
    run.mkdir(parents=True)
    record = {"kind": "epoch", "split": "test", "step": 1, "epoch": 1, "accuracy": accuracy, "loss": 1 - accuracy}
    better = {**record, "accuracy": accuracy + 0.1, "step": 0, "epoch": 0}
    (run / "metrics.jsonl").write_text(f"{json.dumps(better)}\n{json.dumps(record)}\n")
    (run / "result.json").write_text(json.dumps({"accuracy": accuracy, "seed": seed, "world_size": 2}))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_points_on_two_ranks_are_interrupted_and_gone_on_with(sweep: Path) -> None:
    plan = plan_sweep("sweep.yaml")
    runs = [trial.directory for trial in plan.trials]
    process = subprocess.Popen(
        command("--ranks", "2"), env=environment(), cwd=sweep.parent, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics, deadline = runs[1] / "metrics.jsonl", time.monotonic() + LIMIT_SECONDS
        while not (metrics.exists() and metrics.read_text()) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        kill_tree(process.pid)
    assert process.returncode == 75, said
    assert f"stopped at {runs[1].name}, with a checkpoint; 1 finished, 1 stopped, 2 new" in said
    assert "the same command goes on: harness sweep sweep.yaml --ranks 2\n" in said
    reached = max(int(p.name.removeprefix("step_")) for p in (runs[1] / "checkpoints").glob("step_*"))
    assert 0 < reached < STEPS
    first = (runs[0] / "result.json").read_bytes()

    done = run_limited(command("--ranks", "2", "--json"), LIMIT_SECONDS, environment(), sweep.parent)
    assert done.returncode == 0, done.stderr
    assert (runs[0] / "result.json").read_bytes() == first  # skipped
    assert [start["from_step"] for start in starts_of(runs[1])] == [0, reached]
    for trial in plan.trials:
        result = json.loads((trial.directory / "result.json").read_text())
        assert (result["world_size"], result["step"]) == (2, STEPS)
        settings = yaml.safe_load((trial.directory / "recipe.yaml").read_text())
        assert settings["optimizer"]["lr"] == trial.point.values["optimizer.lr"]
        assert settings["optimizer"]["momentum"] == trial.point.values["optimizer.momentum"]
        # What each rank was told: the launcher gives all of them the same words, and before the first step the ranks
        # compare the SHA-256 of their recipes (harness.preflight).
        assert f"optimizer.lr={trial.point.values['optimizer.lr']}" in starts_of(trial.directory)[-1]["command"]
    table = json.loads(done.stdout)
    assert [run["world_size"] for point in table["points"] for run in point["runs"]] == [2] * 4
    assert [point["best"] for point in table["points"]] == [True, False, False, False]
    means = [point["mean"] for point in table["points"]]
    assert means == sorted(means, reverse=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_point_that_fails_is_told_and_not_repeated_unless_asked(
    sweep: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep.write_text(
        "recipe: tiny.yaml\nmethod: grid\noverrides: {training.epochs: 1}\n"
        "parameters: {optimizer.lr: {values: [1.0e+30, 0.05]}}\n"
    )
    assert main(["sweep", "sweep.yaml", "--ranks", "1"]) == 1
    bad, good = plan_sweep("sweep.yaml").trials
    said = capfd.readouterr()
    assert f"{bad.name}: failed: diverged (exit code 3)" in said.err
    assert "--retry-failed" in said.err
    assert status_of(good).state == "finished"
    assert "(0 of 1 seeds; seed 0 failed: diverged (exit code 3))" in said.out
    began = len(starts_of(bad.directory))
    assert main(["sweep", "sweep.yaml", "--ranks", "1"]) == 1
    assert len(starts_of(bad.directory)) == began
    assert main(["sweep", "sweep.yaml", "--ranks", "1", "--retry-failed"]) == 1
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_once_and_the_code_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    def send_when_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_when_ready)
    sender.start()
    with Trainer(quiet=False) as trainer:
        assert trainer.train([sys.executable, "-c", STUBBORN, str(tmp_path)], {}) == 75
        assert trainer.stopping
    sender.join()
    assert (tmp_path / number.name).exists()


WINDS_DOWN = """
import sys, time
from harness.cli import main
main(sys.argv[2:])
open(sys.argv[1], "w").close()
time.sleep(60)
"""


class WindingDown(Ranks):
    """A training that is done, and whose process is still there when the signal comes."""

    def command(self, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", WINDS_DOWN, "done", *words]


def test_a_run_with_its_result_is_finished_whatever_signal_came_after(
    sweep: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_sweep("sweep.yaml")
    done = sweep.with_name("done")

    def interrupt() -> None:
        while not done.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    ranks = WindingDown(1, 1, gpu=False)
    assert run_here(plan, ranks, retry_failed=False, quiet=False, again="harness sweep x") == 75
    sender.join()
    said = capfd.readouterr().err
    assert f"stopped at {plan.trials[0].name}, which is finished; 1 finished, 3 new\n" in said
    assert "the same command goes on: harness sweep x\n" in said
    assert read_exit_code(plan.trials[0].directory) == 0


def test_the_command_that_goes_on_is_the_one_that_was_given() -> None:
    parser = argparse.ArgumentParser()
    commands_sweep.build_sweep(parser)
    for words in (["a b.yaml", "--ranks", "2", "--retry-failed", "--json"], ["sweep.yaml"]):
        given = ["harness", "sweep", *words]
        assert shlex.split(commands_sweep.command_of(parser.parse_args(words))) == given


def test_a_training_does_not_outlive_the_sweep_that_is_killed(tmp_path: Path) -> None:
    """It is told to stop, as by a scheduler, and has its time to write a checkpoint."""
    code = (
        "import sys; from harness.sweeps.run import Trainer\n"
        "with Trainer(quiet=False) as trainer: trainer.train([sys.executable, '-c', *sys.argv[1:]], {})"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code, STUBBORN, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    try:
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        sweep.kill()
        sweep.wait()
    while not (tmp_path / "SIGTERM").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sweep_that_is_under_way_is_not_begun_again(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(plan_sweep("sweep.yaml")):
        assert main(["sweep", "sweep.yaml", "--ranks", "1"]) == 2
        error = capsys.readouterr().err
        assert "another process runs this sweep" in error
        assert "HINT:" in error
        assert main(["sweep", "sweep.yaml", "--table"]) == 0  # which only reads


def test_a_dry_run_shows_the_command_of_all_ranks_and_writes_nothing(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = sorted(sweep.parent.rglob("*"))
    assert main(["sweep", "sweep.yaml", "--ranks", "2", "--dry-run"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert len(listed) == 4
    assert "optimizer.lr=0.05 optimizer.momentum=0.5  new" in listed[3]
    assert "--num_processes 2 -m harness train tiny.yaml" in last
    assert f"training.steps={STEPS} optimizer.lr=0.1 optimizer.momentum=0.9 --run-dir runs/sweep/" in last
    assert sorted(sweep.parent.rglob("*")) == before


def test_the_table_has_mean_and_deviation_over_seeds_the_best_first(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.write_text(f"{SWEEP}seeds: [0, 1, 2]\n")
    plan = plan_sweep("sweep.yaml")
    low, high, part, none = plan.points
    for point, accuracies in ((low, (0.2, 0.3, 0.4)), (high, (0.6, 0.7, 0.8)), (part, (0.9, 0.9))):
        for trial, accuracy in zip(trials_of(plan, point), accuracies, strict=False):
            finish(trial.directory, accuracy, seed=trial.seed)
    write_exit_code(trials_of(plan, part)[2].directory, 2)
    rows = rows_of(plan, statuses(plan))
    assert [row.point.id for row in rows] == [high.id, low.id, part.id, none.id]
    assert [row.is_best for row in rows] == [True, False, False, False]
    assert rows[0].mean == pytest.approx(0.7)
    assert rows[0].std == pytest.approx(0.1)  # n - 1 below the line
    assert (rows[3].mean, rows[3].std) == (None, None)
    assert main(["sweep", "sweep.yaml", "--table"]) == 0
    text = capsys.readouterr().out
    assert "8 finished, 1 failed, 3 new" in text
    assert f"* {high.id}  optimizer.lr=0.1 optimizer.momentum=0.5   70.00% ± 10.00%  (n = 3)" in text
    assert "90.00% ± 0.00%  (2 of 3 seeds; seed 2 failed: bad input (exit code 2))" in text

    sweep.write_text(f"{SWEEP}seeds: [0, 1, 2]\nmetric: {{key: loss, goal: minimize}}\n")
    assert main(["sweep", "sweep.yaml", "--table", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"][0]["id"] == high.id
    assert found["points"][0]["mean"] == pytest.approx(0.3)
    sweep.write_text(f"{SWEEP}seeds: [0, 1, 2]\nmetric: {{at: best}}\n")
    assert rows_of(plan_sweep("sweep.yaml"), statuses(plan_sweep("sweep.yaml")))[0].mean == pytest.approx(0.8)


def test_an_exit_code_alone_makes_no_run(tmp_path: Path) -> None:
    write_exit_code(tmp_path / "run", 2)
    assert is_unused(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "--nodes: only with --slurm"),
        (["--time", "10", "--at-once", "2"], "--time, --at-once: only with --slurm"),
        (["--slurm", "--ranks", "2"], "--ranks is for this machine alone"),
        (["--ranks", "3"], "cannot be shared out among 3 ranks: 16"),
        (["--slurm", "--tasks-per-node", "5"], "cannot be shared out among 5 ranks: 16"),
        (["--wandb-agent", "x", "--dry-run"], "--dry-run: not with --wandb-agent"),
        (["--wandb-agent", "x", "--ranks", "2"], "--ranks: not with --wandb-agent"),
        (["--wandb", "--retry-failed"], "--retry-failed: only with --local or --slurm"),
        (["--slurm", "--wandb"], "not allowed with argument --slurm"),
    ],
)
def test_options_that_do_not_go_together(
    sweep: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["sweep", "sweep.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "HINT:" in error
    assert not Path("runs").exists()


def test_json_is_json_where_nothing_is_submitted(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "sweep.yaml", "--slurm", "--json"]
    assert main([*words, "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = plan_sweep("sweep.yaml")
    assert found["job"] is None
    assert [run["run_directory"] for run in found["runs"]] == [str(t.directory.absolute()) for t in plan.trials]
    for trial in plan.trials:
        finish(trial.directory, 0.5)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"job": None, "runs": []}


def test_a_sweep_is_started_once_and_not_on_each_rank(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", "sweep.yaml"]) == 2
    assert "starts ranks itself" in capsys.readouterr().err
