"""Signals that ask a training to stop: noticed at once, acted on between two steps. Imports nothing heavy.

Schedulers announce the end of a job by SIGTERM, SIGUSR1 or SIGUSR2; people press Ctrl-C (SIGINT) or close the terminal
(SIGHUP, which stays ignored under nohup). The first of them is remembered; a second Ctrl-C ends the process at once, a
second of the others changes nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

_received: list[signal.Signals] = []


@contextmanager
def noticed() -> Iterator[None]:
    """Notice stop signals inside the block instead of dying of them; the former handlers come back after it."""
    _received.clear()
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, _notice) for number in numbers}
    if "TORCHELASTIC_RUN_ID" in os.environ or "HARNESS_EXIT_CODE_FILE" in os.environ:
        end_with_parent()  # a rank without its launcher would train on, and hold the run directory against the restart
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent of this process dies. Only Linux can do so."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died meanwhile; in a container the launcher may well be process 1
        os.kill(os.getpid(), signal.SIGTERM)


def received() -> str | None:
    """The name of the first stop signal that came, or None."""
    return _received[0].name if _received else None


def _notice(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and _received:
        raise KeyboardInterrupt
    _received.append(signal.Signals(number))
    if len(_received) == 1:
        with suppress(OSError):  # nobody reads any more, as `| tee log` does not after Ctrl-C
            os.write(2, f"{received()}: stopping after this step, with a checkpoint\n".encode())
