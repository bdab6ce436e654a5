"""Contestants in processes of their own that take turns, so that other work on the machine falls on all of them alike.

A contestant is a function `module:name` that takes keyword arguments, warms up, and returns a round: a function that
works for a while and returns (seconds, count of what it did), or with them a third thing that it has to tell.
`run_contest` orders one round of each in turn. Between its rounds a process sleeps. Libraries, threads and settings of
one cannot touch another.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from harness.errors import HarnessError
from harness.launching.ports import free_port
from harness.network import GLOO_VARIABLE, interface_towards

LOOPBACK = "127.0.0.1"
MODULE = "harness.benchmarks.contestant"


@dataclass(frozen=True)
class Contestant:
    """What to run.

    Attributes:
        target: "module:function".
        arguments: of the function, JSON-able.
        environment: variables set for its process.
        needs: a package that has to be installed; without it the contestant is left out.
        ranks: processes that work together, as a launcher of ranks would start them; the first one answers.
        rounds: its own number of them, after which it takes no more turns; None is that of the contest.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
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

    def add(self, answer: Mapping[str, Any]) -> None:
        """A round, as the contestant's process answered it."""
        self.seconds.append(answer["seconds"])
        self.counts.append(answer["count"])
        self.payloads.extend(answer["payload"])

    def rates(self) -> list[float]:
        """Counts a second, of each round."""
        return [count / seconds for count, seconds in zip(self.counts, self.seconds, strict=True)]

    def per_second(self, unit: str) -> dict[str, float]:
        """Median, lowest and highest round, as `<unit>_per_second_median` and so on."""
        rates = self.rates()
        return {
            f"{unit}_per_second_median": statistics.median(rates),
            f"{unit}_per_second_min": min(rates),
            f"{unit}_per_second_max": max(rates),
        }


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
        taking_part = {name: process for name, process in processes.items() if process.is_ready()}
        times = {name: Times() for name in taking_part}
        for turn in range(max(own_rounds.values(), default=0)):
            for name, process in taking_part.items():
                if turn < own_rounds[name]:
                    times[name].add(process.round())
                    after_round(name, times[name])
    return {name: times.get(name) for name in contestants}


class _Process:
    """The process of a contestant, or its ranks: a line of JSON from the first for each line to all of them."""

    def __init__(self, name: str, contestant: Contestant, threads: int) -> None:
        self._name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **contestant.environment}
        what = {"target": contestant.target, "arguments": dict(contestant.arguments), "needs": contestant.needs}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", MODULE, json.dumps(what)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**environment, **of_rank},
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

    def is_ready(self) -> bool:
        """Waits until it has warmed up; false where its package is missing."""
        return bool(self._read()["ready"])

    def round(self) -> dict[str, Any]:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended; `_read` tells why
                process.stdin.write("\n")
                process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        first = self._processes[0]
        assert first.stdout is not None
        line = first.stdout.readline()
        if not line:
            self._errors.seek(0)
            message = (self._errors.read().strip() or "it said nothing").splitlines()
            start = max(number for number, line in enumerate(message) if not line.startswith(" "))  # then its hint
            raise HarnessError(f'the contestant "{self._name}" failed: ' + "\n".join(message[start:]), exit_code=1)
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
