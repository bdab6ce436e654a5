"""Faults put into a process from inside, before `harness` runs in it: at the n-th touch of a file, or at a step.

The harness knows nothing of this: what is used are Python's audit events (every open, rename, mkdir and remove of the
process, whoever calls it and from whichever thread), `os.fsync`, and torch's own global hooks of steps and layers.

A fault is a JSON object: `kind` and what that kind takes, see `KINDS`; `rank` restricts it to one rank.
`python -m tests.faults.inject train …` takes them from `$HARNESS_TEST_FAULTS`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

Fault = dict[str, Any]
VARIABLE = "HARNESS_TEST_FAULTS"


def run(words: Sequence[str], faults: list[Fault]) -> int:
    """Arm the faults, leaving out those that are meant for another rank, then do what the command line does."""
    from harness.cli import main

    for fault in faults:
        if fault.get("rank") in (None, int(os.environ.get("RANK", "0"))):
            KINDS[fault["kind"]](fault)
    sys.argv = ["harness", *words]
    return main(words)


class FileTouches:
    """Counts what the process does to files under a folder, and acts at chosen counts.

    `under`: part of the path; `log`: a file that gets a line for each touch; `do`: a list of [n, action], where n
    counts from 1 and the action comes right BEFORE the n-th touch. After the n-th is before the (n + 1)-th.
    """

    def __init__(self, fault: Fault) -> None:
        self._under = fault["under"]
        self._actions = {int(n): action for n, action in fault.get("do", [])}
        self._log = os.open(fault["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if "log" in fault else None
        self._random = random.Random(fault.get("seed", 0))
        self._count = 0
        self._in_removed = False
        sys.addaudithook(self._audit)
        self._fsync = os.fsync
        os.fsync = self._sync

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                self._touch("write", args[0])
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            # shutil.rmtree names its files relative to an open folder.
            inside = self._in_removed and args[-1] != -1 and isinstance(args[0], str) and not args[0].startswith("/")
            self._touch(event[3:], args[0], inside=inside)
        elif event == "shutil.rmtree":
            self._in_removed = self._under in os.fsdecode(args[0])
        elif event == "os.rename":
            self._touch("rename", args[1])

    def _sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._touch("fsync", path, torn=path)
        self._fsync(descriptor)

    def _touch(self, what: str, path: Any, *, inside: bool = False, torn: str = "") -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # an open descriptor
        if not inside and self._under not in os.fsdecode(path):
            return
        self._count += 1
        if self._log is not None:
            os.write(self._log, f"{what} {os.path.basename(os.fsdecode(path))}\n".encode())
        action = self._actions.get(self._count)
        if action == "tear" and os.path.isfile(torn):  # cut the file about to be synced, as a power cut would
            os.truncate(torn, self._random.randrange(os.path.getsize(torn) + 1))
        if action is not None:
            act("kill" if action == "tear" else action)


def act(action: str) -> None:
    """Do it now: "kill", a signal's name, "throw", or the name of an errno to fail with."""
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    elif action == "throw":
        raise RuntimeError("a fault of this test")
    else:
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))


def at_step(fault: Fault) -> None:
    """`step`: the optimizer step, counted from 1 in this process, before which `action` comes."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1
        if count == fault["step"]:
            act(fault["action"])

    register_optimizer_step_pre_hook(hook)


def in_batches(fault: Fault) -> None:
    """From training batch number `batch` on (from 1), the network is given `value` in place of one pixel ("nan"), or
    pixels times `value` (a number)."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    count = 0
    outermost: list[torch.nn.Module] = []

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
        nonlocal count
        if not outermost:
            outermost.append(module)
        if module is not outermost[0] or not module.training or not inputs:
            return None
        count += 1
        if count < fault["batch"]:
            return None
        images = inputs[0].clone()
        if fault["value"] == "nan":
            images[(0,) * images.dim()] = float("nan")
        else:
            images *= float(fault["value"])
        return (images, *inputs[1:])

    register_module_forward_pre_hook(hook)


KINDS: dict[str, Callable[[Fault], Any]] = {"files": FileTouches, "step": at_step, "batch": in_batches}


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], json.loads(os.environ.get(VARIABLE) or "[]")))
