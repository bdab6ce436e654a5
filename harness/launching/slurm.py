"""The batch script of a SLURM job, as a pure function of a `Job`.

Its head (the `#SBATCH` lines and a few settings) is made here; its body, `body.sbatch`, is the same for every job and
for `scripts/train.sbatch`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError

BODY = Path(__file__).with_name("body.sbatch")
MAX_NAME_LETTERS = 60
NAMES = "# shellcheck disable=SC2016  # $(…) in a name is part of the name"


@dataclass(frozen=True)
class Job:
    """What a job asks for and what it trains.

    Attributes:
        name: of the job; letters that might mean something to SLURM become "_".
        recipe: absolute path of the recipe as the user named it.
        overrides: `key.path=value` texts laid over it.
        run_directory: absolute; with `seeds` the beginning of one a seed, see `run_directory_of`.
        python: the interpreter that has the harness.
        tasks_per_node: ranks a node.
        gpus_per_node: 0 trains on the CPU.
        cpus_per_task: None leaves it to SLURM, which gives one.
        time_limit: as sbatch's --time; None leaves it to the partition.
        seeds: an array with a task each, whose index is the seed; empty: no array.
        runs: an array with a task each, in this order: run directories whose recipes are frozen; `run_directory` then
            holds what the job prints.
        again: what to say of how to go on, where it is not sbatch.
        array_limit: tasks of the array that run at once; None: as many as fit.
        signal_seconds: before the time limit, when the ranks are told to stop.
        max_restarts: times that ranks are started again after one died, within the job.
    """

    name: str
    recipe: str
    run_directory: str
    python: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time_limit: str | None = None
    partition: str | None = None
    account: str | None = None
    seeds: tuple[int, ...] = ()
    runs: tuple[str, ...] = ()
    again: str | None = None
    array_limit: int | None = None
    signal_seconds: int = 120
    max_restarts: int = 2

    def run_directory_of(self, seed: int | None) -> Path:
        """The run directory of a job, or of an array's task."""
        return Path(self.run_directory if seed is None else f"{self.run_directory}-seed_{seed}")


def sbatch_text(job: Job) -> str:
    """The whole batch script.

    Raises:
        HarnessError: something in it cannot stand on a `#SBATCH` line.
    """
    lines = ["#!/usr/bin/env bash", *_directives(job), "# Made by `harness submit`.", NAMES, *_settings(job)]
    return "\n".join(lines) + "\n" + BODY.read_text()


def job_name(name: str) -> str:
    """A name without letters that mean something to SLURM or a shell.

    >>> job_name("my recipe $(date)")
    'my_recipe_date'
    """
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")[:MAX_NAME_LETTERS] or "harness"


def log_path(job: Job, job_id: str, seed: int | None = None) -> Path:
    """Where SLURM writes what a job prints."""
    file = f"{job_id}.out" if seed is None else f"{job_id}_{seed}.out"
    return job.run_directory_of(seed) / "slurm" / file


def _directives(job: Job) -> list[str]:
    indices = f"0-{len(job.runs) - 1}" if job.runs else ",".join(map(str, job.seeds))
    array = indices + (f"%{job.array_limit}" if job.array_limit else "")
    # In names of files, SLURM replaces %j, %A and %a; %% is a plain %.
    folder = job.run_directory.replace("%", "%%")
    log = f"{folder}-seed_%a/slurm/%A_%a.out" if job.seeds else f"{folder}/slurm/{'%A_%a' if job.runs else '%j'}.out"
    options: dict[str, str | int | None] = {
        "job-name": job_name(job.name),
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        # Each task sees all GPUs of its node and takes the one of its LOCAL_RANK.
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task,
        "time": job.time_limit,
        "partition": job.partition,
        "account": job.account,
        "array": array or None,
        "signal": f"B:USR1@{job.signal_seconds}",
        "open-mode": "append",
        "output": log,
    }
    lines = [f"#SBATCH --{name}={_quoted(name, str(value))}" for name, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue"]


def _quoted(option: str, value: str) -> str:
    """A value as sbatch reads it from the script: quoted by its own rules, which are not a shell's."""
    if not value.isprintable() or "\\" in value:
        raise HarnessError(
            f"cannot be given to sbatch as --{option}: {value!r}",
            hint="Leave out backslashes and letters that cannot be printed.",
        )
    if re.fullmatch(r"[A-Za-z0-9_./:@%,=+-]*", value):
        return value
    return '"' + value.replace('"', '\\"') + '"'


def _settings(job: Job) -> list[str]:
    return [
        f"python={shlex.quote(job.python)}",
        f"recipe={shlex.quote(job.recipe)}",
        f"overrides=({shlex.join(job.overrides)})",
        f"run={shlex.quote(job.run_directory)}",
        f"max_restarts={job.max_restarts}",
        *([f"runs=({shlex.join(job.runs)})"] if job.runs else []),
        *([f"again={shlex.quote(job.again)}"] if job.again else []),
    ]
