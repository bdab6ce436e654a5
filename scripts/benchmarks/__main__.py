"""The benchmarks beside peers as commands: `python -m scripts.benchmarks NAME`, to which `harness bench NAME` leads.

They take the extras ffcv and bench (pip install '.[ffcv,bench]'); a contestant that is not installed is left out.
HARNESS_DATA=DIR: a folder with the real CIFAR-10 (loaders take random images without it).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.bench.contest import render
from harness.cli import Parser, take_overrides
from harness.commands_speed import PEERS, add_json_option, add_overrides, counts, positive
from harness.errors import EXIT_DONE, HarnessError, print_error

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROUNDS = {"overhead": 9, "ranks": 9, "startup": 5, "first-batch": 3, "scaling": 5, "all": 5}  # by default


def main(words: Sequence[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser(prog="harness bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, text in PEERS.items():
        action = actions.add_parser(name, help=text)
        if name in ROUNDS:
            usual = ROUNDS[name]
            action.add_argument("--rounds", type=positive, default=usual, metavar="N", help=f"(default {usual})")
        if name == "accuracy":
            action.add_argument("--epochs", type=positive, metavar="N", help="at most, schedules shortened (all)")
        if name == "scaling":
            action.add_argument("recipe", metavar="RECIPE", nargs="?", default="debug", help="a YAML file (debug)")
            add_overrides(action)
            action.add_argument("--ranks", type=counts, default=[1, 2, 4], metavar="N,N,…", help="(default 1,2,4)")
        if name == "all":
            action.add_argument("--page", action="store_true", help="write docs/benchmarks.md, .json and .svg too")
        add_json_option(action)
    arguments, unknown = parser.parse_known_args(words)
    take_overrides(arguments, unknown)
    options = vars(arguments)
    name, as_json, to_page = options.pop("command"), options.pop("json"), options.pop("page", False)
    result, text = _measured(name, options)
    if to_page:
        from scripts.benchmarks.page import write

        write(result, DOCS)
    print(json.dumps(result, indent=2) if as_json else text)
    return EXIT_DONE


def _measured(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The result of a benchmark, and as text."""
    if name == "accuracy":
        from scripts.benchmarks.accuracy import bench_accuracy, render_accuracy

        result = bench_accuracy(**options)
        return result, render_accuracy(result)
    if name == "scaling":
        from scripts.benchmarks.scaling import bench_scaling, render_scaling

        result = bench_scaling(options.pop("recipe"), **options)
        return result, render_scaling(result)
    if name == "all":
        from scripts.benchmarks.page import bench_all

        results = bench_all(**options)
        return results, "\n\n".join(f"# {each}\n{render(result)}" for each, result in results.items())
    from scripts.benchmarks import first_batch, overhead, startup

    benches = {"overhead": overhead.bench_overhead, "ranks": overhead.bench_ranks, "startup": startup.bench_startup}
    benches["first-batch"] = first_batch.bench_first_batch
    result = benches[name](**options)
    return result, render(result)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HarnessError as error:
        print_error(error)
        sys.exit(error.exit_code)
