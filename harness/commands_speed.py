"""The commands about speed: `bench` measures it, `scale` predicts it; in the manner of `harness.commands`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE

DEFAULT_RECIPE = Path("recipes", "debug.yaml")  # a training of seconds


_PEER_BENCHMARKS = {  # what it measures, and its usual number of rounds
    "step": ("a training step of the seed's network: PyTorch, Accelerate, Lightning, timm and ours", 5),
    "overhead": ("the same loops around a network so small that overhead remains", 9),
    "ranks": ("that network on two CPU ranks: raw DDP, Accelerate and ours", 9),
    "startup": ("seconds to --help and to the first step of a training", 5),
    "all": ("loader, step, overhead, ranks and startup", 5),
}


def build_bench(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    loader = actions.add_parser("loader", help="images a second of our loaders, torchvision's and stock FFCV's")
    loader.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, peers in turn (default 5)")
    loader.add_argument("--workers", type=int, default=None, metavar="N", help="threads or processes (all cores)")
    _add_json_option(loader)
    loader.set_defaults(run=_bench_loader)
    for name, (text, rounds) in _PEER_BENCHMARKS.items():
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "--rounds", type=int, default=rounds, metavar="N", help=f"rounds, peers in turn (default {rounds})"
        )
        _add_json_option(action)
        action.set_defaults(run=_bench_peers, name=name)
    accuracy = actions.add_parser(
        "accuracy", help="seconds of training to 80 … 94 %% on the real CIFAR-10: airbench94 and ours (about an hour)"
    )
    accuracy.add_argument(
        "--epochs", type=_count, metavar="N", help="of each at most, schedules shortened (default: each one's own)"
    )
    _add_json_option(accuracy)
    accuracy.set_defaults(run=_bench_accuracy)
    scaling = actions.add_parser(
        "scaling", help="training on several CPU ranks: speed, and what gradient exchange, buckets and SyncBN cost"
    )
    scaling.add_argument(
        "recipe", metavar="RECIPE", nargs="?", default=str(DEFAULT_RECIPE), help=f"a YAML file ({DEFAULT_RECIPE})"
    )
    _add_overrides(scaling)
    _add_ranks_option(scaling, "1,2,4")
    scaling.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, variants in turn (default 5)")
    _add_json_option(scaling)
    scaling.set_defaults(run=_bench_scaling)
    allreduce = actions.add_parser(
        "allreduce", help="gloo's all-reduce on this machine, fitted by an alpha-beta model and predicted"
    )
    _add_ranks_option(allreduce, "2,3,4")
    allreduce.add_argument("--rounds", type=int, default=25, metavar="N", help="rounds, sizes in turn (default 25)")
    _add_json_option(allreduce)
    allreduce.set_defaults(run=_bench_allreduce)


def _bench_loader(arguments: argparse.Namespace) -> int:
    from harness.benchmarks.report import bench_loader_here, render

    result = bench_loader_here(rounds=arguments.rounds, workers=arguments.workers)
    return _print(result, None if arguments.json else render(result))


def _bench_peers(arguments: argparse.Namespace) -> int:
    from harness.benchmarks import report

    if arguments.name == "all":
        results = report.bench_all(rounds=arguments.rounds)
        text = "\n\n".join(f"# {name}\n{report.render(result)}" for name, result in results.items())
        return _print(results, None if arguments.json else text)
    result = getattr(report, f"bench_{arguments.name}")(rounds=arguments.rounds)
    return _print(result, None if arguments.json else report.render(result))


def _bench_accuracy(arguments: argparse.Namespace) -> int:
    from harness.benchmarks.accuracy import bench_accuracy, render_accuracy

    result = bench_accuracy(epochs=arguments.epochs)
    return _print(result, None if arguments.json else render_accuracy(result))


def _bench_scaling(arguments: argparse.Namespace) -> int:
    from harness.benchmarks.scaling import bench_scaling, render_scaling

    result = bench_scaling(arguments.recipe, arguments.overrides, ranks=arguments.ranks, rounds=arguments.rounds)
    return _print(result, None if arguments.json else render_scaling(result))


def _bench_allreduce(arguments: argparse.Namespace) -> int:
    from harness.benchmarks.allreduce import bench_allreduce, render_allreduce

    result = bench_allreduce(ranks=arguments.ranks, rounds=arguments.rounds)
    return _print(result, None if arguments.json else render_allreduce(result))


def build_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    _add_overrides(parser)
    parser.add_argument(
        "--gpus", type=_counts, default=[1, 8, 64, 1024], metavar="N,N,…", help="how many (default 1,8,64,1024)"
    )
    parser.add_argument(
        "--network",
        default="infiniband-ndr",
        metavar="NAME|alpha_us=…,gbps=…",
        help="what connects them: infiniband-ndr (default), infiniband-hdr, ethernet-100g, ethernet-25g, nvlink4, "
        "loopback-gloo, or latency and bandwidth, with intra=NAME within nodes if wanted",
    )
    parser.add_argument("--gpus-per-node", type=_count, metavar="G", help="GPUs a node (default: the network's)")
    parser.add_argument("--step-ms", type=float, metavar="X", help="a step on one GPU (default: measured here)")
    _add_json_option(parser)
    parser.set_defaults(run=_scale)


def _scale(arguments: argparse.Namespace) -> int:
    from harness.recipe import load
    from harness.scaling.networks import parse_network

    network = parse_network(arguments.network, gpus_per_node=arguments.gpus_per_node)
    recipe = load(arguments.recipe, arguments.overrides)
    from harness.scaling.report import render_scale, scale

    result = scale(recipe, arguments.gpus, network, step_ms=arguments.step_ms)
    return _print(result, None if arguments.json else render_scale(result))


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="change a setting, e.g. model.name=resnet18"
    )


def _add_ranks_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--ranks", type=_counts, default=_counts(default), metavar="N,N,…", help=f"processes (default {default})"
    )


def _add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, not "{text}"')
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _print(result: dict[str, Any], text: str | None) -> int:
    print(json.dumps(result, indent=2) if text is None else text)
    return EXIT_DONE
