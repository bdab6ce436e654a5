"""The runs of a sweep: how far each is, and training those that are due on this machine."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Literal, get_args

from harness import signals
from harness.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, HarnessError
from harness.files import directory_lock, write_text
from harness.launch.local import Ranks, choose_ranks, loader_override
from harness.launch.slurm import add_options
from harness.launch.torchrun import CODE_FILE_VARIABLE
from harness.recipe import load
from harness.recipe.loading import changed_settings
from harness.runs import EXIT_CODE, Run, is_held, is_unused, open_run
from harness.sweeps.spec import Sweep, SweepRun, label

FAILURES = {EXIT_FAILED: "broke off", EXIT_BAD_INPUT: "bad input", EXIT_DIVERGED: "diverged"}
State = Literal["finished", "running", "queued", "stopped", "failed", "new"]


@dataclass(frozen=True)
class Status:
    """How far a run is, as the disk shows it.

    Attributes:
        state: new (not begun), queued (in a SLURM job), running (a process holds it), stopped (it has a checkpoint to
            resume from), failed (with `exit_code`), or finished.
        on_disk: None before its first record.
    """

    run: SweepRun
    state: State
    exit_code: int | None = None
    on_disk: Run | None = None

    @property
    def in_words(self) -> str:
        return in_words(self.state, self.exit_code)

    def is_due(self, *, retry_failed: bool) -> bool:
        """Whether it is to be trained now."""
        return self.state in ("new", "stopped") or (self.state == "failed" and retry_failed)


def statuses(sweep: Sweep, queued: Collection[str] = ()) -> list[Status]:
    """The status of each run, in their order; `queued` names those that SLURM has."""
    return [status_of(run, queued) for run in sweep.runs]


def status_of(run: SweepRun, queued: Collection[str] = ()) -> Status:
    path, on_disk, exit_code = run.directory, None, None
    with suppress(HarnessError):  # it is no run yet
        on_disk = None if is_unused(path) else open_run(path)
    with suppress(OSError, ValueError):
        exit_code = int((path / EXIT_CODE).read_text())
    if is_held(path):
        return Status(run, "running", on_disk=on_disk)
    if on_disk is not None and on_disk.state == "finished":
        return Status(run, "finished", on_disk=on_disk)
    if run.name in queued:
        return Status(run, "queued", on_disk=on_disk)
    if exit_code in FAILURES:
        return Status(run, "failed", exit_code, on_disk)
    return Status(run, "new" if on_disk is None else "stopped", on_disk=on_disk)


def in_words(state: str, exit_code: int | None) -> str:
    """A state, and how a run failed."""
    return f"failed: {FAILURES[exit_code]} (exit code {exit_code})" if exit_code is not None else state


def count_states(states: Iterable[str]) -> str:
    """Such as "2 finished, 1 failed"."""
    numbers = Counter(states)
    return ", ".join(f"{numbers[state]} {state}" for state in get_args(State) if numbers[state])


def refuse_lost_options(arguments: argparse.Namespace) -> None:
    """Raise a HarnessError for options of `harness sweep` that would do nothing."""
    cluster = argparse.ArgumentParser(add_help=False)
    add_options(cluster, array_of_seeds=False)
    usual = vars(cluster.parse_args([]))
    given = [name.replace("_", "-") for name, value in usual.items() if getattr(arguments, name) != value]
    if given and not arguments.slurm:
        options = ", ".join(f"--{name}" for name in given)
        raise HarnessError(f"{options}: only with --slurm", hint="Add --slurm, or leave it out.")
    if arguments.slurm and arguments.ranks is not None:
        raise HarnessError("--ranks is for this machine only", hint="With --slurm: --nodes N --tasks-per-node R.")
    lost = [f"--{name}" for name in ("ranks", "dry-run", "json") if getattr(arguments, name.replace("-", "_"))]
    if arguments.wandb_agent and lost:
        raise HarnessError(
            f"{', '.join(lost)}: not with --wandb-agent, which trains as the server's sweep says",
            hint="Leave it out; `--wandb --ranks N` makes a sweep of N ranks, `--wandb --dry-run` shows it.",
        )
    if arguments.retry_failed and (arguments.wandb or arguments.wandb_agent or arguments.table):
        raise HarnessError("--retry-failed: only with --local or --slurm", hint="Leave it out.")


def ranks_for(sweep: Sweep, wanted: int | None, *, measure: bool) -> Ranks:
    """The ranks of every training, the same for all so that their figures can be compared."""
    ranks = choose_ranks(sweep.runs[0].recipe, wanted, measure=measure)
    check_ranks(sweep, ranks.count)
    if ranks.note:
        _say(ranks.note)
    return ranks


def check_ranks(sweep: Sweep, ranks: int) -> None:
    """Raise a HarnessError where a run's batch cannot be shared out among the ranks."""
    sizes: dict[str, None] = {}
    for training in (run.recipe.training for run in sweep.runs):
        batch, steps = training.global_batch_size, training.gradient_accumulation_steps
        if batch % (steps * ranks):
            sizes[f"{batch}" + (f" in {steps} micro-batches" if steps > 1 else "")] = None
    if sizes:
        raise HarnessError(
            f"training.global_batch_size cannot be shared out among {ranks} ranks: {', '.join(sizes)}",
            where=str(sweep.path),
            hint="Choose multiples, or another number of ranks.",
        )


