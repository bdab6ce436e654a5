"""The batch script as text, and submitting up to sbatch. What a real SLURM makes of them: tests/cluster."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from harness.cli import main
from harness.errors import HarnessError
from harness.launching import submitting
from harness.launching.ports import free_port
from harness.launching.slurm import BODY, Job, job_name, log_path, sbatch_text
from harness.runs import is_unused

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "sbatch"
DEBUG = str(ROOT / "recipes" / "debug.yaml")
PLAIN = Job("seed", "/home/me/seed.yaml", "/home/me/runs/seed/20260101-000000-0000", "/home/me/.venv/bin/python")
EVIL = "a \"b\" 'c' $(touch x) `y` 100%j #d; e"
JOBS = {
    "cpu": PLAIN,
    "gpus": replace(
        PLAIN,
        overrides=("training.epochs=90", "model.args={a: 'x y'}"),
        nodes=2,
        tasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=6,
        time_limit="1-12:00:00",
        partition="gpu",
        account="lab",
        signal_seconds=300,
        max_restarts=0,
    ),
    "array": replace(PLAIN, seeds=(0, 1, 2, 7), array_limit=2),
    "sweep": replace(
        PLAIN, runs=("/home/me/runs/s/a-seed_0", f"/data/{EVIL}"), array_limit=1, again="harness sweep s.yaml --slurm"
    ),
    "evil": replace(PLAIN, name=EVIL, recipe=f"/data/{EVIL}.yaml", run_directory=f"/data/{EVIL}", overrides=(EVIL,)),
}
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))


@pytest.mark.parametrize("name", JOBS)
def test_the_text_is_the_golden_one(name: str) -> None:
    """To accept a change: `HARNESS_GOLDEN=write pytest tests/launching/test_slurm.py`, then look at the difference."""
    file, text = GOLDEN / f"{name}.sh", sbatch_text(JOBS[name])
    if os.environ.get("HARNESS_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize(
    "script", [*(GOLDEN / f"{name}.sh" for name in JOBS), ROOT / "scripts" / "train.sbatch"], ids=str
)
def test_scripts_pass_bash_and_shellcheck(script: Path) -> None:
    for command in (["bash", "-n"], [SHELLCHECK]):
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_train_sbatch_has_the_same_body() -> None:
    text = (ROOT / "scripts" / "train.sbatch").read_text()
    assert text.endswith(BODY.read_text())
    directives = {line for line in text.splitlines() if line.startswith("#SBATCH")}
    assert directives <= set(sbatch_text(PLAIN).splitlines())


def settings_of(text: str, *names: str) -> list[str]:
    """What bash makes of the settings of a script."""
    head = text[: text.index(BODY.read_text())]
    shown = "; ".join(f'printf "%s\\0" "${{{name}}}"' for name in names)
    done = subprocess.run(["bash", "-c", f"{head}\n{shown}"], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.split("\0")[:-1]


def test_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = JOBS["evil"]
    values = settings_of(sbatch_text(job), "recipe", "overrides[0]", "run", "python")
    assert values == [job.recipe, EVIL, job.run_directory, job.python]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [{"partition": "a\n#SBATCH --wrap=x"}, {"run_directory": "/a\\b"}, {"account": "a\x00"}, {"time_limit": "1\r"}],
)
def test_what_could_break_out_of_its_line_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(HarnessError, match="cannot be given to sbatch") as caught:
        sbatch_text(replace(PLAIN, **change))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seed", "seed"),
        ("my recipe $(date)", "my_recipe_date"),
        ("ümlaut", "mlaut"),
        ("$$$", "harness"),
        ("a" * 99, "a" * 60),
    ],
)
def test_job_names(name: str, expected: str) -> None:
    assert job_name(name) == expected


def test_a_task_of_a_sweep_has_the_run_of_its_index() -> None:
    text = sbatch_text(JOBS["sweep"])
    assert "#SBATCH --array=0-1%1\n" in text
    head = text[: text.index("frozen=$run")]
    for index, run in enumerate(JOBS["sweep"].runs):
        script = f'SLURM_ARRAY_TASK_ID={index}\n{head}\nprintf %s "$run"'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=10)
        assert done.stdout == run


def test_logs_are_in_the_run_directories() -> None:
    assert log_path(PLAIN, "7") == Path(PLAIN.run_directory, "slurm", "7.out")
    assert log_path(JOBS["array"], "7", 2) == Path(f"{PLAIN.run_directory}-seed_2", "slurm", "7_2.out")


def test_secrets_do_not_get_into_the_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    assert main(["submit", DEBUG, "--dry-run"]) == 0
    assert "s3cr3t" not in capsys.readouterr().out


def test_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--nodes", "2", "--gpus-per-node", "4", "--array", "0-1", "training.epochs=1", "--dry-run"]
    assert main(["submit", DEBUG, *words]) == 0
    text = capsys.readouterr().out
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--array=0,1"):
        assert f"#SBATCH {line}\n" in text
    assert "overrides=(training.epochs=1)\n" in text
    assert f"run={tmp_path}/runs/debug/" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.epochs=-1", "optimizer.lr=0"], "2 errors"),
        (["--nodes", "0"], 'argument --nodes: must be a whole number of at least 1, not "0"'),
        (["--array", "3-1"], "argument --array: must be seeds"),
        (["--array", "1,1"], "argument --array: must be seeds, each once"),
        (["--array", "0-9999999"], "argument --array: must be seeds"),
        (["--gpus-per-node", "2", "--tasks-per-node", "4"], "one rank a GPU"),
        (["--time", "2"], "--time 2 is over as soon as --signal-seconds 120 begin"),
        (["--partition", "a\nb"], "cannot be given to sbatch as --partition"),
        (["--run-dir", DEBUG], "cannot be used as a run directory"),
        (["--run-dir", str(ROOT)], "is not a run directory"),
        ([], "there is no sbatch here"),
    ],
)
def test_mistakes_are_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch in it
    assert main(["submit", DEBUG, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "HINT:" in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that notes its environment and answers 42: the real one needs a cluster, see tests/cluster."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "sbatch"
    script.write_text(f'#!/bin/sh\nenv >{shlex.quote(str(tmp_path / "environment"))}\necho "42;cluster"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "environment"


def test_a_job_without_a_number_keeps_what_it_needs(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM may have taken it."""
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\nprintf 'caf\\351'\n")
    assert main(["submit", DEBUG, "--run-dir", "run"]) == 1
    assert "without a job number" in capsys.readouterr().err
    assert (tmp_path / "run" / "slurm" / "recipe.yaml").exists()


