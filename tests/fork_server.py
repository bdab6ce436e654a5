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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]

MODULES = ("harness.cli", "harness.training.run", "harness.training.inference", "harness.data.prepare", "numpy.random")


class ForkServer:
    """The warm process and the children that it forks, each by its process id.

    Args:
        environment: that it has when it imports torch; OpenMP reads it then.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
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
    ) -> int:
        """Start `harness WORDS`, or a script where the first word ends in .py; the process id.

        Args:
            env: the child's whole environment.
            out, err: files that stdout and stderr are appended to.
            faults: that `tests.faults.inject` puts into the child.
        """
        files = {"cwd": str(cwd), "out": str(out), "err": str(err)}
        words, variables = list(map(str, words)), dict(env)
        return int(self._ask({"start": {"words": words, "env": variables, "faults": list(faults), **files}}))

    def code_of(self, pid: int) -> int | None:
        """The exit code of a child (negative: the signal it died of), or None while it runs."""
        code = self._ask({"code_of": pid})
        return None if code is None else int(code)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
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
            answer: Any = _start(request["start"])
            codes.pop(answer, None)  # of an earlier child whose number has come round again
        else:
            _collect(codes)
            answer = codes.get(request["code_of"])
        print(json.dumps(answer), file=answers, flush=True)


def _start(what: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _child(what)
    return pid


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
    from tests.faults.child import run

    return run(words, faults)


def _collect(codes: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        codes[pid] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
