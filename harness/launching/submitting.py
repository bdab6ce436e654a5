"""Handing a training to SLURM: the recipe is checked, the run directory made, the script written and submitted."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import EXIT_BAD_INPUT, EXIT_FAILED, HarnessError
from harness.launching.slurm import Job, log_path, sbatch_text
from harness.runs import JOB, is_unused, new_run_directory

SCRIPT = "job.sbatch"
RECIPE = "recipe.yaml"
SBATCH_LIMIT_SECONDS = 120
MAX_ARRAY = 1001  # tasks; SLURM's own default
# All others are those of a job that we may be in ourselves; the new job gets its own.
KEPT_SLURM_VARIABLES = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
NO_ANSWER = r"contact slurm controller|timed out|munge|authentication|temporarily|standby|Communication connection"
# What to do, by what sbatch says; the first that fits counts.
HINTS = {
    NO_ANSWER: "SLURM does not answer here: see `scontrol ping`, and try again or on a login node.",
    r"configuration (source|file)": "sbatch finds no slurm.conf: set SLURM_CONF to the path of the cluster's.",
    r"\bqos\b": "`sacctmgr show qos format=name,maxwall,maxsubmitpu,maxtrespu` lists limits; SBATCH_QOS chooses one.",
    r"\btime\b": "--time is 90 (minutes), 4:00:00 or 1-12 (days-hours); `sinfo -o '%P %l'` lists partitions' limits.",
    r"\baccount\b": "`sacctmgr show associations user=$USER format=account,partition,qos` lists yours for --account.",
    r"\bgres\b": "--gpus-per-node: `sinfo -o '%P %D %G'` lists partitions with their nodes and GPUs.",
    r"\bfeature": "`sinfo -o '%P %f'` lists the features that SBATCH_CONSTRAINT may name.",
    r"\barray\b": "--array: `scontrol show config | grep MaxArraySize` shows how far its indices may go.",
    r"\bpartition\b": "--partition: `sinfo -o '%P %a %l %D %c %G'` lists those that there are.",
    r"processors|\bnode\b|memory": "Fewer --nodes, --tasks-per-node or --cpus-per-task, or another --partition: "
    "`sinfo -o '%P %D %c %m %G'` lists nodes, CPUs, memory and GPUs.",
}


@dataclass(frozen=True)
class Submission:
    """A job and its script; `job_id` is None in a dry run."""

    job: Job
    text: str
    job_id: str | None

    def places(self) -> list[tuple[Path, Path]]:
        """Run directory and log of each task."""
        assert self.job_id is not None
        return [(self.job.run_directory_of(s), log_path(self.job, self.job_id, s)) for s in _seeds(self.job)]


def submit(
    recipe_path: str,
    overrides: Sequence[str] = (),
    *,
    run_directory: Path | None = None,
    dry_run: bool = False,
    request: Mapping[str, Any],
) -> Submission:
    """Submit the training of a recipe.

    Args:
        run_directory: None makes `runs/<recipe>/<run-id>`; an array has one a seed, ending in `-seed_<n>`.
        dry_run: only make the text; nothing is written.
        request: fields of `Job` about what the job asks for.

    Raises:
        HarnessError: the recipe is wrong, the directory is another run's, or sbatch is missing or refuses the job;
            nothing is left of it then.
    """
    from harness.recipe import load
    from harness.recipe.document import locate
    from harness.recipe.loading import resolved_yaml

    recipe = load(recipe_path, overrides)
    job = Job(
        name=recipe.name,
        recipe=str(locate(recipe_path).absolute()),
        run_directory=str((run_directory or new_run_directory(recipe.name)).absolute()),
        python=sys.executable,
        overrides=tuple(overrides),
        **request,
    )
    text = sbatch_text(job)
    if dry_run:
        return Submission(job, text, None)
    with ExitStack() as undo:
        for seed in _seeds(job):
            frozen = recipe if seed is None else recipe.model_copy(update={"seed": seed})
            folder = _make_folder(job.run_directory_of(seed), undo)
            (folder / RECIPE).write_text(resolved_yaml(frozen))
            (folder / SCRIPT).write_text(text)
        job_id = submit_script(folder / SCRIPT, undo)
    return Submission(job, text, job_id)


def _seeds(job: Job) -> tuple[int, ...] | tuple[None]:
    return job.seeds or (None,)


def _make_folder(run: Path, undo: ExitStack) -> Path:
    """Make the job's folder in a run directory that is not in use; `undo` removes what is made here."""
    folder = run / JOB
    if folder.exists():
        raise HarnessError(
            "a job was submitted with this run directory",
            where=str(run),
            hint=f"sbatch {folder / SCRIPT} resumes it; else give another --run-dir.",
        )
    try:
        if not is_unused(run) and not (run / "recipe.yaml").exists():
            raise HarnessError("is not a run directory", where=str(run), hint="Give another --run-dir.")
        for missing in [p for p in (folder, *folder.parents) if not p.exists()][::-1]:
            missing.mkdir()
            undo.callback(shutil.rmtree if missing == folder else _remove_if_empty, missing)
    except OSError as error:
        raise HarnessError(
            f"cannot be used as a run directory ({error.strerror})", where=str(run), hint="Give another --run-dir."
        ) from None
    return folder


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def submit_script(script: Path, undo: ExitStack) -> str:
    """Submit a batch script; `undo`, which takes back what was made for the job, is emptied where SLURM has it.

    Raises:
        HarnessError: as `sbatch`, or it did not answer: SLURM may have taken the job, which needs what was made.
    """
    try:
        job_id = sbatch(script)
    except subprocess.TimeoutExpired:
        undo.pop_all()
        raise HarnessError(
            f"sbatch did not answer within {SBATCH_LIMIT_SECONDS} s; {script} is kept",
            hint=f"`squeue --me` tells whether the job is there; else: sbatch {script}",
            exit_code=EXIT_FAILED,
        ) from None
    undo.pop_all()
    if not job_id.isdecimal():
        raise HarnessError(
            f'sbatch succeeded without a job number ("{job_id}"); {script} is kept',
            hint="`squeue --me` tells whether the job is there.",
            exit_code=EXIT_FAILED,
        )
    return job_id


