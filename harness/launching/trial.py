"""Processes of a trial on this machine: ranks that meet on the loopback interface, do a job and leave one result.

A trial's module is run as `python -m MODULE FOLDER ARGUMENT…`, once for each rank, with RANK and WORLD_SIZE set. The
ranks meet by a file in the folder (`file://FOLDER/…`); `answer` leaves the result there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.distributed.heartbeat import GLOO_VARIABLE, interface_towards
from harness.errors import HarnessError
from harness.files import write_json
from harness.machine import keep_freed_memory


def run_trial(module: str, arguments: Sequence[str], *, ranks: int, limit_seconds: float) -> Any:
    """Start the ranks, wait for them, and return what rank 0 answered.

    Args:
        module: dotted name of the module to run, whose main calls `answer`.
        arguments: of the module, behind the folder.
        ranks: processes; each begins with one thread of arithmetic and without GPUs.
        limit_seconds: for all of it, the imports included.

    Raises:
        HarnessError: a rank met one and answered with it.
        subprocess.SubprocessError: a process died or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="harness-trial-") as folder:
        command = [sys.executable, "-m", module, folder, *arguments]
        processes = [_start(command, rank, ranks, folder) for rank in range(ranks)]
        try:
            _wait(processes, limit_seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        result_file = Path(folder, "result.json")
        if not result_file.exists():
            raise subprocess.SubprocessError(_last_words(folder) or f"exit code {processes[0].returncode}")
        answered = json.loads(result_file.read_text())
    if "error" in answered:
        raise HarnessError(**answered["error"])
    return answered["result"]


def answer(folder: str, work: Callable[[], Any]) -> int:
    """Do a rank's work; rank 0 leaves its result, or its HarnessError, for `run_trial`. Returns the exit code 0."""
    keep_freed_memory()  # as a training does
    try:
        answered: dict[str, Any] = {"result": work()}
    except HarnessError as error:
        wrong = {"what": error.what, "where": error.where, "hint": error.hint, "exit_code": error.exit_code}
        answered = {"error": wrong}
    if os.environ["RANK"] == "0":
        write_json(Path(folder, "result.json"), answered)
    return 0


def _start(command: list[str], rank: int, world: int, folder: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""
    }  # fmt: skip
    loopback = interface_towards("127.0.0.1", several_machines=False)
    if loopback is not None:
        environment[GLOO_VARIABLE] = loopback
    with Path(folder, f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _wait(processes: Sequence[subprocess.Popen[bytes]], limit_seconds: float) -> None:
    """Until all have ended, or one has failed: the others would wait for it."""
    deadline = time.monotonic() + limit_seconds
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            return
        if time.monotonic() > deadline:
            raise subprocess.SubprocessError(f"it took longer than {limit_seconds:g} s")
        time.sleep(0.02)


def _last_words(folder: str) -> str:
    """The last line that a process printed, which names the exception it died of."""
    logs = (path.read_text(errors="replace").strip() for path in sorted(Path(folder).glob("rank*.log")))
    return next((text.splitlines()[-1] for text in logs if text), "")
