"""Who may train in a run directory: a newer start of the same job takes it over, and the older one writes no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import HarnessError
from harness.files import Owner
from harness.runs import is_held
from harness.training import resume
from harness.training.resume import take_directory
from tests.conftest import ROOT
from tests.training.conftest import Capsys, everything, result

WAIT_SECONDS = 1.0
FIRST = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "7"}
AGAIN = FIRST | {"SLURM_RESTART_COUNT": "1"}
RANKS_AGAIN = FIRST | {"HARNESS_ATTEMPT": "1"}
# Holds a folder until it is asked to look whether it still does.
HOLDER = """
import sys
from pathlib import Path
from harness.errors import HarnessError
from harness.files import Owner, take
lock = take(Path(sys.argv[1]), Owner.this_process())
lock.sign()
print("held", flush=True)
sys.stdin.readline()
try:
    lock.check()
    print("still held", flush=True)
except HarnessError as error:
    print(error.what, error.exit_code, flush=True)
lock.release()
"""

Variables = dict[str, str]
Holder = Callable[[Variables], "subprocess.Popen[str]"]
InJob = Callable[[Variables], None]


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> InJob:
    def enter(variables: Variables) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    for name in AGAIN.keys() | RANKS_AGAIN.keys():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HARNESS_LOCK_SECONDS", str(WAIT_SECONDS))
    return enter


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """`holder(variables)`: another process, with these variables of SLURM's, holds the folder."""
    started: list[subprocess.Popen[str]] = []

    def start(variables: Variables) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        process = subprocess.Popen(
            command, env=os.environ | variables, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def look(process: subprocess.Popen[str]) -> str:
    """What the holder says when it looks whether it still holds the folder."""
    return process.communicate("\n", timeout=60)[0].strip()


@pytest.mark.parametrize("newer", [AGAIN, RANKS_AGAIN], ids=["job", "ranks"])
def test_a_newer_start_of_the_job_takes_over_after_a_wait(
    tmp_path: Path, holder: Holder, in_job: InJob, newer: Variables
) -> None:
    orphan = holder(FIRST)
    in_job(newer)
    began = time.monotonic()
    with ExitStack() as stack:
        own = take_directory(tmp_path, stack)
        assert time.monotonic() - began >= WAIT_SECONDS
        assert Owner.of(tmp_path) == own.owner
        said = look(orphan)
        assert said.startswith(f"was taken over by another start (job 7, process {os.getpid()} on ")
        assert said.endswith(" 1")
        assert is_held(tmp_path)  # whatever the orphan gives free
        own.check()
    assert not is_held(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_signature_of_an_earlier_holder_lets_nobody_in(
    tmp_path: Path, in_job: InJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process holds the folder and has not signed yet; the record there is of a job that has ended."""
    with monkeypatch.context() as earlier, ExitStack() as stack:
        for name, value in FIRST.items():
            earlier.setenv(name, value)
        take_directory(tmp_path, stack).sign()
    with ExitStack() as stack:
        take_directory(tmp_path, stack)
        in_job(AGAIN)
        with pytest.raises(HarnessError, match="another process is training in this run directory"):
            take_directory(tmp_path, stack)


@pytest.mark.parametrize(
    ("holds", "own", "code", "at_once"),
    [
        (AGAIN, FIRST, 2, True),
        (AGAIN, RANKS_AGAIN, 2, True),
        (FIRST, FIRST, 1, False),
        (FIRST, AGAIN | {"SLURM_JOB_ID": "8"}, 1, False),
        (FIRST, AGAIN | {"SLURM_CLUSTER_NAME": "d"}, 1, False),
        ({}, AGAIN, 1, False),
        (FIRST, {}, 2, True),
        ({}, {}, 2, True),
    ],
)
def test_nobody_else_takes_over(
    tmp_path: Path, holder: Holder, in_job: InJob, holds: Variables, own: Variables, code: int, at_once: bool
) -> None:
    process = holder(holds)
    limit = 60 if at_once else WAIT_SECONDS
    in_job(own | {"HARNESS_LOCK_SECONDS": str(limit)})
    began = time.monotonic()
    with ExitStack() as stack, pytest.raises(HarnessError, match=f"process {process.pid} on ") as caught:
        take_directory(tmp_path, stack)
    assert (time.monotonic() - began < limit) is at_once
    assert caught.value.exit_code == code
    assert caught.value.hint
    assert look(process) == "still held"


def test_what_is_given_free_meanwhile_is_taken(
    tmp_path: Path, holder: Holder, in_job: InJob, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    process = holder({})
    in_job(AGAIN | {"HARNESS_LOCK_SECONDS": "60"})

    def end_holder(seconds: float) -> None:
        if process.poll() is None and "waiting up to 60 s" in capsys.readouterr().err:
            process.kill()
            process.wait()

    monkeypatch.setattr(resume.time, "sleep", end_holder)
    with ExitStack() as stack:
        take_directory(tmp_path, stack)
    assert process.poll() is not None


@pytest.mark.parametrize("text", ["", '{"job": "7", "start": [0]}'])
def test_a_lock_that_names_nobody_is_not_taken_over(tmp_path: Path, holder: Holder, in_job: InJob, text: str) -> None:
    """Of an older version, or half written."""
    process = holder(FIRST)
    (tmp_path / ".lock").write_text(text)
    in_job(AGAIN)
    with ExitStack() as stack, pytest.raises(HarnessError, match="another process is training"):
        take_directory(tmp_path, stack)
    assert look(process) == "still held"


@pytest.mark.slow
def test_a_start_that_was_cut_off_stops_without_writing(
    tmp_path: Path, tiny: Path, in_job: InJob, capsys: Capsys
) -> None:
    """A real training that stands still while another start of its job takes over, and then runs on."""
    run, every = tmp_path / "run", 60
    settings = ["training.epochs=null", f"checkpoint.every_steps={every}", "checkpoint.every_epochs=null"]
    settings += ["evaluation.every_epochs=10000"]
    words = ["train", str(tiny), *settings, "--run-dir", str(run), "--resume", "auto"]
    command = [sys.executable, "-m", "harness", *words, "training.steps=1000000"]
    orphan = subprocess.Popen(
        command, env=os.environ | FIRST, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while not (run / "checkpoints" / f"step_{every}").exists():
            assert orphan.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        orphan.send_signal(signal.SIGSTOP)
        in_job(AGAIN)
        assert main([*words, f"training.steps={every * 2 - 1}"]) == 0
        assert "taken over from an earlier start" in capsys.readouterr().err
        assert result(run)["step"] == every * 2 - 1
        before = everything(run)
        orphan.send_signal(signal.SIGCONT)
        said = orphan.communicate(timeout=90)[1]
    finally:
        orphan.kill()
        orphan.communicate()
    assert orphan.returncode == 1
    assert "was taken over by another start (job 7" in said
    assert "Traceback" not in said
    assert everything(run) == before
