"""The runs of a sweep as a SLURM array, whose tasks stop, queue again and resume by themselves."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError
from harness.files import write_json, write_text
from harness.launch.slurm import RECIPE, SCRIPT, Request, make_folder, script_text, submit_script
from harness.recipe.loading import resolved_yaml
from harness.runs import JOB
from harness.sweeps.run import held, statuses
from harness.sweeps.spec import Sweep, SweepRun

SUBMITTED = "submitted.json"
SQUEUE_LIMIT_SECONDS = 60
MAX_ARRAY = 1001  # tasks; SLURM's own default


def submit(
    sweep: Sweep, *, request: Request, retry_failed: bool, dry_run: bool
) -> tuple[str, str | None, list[dict[str, str]]]:
    """Submit all runs that are due and in no job yet.

    Args:
        request: what a task asks for.
        retry_failed: failed runs too.
        dry_run: write and submit nothing.

    Returns:
        The batch script, "" where no run is due; the job's id, None where none was submitted; the `run_directory` of
        each task and, once it is submitted, its `log`.

    Raises:
        HarnessError: too many runs, another process runs this sweep, or sbatch is missing or refuses the job; nothing
            is left of it then.
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
    for index, task in enumerate(tasks):
        task["log"] = str(folder / JOB / f"{job_id}_{index}.out")
    return script, job_id, tasks


def queued_runs(sweep: Sweep, *, must_answer: bool = False) -> set[str]:
    """Names of the runs that this sweep's jobs still have, waiting or running.

    Args:
        must_answer: no answer from squeue is an error; else it means that no run is queued.
    """
    names: set[str] = set()
    for job in _submitted(sweep):
        tasks = _tasks_of(job["job_id"], must_answer=must_answer)
        names |= {name for index, name in enumerate(job["runs"]) if index in tasks}
    return names


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


def _tasks_of(job_id: str, *, must_answer: bool) -> set[int]:
    """Indices of an array's tasks that have not ended; none where SLURM no longer knows the job."""
    command = ["squeue", "--noheader", "--array", "--format=%K", f"--jobs={job_id}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_LIMIT_SECONDS)
        known, why = done.returncode == 0, done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        known, why = False, str(error)
    if known:
        return {int(word) for word in done.stdout.split() if word.isdecimal()}
    if must_answer and "Invalid job id" not in why:
        raise HarnessError(
            f"squeue does not say which runs job {job_id} still has: {why}",
            hint="Try again when SLURM answers; submitted now, runs might be trained twice.",
            exit_code=EXIT_FAILED,
        )
    return set()
