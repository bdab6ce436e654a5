"""The batch script, and submitting up to sbatch. What a real SLURM makes of them: tests/cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.cli import main
from harness.launch import slurm
from harness.launch.slurm import Request, script_text, seeds_of
from harness.recipe.document import RECIPES
from harness.runs import is_unused
from tests.conftest import ROOT

DEBUG = str(RECIPES / "debug.yaml")
JOB_SCRIPT = ROOT / "harness" / "launch" / "job.sbatch"
EVIL = "a \"b\" 'c' $(touch x) `y` 100%j #d; e"
SWEEP_RUNS = ["/home/me/runs/s/a-seed_0", f"/data/{EVIL}"]

Capture = pytest.CaptureFixture[str]


def evil_text(**more: object) -> str:
    """A script in which every name could mean something to a shell or to SLURM."""
    options = {"name": EVIL, "recipe": f"/data/{EVIL}.yaml", "run": Path(f"/data/{EVIL}"), "overrides": [EVIL], **more}
    return script_text(Request(("--nodes=2", f"--comment={EVIL}"), array="0-3,7%2", max_restarts=0), **options)


def test_the_script_is_the_packaged_one_with_what_was_asked_for(capsys: Capture) -> None:
    words = ["--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task=6", "--partition", "gpu", "--qos=high"]
    words += ["--exclusive", "--signal-seconds", "300", "--max-restarts", "0", "--run-dir", "/r/x", "training.epochs=9"]
    assert main(["submit", DEBUG, *words, "--dry-run"]) == 0
    comment, body = JOB_SCRIPT.read_text().split(slurm.BODY)
    added = capsys.readouterr().out.removeprefix(comment).removesuffix(slurm.BODY + body)
    assert added.splitlines() == [
        "#SBATCH --job-name=debug",
        "#SBATCH --output=/r/x/slurm/%j.out",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --partition=gpu",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --qos=high",
        "#SBATCH --exclusive",
        "# shellcheck disable=SC2016  # $(…) in a name is part of the name",
        f"set -- {DEBUG} training.epochs=9",
        "HARNESS_RUN_DIR=/r/x",
        f"HARNESS_PYTHON={sys.executable}",
        "HARNESS_MAX_RESTARTS=0",
    ]


def test_names_on_lines_of_sbatch() -> None:
    lines = [line for line in evil_text().splitlines() if line.startswith("#SBATCH")][3:]
    quoted = EVIL.replace('"', '\\"')
    assert lines == [
        "#SBATCH --job-name=a_b_c_touch_x_y_100_j_d_e",
        f'#SBATCH --output="/data/{quoted.replace("%", "%%")}/slurm/%A_%a.out"',
        "#SBATCH --array=0-3,7%2",
        "#SBATCH --nodes=2",
        f'#SBATCH --comment="{quoted}"',
    ]
    assert "#SBATCH --job-name=harness\n" in evil_text(name="$$$")


@pytest.mark.parametrize("text", [JOB_SCRIPT.read_text(), evil_text(), evil_text(sweep_runs=SWEEP_RUNS)])
def test_scripts_pass_bash_and_shellcheck(text: str) -> None:
    for command in (["bash", "-n"], [str(Path(sys.executable).with_name("shellcheck")), "-"]):
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("index", "sweep_runs", "run", "overrides"),
    [("3", [], f"/data/{EVIL}-seed_3", [EVIL, "seed=3"]), ("1", SWEEP_RUNS, SWEEP_RUNS[1], [EVIL])],
)
def test_names_are_only_names(
    tmp_path: Path, index: str, sweep_runs: list[str], run: str, overrides: list[str]
) -> None:
    """And a task of an array has the run of its index."""
    head, _, _ = evil_text(sweep_runs=sweep_runs, sweep_again=EVIL).partition("frozen=$run")
    shown = 'printf "%s\\0" "$recipe" "$run" "$python" "${overrides[@]}"'
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": index}
    done = subprocess.run(
        ["bash", "-c", f"{head}\n{shown}"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\0")[:-1] == [f"/data/{EVIL}.yaml", run, sys.executable, *overrides]
    assert list(tmp_path.iterdir()) == []


def test_train_sbatch_is_the_same_script() -> None:
    assert (ROOT / "scripts" / "train.sbatch").resolve() == JOB_SCRIPT


def test_secrets_do_not_get_into_the_text(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    assert main(["submit", DEBUG, "--dry-run"]) == 0
    assert "s3cr3t" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--dry-run"], 0, ""),
        (["training.epochs=-1", "optimizer.lr=0"], 2, "2 errors"),
        (["--gpus-per-node", "a100:2", "--tasks-per-node", "4"], 2, "one rank per GPU"),
        (["--time", "2"], 2, "--time 2 is over as soon as --signal-seconds 120 begin"),
        (["--partition", "a\n#SBATCH --wrap=x"], 2, "cannot be given to sbatch as --partition"),
        (["--comment=a\x00"], 2, "cannot be given to sbatch as --comment"),
        (["--run-dir", "/a\\b"], 2, "cannot be given to sbatch as --output"),
        (["--run-dir", DEBUG], 2, "cannot be used as a run directory"),
        (["--run-dir", str(ROOT)], 2, "is not a run directory"),
        (["--qos", "high"], 2, "as one word, such as --qos=high"),
        ([], 2, "there is no sbatch here"),
    ],
)
def test_mistakes_and_dry_runs_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, words: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch in it
    assert main(["submit", DEBUG, *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert ("HINT:" in error) is (code == 2)
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
    return script


def test_what_is_submitted_stays_as_it_is(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The recipe is resolved and written down; what is set by a job we are in does not reach the new one."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    words = ["submit", DEBUG, "seed=5", "--array", "1,3", "--run-dir", "run"]
    assert main(words) == 0
    run = tmp_path / "run"
    places = [f"run directory {run}-seed_{seed}\nlog {run}/slurm/42_{seed}.out" for seed in (1, 3)]
    assert capsys.readouterr().out == "\n".join(["job 42", *places, ""])
    assert yaml.safe_load((run / "slurm" / "recipe.yaml").read_text())["seed"] == 5
    assert is_unused(run)  # by any training
    environment = (tmp_path / "environment").read_text()
    assert "SLURM_GPUS_ON_NODE" not in environment
    assert "SLURM_CONF=/etc/slurm.conf" in environment
    assert main(words) == 2
    assert "a job was submitted with this run directory" in capsys.readouterr().err


def test_what_was_there_before_stays_when_sbatch_refuses(sbatch: Path, tmp_path: Path, capsys: Capture) -> None:
    sbatch.write_text("#!/bin/sh\necho sbatch: error: no >&2; exit 1\n")
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert main(["submit", DEBUG, "--run-dir", str(run)]) == 2
    assert "SLURM refuses the job\n  sbatch: error: no" in capsys.readouterr().err
    assert [p.name for p in run.iterdir()] == ["recipe.yaml"]
    assert main(["submit", DEBUG]) == 2
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("script", "message"),
    [("printf 'caf\\351'", "without a job number"), ("exec sleep 30", "sbatch did not answer within 0.2 s")],
)
def test_what_slurm_may_have_taken_is_kept(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, script: str, message: str
) -> None:
    """The job may be there, and needs the folder that was made for it."""
    sbatch.write_text(f"#!/bin/sh\n{script}\n")
    if "sleep" in script:
        monkeypatch.setattr(slurm, "SBATCH_LIMIT_SECONDS", 0.2)
    assert main(["submit", DEBUG, "--run-dir", "run"]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "slurm" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("message", "hint", "code"),
    [
        ("Invalid --time specification", "4:00:00", 2),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "%l", 2),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "account", 2),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "SBATCH_QOS", 2),
        ("Invalid generic resource (gres) specification", "--gpus-per-node", 2),
        ("Batch job submission failed: Invalid feature specification", "SBATCH_CONSTRAINT", 2),
        ("Batch job submission failed: More processors requested than permitted", "--nodes", 2),
        ('Invalid numeric value "0" for --cpus-per-task.', "--nodes", 2),
        ('"x" is not a valid node count', "--nodes", 2),
        ("Batch job submission failed: Invalid job array specification", "MaxArraySize", 2),
        ("Batch job submission failed: User's group not permitted to use this partition", "--partition", 2),
        ("Batch job submission failed: Requested reservation is invalid", "--dry-run", 2),
        ("unrecognized option '--ndoes=2'", "--help", 2),
        ("fatal: Could not establish a configuration source", "SLURM_CONF", 2),
        ("fatal: Unable to process configuration file", "SLURM_CONF", 2),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "scontrol ping", 1),
        ("Batch job submission failed: Socket timed out on send/recv operation", "scontrol ping", 1),
        ("Munge encode failed: Failed to access /run/munge/munge.socket.2", "scontrol ping", 1),
    ],
)
def test_hints_fit_what_sbatch_says(sbatch: Path, capsys: Capture, message: str, hint: str, code: int) -> None:
    """Its words are those of SLURM 22.05; several of them need accounts or a broken cluster to hear."""
    sbatch.write_text(f"#!/bin/sh\necho {shlex.quote('sbatch: error: ' + message)} >&2; exit 1\n")
    assert main(["submit", DEBUG]) == code
    error = capsys.readouterr().err
    assert message in error
    assert hint in error.partition("HINT:")[2]


@pytest.mark.parametrize(
    ("array", "seeds"),
    [("3", [3]), ("0-2,7%2", [0, 1, 2, 7]), ("5,1", [1, 5]), ("0-10:5,1,1", [0, 1, 5, 10])],
)
def test_seeds_of_an_array(array: str, seeds: list[int]) -> None:
    assert seeds_of(array) == seeds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("4:00:01", 14401), ("1-12", 129600), ("1-0:30", 88200), ("2-0:0:5", 172805)]
    + [(text, None) for text in ("UNLIMITED", "1:2:3:4", None)],
)
def test_time_limits(text: str | None, seconds: int | None) -> None:
    assert slurm.limit_seconds(text) == seconds


@pytest.mark.parametrize("python", ["nowhere/python", "bare/python"])
def test_a_python_that_cannot_train_is_reported_once(tmp_path: Path, python: str) -> None:
    """Before anything is made or started: another try would not fix it."""
    bare = tmp_path / "bare" / "python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    before = sorted(tmp_path.iterdir())
    environment = os.environ | {"SLURM_JOB_ID": "7", "HARNESS_PYTHON": str(tmp_path / python)}
    done = subprocess.run(
        ["bash", JOB_SCRIPT, DEBUG], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert f"ERROR {tmp_path / python} " in done.stderr
    assert "HINT: ./scripts/setup.sh" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_signal_that_comes_before_the_ranks_queues_the_job_again(tmp_path: Path) -> None:
    """Stand-ins, since a real SLURM's signal cannot be timed so: Python is still looking for torch when it comes."""
    for name, text in (
        ("python", "kill -USR1 $PPID"),
        ("scontrol", "echo $* >>asked; echo ' JobState=RUNNING Requeue=1 Restarts=0 '"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "HARNESS_PYTHON": str(tmp_path / "python")}
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", JOB_SCRIPT, DEBUG], env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 7"
