"""The commands that look at runs: `report` makes a page of one; `runs`, `curves` and `compare` are about several."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE, HarnessError
from harness.files import write_text
from harness.run_directory import RUNS

WATCH_SECONDS = 3.0


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_paths", metavar="RUN", nargs="+", type=Path, help="run directories")


def _add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def _width() -> int | None:
    """Columns of the terminal; None where the output is read by something else."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


# --- report


def build_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make one HTML file of a run, which opens without a network: figures, curves, confusion matrix, calibration, "
        "worst mistakes, Grad-CAM, receptive fields, the network, its recipe and provenance. A run in any state will "
        "do: what cannot be shown is said in its place."
    )
    parser.add_argument("run_path", metavar="RUN", type=Path, help="a run directory, or one of its checkpoints")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last (default), best or step_N")
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="which weights (default raw)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default RUN/report.html)")
    parser.add_argument("--serve", action="store_true", help="show it at 127.0.0.1 and keep it up to date until Ctrl-C")
    parser.add_argument("--port", type=_port, metavar="P", help="of --serve (default: a free one)")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    if arguments.port is not None and not arguments.serve:
        raise HarnessError("--port is for --serve", hint="Add --serve, or leave --port out.")
    from harness.report.reporter import Reporter

    reporter = Reporter(
        arguments.run_path, which=arguments.checkpoint, weights=arguments.weights, output=arguments.output
    )
    if arguments.serve:
        from harness.report.reporter import serve

        serve(reporter, port=arguments.port or 0)
        return EXIT_DONE
    for problem in reporter.write():
        print(f"WARNING {problem}", file=sys.stderr)
    print(f"{reporter.file} ({reporter.file.stat().st_size / 1e6:.2f} MB)")
    return EXIT_DONE


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 to 65535, not "{text}"')
    return int(text)


# --- runs


def build_runs(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List runs with their state (running, finished, stopped, empty, broken), the newest last: how far they are, "
        "their best test accuracy, and the age of their latest record."
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=RUNS, help=f"(default {RUNS})")
    parser.add_argument("--recipe", metavar="NAME", help="only runs of this recipe")
    _add_json_option(parser)
    parser.set_defaults(run=_runs)


def _runs(arguments: argparse.Namespace) -> int:
    from harness.report.terminal import ORDER, as_json, render
    from harness.runs import list_runs

    runs = list_runs(arguments.directory, recipe=arguments.recipe)
    if arguments.json:
        _print_json({"directory": str(arguments.directory), "order": ORDER, "runs": [as_json(run) for run in runs]})
    else:
        print(render(runs, arguments.directory, width=_width()))
    return EXIT_DONE


# --- curves


def build_curves(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw the curves of runs in the terminal: training, test and averaged weights (EMA) together, several runs "
        "over one another. Without a terminal it is plain text, and letters tell the curves apart."
    )
    _run_arguments(parser)
    parser.add_argument(
        "--what",
        default="loss,accuracy",
        metavar="NAME,…",
        help="of loss, accuracy, lr and throughput (default loss,accuracy)",
    )
    parser.add_argument(
        "--watch", action="store_true", help=f"draw again every {WATCH_SECONDS:g} seconds until the runs end or Ctrl-C"
    )
    parser.set_defaults(run=_curves)


def _curves(arguments: argparse.Namespace) -> int:
    from harness.report.terminal import draw_runs, has_colours, parse_what, watch

    what = parse_what(arguments.what)

    def draw() -> tuple[str, bool]:
        return draw_runs(
            arguments.run_paths,
            what,
            size=shutil.get_terminal_size(),
            colours=has_colours(),
        )

    if not arguments.watch:
        print(draw()[0])
        return EXIT_DONE
    watch(draw, seconds=WATCH_SECONDS, clear=sys.stdout.isatty())
    return EXIT_DONE


# --- compare


def build_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare runs, grouped by their recipes apart from the seed: what the recipes differ in, mean and standard "
        "deviation over the seeds, and whether the test accuracies of the groups differ by more than chance, over "
        "the test images and over the seeds. Each group is compared with that of the first run."
    )
    _run_arguments(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the same tables and the curves")
    parser.add_argument(
        "--checkpoint", choices=("last", "best"), default="last", help="whose answers are compared (default last)"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="which weights (default raw)")
    _add_json_option(parser)
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from harness.report.compare import compare
    from harness.report.comparison_view import comparison_page, render
    from harness.report.page import check_target

    if arguments.html:
        check_target(arguments.html)
    found = compare(arguments.run_paths, checkpoint=arguments.checkpoint, weights=arguments.weights)
    if arguments.html:
        write_text(arguments.html, comparison_page(found))
    if arguments.json:
        _print_json(found.to_json())
    else:
        print(render(found, width=_width()))
        if arguments.html:
            print(f"\n{arguments.html}")
    return EXIT_DONE
