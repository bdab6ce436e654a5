"""The commands about speed: `bench` measures it, `scale` predicts it; in the manner of `harness.commands`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE, HarnessError

PEERS = {  # beside the project's peers: scripts/benchmarks, which is not installed
    "overhead": "the loops of PyTorch, Accelerate, Lightning, timm and ours around a network so small that they remain",
    "ranks": "that network on two CPU ranks: raw DDP, Accelerate and ours",
    "startup": "seconds to --help and to the first step of a training",
    "first-batch": "seconds until a loader's first batch is there, in a first process and in later ones",
    "accuracy": "seconds of training to 80 … 94 %% on the real CIFAR-10: airbench94 and ours (about an hour)",
    "scaling": "training on several CPU ranks: speed, and what gradient exchange, buckets and SyncBN cost",
    "all": "loader, step, overhead, ranks and startup",
}
MOST, MOST_STEP_MS = 1_000_000, 86_400_000.0  # a day
ROOT = Path(__file__).resolve().parents[1]


def build_bench(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    loader = actions.add_parser("loader", help="images a second of our loaders, torchvision's and stock FFCV's")
    loader.add_argument("--workers", type=int, default=None, metavar="N", help="threads or processes (all cores)")
    step = actions.add_parser(
        "step", help="a training step of the seed's network in each precision, PyTorch's and ours"
    )
    step.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images a step (default 128)")
    for action in (loader, step):
        action.add_argument("--rounds", type=positive, default=5, metavar="N", help="rounds, peers in turn (default 5)")
        add_json_option(action)
    loader.set_defaults(run=_bench_loader)
    step.set_defaults(run=_bench_step)
    for name, text in PEERS.items():  # their options are theirs: no word looks like one of ours
        action = actions.add_parser(name, help=text, add_help=False, prefix_chars="\0")
        action.add_argument("words", nargs="*")
        action.set_defaults(run=_bench_peers)


def _bench_loader(arguments: argparse.Namespace) -> int:
    from harness.bench.contest import render
    from harness.bench.loader import bench_loader

    result = bench_loader(rounds=arguments.rounds, workers=arguments.workers)
    return _print(result, None if arguments.json else render(result))


def _bench_step(arguments: argparse.Namespace) -> int:
    from harness.bench.contest import render
    from harness.bench.step import bench_step

    result = bench_step(rounds=arguments.rounds, batch_size=arguments.batch_size)
    return _print(result, None if arguments.json else render(result))


def _bench_peers(arguments: argparse.Namespace) -> int:
    if not (ROOT / "scripts" / "benchmarks").is_dir():
        raise HarnessError(
            f'"harness bench {arguments.action}" compares the project with its peers and is not installed',
            hint="Run it in a checkout of the project; `harness bench loader` and `step` work everywhere.",
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from scripts.benchmarks.__main__ import main

    return main([arguments.action, *arguments.words])


def build_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    add_overrides(parser)
    parser.add_argument(
        "--gpus", type=counts, default=[1, 8, 64, 1024], metavar="N,N,…", help="how many (default 1,8,64,1024)"
    )
    parser.add_argument(
        "--network",
        default="infiniband-ndr",
        metavar="NAME|alpha_us=…,gbps=…",
        help="what connects them: infiniband-ndr (default), infiniband-hdr, ethernet-100g, ethernet-25g, nvlink4, "
        "loopback-gloo, or latency and bandwidth, with intra=NAME within nodes if wanted",
    )
    parser.add_argument("--gpus-per-node", type=positive, metavar="G", help="GPUs a node (default: the network's)")
    parser.add_argument("--step-ms", type=_milliseconds, metavar="X", help="a step on one GPU (default: measured here)")
    add_json_option(parser)
    parser.set_defaults(run=_scale)


def _scale(arguments: argparse.Namespace) -> int:
    from harness.recipe import load
    from harness.scaling import parse_network, scale

    network = parse_network(arguments.network, gpus_per_node=arguments.gpus_per_node)
    recipe = load(arguments.recipe, arguments.overrides)
    result = scale(recipe, arguments.gpus, network, step_ms=arguments.step_ms)
    return _print(result, None if arguments.json else _scale_table(result))


_SCALE_COLUMNS = {
    "gpus": ("GPUs", 6, ",d"),
    "images_per_gpu": ("images/GPU", 12, ",d"),
    "step_ms": ("step ms", 11, ",.2f"),
    "compute_ms": ("compute ms", 12, ",.2f"),
    "sync_batch_norm_ms": ("SyncBN ms", 11, ",.2f"),
    "exchange_ms": ("exchange ms", 13, ",.2f"),
    "exchange_total_ms": ("(with hidden)", 15, ",.2f"),
    "images_per_second": ("images/s", 13, ",.0f"),
    "efficiency": ("efficiency", 12, ".1%"),
}


def _scale_table(result: dict[str, Any]) -> str:
    recipe = result["recipe"]
    lines = [
        f"{recipe['name']}: {recipe['model']}, {recipe['gradient_bytes'] / 1e6:.2f} MB of gradients, "
        f"{recipe['sync_batch_norm_messages_per_step']} SyncBatchNorm messages a step"
    ]
    if result["compute"]["measured_on"] == "cpu":
        lines.append(
            "The step was measured on a CPU and is no GPU's: each of the GPUs below is as slow as this CPU. "
            "--step-ms X takes the milliseconds of a step on one GPU."
        )
    for mode, share in {"strong": "over all GPUs", "weak": "on each GPU"}.items():
        lines += ["", f"{mode} scaling: {recipe['global_batch_size']} images a step {share}"]
        lines.append("".join(f"{title:>{width}}" for title, width, _ in _SCALE_COLUMNS.values()))
        for row in result[mode]:
            if "impossible" in row:
                lines.append(f"{row['gpus']:>6,d}  – {row['impossible']}")
            else:
                lines.append(
                    "".join(f"{format(row[name], form):>{w}}" for name, (_, w, form) in _SCALE_COLUMNS.items())
                )
    return "\n".join([*lines, "", "Assumptions", *(f"- {text}" for text in result["assumptions"])])


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="change a setting, e.g. model.name=resnet18"
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 to {MOST:,}, not "{text}"')
    return int(text)


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_STEP_MS:  # NaN is refused, too
        raise argparse.ArgumentTypeError(f'must be more than 0 and at most {MOST_STEP_MS:,.0f} ms, not "{text}"')
    return value


def counts(text: str) -> list[int]:
    return [positive(part.strip()) for part in text.split(",")]


def _print(result: dict[str, Any], text: str | None) -> int:
    print(json.dumps(result, indent=2) if text is None else text)
    return EXIT_DONE