def sbatch(script: Path) -> str:
    """Submit a batch script; the id of the new job.

    Raises:
        HarnessError: sbatch is missing or refuses the job.
        subprocess.TimeoutExpired: it does not answer; SLURM may have taken the job.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SRUN_")) or name in KEPT_SLURM_VARIABLES
    }
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SBATCH_LIMIT_SECONDS,
        )
    except (FileNotFoundError, PermissionError):
        raise HarnessError(
            "there is no sbatch here", hint="Submit on a login node of the cluster; --dry-run shows the script."
        ) from None
    if done.returncode != 0:
        message = "\n  ".join(done.stderr.strip().splitlines()) or f"sbatch ended with {done.returncode}"
        fitting = [words for words in HINTS if re.search(words, message, re.IGNORECASE)]
        raise HarnessError(
            f"SLURM refuses the job\n  {message}",
            hint=HINTS[fitting[0]] if fitting else "--dry-run shows the script; `man sbatch` explains its options.",
            exit_code=EXIT_FAILED if NO_ANSWER in fitting else EXIT_BAD_INPUT,
        )
    return done.stdout.strip().split(";")[0]


# --- options of the command line


def add_options(parser: argparse._ActionsContainer, *, array_of_seeds: bool = True) -> None:
    """The options whose values `request_of` reads.

    Args:
        array_of_seeds: with --array; else with --at-once, for an array whose runs are known already.
    """
    parser.add_argument("--nodes", type=_at_least(1), default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=_at_least(0), default=0, metavar="G", help="GPUs a node (default 0: trains on the CPU)"
    )
    parser.add_argument(
        "--tasks-per-node", type=_at_least(1), metavar="R", help="ranks a node (default: one a GPU, 1 without)"
    )
    parser.add_argument("--cpus-per-task", type=_at_least(1), metavar="C", help="CPUs a rank")
    parser.add_argument("--time", dest="time_limit", metavar="T", help="time limit, as sbatch has it: 4:00:00, 1-12")
    parser.add_argument("--partition", metavar="P", help="partition")
    parser.add_argument("--account", metavar="A", help="account")
    if array_of_seeds:
        parser.add_argument(
            "--array",
            type=_array,
            default=((), None),
            metavar="SEEDS",
            help="a run a seed: 0-4, 1,5,9 or 0-9%%2 (two at once)",
        )
    else:
        parser.add_argument(
            "--at-once", type=_at_least(1), metavar="N", help="runs at once (default: as many as SLURM lets in)"
        )
    parser.add_argument(
        "--signal-seconds",
        type=_at_least(1),
        default=Job.signal_seconds,
        metavar="S",
        help=f"stop this long before the time limit and queue again (default {Job.signal_seconds})",
    )
    parser.add_argument(
        "--max-restarts",
        type=_at_least(0),
        default=Job.max_restarts,
        metavar="N",
        help=f"restarts within the job after a rank died (default {Job.max_restarts})",
    )


def request_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Job` that the options set.

    Raises:
        HarnessError: options that contradict each other.
    """
    tasks, gpus = arguments.tasks_per_node, arguments.gpus_per_node
    if tasks is not None and gpus and tasks != gpus:
        raise HarnessError(
            f"--tasks-per-node {tasks} and --gpus-per-node {gpus}: one rank a GPU", hint="Give one of them."
        )
    seconds = limit_seconds(arguments.time_limit)
    if seconds is not None and seconds <= arguments.signal_seconds:
        raise HarnessError(
            f"--time {arguments.time_limit} is over as soon as --signal-seconds {arguments.signal_seconds} begin",
            hint="Ask for more time or give a smaller --signal-seconds: a job must get on before it is queued again.",
        )
    seeds, limit = getattr(arguments, "array", None) or ((), arguments.at_once)
    same = ("nodes", "cpus_per_task", "time_limit", "partition", "account", "signal_seconds", "max_restarts")
    return {
        **{name: getattr(arguments, name) for name in same},
        "gpus_per_node": gpus,
        "tasks_per_node": tasks or max(1, gpus),
        "seeds": seeds,
        "array_limit": limit,
    }


