"""The runs of a sweep as an array of SLURM: each task is a run that stops, queues itself again and goes on alone."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError
from harness.files import write_json, write_text
from harness.launching.slurm import Job, sbatch_text
from harness.launching.submitting import MAX_ARRAY, RECIPE, SCRIPT, submit_script
from harness.recipe.loading import resolved_yaml
from harness.run_directory import JOB
from harness.sweeps.plan import Plan, Trial
from harness.sweeps.progress import statuses
from harness.sweeps.run import held

SUBMITTED = "submitted.json"
SQUEUE_LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Submitted:
    """An array and its runs, in the order of its tasks; `job_id` is None in a dry run and where nothing was due."""

    text: str
    trials: tuple[Trial, ...]
    job_id: str | None


def submit_sweep(plan: Plan, *, request: Mapping[str, Any], retry_failed: bool, dry_run: bool = False) -> Submitted:
    """Submit all runs that are due and that no job has yet.

    Args:
        request: fields of `Job` about what a task asks for.
        retry_failed: those too that failed.
        dry_run: only make the text; nothing is written.

    Raises:
        HarnessError: too many runs, another process runs this sweep, or sbatch is missing or refuses the job; nothing
            is left of it then.
    """
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(held(plan))
        found = statuses(plan, queued_runs(plan, must_answer=not dry_run))
        trials = tuple(status.trial for status in found if status.is_due(retry_failed=retry_failed))
        if len(trials) > MAX_ARRAY:
            raise HarnessError(
                f"{len(trials):,} runs are more than the {MAX_ARRAY:,} tasks of an array",
                where=str(plan.file.path),
                hint="Fewer values, points or seeds, in several sweeps.",
            )
        text = sbatch_text(_job(plan, trials, request)) if trials else ""
        if dry_run or not trials:
            return Submitted(text, trials, None)
        return Submitted(text, trials, _submit(plan, trials, text))


def queued_runs(plan: Plan, *, must_answer: bool = False) -> set[str]:
    """Names of the runs that jobs of this sweep still have, waiting or running, as squeue tells.

    Args:
        must_answer: it is an error where squeue cannot tell; else none is taken to be queued then.
    """
    names: set[str] = set()
    for entry in _submissions(_submitted_file(plan)):
        runs, job_id = entry.get("runs"), str(entry.get("job_id"))
        if isinstance(runs, list):
            tasks = _tasks_of(job_id, must_answer=must_answer)
            names |= {str(runs[index]) for index in tasks if index < len(runs)}
    return names


def log_of(plan: Plan, job_id: str, index: int) -> Path:
    """Where SLURM writes what a task of the array prints."""
    return plan.folder.absolute() / JOB / f"{job_id}_{index}.out"


def _job(plan: Plan, trials: Sequence[Trial], request: Mapping[str, Any]) -> Job:
    again = f"harness sweep {shlex.quote(str(plan.file.path.absolute()))} --slurm, in {Path.cwd()}"
    return Job(
        name=plan.name,
        recipe=str(plan.file.recipe_path.absolute()),
        run_directory=str(plan.folder.absolute()),
        python=sys.executable,
        runs=tuple(str(trial.directory.absolute()) for trial in trials),
        again=again,
        **request,
    )


def _submit(plan: Plan, trials: Sequence[Trial], text: str) -> str:
    """Freeze the recipes, write the script and submit it; what was made is taken back where SLURM refuses."""
    with ExitStack() as undo:
        for trial in trials:
            folder = trial.directory / JOB
            _make(folder, undo)
            if not (folder / RECIPE).exists():
                undo.callback((folder / RECIPE).unlink, missing_ok=True)
            write_text(folder / RECIPE, resolved_yaml(trial.recipe))
        _make(plan.folder / JOB, undo)
        script = plan.folder / JOB / SCRIPT
        write_text(script, text)
        job_id = submit_script(script, undo)
    file = _submitted_file(plan)
    write_json(file, [*_submissions(file), {"job_id": job_id, "runs": [trial.name for trial in trials]}])
    return job_id


def _make(folder: Path, undo: ExitStack) -> None:
    """Make a folder; `undo` removes what was not there before."""
    for missing in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
        missing.mkdir()
        undo.callback(shutil.rmtree, missing, ignore_errors=True)


def _submitted_file(plan: Plan) -> Path:
    return plan.folder / JOB / SUBMITTED


def _tasks_of(job_id: str, *, must_answer: bool) -> list[int]:
    """Indices of an array's tasks that SLURM has not ended; none where it does not know the job any more."""
    command = ["squeue", "--noheader", "--array", "--format=%K", f"--jobs={job_id}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_LIMIT_SECONDS)
        known, why = done.returncode == 0, done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        known, why = False, str(error)
    if known:
        return [int(word) for word in done.stdout.split() if word.isdecimal()]
    if must_answer and "Invalid job id" not in why:
        raise HarnessError(
            f"squeue does not tell which runs job {job_id} still has: {why}",
            hint="Try again when SLURM answers; submitted now, runs might be trained twice.",
            exit_code=EXIT_FAILED,
        )
    return []


def _submissions(path: Path) -> list[dict[str, object]]:
    """The arrays that were submitted so far; none where the file is missing or broken."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
