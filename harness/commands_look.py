"""The commands that look at runs: `report` makes a page of one; in the manner of `harness.commands`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.errors import EXIT_DONE

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
    from harness.errors import HarnessError

    if arguments.port is not None and not arguments.serve:
        raise HarnessError("--port is for --serve", hint="Add --serve, or leave --port out.")
    from harness.reporting.report import Reporter, output_of, write_report

    options = {"which": arguments.checkpoint, "weights": arguments.weights}
    if arguments.serve:
        from harness.reporting.serve import serve

        reporter = Reporter(arguments.run_path, **options)
        serve(reporter, output_of(reporter, arguments.output), port=arguments.port or 0)
        return EXIT_DONE
    file, problems = write_report(arguments.run_path, output=arguments.output, **options)
    for problem in problems:
        print(f"WARNING {problem}", file=sys.stderr)
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB)")
    return EXIT_DONE


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 to 65535, not "{text}"')
    return int(text)
