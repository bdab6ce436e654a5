"""Launchers: real ranks over gloo, their exit codes, the signals they get, and restarts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.launch.local import Ranks
from harness.launch.torchrun import exit_code, next_attempt
from tests.conftest import ROOT, kill_tree, run_limited

LIMIT_SECONDS = 90
RANK = """
import os, signal, sys, time

stops = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda n, frame: stops.append(n))

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true")
rank, world = accelerator.process_index, accelerator.num_processes
total = accelerator.reduce(torch.tensor([rank + 1.0])).item()
line = f"rank {rank} of {world} sum {total:g} threads {torch.get_num_threads()}\\n"
os.write(1, line.encode())  # in one piece: the ranks share their output
mode, code = sys.argv[1], int(sys.argv[2])
if mode == "die" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("wait", "die"):
    end = time.monotonic() + 60
    while not stops and time.monotonic() < end:
        time.sleep(0.02)
if code and "HARNESS_EXIT_CODE_FILE" in os.environ:
    with open(os.environ["HARNESS_EXIT_CODE_FILE"], "a") as file:
        print(code, file=file)
accelerator.end_training()
os._exit(code)
"""
TRAIN = ["accelerate", "launch", "-m", "harness", "train", "x.yaml"]


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return str(path)


def environment(**extra: str) -> dict[str, str]:
    common = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | common | extra


def command(ranks: int, *words: str, max_restarts: int = 1) -> list[str]:
    """As `launch.sh` has it, for a script in place of `-m harness`."""
    launcher = Ranks(ranks, 1, gpu=False).command([], max_restarts=max_restarts)
    return [*launcher[: launcher.index("--num_processes") + 2], *words]


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_limited(list(words), LIMIT_SECONDS, environment(), cwd)


def ranks_in(output: str) -> list[str]:
    return sorted(line for line in output.splitlines() if line.startswith("rank "))


def plain(configuration: str, *words: str) -> list[str]:
    """The command in the first lines of a configuration, without our wing."""
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    return [accelerate, "launch", "--config_file", str(ROOT / f"recipes/launch/{configuration}.yaml"), *words]


@pytest.mark.slow
@pytest.mark.parametrize(("configuration", "ranks"), [("cpu", 2), ("one_gpu", 1)])
def test_configurations_bring_up_ranks_that_exchange(script: str, configuration: str, ranks: int) -> None:
    done = run(*plain(configuration, "--num_processes", str(ranks), script, "run", "0"))
    assert done.returncode == 0, done.stderr
    total = sum(range(ranks + 1))
    assert ranks_in(done.stdout) == [f"rank {rank} of {ranks} sum {total} threads 1" for rank in range(ranks)]


@pytest.mark.slow
def test_multi_node_yaml_joins_two_machines(script: str, free_port: int) -> None:
    """Two launchers on this machine stand for two machines; on the CPU, as there is no GPU for each rank."""
    words = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", str(free_port)]
    results: dict[int, subprocess.CompletedProcess[str]] = {}

    def start(machine: int) -> None:
        results[machine] = run(*plain("multi_node", *words, "--machine_rank", str(machine), script, "run", "0"))

    machines = [threading.Thread(target=start, args=(machine,)) for machine in (0, 1)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert [results[m].returncode for m in (0, 1)] == [0, 0], results
    assert [ranks_in(results[m].stdout) for m in (0, 1)] == [[f"rank {m} of 2 sum 3 threads 1"] for m in (0, 1)]


@pytest.mark.slow
def test_the_code_of_the_ranks_comes_through_without_a_traceback(script: str) -> None:
    done = run(*command(2, script, "run", "2"))
    assert done.returncode == 2
    assert len(ranks_in(done.stdout)) == 2
    for noise in ("Traceback", "FAILED", "starting the ranks again", "master_addr"):  # which Accelerate always gives
        assert noise not in done.stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_is_a_failure_and_is_named(script: str) -> None:
    """Rank 0 then stops by the launcher's SIGTERM and writes 75, but this is no orderly stop."""
    done = run(*command(2, script, "die", "75", max_restarts=0))
    assert done.returncode == 1
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [(2, signal.SIGTERM), (2, signal.SIGINT), (1, signal.SIGUSR1)])
def test_a_signal_reaches_the_ranks_which_are_not_started_again(
    script: str, ranks: int, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        command(ranks, script, "wait", "75"), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(ranks)]
        assert len(ranks_in("".join(lines))) == ranks
        # The ranks of one machine listen on loopback alone.
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        addresses = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert addresses == {"127.0.0.1"}
        time.sleep(0.3)  # the launcher watches its ranks by now
        process.send_signal(number)
        assert process.wait(timeout=LIMIT_SECONDS) == 75
        assert process.stdout.read() == ""
    finally:
        kill_tree(process.pid)
        process.communicate()


