"""The recipe decides, not the environment: variables of the libraries, of OpenMP, of launchers; readers that leave."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.cli import main
from tests.conftest import ROOT, run_limited
from tests.training.conftest import result

HARMLESS = {  # what `accelerate launch` sets, and variables that say where and how loud
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_CPU": "yes",
    "TIMM_FUSED_ATTN": "1",
    "NVIDIA_TF32_OVERRIDE": "",
    "WORLD_SIZE": "",
    "TIMM_REENTRANT_CKPT": "false",
    "OMPI_COMM_WORLD_SIZE": "1",
    "PMI_RANK": "0",
    "LOCAL_WORLD_SIZE": "",
}


def train(tiny: Path, run: Path, expect: int = 0) -> Path:
    assert main(["train", str(tiny), "--run-dir", str(run)]) == expect
    return run


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DOWNCAST_BF16", "true"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_A_SETTING_OF_LATER_VERSIONS", "4"),
        ("FSDP_VERSION", "7"),
    ],
)
def test_settings_for_accelerate_change_nothing_and_are_noted(
    name: str,
    value: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = train(tiny, tmp_path / "alone")
    monkeypatch.setenv(name, value)
    capsys.readouterr()
    run = train(tiny, tmp_path / "run")
    assert result(run)["loss"] == result(alone)["loss"]
    (start,) = json.loads((run / "provenance.json").read_text())["starts"]
    told = not name.startswith("FSDP_")  # details of what is not switched on
    assert start["environment_ignored"] == ({name: value} if told else {})
    assert (f"ignored, since the recipe decides: {name}={value}" in capsys.readouterr().err) == told
    assert os.environ[name] == value


def test_what_the_launcher_sets_is_no_matter(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in HARMLESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    (start,) = json.loads((train(tiny, tmp_path / "run") / "provenance.json").read_text())["starts"]
    assert "WARNING" not in capsys.readouterr().err
    assert start["environment_ignored"] == {}
    assert start["environment"].items() >= {"MKL_CBWR": "AVX2", "TIMM_FUSED_ATTN": "1"}.items()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["asks for DeepSpeed", "Unset ACCELERATE_USE_DEEPSPEED"]),
        ({"ACCELERATE_USE_FSDP": "1", "TIMM_FUSED_ATTN": "0"}, ["environment: 2 errors", "FSDP", "TIMM_FUSED_ATTN=0"]),
        ({"NVIDIA_TF32_OVERRIDE": "1"}, ["changes the arithmetic"]),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, ["changes the arithmetic"]),
        ({"ACCELERATE_USE_CPU": "maybe"}, ['ACCELERATE_USE_CPU is "maybe"']),
        ({"ACCELERATE_DEBUG_MODE": "maybe"}, ['ACCELERATE_DEBUG_MODE is "maybe"']),
        ({"TORCH_COMPILE_OVERRIDE_BACKENDS": "eager"}, ["changes the arithmetic"]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["OMPI_COMM_WORLD_SIZE=2 says that there are several ranks"]),
        ({"OMP_NUM_THREADS": "many"}, ['OMP_NUM_THREADS must be a whole number ≥ 1, it is "many"']),
        ({"OMP_NUM_THREADS": "0", "TIMM_FUSED_ATTN": "0"}, ["environment: 2 errors", "OMP_NUM_THREADS must be"]),
        ({"WORLD_SIZE": "two"}, ['WORLD_SIZE must be a whole number ≥ 1, it is "two"']),
        ({"LOCAL_WORLD_SIZE": "0"}, ['LOCAL_WORLD_SIZE must be a whole number ≥ 1, it is "0"']),
        ({"WORLD_SIZE": "2"}, ["RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"]),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
            ["MASTER_PORT is 99999"],
        ),
    ],
)
def test_what_asks_for_another_training_is_refused_by_name(
    variables: dict[str, str],
    told: list[str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    train(tiny, tmp_path / "run", expect=2)
    error = capsys.readouterr().err
    assert [text for text in (*told, "HINT:") if text not in error] == []
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("set_by_user", "found"),
    [({}, "100"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_openmp_waits_quietly_in_every_command(set_by_user: dict[str, str], found: str) -> None:
    code = "import os, sys; from harness.cli import main; main(); "
    code += "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = run_limited([sys.executable, "-c", code, "recipe", "schema"], 60, plain | set_by_user, ROOT)
    assert done.stdout.splitlines()[-1] == f"{found} False", done.stderr


def test_a_variable_that_timm_cannot_read_is_no_traceback() -> None:
    environment = os.environ | {"TIMM_FUSED_ATTN": "yes"}
    done = run_limited([sys.executable, "-m", "harness", "summary", "seed"], 60, environment, ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR TIMM_FUSED_ATTN=yes changes the arithmetic")


def test_help_needs_no_docstrings() -> None:
    done = run_limited([sys.executable, "-OO", "-m", "harness", "--help"], 60, dict(os.environ), ROOT)
    assert done.returncode == 0
    assert "None" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_a_reader_that_leaves_changes_neither_training_nor_code(redirection: str, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = (
        f"{sys.executable} -m harness train {tiny} --run-dir {run} {redirection} | head -c 1; exit ${{PIPESTATUS[0]}}"
    )
    done = run_limited(["bash", "-c", command], 120, dict(os.environ), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert result(run)["step"] == 14


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_stops_a_training_with_a_checkpoint(nohup: bool, tiny: Path, tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    run = tmp_path / "run"
    length = "training.epochs=60" if nohup else "training.epochs=1000000"
    command = [sys.executable, "-m", "harness", "train", str(tiny), length, "--run-dir", str(run)]
    if nohup:
        command = ["nohup", *command]
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup themselves
    )
    os.close(terminal)
    while not (run / "metrics.jsonl").exists() and process.poll() is None:
        try:
            os.read(master, 1 << 16)
        except OSError as error:
            assert error.errno == errno.EIO
        time.sleep(0.01)
    os.close(master)
    process.send_signal(signal.SIGHUP)  # as the kernel does for the leader of the terminal's session
    try:
        assert process.wait(timeout=120) == (0 if nohup else 75)
    finally:
        process.kill()
        process.wait()
    assert (run / "result.json").exists() == nohup
    assert list((run / "checkpoints").glob("step_*"))
