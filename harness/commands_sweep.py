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
    how.add_argument("--slurm", action="store_true", help="submit an array of SLURM, a task a run")
    how.add_argument("--wandb", action="store_true", help="create the sweep on the W&B server and print its id")
    how.add_argument("--wandb-agent", metavar="ID", help="train here what the W&B server's sweep draws")
    how.add_argument("--table", action="store_true", help="print the table of what is finished so far, and stop")
    parser.add_argument("--ranks", type=_count, metavar="N", help="processes of each training (default: as launch.sh)")
    parser.add_argument("--retry-failed", action="store_true", help="train those again that failed")
    parser.add_argument("--dry-run", action="store_true", help="check all, print what would be done, write nothing")
    _add_json_option(parser)
    add_options(parser.add_argument_group("with --slurm"), array_of_seeds=False)
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from harness.sweeps.plan import check_unchanged, plan_sweep

    _refuse_lost_options(arguments)
    plan = plan_sweep(arguments.sweep)
    check_unchanged(plan)
    if arguments.table:
        return _print_table(plan, arguments)
    if arguments.slurm:
        return _sweep_on_cluster(plan, arguments)
    if arguments.wandb or arguments.wandb_agent:
        return _sweep_by_server(plan, arguments)
    return _sweep_here(plan, arguments)


def _sweep_here(plan: Any, arguments: argparse.Namespace) -> int:
    from harness.sweeps.progress import statuses
    from harness.sweeps.run import run_here, training_words
    from harness.sweeps.slurm import queued_runs
    from harness.sweeps.table import plan_json, render_plan

    ranks = _ranks(plan, arguments)
    queued = sorted(queued_runs(plan))
    if arguments.dry_run:
        found = statuses(plan, queued)
        command = ranks.command(training_words(plan.trials[0], plan.file.recipe_path))
        _print(plan_json(found) if arguments.json else f"{render_plan(found)}\n{shlex.join(command)}")
        return EXIT_DONE
    code = run_here(
        plan,
        ranks,
        retry_failed=arguments.retry_failed,
        quiet=arguments.json,
        again=command_of(arguments),
        queued=queued,
    )
    _print_table(plan, arguments)
    return code


def command_of(arguments: argparse.Namespace) -> str:
    """The command as it was given."""
    words = ["harness", "sweep", str(arguments.sweep)]
    words += ["--ranks", str(arguments.ranks)] if arguments.ranks is not None else []
    words += [f"--{name}" for name in ("retry-failed", "json") if getattr(arguments, name.replace("-", "_"))]
    return shlex.join(words)


def _sweep_on_cluster(plan: Any, arguments: argparse.Namespace) -> int:
    from harness.launching.submitting import request_of
    from harness.sweeps.plan import check_ranks
    from harness.sweeps.slurm import log_of, submit_sweep

    request = request_of(arguments)
    check_ranks(plan, request["nodes"] * request["tasks_per_node"])
    done = submit_sweep(plan, request=request, retry_failed=arguments.retry_failed, dry_run=arguments.dry_run)
    if done.job_id is None and arguments.json:
        _print({"job": None, "runs": [{"run_directory": str(t.directory.absolute())} for t in done.trials]})
        return EXIT_DONE
    if done.job_id is None:
        print(done.text if done.trials else "no run is due: all are finished, failed, running or queued", end="")
        print(end="" if done.trials else "\n")
        return EXIT_DONE
    logs = [(str(t.directory.absolute()), str(log_of(plan, done.job_id, i))) for i, t in enumerate(done.trials)]
    if arguments.json:
        _print({"job": done.job_id, "runs": [{"run_directory": run, "log": log} for run, log in logs]})
    else:
        print(f"job {done.job_id}")
        for run_directory, log in logs:
            print(f"run directory {run_directory}\nlog {log}")
    return EXIT_DONE


def _sweep_by_server(plan: Any, arguments: argparse.Namespace) -> int:
    from harness.recipe.document import dump
    from harness.sweeps.wandb import configuration, create, run_agent

    if arguments.wandb_agent:
        return run_agent(plan, arguments.wandb_agent)
    ranks = _ranks(plan, arguments)
    if arguments.dry_run:
        found = configuration(plan, ranks)
        _print(found if arguments.json else dump(found).rstrip())
        return EXIT_DONE
    sweep_id = create(plan, ranks)
    agent = f"harness sweep {shlex.quote(str(arguments.sweep))} --wandb-agent {sweep_id}"
    _print({"id": sweep_id, "agent": agent} if arguments.json else f"{sweep_id}\n{agent}")
    return EXIT_DONE


def _ranks(plan: Any, arguments: argparse.Namespace) -> Any:
    """The ranks of every training, the same for all so that their figures can be compared."""
    from harness.launching.training import choose_ranks
    from harness.sweeps.plan import check_ranks

    first = plan.trials[0]
    measure = not arguments.dry_run
    ranks = choose_ranks(plan.file.recipe_path, first.overrides, arguments.ranks, measure=measure)
    check_ranks(plan, ranks.count)
    if ranks.note:
        print(f"sweep: {ranks.note}", file=sys.stderr)
    return ranks


def _print_table(plan: Any, arguments: argparse.Namespace) -> int:
    from harness.sweeps.progress import statuses
    from harness.sweeps.slurm import queued_runs
    from harness.sweeps.table import render_table, table_json

    found = statuses(plan, queued_runs(plan))
    _print(table_json(plan, found) if arguments.json else render_table(plan, found))
    return EXIT_DONE


def _refuse_lost_options(arguments: argparse.Namespace) -> None:
    """Options that would do nothing are mistakes."""
    cluster = argparse.ArgumentParser(add_help=False)
    from harness.launching.submitting import add_options

    add_options(cluster, array_of_seeds=False)
    usual = vars(cluster.parse_args([]))
    given = [f"--{n.replace('_', '-')}" for n, v in usual.items() if getattr(arguments, n) != v]
    given = ["--time" if name == "--time-limit" else name for name in given]
    if given and not arguments.slurm:
        raise HarnessError(f"{', '.join(given)}: only with --slurm", hint="Add --slurm, or leave it out.")
    if arguments.slurm and arguments.ranks is not None:
        raise HarnessError("--ranks is for this machine alone", hint="With --slurm: --nodes N --tasks-per-node R.")
    own = {"--ranks": arguments.ranks is not None, "--dry-run": arguments.dry_run, "--json": arguments.json}
    lost = [name for name, is_given in own.items() if is_given]
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
    from harness.training.lr_range import find_lr

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
