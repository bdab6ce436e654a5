"""The commands that try settings: `sweep` trains them, `lr-find` looks for a rate. In the manner of `commands`."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE, HarnessError


def build_sweep(parser: argparse.ArgumentParser) -> None:
    from harness.launching.submitting import add_options

    parser.add_argument("sweep", metavar="SWEEP", type=Path, help="a YAML file: recipe, parameters, seeds, metric")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--local", action="store_true", help="train here, one run after another (default)")
    how.add_argument("--slurm", action="store_true", help="submit a SLURM array, one task per run")
    how.add_argument("--wandb", action="store_true", help="create the sweep on the W&B server and print its id")
    how.add_argument("--wandb-agent", metavar="ID", help="train here what the W&B server's sweep draws")
    how.add_argument("--table", action="store_true", help="print the table of what is finished so far, and stop")
    parser.add_argument("--ranks", type=_count, metavar="N", help="processes of each training (default: as launch.sh)")
    parser.add_argument("--retry-failed", action="store_true", help="train failed runs again")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print what would be done")
    _add_json_option(parser)
    add_options(parser.add_argument_group("with --slurm"), array_of_seeds=False)
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from harness.sweeps.run import check_unchanged
    from harness.sweeps.spec import load_sweep

    _refuse_lost_options(arguments)
    sweep = load_sweep(arguments.sweep)
    check_unchanged(sweep)
    if arguments.table:
        _print_table(sweep, arguments)
        return EXIT_DONE
    if arguments.slurm:
        return _sweep_on_cluster(sweep, arguments)
    if arguments.wandb or arguments.wandb_agent:
        return _sweep_by_server(sweep, arguments)
    return _sweep_here(sweep, arguments)


def _sweep_here(sweep: Any, arguments: argparse.Namespace) -> int:
    from harness.sweeps.run import run_here, statuses, training_words
    from harness.sweeps.slurm import queued_runs
    from harness.sweeps.table import plan_json, render_plan

    ranks = _ranks(sweep, arguments)
    queued = queued_runs(sweep)
    if arguments.dry_run:
        found = statuses(sweep, queued)
        command = shlex.join(ranks.command(training_words(sweep, sweep.runs[0])))
        _print(plan_json(found) if arguments.json else f"{render_plan(found)}\n{command}")
        return EXIT_DONE
    code = run_here(sweep, ranks, retry_failed=arguments.retry_failed, quiet=arguments.json, queued=queued)
    _print_table(sweep, arguments)
    return code


def _sweep_on_cluster(sweep: Any, arguments: argparse.Namespace) -> int:
    from harness.launching.submitting import request_of
    from harness.sweeps.run import check_ranks
    from harness.sweeps.slurm import submit

    request = request_of(arguments)
    check_ranks(sweep, request["nodes"] * request["tasks_per_node"])
    retry, dry_run = arguments.retry_failed, arguments.dry_run
    script, job_id, tasks = submit(sweep, request=request, retry_failed=retry, dry_run=dry_run)
    if arguments.json:
        _print({"job": job_id, "runs": tasks})
    elif job_id is None:
        print(script or "no run is due: all are finished, failed, running or queued\n", end="")
    else:
        print(f"job {job_id}", *(f"run directory {t['run_directory']}\nlog {t['log']}" for t in tasks), sep="\n")
    return EXIT_DONE


def _sweep_by_server(sweep: Any, arguments: argparse.Namespace) -> int:
    from harness.recipe.document import dump
    from harness.sweeps.wandb import configuration, run_agent
    from harness.tracking.wandb_sweep import create_sweep

    if arguments.wandb_agent:
        return run_agent(sweep, arguments.wandb_agent)
    found = configuration(sweep, _ranks(sweep, arguments))
    if arguments.dry_run:
        _print(found if arguments.json else dump(found).rstrip())
        return EXIT_DONE
    tracking = sweep.runs[0].recipe.tracking
    sweep_id = create_sweep(found, project=tracking.project, entity=tracking.entity)
    agent = f"harness sweep {shlex.quote(str(arguments.sweep))} --wandb-agent {sweep_id}"
    _print({"id": sweep_id, "agent": agent} if arguments.json else f"{sweep_id}\n{agent}")
    return EXIT_DONE


def _ranks(sweep: Any, arguments: argparse.Namespace) -> Any:
    """The ranks of every training, the same for all so that their figures can be compared."""
    from harness.launching.training import choose_ranks
    from harness.sweeps.run import check_ranks

    overrides, measure = sweep.runs[0].overrides, not arguments.dry_run
    ranks = choose_ranks(sweep.recipe_path, overrides, arguments.ranks, measure=measure)
    check_ranks(sweep, ranks.count)
    if ranks.note:
        print(f"sweep: {ranks.note}", file=sys.stderr)
    return ranks


def _print_table(sweep: Any, arguments: argparse.Namespace) -> None:
    from harness.sweeps.run import statuses
    from harness.sweeps.slurm import queued_runs
    from harness.sweeps.table import render_table, table_json

    table = table_json(sweep, statuses(sweep, queued_runs(sweep)))
    _print(table if arguments.json else render_table(table))


def _refuse_lost_options(arguments: argparse.Namespace) -> None:
    """Options that would do nothing are mistakes."""
    from harness.launching.submitting import add_options

    cluster = argparse.ArgumentParser(add_help=False)
    add_options(cluster, array_of_seeds=False)
    usual = vars(cluster.parse_args([]))
    given = [name.replace("_", "-") for name, value in usual.items() if getattr(arguments, name) != value]
    if given and not arguments.slurm:
        options = ", ".join(f"--{name}" for name in given).replace("--time-limit", "--time")
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


def build_lr_find(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="change a setting, e.g. optimizer.name=adamw"
    )
    parser.add_argument("--min-lr", type=float, default=1e-6, metavar="X", help="rate of the first step (default 1e-6)")
    parser.add_argument("--max-lr", type=float, default=10.0, metavar="X", help="rate of the last step (default 10)")
    parser.add_argument("--steps", type=_count, default=100, metavar="N", help="optimizer steps (default 100)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the curve")
    _add_json_option(parser)
    parser.set_defaults(run=_lr_find)


def _lr_find(arguments: argparse.Namespace) -> int:
    from harness.recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    from harness.files import write_text
    from harness.report.lr_curve import curve_page, render_curve, render_suggestions
    from harness.report.page import check_target
    from harness.report.terminal import has_colours
    from harness.training.lr_finder import find_lr

    if arguments.html is not None:
        check_target(arguments.html)
    found = find_lr(recipe, min_lr=arguments.min_lr, max_lr=arguments.max_lr, steps=arguments.steps)
    if arguments.html is not None:
        write_text(arguments.html, curve_page(found, recipe.name))
    if arguments.json:
        _print(found.to_json())
    else:
        curve = render_curve(found, size=shutil.get_terminal_size(), colours=has_colours())
        print(f"{curve}\n{render_suggestions(found)}")
    return EXIT_DONE


def _add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, not "{text}"')
    return int(text)


def _print(result: Any) -> None:
    print(result if isinstance(result, str) else json.dumps(result, indent=2))
