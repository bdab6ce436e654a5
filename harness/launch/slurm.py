"""Submitting a training to SLURM: `job.sbatch`, with what was asked for written into it, next to the frozen recipe.

Options of sbatch are handed on as they are; SLURM says what is wrong with them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from harness.errors import EXIT_BAD_INPUT, EXIT_FAILED, HarnessError
from harness.runs import JOB, is_unused, new_run_directory

SCRIPT = "job.sbatch"
RECIPE = "recipe.yaml"
BODY = "set -uo pipefail\n"  # what SCRIPT begins with after its comment
SBATCH_LIMIT_SECONDS = 120
# All others are those of a job that we may be in ourselves; the new job gets its own.
KEPT_SLURM_VARIABLES = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
NO_ANSWER = r"contact slurm controller|timed out|munge|authentication|temporarily|standby|Communication connection"
# What to do, by what sbatch says; the first that fits counts.
HINTS = {
    NO_ANSWER: "SLURM does not answer here: see `scontrol ping`, and try again or on a login node.",
    r"unrecognized option": "See harness submit --help; options of sbatch are written --name=value.",
    r"configuration (source|file)": "sbatch finds no slurm.conf: set SLURM_CONF to the path of the cluster's.",
    r"\bqos\b": "`sacctmgr show qos format=name,maxwall,maxsubmitpu,maxtrespu` lists limits; --qos=Q or SBATCH_QOS "
    "chooses one.",
    r"\btime\b": "--time is 90 (minutes), 4:00:00 or 1-12 (days-hours); `sinfo -o '%P %l'` lists partitions' limits.",
    r"\baccount\b": "`sacctmgr show associations user=$USER format=account,partition,qos` lists yours for --account.",
    r"\bgres\b": "--gpus-per-node: `sinfo -o '%P %D %G'` lists partitions with their nodes and GPUs.",
    r"\bfeature": "`sinfo -o '%P %f'` lists the features that --constraint=F or SBATCH_CONSTRAINT may name.",
    r"\barray\b": "--array: `scontrol show config | grep MaxArraySize` shows how far its indices may go.",
    r"\bpartition\b": "--partition: `sinfo -o '%P %a %l %D %c %G'` lists those that there are.",
    r"processors|\bnode\b|memory|-per-": "Fewer --nodes, --tasks-per-node or --cpus-per-task, or another --partition: "
    "`sinfo -o '%P %D %c %m %G'` lists nodes, CPUs, memory and GPUs.",
}
# Options of sbatch that --help names.
LISTED = {
    "nodes": "nodes (default 1)",
    "gpus-per-node": "GPUs per node (default 0: trains on the CPU)",
    "tasks-per-node": "ranks per node (default: one per GPU, 1 without)",
    "cpus-per-task": "CPUs per rank",
    "time": "time limit: 90 (minutes), 4:00:00, 1-12 (days-hours)",
    "partition": "partition",
    "account": "account",
}


@dataclass(frozen=True)
class Request:
    """Options of sbatch (`--name=value`, a later one overrides an earlier one), and what they say of the ranks."""

    options: tuple[str, ...] = ()
    array: str | None = None
    at_once: str | None = None  # tasks of a sweep's array
    ranks: int = 1  # over all nodes, where plain numbers say it
    max_restarts: int = 2  # of the ranks within the job, after one died


def add_options(parser: argparse._ActionsContainer, *, array_of_seeds: bool = True) -> None:
    """The options that `request_of` reads: with --array of seeds, or with --at-once for runs that are known already."""
    for name, text in LISTED.items():
        parser.add_argument(f"--{name}", metavar="X", help=text)
    if array_of_seeds:
        parser.add_argument("--array", metavar="SEEDS", help="one run per seed: 0-4, 1,5,9 or 0-9%%2 (two at once)")
    else:
        parser.add_argument("--at-once", metavar="N", help="runs at once (default: as many as SLURM lets in)")
    for name, default, text in (
        ("--signal-seconds", 120, "stop this long before the time limit and queue again"),
        ("--max-restarts", Request.max_restarts, "restarts within the job after a rank died"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default {default})")


def request_of(arguments: argparse.Namespace, others: Sequence[str] = ()) -> Request:
    """What the options of `add_options`, and other ones of sbatch, ask for.

    Raises:
        HarnessError: options that contradict each other.
    """
    given = {name: getattr(arguments, name.replace("-", "_")) for name in LISTED}
    nodes, gpus, tasks = (_number_in(given[name]) for name in ("nodes", "gpus-per-node", "tasks-per-node"))
    if gpus and tasks not in (None, gpus):
        what = f"--tasks-per-node {tasks} and --gpus-per-node {gpus}: one rank per GPU"
        raise HarnessError(what, hint="Give one of them.")
    seconds = limit_seconds(given["time"])
    if seconds is not None and seconds <= arguments.signal_seconds:
        raise HarnessError(
            f"--time {given['time']} is over as soon as --signal-seconds {arguments.signal_seconds} begin",
            hint="Ask for more time or give a smaller --signal-seconds: a job must get on before it is queued again.",
        )
    # Each task sees all GPUs of its node and takes the one of its LOCAL_RANK.
    given["ntasks-per-node"] = given.pop("tasks-per-node") or gpus or 1
    given["signal"] = f"B:USR1@{arguments.signal_seconds}"
    if gpus == 0:
        given["gpus-per-node"] = None  # a SLURM without GPUs refuses the word
    return Request(
        options=(*(f"--{name}={value}" for name, value in given.items() if value is not None), *others),
        array=getattr(arguments, "array", None),
        at_once=getattr(arguments, "at_once", None),
        ranks=(nodes or 1) * (tasks or gpus or 1),
        max_restarts=arguments.max_restarts,
    )


def limit_seconds(text: str | None) -> int | None:
    """A time limit as sbatch has it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S), in seconds; None for anything else."""
    if text is None or not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        return None
    numbers = [int(number) for number in re.split("[-:]", text)]
    if "-" not in text:
        numbers = [0] * (1 if len(numbers) == 3 else 2) + numbers
    return sum(number * unit for number, unit in zip(numbers, (86400, 3600, 60, 1), strict=False))


def script_text(
    request: Request,
    *,
    name: str,
    recipe: str,
    run: Path,
    overrides: Sequence[str] = (),
    sweep_runs: Sequence[str] = (),
    sweep_again: str = "",
) -> str:
    """The batch script: of one run, of a run `<run>-seed_<n>` per seed, or of a sweep.

    Args:
        recipe, run: absolute paths; of a sweep, `run` is the folder for what the job prints.
        sweep_runs: run directories whose recipes are frozen, one task each; `sweep_again` resumes them.

    Raises:
        HarnessError: something in it cannot stand on a `#SBATCH` line.
    """
    indices = f"0-{len(sweep_runs) - 1}" + (f"%{request.at_once}" if request.at_once else "")
    array = [f"--array={indices if sweep_runs else request.array}"] if sweep_runs or request.array else []
    # In names of files, SLURM replaces %j, %A and %a; %% is a plain %.
    log = f"{run}/{JOB}/".replace("%", "%%") + ("%A_%a.out" if array else "%j.out")
    job_name = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")[:60] or "harness"
    lines = [
        *(f"#SBATCH {_quoted(o)}" for o in (f"--job-name={job_name}", f"--output={log}", *array, *request.options)),
        "# shellcheck disable=SC2016  # $(…) in a name is part of the name",
        f"set -- {shlex.join([recipe, *overrides])}",
        f"HARNESS_RUN_DIR={shlex.quote(str(run))}",
        f"HARNESS_PYTHON={shlex.quote(sys.executable)}",
        f"HARNESS_MAX_RESTARTS={request.max_restarts}",
    ]
    if sweep_runs:
        lines += [f"sweep_runs=({shlex.join(sweep_runs)})", f"sweep_again={shlex.quote(sweep_again)}"]
    comment, body = Path(__file__).with_name(SCRIPT).read_text().split(BODY)
    return comment + "\n".join([*lines, BODY]) + body


def submit(
    recipe_path: str, overrides: Sequence[str], *, request: Request, run_directory: Path | None, dry_run: bool
) -> tuple[str, str | None, list[tuple[Path, Path]]]:
    """Submit the training of a recipe, or only make the script.

    Returns:
        The script; the job's id, None in a dry run; run directory and log of each task.

    Raises:
        HarnessError: the recipe is wrong, the directory is another run's, or sbatch is missing or refuses the job;
            nothing is left of it then.
    """
    from harness.recipe import load
    from harness.recipe.document import locate
    from harness.recipe.loading import resolved_yaml

    recipe = load(recipe_path, overrides)
    run = (run_directory or new_run_directory(recipe.name)).absolute()
    path = str(locate(recipe_path).absolute())
    text = script_text(request, name=recipe.name, recipe=path, run=run, overrides=overrides)
    if dry_run:
        return text, None, []
    script = run / JOB / SCRIPT
    if script.parent.exists():
        hint = f"sbatch {script} resumes it; else give another --run-dir."
        raise HarnessError("a job was submitted with this run directory", where=str(run), hint=hint)
    try:
        if not is_unused(run) and not (run / "recipe.yaml").exists():
            raise HarnessError("is not a run directory", where=str(run), hint="Give another --run-dir.")
        with ExitStack() as undo:
            make_folder(script.parent, undo)
            script.with_name(RECIPE).write_text(resolved_yaml(recipe))
            script.write_text(text)
            job_id = submit_script(script, undo)
    except OSError as error:
        what = f"cannot be used as a run directory ({error.strerror})"
        raise HarnessError(what, where=str(run), hint="Give another --run-dir.") from None
    seeds = seeds_of(request.array) if request.array else []
    tasks = [(run.with_name(f"{run.name}-seed_{seed}"), f"{job_id}_{seed}.out") for seed in seeds]
    return text, job_id, [(task, script.with_name(log)) for task, log in tasks or [(run, f"{job_id}.out")]]


def seeds_of(array: str) -> list[int]:
    """The indices of an array, such as `0-2,7,10-20:5%2`."""
    parts = re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", array.partition("%")[0])
    ranges = (range(int(first), int(last or first) + 1, int(step or 1)) for first, last, step in parts)
    return sorted({seed for seeds in ranges for seed in seeds})


def make_folder(folder: Path, undo: ExitStack) -> None:
    """Make a folder and those above it; `undo` removes what was not there before."""
    if not folder.exists():
        make_folder(folder.parent, undo)
        folder.mkdir()
        undo.callback(shutil.rmtree, folder, ignore_errors=True)


def submit_script(script: Path, undo: ExitStack) -> str:
    """Submit a script; the job's id. `undo` removes what was made for it, unless SLURM has the job or may have it.

    Raises:
        HarnessError: sbatch is missing, refuses the job or does not answer.
    """
    drop = {n for n in os.environ if n.startswith(("SLURM_", "SRUN_"))} - KEPT_SLURM_VARIABLES
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            env={name: value for name, value in os.environ.items() if name not in drop},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SBATCH_LIMIT_SECONDS,
        )
    except (FileNotFoundError, PermissionError):
        hint = "Submit on a login node of the cluster; --dry-run shows the script."
        raise HarnessError("there is no sbatch here", hint=hint) from None
    except subprocess.TimeoutExpired:
        undo.pop_all()
        raise HarnessError(
            f"sbatch did not answer within {SBATCH_LIMIT_SECONDS} s; {script} is kept",
            hint=f"`squeue --me` tells whether the job is there; else: sbatch {script}",
            exit_code=EXIT_FAILED,
        ) from None
    if done.returncode != 0:
        message = "\n  ".join(done.stderr.strip().splitlines()) or f"sbatch ended with {done.returncode}"
        fitting = next((words for words in HINTS if re.search(words, message, re.IGNORECASE)), None)
        raise HarnessError(
            f"SLURM refuses the job\n  {message}",
            hint=HINTS[fitting] if fitting else "--dry-run shows the script; `man sbatch` explains its options.",
            exit_code=EXIT_FAILED if fitting == NO_ANSWER else EXIT_BAD_INPUT,
        )
    undo.pop_all()
    job_id = done.stdout.strip().split(";")[0]
    if not job_id.isdecimal():
        what = f'sbatch succeeded without a job number ("{job_id}"); {script} is kept'
        raise HarnessError(what, hint="`squeue --me` tells whether the job is there.", exit_code=EXIT_FAILED)
    return job_id


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script: quoted by its own rules, which are not a shell's."""
    name, _, value = option.partition("=")
    if not option.isprintable() or "\\" in option:
        hint = "Leave out backslashes and letters that cannot be printed."
        raise HarnessError(f"cannot be given to sbatch as {name}: {value!r}", hint=hint)
    if re.fullmatch(r"[A-Za-z0-9_./:@%,=+-]*", option):
        return option
    escaped = value.replace('"', '\\"')
    return f'{name}="{escaped}"'


def _number_in(text: str | None) -> int | None:
    """Such as 8 of `a100:8`; None where there is none, as in `2-4`."""
    last = (text or "").rpartition(":")[2]
    return int(last) if last.isdecimal() else None
