"""Training the runs of a sweep that are due: on this machine, as a SLURM array, or as a W&B server draws them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from harness import signals
from harness.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, HarnessError, ManyErrors
from harness.files import directory_lock, write_json, write_text
from harness.launch.local import Ranks, choose_ranks, loader_override
from harness.launch.slurm import RECIPE, SCRIPT, Request, add_options, make_folder, script_text, submit_script
from harness.launch.torchrun import CODE_FILE_VARIABLE
from harness.recipe import load
from harness.recipe.document import parse_value
from harness.recipe.loading import changed_settings, resolved_yaml
from harness.runs import EXIT_CODE, JOB
from harness.sweeps.spec import Parameter, Sweep, SweepRun, ends, label, override_text
from harness.sweeps.table import count_states, status_of, statuses

SUBMITTED = "submitted.json"
SQUEUE_LIMIT_SECONDS = 60
MAX_ARRAY = 1001  # tasks; SLURM's own default
VALUES_OF_POINT = "${args_no_hyphens}"  # W&B's agent puts `key=value …` in its place


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
    trainings = [run.recipe.training for run in sweep.runs]
    sizes = dict.fromkeys((t.global_batch_size, t.gradient_accumulation_steps) for t in trainings)
    uneven = [f"{batch}" + f" in {n} micro-batches" * (n > 1) for batch, n in sizes if batch % (n * ranks)]
    if uneven:
        what = f"training.global_batch_size cannot be shared out among {ranks} ranks: {', '.join(uneven)}"
        raise HarnessError(what, where=str(sweep.path), hint="Choose multiples, or another number of ranks.")


def check_unchanged(sweep: Sweep) -> None:
    """Raise a HarnessError where a run on disk has other settings: the sweep's recipe may have been edited since."""
    for run in sweep.runs:
        file = run.directory / "recipe.yaml"
        if file.exists() and (changed := changed_settings(load(file), run.recipe, other_length=False)):
            listed = "; ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in changed.items())
            what = f"was trained with other settings: {listed}"
            hint = "Give the sweep another name, or undo the change in the recipe; nothing was overwritten."
            raise HarnessError(what, where=str(run.directory), hint=hint)


def held(sweep: Sweep) -> AbstractContextManager[None]:
    """Hold the sweep's folder, or raise a HarnessError: two processes at once would train the same runs."""
    hint = "Wait for it (harness sweep SWEEP.yaml --table shows how far it is), or give the sweep another name."
    taken = HarnessError("another process runs this sweep", where=str(sweep.folder), hint=hint)
    hint = "Start in a folder that can be written to."
    return directory_lock(sweep.folder, taken=taken, use="the sweep's folder", hint=hint)


# --- here


def training_words(sweep: Sweep, run: SweepRun) -> list[str]:
    """The words after `harness` that train a run or resume it, the same on every rank."""
    words = ["train", str(sweep.recipe_path), *run.overrides, *loader_override(run.recipe)]
    return [*words, "--run-dir", str(run.directory), "--resume", "auto"]


def run_here(sweep: Sweep, ranks: Ranks, *, retry_failed: bool, quiet: bool, queued: Collection[str] = ()) -> int:
    """Train all runs that are due and not `queued` in SLURM, one after another, each on all ranks.

    A stop signal is passed on to the current training, which ends with a checkpoint; then the sweep ends. `quiet`
    trainings print on stderr, so that stdout is free for the table.

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

    def train(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Run a command with more environment variables; its exit code, 128 + n where signal n ended it.

        The training has a session of its own, so that Ctrl-C reaches it through us alone and not twice.
        """
        environment = {name: value for name, value in os.environ.items() if name != CODE_FILE_VARIABLE} | {**variables}
        sys.stdout.flush()
        session: dict[str, Any] = {"start_new_session": True, "preexec_fn": signals.end_with_parent}
        self._process = subprocess.Popen(command, env=environment, stdout=self._output, **session)
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


# --- as a SLURM array, whose tasks stop, queue again and resume by themselves


def submit(
    sweep: Sweep, *, request: Request, retry_failed: bool, dry_run: bool
) -> tuple[str, str | None, list[dict[str, str]]]:
    """Submit all runs that are due and in no job yet; `request` is what a task asks for.

    Returns:
        The batch script, "" where no run is due; the job's id, None where none was submitted; the `run_directory` of
        each task and, once it is submitted, its `log`.

    Raises:
        HarnessError: too many runs, another process runs this sweep, or the job is refused; nothing is left of it then.
    """
    with nullcontext() if dry_run else held(sweep):
        found = statuses(sweep, queued_runs(sweep, must_answer=not dry_run))
        runs = [status.run for status in found if status.is_due(retry_failed=retry_failed)]
        if len(runs) > MAX_ARRAY:
            what = f"{len(runs):,} runs are more than the {MAX_ARRAY:,} tasks of an array"
            hint = "Fewer values, points or seeds, in several sweeps."
            raise HarnessError(what, where=str(sweep.path), hint=hint)
        tasks = [{"run_directory": str(run.directory.absolute())} for run in runs]
        if not runs:
            return "", None, tasks
        folder = sweep.folder.absolute()
        script = script_text(
            request,
            name=sweep.spec.name,
            recipe=str(sweep.recipe_path.absolute()),
            run=folder,
            sweep_runs=[task["run_directory"] for task in tasks],
            sweep_again=f"harness sweep {shlex.quote(str(sweep.path.absolute()))} --slurm, in {Path.cwd()}",
        )
        if dry_run:
            return script, None, tasks
        job_id = _submit(sweep, runs, script)
    return script, job_id, [task | {"log": str(folder / JOB / f"{job_id}_{i}.out")} for i, task in enumerate(tasks)]


