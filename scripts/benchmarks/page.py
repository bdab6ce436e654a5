"""All contests, and their results as docs/benchmarks.md: tables, ratios against the goals, and bars."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from harness.bench import render, table
from harness.bench.loader import bench_loader
from harness.errors import HarnessError
from harness.files import write_json, write_text
from scripts.benchmarks.overhead import bench_overhead, bench_ranks, bench_step
from scripts.benchmarks.startup import bench_startup

Results = dict[str, dict[str, Any]]
ALL: dict[str, Callable[[int], dict[str, Any]]] = {
    "loader": lambda rounds: bench_loader(rounds=rounds),
    "step": lambda rounds: bench_step(rounds=rounds),
    "overhead": lambda rounds: bench_overhead(rounds=2 * rounds - 1),  # its rounds are short
    "ranks": lambda rounds: bench_ranks(rounds=2 * rounds - 1),
    "startup": lambda rounds: bench_startup(rounds=rounds),
}
WHAT = {
    "loader": "Batches of augmented images, ready to train on: cropped (padding 4), flipped, normalised. The stock "
    "FFCV pipeline is that of its CIFAR-10 example, which cuts out as well.",
    "step": "A training step of the seed's network (dual branch, 380,646 parameters, dropout in each unit), batch 128.",
    "overhead": "The same loops around a network of a few thousand parameters, batch 8, one thread. Peers have torch's "
    "own layout, ours is channels_last: `harness_plain` runs the layers that `pytorch_channels_last` runs. Ratios are "
    "medians of the rounds' own ratios.",
    "ranks": "The same network on two ranks over gloo, a thread and a batch of 8 each. Ratios as above.",
    "startup": "Whole commands; the training is the seed's network on the digits, up to its first step, as the run "
    "itself reports it: without what Python waited for before our first line.",
}
HEAD = """# Benchmarks

Made by `harness bench all --page` on {date}: {cpu}, {cpus} cores, {threads} threads; {versions}.

Contestants take turns round by round in one run, so that other work on the machine falls on all alike; figures are \
medians over the rounds, with the lowest and highest next to them. Ratios are what to look at: another machine has \
other figures.

![Bars of the medians](benchmarks.svg)

| goal | found | wanted | met |
|---|---:|---:|---|"""
GOALS = {  # benchmark, ratio or contestant (then its median), goal: at least (>=) or at most (<=)
    "the loader over torchvision's DataLoader": ("loader", "harness_ffcv_over_torchvision", ">=", 30.0),
    "the loader over a stock FFCV pipeline": ("loader", "harness_ffcv_over_stock_ffcv", ">=", 5.0),
    "the training step over plain PyTorch in float32": ("step", "harness_bf16_over_pytorch_fp32", ">=", 8.0),
    "a step's time over a bare PyTorch loop's": ("overhead", "harness_over_pytorch", "<=", 1.05),
    "the same, layers and layout alike": ("overhead", "harness_plain_over_pytorch_channels_last", "<=", 1.05),
    "a step's time over raw DDP's on two ranks": ("ranks", "harness_over_pytorch_ddp", "<=", 1.05),
    "seconds to `harness --help`": ("startup", "help", "<=", 0.3),
    "seconds from `harness train` to the first step": ("startup", "train_to_first_step", "<=", 10.0),
}


def bench_all(*, rounds: int) -> Results:
    """The benchmarks against peers one after another, each under its name."""
    return {name: bench(rounds) for name, bench in ALL.items()}


def render_all(results: Results) -> str:
    return "\n\n".join(f"# {name}\n{render(result)}" for name, result in results.items())


def write(results: Results, folder: Path) -> None:
    """Write benchmarks.md, .json and .svg.

    Raises:
        HarnessError: matplotlib is not installed.
    """
    date = datetime.date.today().isoformat()
    _draw(results, folder / "benchmarks.svg")
    write_json(folder / "benchmarks.json", {"date": date, "results": results})
    write_text(folder / "benchmarks.md", page(results, date=date))


def page(results: Results, *, date: str) -> str:
    """The page as Markdown."""
    machine, threads = results["step"]["machine"], results["step"]["settings"]["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [HEAD.format(**machine | {"date": date, "threads": threads, "versions": versions})]
    lines += [_verdict(results, goal, *how) for goal, how in GOALS.items()]
    lines += ["", "## Where we lose", "", *(_losses(results) or ["Nowhere in this run."])]
    for name, result in results.items():
        lines += ["", f"## {name.capitalize()}", "", WHAT[name], "", "```", render(result), "```"]
    return "\n".join(lines) + "\n"


def _verdict(results: Results, goal: str, name: str, what: str, sign: str, bound: float) -> str:
    medians = {key: figures and figures[0] for key, figures in table(results[name])[1].items()}
    value = (medians | results[name].get("ratios", {})).get(what)
    met = value is not None and (value >= bound if sign == ">=" else value <= bound)
    found = "not measured" if value is None else f"{value:.2f}"
    return f"| {goal} | {found} | {sign} {bound:g} | {'yes' if met else '**no**'} |"


def _losses(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each peer whose median is better than that of a contestant of ours."""
    lines = []
    for name, result in results.items():
        unit, rows = table(result)
        medians = {label: figures[0] for label, figures in rows.items() if figures is not None}
        for one, other in permutations(medians, 2):
            slower = medians[one] / medians[other]
            slower = 1 / slower if unit.endswith("_per_second") else slower
            if slower > 1 and one.startswith("harness") and not other.startswith("harness"):
                lines.append(f"- {name}: `{one}` takes {slower:.2f} times as long as `{other}` (medians).")
    return lines


def _draw(results: Results, path: Path) -> None:
    """Bars of the medians, a panel for each benchmark, as SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HarnessError("the picture needs matplotlib", hint="pip install '.[bench]'") from None
    figure = Figure(figsize=(9, 2.6 * len(results)), layout="constrained")
    for axes, (title, result) in zip(figure.subplots(len(results)), results.items(), strict=True):
        unit, rows = table(result)
        measured = {label: figures for label, figures in rows.items() if figures is not None}
        spread = [[f[0] - f[1] for f in measured.values()], [f[2] - f[0] for f in measured.values()]]
        colours = ["#c2571a" if name.startswith(("harness", "train", "help")) else "#8a9bb0" for name in measured]
        axes.barh(list(measured), [figures[0] for figures in measured.values()], xerr=spread, color=colours)
        axes.invert_yaxis()
        axes.set_title(f"{title}: {unit.replace('_', ' ')}", loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
