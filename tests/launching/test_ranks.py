"""`accelerate launch` under our wing: real ranks over gloo, their exit codes and the signals they get."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.launching.ports import free_port
from harness.launching.ranks import exit_code, main
from tests.conftest import kill_tree, run_limited

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


def environment(**extra: str) -> dict[str, str]:
    common = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | common | extra


def command(config: str, *words: str | Path) -> list[str]:
    launch = ["accelerate", "launch", "--config_file", str(ROOT / f"recipes/launch/{config}.yaml")]
    return [sys.executable, "-m", "harness.launching.ranks", *launch, *map(str, words)]


def ranks_in(output: str) -> list[str]:
    return sorted(line for line in output.splitlines() if line.startswith("rank "))


@pytest.mark.slow
def test_cpu_yaml_brings_up_two_ranks_that_exchange(script: Path) -> None:
    """The plain command of the file's first lines, without our wing."""
    plain = [str(Path(sys.executable).with_name("accelerate")), *command("cpu")[4:]]
    done = run_limited([*plain, "--num_processes", "2", str(script), "run", "0"], LIMIT_SECONDS, environment(), ROOT)
    assert done.returncode == 0, done.stderr
    assert ranks_in(done.stdout) == ["rank 0 of 2 sum 3 threads 1", "rank 1 of 2 sum 3 threads 1"]


@pytest.mark.slow
def test_one_gpu_yaml_starts_one_process(script: Path) -> None:
    plain = [str(Path(sys.executable).with_name("accelerate")), *command("one_gpu")[4:]]
    done = run_limited([*plain, str(script), "run", "0"], LIMIT_SECONDS, environment(), ROOT)
    assert done.returncode == 0, done.stderr
    assert ranks_in(done.stdout) == ["rank 0 of 1 sum 1 threads 1"]


