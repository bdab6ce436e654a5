"""Where the time of a step goes: some steps by the clock, then some with every operation, and on with the training.

Tracing operations slows a step down, so the seconds of its phases come from steps before, which are only timed: by the
host's clock on a CPU, by the device's on a GPU, where nothing waits for it. Random numbers and order are left alone: a
profiled training ends bit-equal to one that is not.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from harness.errors import HarnessError
from harness.files import write_json, write_text

PHASES = ("loader_wait", "forward", "backward", "optimizer")  # what remains of a step is "other"
WAIT_STEPS, TIMED_STEPS, TRACE_WARMUP_STEPS, TRACED_STEPS = 5, 10, 2, 10
MIN_STEPS = 4  # one to wait, one to time, one to warm the tracer up, one to trace
TABLE_ROWS = 60
LOADER_WAIT_TO_ACT_ON = 0.1
_NOTHING = nullcontext()


class NullProfiler:
    """Looks at nothing and costs nothing."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Around optimizer step number `step` (0 is the first)."""
        return _NOTHING

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Around a part of a step: one of `PHASES`."""
        return _NOTHING

    def close(self) -> list[str]:
        """The end of the training, good or bad. What there is to say, in lines."""
        return self._lines


class Plan(NamedTuple):
    """Which optimizer steps (0 is the first) are timed, and which are traced after a warm-up of the tracer."""

    timed: range
    warmup: range
    traced: range


def plan_steps(first_step: int, total_steps: int, steps_per_epoch: int) -> Plan | None:
    """The steps to profile of a training that begins at `first_step`; None where there are too few.

    Short trainings have shorter stretches. The traced one lies within an epoch where any epoch is long enough, so that
    no evaluation is traced.
    """
    lengths = (WAIT_STEPS, TIMED_STEPS, TRACE_WARMUP_STEPS, TRACED_STEPS)
    share = min(1.0, (total_steps - first_step) / sum(lengths))
    wait, timed, warmup, traced = (max(1, int(share * length)) for length in lengths)
    begin, end = first_step + wait, first_step + wait + timed
    if end + warmup + traced > total_steps:
        return None
    next_epoch = -(-end // steps_per_epoch) * steps_per_epoch
    for count in range(traced, 0, -1):
        for start in (end, next_epoch):
            last = start + warmup + count
            if last <= total_steps and start % steps_per_epoch + warmup + count <= steps_per_epoch:
                return Plan(range(begin, end), range(start, start + warmup), range(start + warmup, last))
    return Plan(range(begin, end), range(end, end + warmup), range(end + warmup, end + warmup + traced))


class StepProfiler(NullProfiler):
    """Profiles the steps of a plan, writes `directory`, and then does nothing any more; `facts` go into its summary."""

    def __init__(self, plan: Plan, directory: Path, *, device: torch.device, facts: dict[str, Any]) -> None:
        super().__init__("profile: the training ended before the steps to profile")
        self._plan, self._directory, self._device, self._facts = plan, directory, device, facts
        self._on_gpu = device.type == "cuda"
        self._timing = False
        self._times: list[tuple[str, Any, Any]] = []
        self._trace: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        if step == self._plan.warmup.start:
            self._begin_trace()
        self._timing = step in self._plan.timed
        with self._timed("total") if self._timing else _NOTHING:
            yield
        self._timing = False
        if self._trace is not None:
            self._trace.step()
            if step + 1 == self._plan.traced.stop:
                self._report(self._trace)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        assert name in PHASES
        if self._timing:
            return self._timed(name)
        return _NOTHING if self._trace is None else record_function(name)

    def close(self) -> list[str]:
        if self._trace is not None:  # broken off in the middle: the tracer must not run on
            self._trace.stop()
            self._trace = None
        return self._lines

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = self._now()
        yield
        self._times.append((name, began, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)  # in the stream of work: nothing waits for it
        mark.record()
        return mark

    def _begin_trace(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        stretch = schedule(wait=0, warmup=len(self._plan.warmup), active=len(self._plan.traced), repeat=1)
        self._trace = profile(activities=activities, schedule=stretch, record_shapes=True, acc_events=True)
        # The tracer tells stderr of its own starts and of GPUs that are not there, unless this variable forbids it.
        quiet = "KINETO_LOG_LEVEL" not in os.environ
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        try:
            self._trace.start()
        finally:
            if quiet:
                del os.environ["KINETO_LOG_LEVEL"]

    def _report(self, trace: profile) -> None:
        """Write the files; a disk that has no room for them is no reason to end a training."""
        trace.stop()
        self._trace = None
        summary = self._summary()
        order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        try:
            self._directory.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(self._directory / "trace_rank_0.json.gz"))
            table = trace.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
            write_text(self._directory / "operations.txt", f"{table}\n")
            write_json(self._directory / "summary.json", summary)
        except (HarnessError, OSError) as error:
            self._lines = [f"profile: cannot be written: {error}"]
        else:
            self._lines = [*render(summary), f"  {self._directory}"]

    def _summary(self) -> dict[str, Any]:
        """Seconds per step are means of "total" and, adding up to it, each phase and "other"."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(("total", *PHASES), 0.0)
        for name, began, ended in self._times:  # with accumulation a step has a phase several times
            taken = began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began
            seconds[name] += taken / len(self._plan.timed)
        seconds["other"] = seconds["total"] - sum(seconds[name] for name in PHASES)
        return {
            **self._facts,
            "device": self._device.type,
            "timed_steps": [self._plan.timed.start + 1, self._plan.timed.stop],
            "traced_steps": [self._plan.traced.start + 1, self._plan.traced.stop],
            "seconds_per_step": seconds,
            "loader_wait_share": seconds["loader_wait"] / seconds["total"],
            "peak_memory_mib": {
                "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts KiB
                "device": torch.cuda.max_memory_allocated() / 2**20 if self._on_gpu else None,
            },
        }


def render(summary: dict[str, Any]) -> list[str]:
    """The summary as a short table."""
    (first, last), seconds, memory = summary["timed_steps"], summary["seconds_per_step"], summary["peak_memory_mib"]
    rank = f"rank {summary['rank']} of {summary['world_size']}, {summary['device']}"
    lines = [f"profile of steps {first} to {last} ({rank})"]
    for name, each in seconds.items():
        lines.append(f"  {name.replace('_', ' '):<12}{1000 * each:>10.2f} ms/step{each / seconds['total']:>8.1%}")
    on_gpu = "" if memory["device"] is None else f", of the GPU {memory['device']:,.0f} MiB"
    lines.append(f"  peak memory {memory['host']:,.0f} MiB{on_gpu}")
    if summary["loader_wait_share"] > LOADER_WAIT_TO_ACT_ON:
        lines.append("  HINT: the step waits for the loader; try more data.workers, or data.loader=ffcv or device")
    return lines
