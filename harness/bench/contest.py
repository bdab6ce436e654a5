"""Contestants in processes of their own that take turns, so that other work on the machine falls on all of them alike.

A contestant is a function `module:name` that takes keyword arguments, warms up, and returns a round: a function that
works for a while and returns (seconds, count of what it did), or with them a third thing that it has to tell.
`run_contest` orders one round of each in turn. Between its rounds a process sleeps. Libraries, threads and settings of
one cannot touch another.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from harness.distributed.heartbeat import GLOO_VARIABLE, interface_towards
from harness.errors import EXIT_FAILED, HarnessError
from harness.launching.ports import free_port
from harness.machine import cpu_name

LOOPBACK = "127.0.0.1"
MODULE = "harness.bench.contest"

Round = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Contestant:
    """What to run.

    Attributes:
        target: "module:function".
        arguments: of the function, JSON-able.
        needs: a package that has to be installed; without it the contestant is left out.
        ranks: processes that work together, as a launcher of ranks would start them; the first one answers.
        rounds: its own number of them, after which it takes no more turns; None is that of the contest.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    ranks: int = 1
    rounds: int | None = None


@dataclass(frozen=True)
class Times:
    """What a contestant did: for each round its seconds and its count.

    Attributes:
        payloads: what each round told besides, JSON-able; empty where rounds tell nothing.
    """

    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    payloads: list[Any] = field(default_factory=list)

    def per_second(self, unit: str) -> dict[str, float]:
        """Median, lowest and highest round, as `<unit>_per_second_median` and so on."""
        return spread(f"{unit}_per_second", [n / s for n, s in zip(self.counts, self.seconds, strict=True)])


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest value, as `<name>_median` and so on."""
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def ratios(results: Mapping[str, Mapping[str, float] | None], ours: Sequence[str]) -> dict[str, float]:
    """Medians of ours over those of all others, as far as they were measured, by `<one>_over_<other>`."""
    medians = {name: each[next(iter(each))] for name, each in results.items() if each}
    return {f"{a}_over_{b}": medians[a] / medians[b] for a in ours for b in medians if a in medians and b not in ours}


def run_contest(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int,
    threads: int,
    after_round: Callable[[str, Times], None] = lambda name, times: None,
) -> dict[str, Times | None]:
    """Run `rounds` rounds of each contestant, or its own number of them, in turn.

    Args:
        contestants: by name, in the order of their turns.
        rounds: at least 1.
        threads: of arithmetic in each process.
        after_round: called after each round with the contestant's name and what it has done so far.

    Returns:
        For each name its times, or None where its package is not installed.

    Raises:
        HarnessError: `rounds` or `threads` below 1, or a contestant that fails.
    """
    if min(rounds, threads) < 1:
        raise HarnessError(
            f"rounds and threads must be at least 1, they are {rounds} and {threads}", hint="Use --rounds 1 or more."
        )
    own_rounds = {name: rounds if each.rounds is None else each.rounds for name, each in contestants.items()}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_Process(name, each, threads)) for name, each in contestants.items()}
        taking_part = {name: process for name, process in processes.items() if process.read()["ready"]}
        times = {name: Times() for name in taking_part}
        for turn in range(max(own_rounds.values(), default=0)):
            for name, process in taking_part.items():
                if turn < own_rounds[name]:
                    answer = process.round()
                    times[name].seconds.append(answer["seconds"])
                    times[name].counts.append(answer["count"])
                    times[name].payloads.extend(answer["payload"])
                    after_round(name, times[name])
    return {name: times.get(name) for name in contestants}


class _Process:
    """The process of a contestant, or its ranks: a line of JSON from the first for each line to all of them."""

    def __init__(self, name: str, contestant: Contestant, threads: int) -> None:
        self._name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        # A child finds what its parent has imported, from whatever folder.
        shared = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path), "WANDB_MODE": "disabled"}
        what = {"target": contestant.target, "arguments": dict(contestant.arguments), "needs": contestant.needs}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", MODULE, json.dumps(what)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **shared, **of_rank},
            )
            for rank, of_rank in enumerate(_environments(contestant.ranks))
        ]

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # the end of its work
        for process in self._processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._errors.close()

    def round(self) -> dict[str, Any]:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended; `read` tells why
                process.stdin.write("\n")
                process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer; the first one comes when it has warmed up."""
        first = self._processes[0]
        assert first.stdout is not None
        line = first.stdout.readline()
        if not line:
            self._errors.seek(0)
            message = (self._errors.read().strip() or "it said nothing").splitlines()
            start = max(number for number, line in enumerate(message) if not line.startswith(" "))  # then its hint
            reason = "\n".join(message[start:])
            what = f'the contestant "{self._name}" failed: {reason}'
            raise HarnessError(what, hint="Its own message says why; try it again alone.", exit_code=EXIT_FAILED)
        answer: dict[str, Any] = json.loads(line)
        return answer


def _environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each of several ranks on this machine; nothing to one alone."""
    if ranks == 1:
        return [{}]
    loopback = interface_towards(LOOPBACK, several_machines=False)
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": LOOPBACK}
    shared |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    shared |= {} if loopback is None else {GLOO_VARIABLE: loopback}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, CPUs that this process may use, GPU where there is one, and versions (None: not installed)."""
    import torch

    versions: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cpus": len(os.sched_getaffinity(0)), "gpu": gpu, "versions": versions}


def render(result: Mapping[str, Any]) -> str:
    """The result of a contest as lines: a table, the ratios, and all else that it says."""
    unit, rows = table(result)
    width = max(len(name) for name in [unit, *rows]) + 2
    lines = [f"{unit:<{width}}{'median':>12}{'lowest':>12}{'highest':>12}"]
    for name, figures in rows.items():
        text = f"{'not installed':>24}" if figures is None else "".join(f"{_figure(x):>12}" for x in figures)
        lines.append(f"{name:<{width}}{text}")
    for key, value in result.items():
        if key != "contestants":
            lines.append(f"{key}:")
            lines += [f"  {name}: {_figure(v) if isinstance(v, float) else v}" for name, v in value.items()]
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> tuple[str, dict[str, list[float] | None]]:
    """The unit, and for each contestant its median, lowest and highest round; None for one that is not installed."""
    found = next(each for each in result["contestants"].values() if each is not None)
    unit = next(key for key in found if key.endswith("_median")).removesuffix("_median")
    return unit, {
        name: None if each is None else [each[f"{unit}_{x}"] for x in ("median", "min", "max")]
        for name, each in result["contestants"].items()
    }


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main(what: Mapping[str, Any]) -> None:
    """The process of a contestant: prepare, then do a round for each line that comes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    if what["needs"] is not None and importlib.util.find_spec(what["needs"]) is None:
        answer(ready=False)
        return
    warnings.simplefilter("ignore")
    module, _, name = what["target"].partition(":")
    one_round = getattr(importlib.import_module(module), name)(**what["arguments"])
    answer(ready=True)
    for _ in sys.stdin:
        seconds, count, *payload = one_round()
        answer(seconds=seconds, count=count, payload=payload)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