@pytest.mark.slow
def test_multi_node_yaml_joins_two_machines(script: Path, free_port: int) -> None:
    """Two launchers on this machine stand for two machines; on the CPU, as there is no GPU a rank."""
    words = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    results: dict[int, subprocess.CompletedProcess[str]] = {}

    def start(machine: int) -> None:
        rank = ["--machine_rank", str(machine), "--main_process_port", str(free_port), str(script), "run", "0"]
        results[machine] = run_limited(command("multi_node", *words, *rank), LIMIT_SECONDS, environment(), ROOT)

    machines = [threading.Thread(target=start, args=(machine,)) for machine in (0, 1)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert [results[m].returncode for m in (0, 1)] == [0, 0], results
    assert ranks_in(results[0].stdout) == ["rank 0 of 2 sum 3 threads 1"]
    assert ranks_in(results[1].stdout) == ["rank 1 of 2 sum 3 threads 1"]


@pytest.mark.slow
def test_the_code_of_the_ranks_comes_through_without_a_traceback(script: Path) -> None:
    words = ["--num_processes", "2", script, "run", "2"]
    done = run_limited(command("cpu", *words), LIMIT_SECONDS, environment(), ROOT)
    assert done.returncode == 2
    assert len(ranks_in(done.stdout)) == 2
    assert "Traceback" not in done.stderr
    assert "FAILED" not in done.stderr
    assert "master_addr" not in done.stderr  # torch's warning of an option that Accelerate always gives


@pytest.mark.slow
def test_a_rank_that_is_killed_is_a_failure_and_is_named(script: Path) -> None:
    """Rank 0 then stops by the launcher's SIGTERM and writes 75, but this is no orderly stop."""
    words = ["--num_processes", "2", script, "die", "75"]
    done = run_limited(command("cpu", *words), LIMIT_SECONDS, environment(), ROOT)
    assert done.returncode == 1
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_their_code_comes_back(script: Path, number: signal.Signals) -> None:
    words = command("cpu", "--num_processes", "2", script, "wait", "75")
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert len(ranks_in("".join(lines))) == 2
        time.sleep(0.3)  # the launcher watches its ranks by now
        process.send_signal(number)
        assert process.wait(timeout=LIMIT_SECONDS) == 75
    finally:
        kill_tree(process.pid)
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_single_process_gets_the_signal_and_is_not_started_again(
    tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [
        sys.executable,
        "-m",
        "harness.launching.ranks",
        "--max-restarts",
        "3",
        "python",
        "-m",
        "harness",
        "train",
    ]
    run, words = tmp_path / "run", [str(tiny), "training.epochs=100000", "evaluation.every_epochs=1000"]
    launcher = subprocess.Popen(
        [*command, *words, "--run-dir", str(run)], env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        launcher.send_signal(number)
        _, text = launcher.communicate(timeout=60)
    finally:
        kill_tree(launcher.pid)
        launcher.communicate()
    assert launcher.returncode == 75, text
    assert "starting the ranks again" not in text


@pytest.mark.parametrize(
    ("first_failure", "written", "code"),
    [
        (2, [2, 2], 2),
        (3, [3], 3),
        (75, [75, 75], 75),
        (3, [75, 3], 3),  # one rank diverged, the other was told to stop
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
def test_which_code_wins_when_told_to_stop(written: list[int], code: int) -> None:
    assert exit_code(-signal.SIGTERM, written, told_to_stop=True) == code


def test_a_free_port_is_free_and_is_not_handed_to_outgoing_connections() -> None:
    port = free_port()
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 1024 <= port < lowest
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_only_accelerate_launch_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "-rf"]) == 2
    assert "usage: harness.launching.ranks [--max-restarts N] (accelerate launch" in capsys.readouterr().err


@pytest.mark.slow
def test_run_ranks_starts_connected_ranks(script: Path, run_ranks) -> None:
    """The fixture of conftest.py."""
    done = run_ranks(2, script, "run", "0")
    assert done.returncode == 0, done.stderr
    assert ranks_in(done.stdout) == ["rank 0 of 2 sum 3 threads 1", "rank 1 of 2 sum 3 threads 1"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_dies_is_started_again_from_the_last_checkpoint(
    ranks: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank of the first attempt is killed at step 9, behind the checkpoint of step 7."""
    script = tmp_path / "dies.py"
    script.write_text(
        f"""
import os, pathlib, signal, sys, time
from harness.cli import main
from harness.training.step import TrainingStep

real, mark = TrainingStep.__call__, pathlib.Path({str(tmp_path / "died")!r})

def call(self, *args, **kwargs):
    if kwargs["step"] == 9 and os.environ.get("RANK", "0") == "{ranks - 1}" and not mark.exists():
        while not list(pathlib.Path("runs/tiny").glob("*/checkpoints/step_7")):
            time.sleep(0.05)  # it is written beside the training
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)

TrainingStep.__call__ = call
sys.exit(main(sys.argv[1:]))
"""
    )
    base = [sys.executable, "-m", "harness.launching.ranks", "--max-restarts", "2"]
    launch = ["accelerate", "launch", "--config_file", str(ROOT / "recipes/launch/cpu.yaml"), "--num_processes", "2"]
    words = [*(launch if ranks == 2 else ["python"]), str(script), "train", str(tiny)]
    done = run_limited([*base, *words], 240, environment(PYTHONPATH=str(ROOT)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("launch: starting the ranks again (1 of 2 restarts)") == 1
    assert "resumed at step 7 of 14" in done.stderr
    (run,) = (tmp_path / "runs/tiny").iterdir()
    assert json.loads((run / "result.json").read_text())["step"] == 14
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 15))


@pytest.mark.slow
def test_the_ranks_of_one_machine_listen_on_loopback_alone(script: Path) -> None:
    with subprocess.Popen(
        command("cpu", "--num_processes", "2", script, "wait", "0"), env=environment(), cwd=ROOT, stdout=subprocess.PIPE
    ) as launcher:
        try:
            assert launcher.stdout is not None
            launcher.stdout.readline()  # a rank is up
            family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
            addresses = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        finally:
            kill_tree(launcher.pid)
    assert addresses == {"127.0.0.1"}