def test_what_is_submitted_stays_as_it_is(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe is resolved and written down; what is set by a job we are in does not reach the new one."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert main(["submit", DEBUG, "seed=5", "--array", "1,3", "--run-dir", "run"]) == 0
    printed = capsys.readouterr().out
    for seed in (1, 3):
        run = tmp_path / f"run-seed_{seed}"
        assert f"run directory {run}\nlog {run}/slurm/42_{seed}.out\n" in printed
        assert yaml.safe_load((run / "slurm" / "recipe.yaml").read_text())["seed"] == seed
        assert is_unused(run)  # by any training
    assert printed.startswith("job 42\n")
    assert "SLURM_GPUS_ON_NODE" not in sbatch.read_text()
    assert "SLURM_CONF=/etc/slurm.conf" in sbatch.read_text()
    assert main(["submit", DEBUG, "--array", "1,2", "--run-dir", "run"]) == 2
    assert "a job was submitted with this run directory" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("run*")) == ["run-seed_1", "run-seed_3"]


def test_what_was_there_before_stays_when_sbatch_refuses(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho sbatch: error: no >&2; exit 1\n")
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert main(["submit", DEBUG, "--run-dir", str(run)]) == 2
    assert "SLURM refuses the job\n  sbatch: error: no" in capsys.readouterr().err
    assert [p.name for p in run.iterdir()] == ["recipe.yaml"]
    assert main(["submit", DEBUG]) == 2
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("told", "hint", "code"),
    [
        ("Invalid --time specification", "4:00:00", 2),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "%l", 2),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "account", 2),
        ("Batch job submission failed: Invalid qos specification", "SBATCH_QOS", 2),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "SBATCH_QOS", 2),
        ("Invalid generic resource (gres) specification", "--gpus-per-node", 2),
        ("Batch job submission failed: Invalid feature specification", "SBATCH_CONSTRAINT", 2),
        ("Batch job submission failed: More processors requested than permitted", "--nodes", 2),
        ("Batch job submission failed: Node count specification invalid", "--nodes", 2),
        ("Batch job submission failed: Requested node configuration is not available", "--nodes", 2),
        ("Batch job submission failed: Invalid job array specification", "MaxArraySize", 2),
        ("invalid partition specified: nowhere", "--partition", 2),
        ("Batch job submission failed: User's group not permitted to use this partition", "--partition", 2),
        ("Batch job submission failed: Requested reservation is invalid", "--dry-run", 2),
        ("fatal: Could not establish a configuration source", "SLURM_CONF", 2),
        ("fatal: Unable to process configuration file", "SLURM_CONF", 2),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "scontrol ping", 1),
        ("Batch job submission failed: Socket timed out on send/recv operation", "scontrol ping", 1),
        ("Munge encode failed: Failed to access /run/munge/munge.socket.2", "scontrol ping", 1),
    ],
)
def test_hints_are_of_what_sbatch_refuses(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: str, hint: str, code: int
) -> None:
    """Its words are those of SLURM 22.05; several of them need accounts or a broken cluster to hear."""
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\necho {shlex.quote('sbatch: error: ' + told)} >&2; exit 1\n")
    assert main(["submit", DEBUG]) == code
    error = capsys.readouterr().err
    assert told in error
    assert hint in error.partition("HINT:")[2]


