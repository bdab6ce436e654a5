"""The benchmarks next to peers as actions of `harness bench`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from harness.cli import JSON, OVERRIDES, Command, Option, flag, option, whole_number, whole_numbers
from harness.commands import show

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _rounds(usual: int) -> Option:
    return option("--rounds", "N", f"(default {usual})", type=whole_number(), default=usual)


def _accuracy(arguments: Namespace) -> None:
    from scripts.benchmarks.accuracy import bench_accuracy, render_accuracy

    show(arguments, bench_accuracy(epochs=arguments.epochs), render_accuracy)


def _scaling(arguments: Namespace) -> None:
    from scripts.benchmarks.scaling import bench_scaling, render_scaling

    result = bench_scaling(arguments.recipe, arguments.overrides, ranks=arguments.ranks, rounds=arguments.rounds)
    show(arguments, result, render_scaling)


def _all(arguments: Namespace) -> None:
    from scripts.benchmarks.page import bench_all, render_all, write

    results = bench_all(rounds=arguments.rounds)
    if arguments.page:
        write(results, DOCS)
    show(arguments, results, render_all)


def _one(arguments: Namespace) -> None:
    from harness.bench import render
    from scripts.benchmarks.first_batch import bench_first_batch
    from scripts.benchmarks.overhead import bench_overhead, bench_ranks
    from scripts.benchmarks.startup import bench_startup

    benches = {"overhead": bench_overhead, "ranks": bench_ranks, "startup": bench_startup}
    benches["first-batch"] = bench_first_batch
    show(arguments, benches[arguments.action](rounds=arguments.rounds), render)


LOOPS = "the loops of PyTorch, Accelerate, Lightning, timm and ours around a network so small that they remain"
WAIT = "seconds until a loader's first batch is there, in a first process and in later ones"
ACCURACY = "seconds of training to 80 … 94 percent on the real CIFAR-10: airbench94 and ours (about an hour)"
SCALING = "training on several CPU ranks: speed, and what gradient exchange, buckets and SyncBN cost"
PEERS = {
    "overhead": Command("", LOOPS, _one, [_rounds(9), JSON]),
    "ranks": Command("", "that network on two CPU ranks: raw DDP, Accelerate and ours", _one, [_rounds(9), JSON]),
    "startup": Command("", "seconds to --help and to the first step of a training", _one, [_rounds(5), JSON]),
    "first-batch": Command("", WAIT, _one, [_rounds(3), JSON]),
    "accuracy": Command(
        "", ACCURACY, _accuracy,
        [option("--epochs", "N", "at most, schedules shortened (all)", type=whole_number()), JSON],
    ),
    "scaling": Command("", SCALING, _scaling, [
        option("recipe", "RECIPE", "a YAML file (debug)", nargs="?", default="debug"), OVERRIDES, _rounds(5), JSON,
        option("--ranks", "N,N,…", "(default 1,2,4)", type=whole_numbers, default=[1, 2, 4]),
    ]),
    "all": Command("", "loader, step, overhead, ranks and startup", _all, [
        _rounds(5), JSON, flag("--page", "write docs/benchmarks.md, .json and .svg too"),
    ]),
}  # fmt: skip
