"""A warm process that forks a process for each request, so that a test of real processes takes no seconds of imports.

Importing torch takes seconds, a tiny training a fraction of one. So this script imports everything once and forks:
each child is a process and session of its own, with its own files, environment and signals, that runs the `harness`
command or a script and can be sent a real SIGKILL. Forking is safe here since nothing was computed yet: there is no
thread and no OpenMP pool to lose, which `main` checks. `ForkServer` starts it (`-m tests.fork_server`) and speaks with
it; requests and answers are lines of JSON on its stdin and stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("harness.cli", "harness.training.run", "harness.training.inference", "harness.data.prepare", "numpy.random")
LIMIT_SECONDS = 120.0
# On the CPU and with one thread, whatever else the machine has.
ONE_THREAD = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Hang(Exception):
    """Something did not end in its time."""


class Process:
    """A process under test: its id, what it wrote to stderr, and its end."""

    def __init__(self, pid: int, err: Path, poll: Callable[[], int | None]) -> None:
        self.pid, self.poll, self._err = pid, poll, err
        self.started_at = time.monotonic()

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """The exit code (negative: the signal it died of). Raises Hang when the process does not end."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                kill_tree(self.pid)
                raise Hang(f"no end within {seconds:g} s: {self.text()[-2000:]}")
            time.sleep(0.002)
        return code

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def text(self) -> str:
        return self._err.read_text(errors="replace") if self._err.exists() else ""


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it; torchrun's workers have sessions of their own, so the group is not enough."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        family = [*top.children(recursive=True), top]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5)


class ForkServer:
    """The warm process; `environment` is what it has when it imports torch, since OpenMP reads it then."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**environment, **ONE_THREAD, "PYTHONPATH": str(ROOT)},
        )
        self._lock = threading.Lock()
        assert "ready" in self._answer()

    def fork(
        self,
        words: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str],
        out: Path,
        err: Path,
        faults: Sequence[Any] = (),
    ) -> Process:
        """Start `harness WORDS`, or a script where the first word ends in .py.

        Args:
            env: the child's whole environment.
            out, err: files that stdout and stderr are appended to.
            faults: that `tests.faults.inject` puts into the child.
        """
        files = {"cwd": str(cwd), "out": str(out), "err": str(err)}
        what = {"words": list(map(str, words)), "env": dict(env), "faults": list(faults), **files}
        pid = int(self._ask({"start": what}))
        return Process(pid, err, lambda: self._ask({"code_of": pid}))

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)
        self._server.stdout.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        with self._lock:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the fork server ended"
        return json.loads(line)


def main() -> None:
    """Serve until stdin ends."""
    for name in MODULES:
        __import__(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"{threads} threads after the imports: forking would not be safe")
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = os.fork() or _child(request["start"])
            codes.pop(answer, None)  # of an earlier child whose number has come round again
        else:
            _collect(codes)
            answer = codes.get(request["code_of"])
        print(json.dumps(answer), file=answers, flush=True)


def _child(what: dict[str, Any]) -> NoReturn:
    os.setsid()
    os.chdir(what["cwd"])
    os.environ.clear()
    os.environ.update(what["env"])
    for descriptor, path in ((0, os.devnull), (1, what["out"]), (2, what["err"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.closerange(3, 64)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        code = _run(what["words"], what["faults"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # what Python itself would print before it ends with 1
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(words: list[str], faults: list[Any]) -> int:
    if words[0].endswith(".py"):
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        return 0
    from tests.faults.inject import run

    return run(words, faults)


def _collect(codes: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    main()
