"""A warm process that forks a `harness` process for each request, so that hundreds of real trainings can be killed.

Importing torch takes seconds, a tiny training a fraction of one. So this script imports everything once and forks:
each child is a process and session of its own, with its own files, environment and signals, that runs
`harness.cli.main` and can be sent a real SIGKILL. Forking is safe here since nothing was computed yet: there is no
thread and no OpenMP pool to lose, which `main` checks. Run with `-m tests.faults.server`; requests and answers are
lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any, NoReturn

MODULES = ("harness.cli", "harness.training.run", "harness.training.finished", "harness.data.prepare", "numpy.random")


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
    os.environ.update(what["env"])
    for descriptor, path in ((0, os.devnull), (1, what["out"]), (2, what["err"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.closerange(3, 64)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from tests.faults.child import run

    code = 1
    try:
        code = run(what["argv"], what["faults"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # what Python itself would print before it ends with 1
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


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
