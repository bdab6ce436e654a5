"""Sweeps by a W&B server: the configuration, and an agent whose points reach every rank by the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.cli import main
from harness.launch.local import Ranks
from harness.recipe import load
from harness.recipe.document import RECIPES
from harness.sweeps.run import wandb_configuration
from harness.sweeps.spec import load_sweep
from harness.tracking.wandb_run import new_run_id, values_of
from tests.conftest import ROOT, run_limited
from tests.faults.runs import NotHere
from tests.faults.wandb_server import WandbServer
from tests.faults.wandb_server import environment as to_server
from tests.sweeps.sweep_server import SWEEP_ID, sweep_server

LIMIT_SECONDS = 400
SWEEP = """recipe: tiny.yaml
method: random
points: 3
seeds: [4, 5]
overrides: {training.epochs: 1, tracking.wandb: auto}
parameters:
  optimizer.lr: {min: 0.01, max: 0.1}
  optimizer.weight_decay: {min: 1e-5, max: 1e-3, scale: log}
  checkpoint.keep_last: {min: 7.5, max: 16.5}
  tracking.log_every_steps: {min: 1.2, max: 50, scale: log}
  data.flip: {values: [none, random]}
"""
COMMAND = [sys.executable, "-m", "harness", "sweep", "sweep.yaml"]
TWO = Ranks(2, 1, gpu=False)


def test_the_configuration_says_the_same_as_the_file(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = wandb_configuration(load_sweep("sweep.yaml"), TWO)
    assert found.pop("command") == [
        *("${env}", "ACCELERATE_USE_CPU=true", "OMP_NUM_THREADS=1"),
        *(sys.executable, "-m", "harness.launch.torchrun", "accelerate", "launch"),
        *("--config_file", str(RECIPES / "launch" / "cpu.yaml"), "--num_processes", "2", "-m", "harness"),
        *("train", str(sweep.with_name("tiny.yaml")), "training.epochs=1", "tracking.wandb=auto"),
        "${args_no_hyphens}",
    ]
    assert found == {
        "name": "sweep",
        "method": "random",
        "metric": {"name": "test/accuracy", "goal": "maximize"},
        "run_cap": 6,
        "parameters": {
            "optimizer.lr": {"distribution": "uniform", "min": 0.01, "max": 0.1},
            "optimizer.weight_decay": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
            "checkpoint.keep_last": {"distribution": "int_uniform", "min": 8, "max": 16},
            "tracking.log_every_steps": {"distribution": "q_log_uniform_values", "q": 1, "min": 2, "max": 50},
            "data.flip": {"values": ["none", "random"]},
            "seed": {"values": [4, 5]},
        },
    }
    # What is optimised has the name that trainings log; of the training, `train/loss` is that of a log step.
    sweep.write_text(f"{SWEEP}metric: {{split: train, key: loss, goal: minimize}}\n")
    found = wandb_configuration(load_sweep("sweep.yaml"), TWO)
    assert found["metric"] == {"name": "train/epoch_loss", "goal": "minimize"}
    assert "train/epoch_loss" in values_of({"kind": "epoch", "split": "train", "step": 4, "epoch": 1, "loss": 0.5})


def test_what_the_agent_writes_reads_back(sweep: Path) -> None:
    """The agent's own code writes the arguments."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    drawn = {"optimizer.lr": 1e-05, "data.flip": "none", "training.clip_grad_norm": 0.5, "optimizer.nesterov": True}
    drawn |= {"model.args.widths": [[4, 8], [8]], "training.precision": "no"}
    words = create_sweep_command_args({"args": {key: {"value": value} for key, value in drawn.items()}})
    recipe = load("tiny.yaml", words["args_no_hyphens"])
    assert (recipe.optimizer.lr, recipe.data.flip, recipe.training.precision) == (1e-05, "none", "no")
    assert (recipe.training.clip_grad_norm, recipe.optimizer.nesterov) == (0.5, True)
    assert recipe.model.args["widths"] == [[4, 8], [8]]


def test_values_that_the_agent_would_change_are_refused(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "sweep.yaml", "--wandb", "--dry-run", "--ranks", "1"]
    assert main(command) == 0
    assert yaml.safe_load(capsys.readouterr().out)["parameters"]["seed"] == {"values": [4, 5]}
    assert not Path("runs").exists()
    sweep.write_text("recipe: tiny.yaml\nmethod: grid\nparameters:\n  training.clip_grad_norm: {values: [null, 1.0]}\n")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "sweep.yaml:4: training.clip_grad_norm: None would not reach the training" in error
    assert "HINT: Use --local or --slurm" in error


def test_a_training_has_the_id_that_the_agent_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert new_run_id() != "abc"  # two trainings of one shell would be one run
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert new_run_id() == "abc"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbServer]:
    try:
        server = WandbServer(tmp_path / "server", tmp_path / "server.log")
    except NotHere as reason:
        pytest.skip(str(reason))
    yield server
    server.kill()


def environment(port: int) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | to_server(port) | own


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_agent_trains_its_points_on_two_ranks(sweep: Path, tmp_path: Path, server: WandbServer) -> None:
    """`--wandb` creates the sweep, `--wandb-agent` trains what W&B's own agent is given."""
    point = {"optimizer.lr": 0.0625, "checkpoint.keep_last": 9, "data.flip": "random", "seed": 5}
    with sweep_server(server.port, [point]) as front:
        words, variables = ["--wandb", "--ranks", "2", "--json"], environment(front.port)
        made = run_limited([*COMMAND, *words], LIMIT_SECONDS, variables, tmp_path)
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["id"] == SWEEP_ID
        assert front.configuration["parameters"]["seed"] == {"values": [4, 5]}
        done = run_limited([*COMMAND, "--wandb-agent", SWEEP_ID], LIMIT_SECONDS, variables, tmp_path)
    assert server.holds() > 0
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (result["world_size"], result["seed"]) == (2, 5)
    settings = yaml.safe_load((run / "recipe.yaml").read_text())  # which the ranks compared before the first step
    assert (settings["optimizer"]["lr"], settings["checkpoint"]["keep_last"]) == (0.0625, 9)
    assert front.run_ids == [json.loads((run / "provenance.json").read_text())["wandb_run_id"]]
    assert "W&B fails" not in done.stderr + done.stdout


@pytest.mark.slow
def test_a_server_without_sweeps_is_an_error_of_a_line(sweep: Path, tmp_path: Path, server: WandbServer) -> None:
    command = [*COMMAND, "--wandb", "--ranks", "1"]
    done = run_limited(command, LIMIT_SECONDS, environment(server.port), tmp_path)
    assert done.returncode == 1
    assert "ERROR W&B does not take the sweep" in done.stderr
    assert "HINT:" in done.stderr
    assert "Traceback" not in done.stderr