def limit_seconds(text: str | None) -> int | None:
    """A time limit as sbatch has it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S), in seconds; None for anything else.

    >>> limit_seconds("1-12"), limit_seconds("4:00:00"), limit_seconds("90")
    (129600, 14400, 5400)
    """
    if text is None or not re.fullmatch(r"([0-9]{1,6}-)?[0-9]{1,6}(:[0-9]{1,6}){0,2}", text):
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < smallest:
            raise argparse.ArgumentTypeError(f'must be a whole number of at least {smallest}, not "{text}"')
        return int(text)

    return parse


def _array(text: str) -> tuple[tuple[int, ...], int | None]:
    """Seeds and how many at once, from sbatch's way of writing them.

    >>> _array("0-2,7%2")
    ((0, 1, 2, 7), 2)
    """
    parts, _, limit = text.partition("%")
    seeds: list[int] = []
    for part in parts.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first >= MAX_ARRAY:
            raise argparse.ArgumentTypeError(f'must be seeds such as 0-4 or 1,5,9, not "{text}"')
        seeds += range(first, last + 1)
    if len(set(seeds)) != len(seeds) or (limit and not re.fullmatch(r"[1-9][0-9]{0,8}", limit)) or text.endswith("%"):
        raise argparse.ArgumentTypeError(f'must be seeds, each once, such as 0-4 or 0-9%2, not "{text}"')
    return tuple(seeds), int(limit) if limit else None
