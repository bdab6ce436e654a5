"""`harness bench`: contestants in processes of their own take turns, so that other work on the machine hits all alike.

A contestant is a function `module:name` that takes keyword arguments, warms up, and returns a round: a function that
works for a while and returns (seconds, count of what it did), or with them a payload of its own. Between its rounds a
process sleeps. Libraries, threads and settings of one cannot touch another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from harness.distributed.heartbeat import GLOO_VARIABLE, interface_towards
from harness.errors import EXIT_FAILED, HarnessError
from harness.launch.rank_env import free_port
from harness.machine import cpu_name

PACKAGES = ("torch", "torchvision", "accelerate", "timm", "lightning", "ffcv", "numba", "numpy", "wandb")
PROCESS = "from harness.bench import serve_rounds; serve_rounds()"

Round = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Contestant:
    target: str  # "module:function"
    arguments: Mapping[str, Any] = field(default_factory=dict)  # JSON-able
    needs: str | None = None  # a package; where it is not installed, the contestant is left out
    ranks: int = 1  # processes that work together, as a launcher would start them; the first one answers
    rounds: int | None = None  # after which it takes no more turns; None is the contest's number


@dataclass(frozen=True)
class Times:
    """The seconds and the count of each round, and the payloads of those that have one."""

    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    payloads: list[Any] = field(default_factory=list)

    def per_second(self, unit: str) -> dict[str, float]:
        rates = [count / seconds for count, seconds in zip(self.counts, self.seconds, strict=True)]
        return spread(f"{unit}_per_second", rates) | {f"{unit}_per_round": self.counts[0]}


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest value, as `<name>_median` and so on."""
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def run_contest(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int,
    threads: int,
    after_round: Callable[[str, Times], None] = lambda name, times: None,
) -> dict[str, Times | None]:
    """The times of each contestant, None where its package is not installed; `threads` are those of each process.

    Raises:
        HarnessError: a contestant failed.
    """
    own_rounds = {name: each.rounds or rounds for name, each in contestants.items()}
    times = {n: Times() for n, each in contestants.items() if not each.needs or importlib.util.find_spec(each.needs)}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_Process(name, contestants[name], threads)) for name in times}
        for process in processes.values():
            process.answer()  # when it has warmed up
        for turn in range(max(own_rounds.values())):
            for name in [name for name in times if turn < own_rounds[name]]:
                seconds, count, *payload = processes[name].round()
                times[name].seconds.append(seconds)
                times[name].counts.append(count)
                times[name].payloads.extend(payload)
                after_round(name, times[name])
    return {name: times.get(name) for name in contestants}


class _Process:
    """The process of a contestant, or its ranks: for each line to all of them a line of JSON from each."""

    def __init__(self, name: str, contestant: Contestant, threads: int) -> None:
        self._name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-c", PROCESS, json.dumps([contestant.target, dict(contestant.arguments)])]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._ranks: list[Any] = [
            subprocess.Popen(command, **pipes, text=True, env={**os.environ, **variables})
            for variables in _environments(contestant.ranks, threads)
        ]

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            with suppress(OSError):
                rank.stdin.close()  # the end of its work
        for rank in self._ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.wait(timeout=30)
            rank.kill()
            rank.wait()
            rank.stdout.close()
        self._errors.close()

    def round(self) -> list[Any]:
        for rank in self._ranks:
            with suppress(OSError):  # it has ended; its last words say why
                print(file=rank.stdin, flush=True)
        return self.answer()

    def answer(self) -> list[Any]:
        lines = [rank.stdout.readline() for rank in self._ranks]
        if not all(lines):
            self._errors.seek(0)
            message = (self._errors.read().strip() or "it said nothing").splitlines()
            start = max(number for number, line in enumerate(message) if not line.startswith(" "))  # then its hint
            what = f'the contestant "{self._name}" failed: ' + "\n".join(message[start:])
            raise HarnessError(what, hint="Its own message says why; try it again alone.", exit_code=EXIT_FAILED)
        return list(json.loads(lines[0]))


def _environments(ranks: int, threads: int) -> list[dict[str, str]]:
    """What is set in the environment of each process; several ranks find what a launcher tells them."""
    shared = {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"}
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)  # a child finds what its parent has imported, from whatever folder
    if ranks == 1:
        return [shared]
    loopback = interface_towards("127.0.0.1", several_machines=False)
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {GLOO_VARIABLE: loopback} if loopback else {}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def serve_rounds() -> None:
    """The process of a contestant: prepare, then do a round for each line that comes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    target, arguments = json.loads(sys.argv[1])
    module, _, name = target.partition(":")
    one_round = getattr(importlib.import_module(module), name)(**arguments)
    print("[]", file=answers)
    for _ in sys.stdin:
        print(json.dumps(one_round()), file=answers)


def describe_machine() -> dict[str, Any]:
    """Processor, CPUs that this process may use, GPU where there is one, and versions of what is installed."""
    import torch

    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cpus": len(os.sched_getaffinity(0)), "gpu": gpu, "versions": versions}


def rates(times: Mapping[str, Times | None], ours: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A contest in images a second as a dict for JSON.

    "contestants" has the images_per_second of each as median, min and max over the rounds, None where it was left out;
    "ratios" those of the medians, ours over all others; "settings" and "machine" what they belong to.
    """
    results = {name: each and each.per_second("images") for name, each in times.items()}
    medians = {name: each["images_per_second_median"] for name, each in results.items() if each}
    pairs = [(a, b) for a in ours for b in medians if a in medians and b not in ours]
    ratios = {f"{a}_over_{b}": medians[a] / medians[b] for a, b in pairs}
    return {"contestants": results, "ratios": ratios, "settings": dict(settings), "machine": describe_machine()}


def table(result: Mapping[str, Any]) -> tuple[str, dict[str, list[float] | None]]:
    """The unit, and for each contestant its median, lowest and highest round; None for one that was left out."""
    contestants = result["contestants"]
    unit = next(key for each in contestants.values() for key in each or () if key.endswith("_median"))
    names = [unit.replace("_median", end) for end in ("_median", "_min", "_max")]
    return unit.removesuffix("_median"), {name: each and [each[n] for n in names] for name, each in contestants.items()}


def render(result: Mapping[str, Any]) -> str:
    """The result of a contest as lines: a table, the ratios, and all else that it says."""
    unit, rows = table(result)
    width = max(map(len, [unit, *rows])) + 2
    lines = [f"{unit:<{width}}{'median':>12}{'lowest':>12}{'highest':>12}"]
    for name, figures in rows.items():
        text = "".join(f"{_figure(x):>12}" for x in figures) if figures else f"{'not installed':>24}"
        lines.append(f"{name:<{width}}{text}")
    for key in [key for key in result if key != "contestants"]:
        lines.append(f"{key}:")
        lines += [f"  {name}: {_figure(v) if isinstance(v, float) else v}" for name, v in result[key].items()]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