@pytest.mark.parametrize(
    ("text", "expected"), [("3", ((3,), None)), ("0-2,7%2", ((0, 1, 2, 7), 2)), ("5,1", ((5, 1), None))]
)
def test_arrays(text: str, expected: object) -> None:
    assert submitting._array(text) == expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("4:00:01", 14401),
        ("1-12", 129600),
        ("1-0:30", 88200),
        ("2-0:0:5", 172805),
        ("UNLIMITED", None),
        ("1:2:3:4", None),
        (None, None),
    ],
)
def test_time_limits(text: str | None, seconds: int | None) -> None:
    assert submitting.limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "a", "1-", "0,", "-1", "1%", "1%0", "0-3:2", "1 2"])
def test_wrong_arrays(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        submitting._array(text)


def test_ports_of_jobs_begin_apart_and_taken_ones_are_passed() -> None:
    first = free_port("1 0 0")
    assert free_port("1 0 0") == first
    assert len({free_port(f"{job} 0 0") for job in range(20)}) > 15
    with socket.socket() as server:
        server.bind(("", first))
        assert free_port("1 0 0") != first


def test_what_slurm_may_have_taken_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch that does not answer: the job may be there, and needs the folder that was made for it."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(submitting, "SBATCH_LIMIT_SECONDS", 0.2)
    folder = tmp_path / "made"
    folder.mkdir()
    with ExitStack() as undo:
        undo.callback(folder.rmdir)
        with pytest.raises(HarnessError, match="sbatch did not answer") as told:
            submitting.submit_script(folder / "job.sbatch", undo)
    assert told.value.exit_code == 1
    assert folder.exists()


@pytest.mark.parametrize("python", ["nowhere/python", "bare/python"])
def test_a_python_that_cannot_train_is_told_of_once(tmp_path: Path, python: str) -> None:
    """Before anything is made or started: another try would not mend it."""
    bare = tmp_path / "bare" / "python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    before = sorted(tmp_path.iterdir())
    environment = os.environ | {"SLURM_JOB_ID": "7", "HARNESS_PYTHON": str(tmp_path / python)}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "train.sbatch"), DEBUG],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"ERROR {tmp_path / python} " in done.stderr
    assert "HINT: ./scripts/setup.sh" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before
