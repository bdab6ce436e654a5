"""Where the time of a step goes: some steps by the clock, then some with every operation, and on with the training.

Tracing operations slows a step down, so the seconds of its phases come from steps before, which are only timed: by the
host's clock on a CPU, by the device's on a GPU, where nothing waits for it. Random numbers and order are left alone: a
profiled training ends bit-equal to one that is not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from harness.errors import HarnessError
from harness.training.profile_report import PHASES, Timing, render, write_report

WAIT_STEPS, TIMED_STEPS, TRACE_WARMUP_STEPS, TRACED_STEPS = 5, 10, 2, 10
MIN_STEPS = 4  # one to wait, one to time, one to warm the tracer up, one to trace

Phase = Callable[[str], AbstractContextManager[Any]]
_NOTHING = nullcontext()


class Profiler(Protocol):
    """What the loop and the step tell of what they do."""

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Around optimizer step number `step` (0 is the first)."""

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Around a part of a step: one of `PHASES`."""

    def close(self) -> list[str]:
        """The end of the training, good or bad. What there is to say, in lines."""


class NullProfiler:
    """Looks at nothing and costs nothing."""

    def step(self, step: int) -> AbstractContextManager[Any]:
        return _NOTHING

    def phase(self, name: str) -> AbstractContextManager[Any]:
        return _NOTHING

    def close(self) -> list[str]:
        return []


UNPROFILED = NullProfiler()


class TooFewSteps(NullProfiler):
    """Stands for a profile that was asked of a training too short for one, and says so."""

    def close(self) -> list[str]:
        return [f"profile: none, it takes at least {MIN_STEPS} steps"]


@dataclass(frozen=True)
class Plan:
    """Which optimizer steps (0 is the first) are timed, and which are traced after a warm-up of the tracer."""

    timed: range
    warmup: range
    traced: range


def plan_steps(first_step: int, total_steps: int, steps_per_epoch: int) -> Plan | None:
    """The steps to profile of a training that begins at `first_step`; None where there are too few.

    Short trainings have shorter stretches. The traced one lies within an epoch where any epoch is long enough, so that
    no evaluation is traced.
    """
    share = min(1.0, (total_steps - first_step) / (WAIT_STEPS + TIMED_STEPS + TRACE_WARMUP_STEPS + TRACED_STEPS))
    lengths = (WAIT_STEPS, TIMED_STEPS, TRACE_WARMUP_STEPS, TRACED_STEPS)
    wait, timed, warmup, traced = (max(1, int(share * length)) for length in lengths)
    begin = first_step + wait
    end = begin + timed
    if end + warmup + traced > total_steps:
        return None
    next_epoch = -(-end // steps_per_epoch) * steps_per_epoch
    for count in range(traced, 0, -1):
        for start in (end, next_epoch):
            last = start + warmup + count
            if last <= total_steps and start % steps_per_epoch + warmup + count <= steps_per_epoch:
                return Plan(range(begin, end), range(start, start + warmup), range(start + warmup, last))
    return Plan(range(begin, end), range(end, end + warmup), range(end + warmup, end + warmup + traced))


class StepProfiler:
    """Profiles the steps of a plan, then writes `directory` and does nothing any more.

    Args:
        plan: the steps.
        directory: is made; files there are replaced.
        device: of this rank; its clock is used.
        facts: more entries for summary.json.
    """

    def __init__(self, plan: Plan, directory: Path, *, device: torch.device, facts: dict[str, Any]) -> None:
        self._plan, self._directory, self._device, self._facts = plan, directory, device, facts
        self._clock: _HostClock | _DeviceClock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
        self._timing = False
        self._steps: list[tuple[Any, Any]] = []
        self._phases: list[tuple[str, Any, Any]] = []
        self._trace: profile | None = None
        self._lines: list[str] = ["profile: the training ended before the steps to profile"]

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """See `Profiler.step`."""
        if step == self._plan.warmup.start:
            self._begin_trace()
        self._timing = step in self._plan.timed
        began = self._clock.now() if self._timing else None
        yield
        if self._timing:
            self._steps.append((began, self._clock.now()))
        elif self._trace is not None:
            self._trace.step()
            if step + 1 == self._plan.traced.stop:
                self._report()
        self._timing = False

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """See `Profiler.phase`."""
        assert name in PHASES
        if self._timing:
            return self._timed(name)
        return _NOTHING if self._trace is None else record_function(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = self._clock.now()
        yield
        self._phases.append((name, began, self._clock.now()))

    def _begin_trace(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        stretch = schedule(wait=0, warmup=len(self._plan.warmup), active=len(self._plan.traced), repeat=1)
        self._trace = profile(activities=activities, schedule=stretch, record_shapes=True, acc_events=True)
        with _quiet_kineto():
            self._trace.start()

    def _report(self) -> None:
        """Write the files; a disk that has no room for them is no reason to end a training."""
        trace, self._trace = self._trace, None
        assert trace is not None
        trace.stop()
        timing = Timing(
            steps=[self._clock.seconds(began, ended) for began, ended in self._steps],
            phases=[(name, self._clock.seconds(began, ended)) for name, began, ended in self._phases],
        )
        facts = {
            **self._facts,
            "device": self._device.type,
            "timed_steps": [self._plan.timed.start + 1, self._plan.timed.stop],
            "traced_steps": [self._plan.traced.start + 1, self._plan.traced.stop],
        }
        try:
            summary = write_report(self._directory, trace, timing, device=self._device, facts=facts)
        except (HarnessError, OSError) as error:
            self._lines = [f"profile: cannot be written: {error}"]
        else:
            self._lines = [*render(summary), f"  {self._directory}"]

    def close(self) -> list[str]:
        """See `Profiler.close`."""
        trace, self._trace = self._trace, None
        if trace is not None:  # broken off in the middle: the tracer must not go on
            trace.stop()
        return self._lines


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """torch's tracer tells stderr of its own starts and of GPUs that are not there, unless a variable forbids it."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]


class _HostClock:
    """Seconds as the host sees them, which on a CPU is when things are done."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, began: float, ended: float) -> float:
        return ended - began


class _DeviceClock:
    """Seconds as the GPU sees them, without waiting for it: marks in its stream of work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def seconds(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