@pytest.mark.parametrize(
    ("first_failure", "written", "code"),
    [
        (2, [2, 2], 2),
        (3, [3], 3),
        (75, [75, 75], 75),
        (3, [75, 3], 3),  # one rank diverged, the other was stopped
        (1, [1, 2], 2),  # rank 1 lost its peer before rank 0's own end was seen
        (-9, [75], 1),
        (-9, [], 1),
        (1, [1], 1),
        (139, [], 1),
    ],
)
def test_which_code_wins_when_a_rank_failed(first_failure: int, written: list[int], code: int) -> None:
    assert exit_code(first_failure, written) == code


@pytest.mark.parametrize(
    ("written", "code"),
    [([75, 75], 75), ([], 128 + 15), ([75, 1], 1), ([75, 3], 3), ([2], 2), ([0, 75], 75), ([0], 143)],
)
def test_which_code_wins_when_the_launcher_was_stopped(written: list[int], code: int) -> None:
    assert exit_code(-signal.SIGTERM, written, was_stopped=True) == code


def test_another_attempt_resumes_the_run_of_the_first(tmp_path: Path) -> None:
    for words in ([], ["--resume=never"], ["--run-dir", "run", "--resume", "auto"]):
        assert next_attempt([*TRAIN, *words]) == [*TRAIN, *words, "--resume", "auto"]  # the last one counts
    # Resumed by `auto`, a run that starts from another one's checkpoint would begin from nothing before its own first.
    first = [*TRAIN, "--resume", "other/checkpoints/step_3", "--run-dir", str(tmp_path)]
    assert next_attempt(first) is None
    (tmp_path / "checkpoints/step_5").mkdir(parents=True)
    assert next_attempt(first) == [*first, "--resume", "auto"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_dies_is_started_again_from_the_last_checkpoint(ranks: int, tiny: Path, tmp_path: Path) -> None:
    """The last rank of the first attempt is killed at step 9, after the checkpoint of step 7."""
    script = tmp_path / "dies.py"
    script.write_text(
        f"""
import os, pathlib, signal, sys, time
from harness.cli import main
from harness.training.step import TrainingStep

real, mark = TrainingStep.__call__, pathlib.Path({str(tmp_path / "died")!r})

def call(self, *args, **kwargs):
    if kwargs["step"] == 9 and os.environ["RANK"] == "{ranks - 1}" and not mark.exists():
        while not list(pathlib.Path("run").glob("checkpoints/step_7")):
            time.sleep(0.05)  # it is written next to the training
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)

TrainingStep.__call__ = call
sys.exit(main(sys.argv[1:]))
"""
    )
    words = command(ranks, str(script), "train", str(tiny), "--run-dir", "run", max_restarts=2)
    done = run_limited(words, 240, environment(PYTHONPATH=str(ROOT)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("launch: starting the ranks again (1 of 2 restarts)") == 1
    assert "resumed at step 7 of 14" in done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["step"] == 14
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 15))