def check_unchanged(sweep: Sweep) -> None:
    """Raise a HarnessError where a run on disk has other settings: the sweep's recipe may have been edited since."""
    for run in sweep.runs:
        file = run.directory / "recipe.yaml"
        changed = changed_settings(load(file), run.recipe, other_length=False) if file.exists() else {}
        if changed:
            listed = "; ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in changed.items())
            what = f"was trained with other settings: {listed}"
            hint = "Give the sweep another name, or undo the change in the recipe; nothing was overwritten."
            raise HarnessError(what, where=str(run.directory), hint=hint)


def held(sweep: Sweep) -> AbstractContextManager[None]:
    """Hold the sweep's folder: two processes at once would train the same runs.

    Raises:
        HarnessError: another process holds it, or it cannot be made.
    """
    taken = HarnessError(
        "another process runs this sweep",
        where=str(sweep.folder),
        hint="Wait for it (harness sweep SWEEP.yaml --table shows how far it is), or give the sweep another name.",
    )
    hint = "Start in a folder that can be written to."
    return directory_lock(sweep.folder, taken=taken, use="the sweep's folder", hint=hint)


def training_words(sweep: Sweep, run: SweepRun) -> list[str]:
    """The words after `harness` that train a run or resume it, the same on every rank."""
    words = ["train", str(sweep.recipe_path), *run.overrides, *loader_override(run.recipe)]
    return [*words, "--run-dir", str(run.directory), "--resume", "auto"]


def run_here(sweep: Sweep, ranks: Ranks, *, retry_failed: bool, quiet: bool, queued: Collection[str] = ()) -> int:
    """Train all runs that are due, one after another, each on all ranks.

    A stop signal is passed on to the current training, which ends with a checkpoint; then the sweep ends.

    Args:
        retry_failed: train failed runs again, from their last checkpoint.
        quiet: trainings print on stderr, so that stdout is free for the table.
        queued: names of runs that are left to SLURM.

    Returns:
        0 where all are finished; 1 where some failed or are someone else's; 75 where a signal stopped the sweep.
    """
    with held(sweep), Trainer(quiet=quiet) as trainer:
        for number, run in enumerate(sweep.runs, start=1):
            status = status_of(run, queued)
            title = f"{number}/{len(sweep.runs)} {run.name} ({label(run.values)})"
            if not status.is_due(retry_failed=retry_failed):
                _say(f"{title}: {status.in_words}")
                continue
            _say(f"{title}: {'resumes' if status.state == 'stopped' else 'starts'}")
            code = trainer.train(ranks.command(training_words(sweep, run)), ranks.variables())
            if status_of(run).state == "finished":  # whatever signal reached its processes as they ended
                code = EXIT_DONE
            run.directory.mkdir(parents=True, exist_ok=True)  # a training that met bad input made none
            write_text(run.directory / EXIT_CODE, f"{code}\n")
            if trainer.stopping:
                how = {EXIT_DONE: "which is finished", EXIT_REQUEUE: "with a checkpoint"}.get(code, f"exit code {code}")
                _say(f"stopped at {run.name}, {how}; {count_states(s.state for s in statuses(sweep))}")
                _say(f"the same command resumes: {shlex.join(['harness', *sys.argv[1:]])}")
                return EXIT_REQUEUE
            if code != EXIT_DONE:
                _say(f"{run.name}: {status_of(run).in_words}")
    states = [status.state for status in statuses(sweep, queued)]
    if "failed" in states and not retry_failed:
        _say("--retry-failed trains failed runs again, from their last checkpoint")
    _say(count_states(states))
    return EXIT_DONE if set(states) == {"finished"} else EXIT_FAILED


class Trainer:
    """Runs trainings, and passes stop signals on to the current one."""

    def __init__(self, *, quiet: bool) -> None:
        self.stopping = False
        self._output = sys.stderr if quiet else None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Trainer:
        self._before = {number: signal.signal(number, self._pass_on) for number in signals.STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def train(self, command: Sequence[str], variables: dict[str, str]) -> int:
        """Run a command with more environment variables; its exit code, 128 + n where signal n ended it.

        The training has a session of its own, so that Ctrl-C reaches it through us alone and not twice.
        """
        environment = {name: value for name, value in os.environ.items() if name != CODE_FILE_VARIABLE}
        sys.stdout.flush()
        self._process = subprocess.Popen(
            command,
            env=environment | variables,
            stdout=self._output,
            start_new_session=True,
            preexec_fn=signals.end_with_parent,
        )
        if self.stopping:  # asked for just before
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self._process is not None:
            self._process.send_signal(number)


def _say(text: str) -> None:
    print(f"sweep: {text}", file=sys.stderr, flush=True)