def _submit(sweep: Sweep, runs: Sequence[SweepRun], script: str) -> str:
    """Freeze the recipes, write the script and submit it; what was made is removed where SLURM refuses."""
    folder = sweep.folder / JOB
    with ExitStack() as undo:
        for run in runs:
            make_folder(run.directory / JOB, undo)
            write_text(run.directory / JOB / RECIPE, resolved_yaml(run.recipe))
        make_folder(folder, undo)
        write_text(folder / SCRIPT, script)
        job_id = submit_script(folder / SCRIPT, undo)
    write_json(folder / SUBMITTED, [*_submitted(sweep), {"job_id": job_id, "runs": [run.name for run in runs]}])
    return job_id


def _submitted(sweep: Sweep) -> list[dict[str, Any]]:
    """The jobs submitted so far, each with its `job_id` and the names of its `runs` in the order of its tasks."""
    file = sweep.folder / JOB / SUBMITTED
    try:
        return json.loads(file.read_text()) if file.exists() else []
    except ValueError:
        hint = "Remove it when squeue shows no job of this sweep any more."
        raise HarnessError("is broken", where=str(file), hint=hint) from None


def queued_runs(sweep: Sweep, *, must_answer: bool = False) -> set[str]:
    """Names of the runs that this sweep's jobs still have, waiting or running.

    With `must_answer` no answer from squeue is an error; else it means that no run is queued, as it does where SLURM no
    longer knows a job.
    """
    names: set[str] = set()
    for job in _submitted(sweep):
        command = ["squeue", "--noheader", "--array", "--format=%K", f"--jobs={job['job_id']}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_LIMIT_SECONDS)
            known, why = done.returncode == 0, done.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            known, why = False, str(error)
        if known:
            tasks = done.stdout.split()
            names |= {name for index, name in enumerate(job["runs"]) if str(index) in tasks}
        elif must_answer and "Invalid job id" not in why:
            raise HarnessError(
                f"squeue does not say which runs job {job['job_id']} still has: {why}",
                hint="Try again when SLURM answers; submitted now, runs might be trained twice.",
                exit_code=EXIT_FAILED,
            )
    return names


# --- on a W&B server: it samples, and its agent asks it for the next point. What it draws reaches every rank as
# `key=value` on the command line of the training that the agent starts, not through the memory of one rank.


def wandb_configuration(sweep: Sweep, ranks: Ranks) -> dict[str, Any]:
    """The sweep in W&B's words (docs.wandb.ai, "Define a sweep configuration"): random points are drawn by the server,
    and seeds are one more parameter. HarnessError where the agent's command line would change a value."""
    spec = sweep.spec
    errors = [
        sweep.error(
            ("parameters", key),
            f"{key}: {value!r} would not reach the training through W&B's agent as it is",
            "Use --local or --slurm, or put the value into overrides.",
        )
        for key, parameter in spec.parameters.items()
        for value in parameter.values or ()
        if not _arrives(key, value)
    ]
    if errors:
        raise ManyErrors(str(sweep.path), errors)
    parameters = {key: _distribution(key, parameter) for key, parameter in spec.parameters.items()}
    if spec.seeds is not None:
        parameters["seed"] = {"values": list(spec.seeds)}
    words = ["train", str(sweep.recipe_path.absolute())]
    words += [override_text(key, value) for key, value in spec.overrides.items()]
    words += loader_override(sweep.runs[0].recipe)
    variables = [f"{name}={value}" for name, value in ranks.variables().items()]
    # By the names under which trainings log it: `train/loss` is that of a step.
    logged = f"epoch_{spec.metric.key}" if spec.metric.split == "train" else spec.metric.key
    return {
        "name": spec.name,
        "method": spec.method,
        "metric": {"name": f"{spec.metric.split}/{logged}", "goal": spec.metric.goal},
        "parameters": parameters,
        "command": ["${env}", *variables, *ranks.command(words), VALUES_OF_POINT],
        **({"run_cap": len(sweep.runs)} if spec.method == "random" else {}),
    }


def _distribution(key: str, parameter: Parameter) -> dict[str, Any]:
    if parameter.values is not None:
        return {"values": list(parameter.values)}
    low, high = ends(key, parameter)
    names = {"linear": ("uniform", "int_uniform"), "log": ("log_uniform_values", "q_log_uniform_values")}
    name = names[parameter.scale][isinstance(low, int)]
    return {"distribution": name, **({"q": 1} if name.startswith("q_") else {}), "min": low, "max": high}


def _arrives(key: str, value: Any) -> bool:
    """Whether a recipe reads the value back from what the agent writes, which is as Python prints it."""
    try:
        return bool(parse_value(str(value), key) == value)
    except HarnessError:
        return False


def run_wandb_agent(sweep: Sweep, sweep_id: str) -> int:
    """Train with W&B's agent until the server (`sweep_id`, or `entity/project/id`) has no point left; stop signals
    reach the training. Returns the agent's exit code."""
    tracking = sweep.runs[0].recipe.tracking
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", "--project", tracking.project]
    command += ["--entity", tracking.entity] if tracking.entity else []
    with Trainer(quiet=False) as trainer:
        return trainer.train([*command, sweep_id], {})
