"""The runs of a sweep on this machine, one after another, each on all its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

from harness import signals
from harness.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, HarnessError
from harness.launching.ranks import CODE_FILE_VARIABLE
from harness.launching.training import Ranks, loader_override
from harness.locks import holding
from harness.sweeps.plan import Plan, Trial
from harness.sweeps.progress import count_states, status_of, statuses, write_exit_code


def held(plan: Plan) -> AbstractContextManager[None]:
    """Hold the sweep's folder: two at once would train the same runs.

    Raises:
        HarnessError: another process holds it, or it cannot be made.
    """
    taken = HarnessError(
        "another process runs this sweep",
        where=str(plan.folder),
        hint="Wait for it (harness sweep SWEEP.yaml --table shows how far it is), or give the sweep another name.",
    )
    hint = "Start in a folder that can be written to."
    return holding(plan.folder, taken=taken, use="the sweep's folder", hint=hint)


def training_words(trial: Trial, recipe_path: Path) -> list[str]:
    """The words behind `harness` that train a run, or go on with it; the same on every rank."""
    loader = loader_override(trial.recipe)
    place = ["--run-dir", str(trial.directory), "--resume", "auto"]
    return ["train", str(recipe_path), *trial.overrides, *loader, *place]


def run_here(
    plan: Plan, ranks: Ranks, *, retry_failed: bool, quiet: bool, again: str, queued: Sequence[str] = ()
) -> int:
    """Train all runs that are due, in order.

    A stop signal is handed on to the training under way, which ends with a checkpoint; the sweep ends behind it.

    Args:
        retry_failed: train those again that failed, from their last checkpoint.
        quiet: what trainings print goes to stderr, so that stdout is free for the table.
        again: the command that goes on with the sweep, to be told when it is stopped.
        queued: names of runs that a scheduler has, which are left to it.

    Returns:
        0 where all are finished; 1 where some failed or are someone else's; 75 where a signal stopped the sweep.
    """
    with held(plan), Trainer(quiet=quiet) as trainer:
        for number, trial in enumerate(plan.trials, start=1):
            status = status_of(trial, queued=trial.name in queued)
            title = f"{number}/{len(plan.trials)} {trial.name} ({trial.point.label()})"
            if not status.is_due(retry_failed=retry_failed):
                _say(f"{title}: {status.words()}")
                continue
            _say(f"{title}: {'goes on' if status.state == 'stopped' else 'starts'}")
            code = trainer.train(ranks.command(training_words(trial, plan.file.recipe_path)), ranks.variables())
            if status_of(trial).state == "finished":  # whatever signal met its processes as they wound down
                code = EXIT_DONE
            write_exit_code(trial.directory, code)
            if trainer.stopping:
                return _tell_stop(plan, trial, code, again)
            if code != EXIT_DONE:
                _say(f"{trial.name}: {status_of(trial).words()}")
    return _tell_end(plan, retry_failed=retry_failed, queued=queued)


class Trainer:
    """Runs trainings, and hands stop signals on to the one under way."""

    def __init__(self, *, quiet: bool) -> None:
        self.stopping = False
        self._output = sys.stderr if quiet else None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Trainer:
        self._before = {number: signal.signal(number, self._hand_on) for number in signals.STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def train(self, command: Sequence[str], variables: dict[str, str]) -> int:
        """Run a command; its exit code, 128 + n where signal n ended it.

        The training has a session of its own, so that Ctrl-C reaches it through us alone and not twice.
        """
        environment = {n: v for n, v in os.environ.items() if n != CODE_FILE_VARIABLE} | variables
        sys.stdout.flush()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdout=self._output,
            start_new_session=True,
            preexec_fn=signals.end_with_parent,
        )
        if self.stopping:  # asked for just before
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self._process is not None:
            self._process.send_signal(number)


def _tell_stop(plan: Plan, trial: Trial, code: int, again: str) -> int:
    how = {EXIT_DONE: "which is finished", EXIT_REQUEUE: "with a checkpoint"}.get(code, f"exit code {code}")
    _say(f"stopped at {trial.name}, {how}; {count_states(statuses(plan))}")
    _say(f"the same command goes on: {again}")
    return EXIT_REQUEUE


def _tell_end(plan: Plan, *, retry_failed: bool, queued: Sequence[str]) -> int:
    found = statuses(plan, queued)
    failed = [status for status in found if status.state == "failed"]
    for status in failed:
        _say(f"{status.trial.name}: {status.words()}")
    if failed and not retry_failed:
        _say("--retry-failed trains those that failed again, from their last checkpoint")
    _say(count_states(found))
    return EXIT_DONE if all(status.state == "finished" for status in found) else EXIT_FAILED


def _say(text: str) -> None:
    print(f"sweep: {text}", file=sys.stderr, flush=True)
