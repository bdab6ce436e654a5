"""What a profile leaves behind: a trace for a viewer, a table of operations, a summary, lines for people."""

from __future__ import annotations

import gzip
import resource
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from harness.files import replacing, write_json, write_text

PHASES = ("loader_wait", "forward", "backward", "optimizer")  # what remains of a step is "other"
TRACE_FILE, OPERATIONS_FILE, SUMMARY_FILE = "trace_rank_0.json.gz", "operations.txt", "summary.json"
TOP_OPERATIONS = 15
TABLE_ROWS = 60
LOADER_WAIT_TO_ACT_ON = 0.1
_LINES_OF_OPERATIONS = 5
_STEP_PREFIX = "ProfilerStep"  # torch's mark around a traced step


@dataclass(frozen=True)
class Timing:
    """Seconds of whole steps, and of each phase in them; with accumulation a step has a phase several times."""

    steps: Sequence[float]
    phases: Sequence[tuple[str, float]]

    def seconds_per_step(self) -> dict[str, float]:
        """Mean seconds of "total", each phase and "other", which add up to it."""
        count, total = len(self.steps), sum(self.steps)
        sums = {name: sum(seconds for each, seconds in self.phases if each == name) for name in PHASES}
        sums["other"] = total - sum(sums.values())
        return {name: seconds / count for name, seconds in {"total": total, **sums}.items()}


def write_report(
    directory: Path, trace: profile, timing: Timing, *, device: torch.device, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the three files and return the summary.

    Args:
        trace: a tracer that has been stopped.
        facts: more entries of the summary.

    Raises:
        HarnessError, OSError: they cannot be written.
    """
    directory.mkdir(exist_ok=True)
    _write_trace(directory / TRACE_FILE, trace)
    averages, on_gpu = trace.key_averages(), device.type == "cuda"
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    write_text(directory / OPERATIONS_FILE, averages.table(sort_by=order, row_limit=TABLE_ROWS) + "\n")
    seconds_per_step = timing.seconds_per_step()
    traced_first, traced_last = facts["traced_steps"]
    summary = {
        **facts,
        "seconds_per_step": seconds_per_step,
        "slowest_step_seconds": max(timing.steps),
        "loader_wait_share": seconds_per_step["loader_wait"] / seconds_per_step["total"],
        "peak_memory_mib": {
            "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts KiB
            "device": torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None,
        },
        "top_operations": top_operations(averages, on_gpu=on_gpu, steps=traced_last - traced_first + 1),
    }
    write_json(directory / SUMMARY_FILE, summary)
    return summary


def top_operations(averages: Sequence[Any], *, on_gpu: bool, steps: int) -> list[dict[str, Any]]:
    """The operations with the most time of their own, on the GPU where there is one, without what they call.

    Args:
        averages: of `torch.profiler.profile.key_averages`.
        on_gpu: take the time of the kernels that an operation has started.
        steps: that were traced.

    Returns:
        name, calls_per_step, self_seconds_per_step and self_share (of all operations' time, 0 to 1) of each.
    """
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    microseconds = {
        each: getattr(each, time_of)
        for each in averages
        if each.device_type == DeviceType.CPU and each.key not in PHASES and not each.key.startswith(_STEP_PREFIX)
    }
    whole = max(sum(microseconds.values()), 1e-9)
    longest = sorted(microseconds, key=lambda each: -microseconds[each])[:TOP_OPERATIONS]
    return [
        {
            "name": each.key,
            "calls_per_step": each.count / steps,
            "self_seconds_per_step": microseconds[each] / 1e6 / steps,
            "self_share": microseconds[each] / whole,
        }
        for each in longest
    ]


def _write_trace(path: Path, trace: profile) -> None:
    with tempfile.TemporaryDirectory(prefix="harness-profile-") as folder:
        plain = Path(folder, "trace.json")
        trace.export_chrome_trace(str(plain))
        with plain.open("rb") as text, replacing(path) as file, gzip.GzipFile("", "wb", fileobj=file) as packed:
            shutil.copyfileobj(text, packed)


def render(summary: dict[str, Any]) -> list[str]:
    """The summary as a short table."""
    seconds = summary["seconds_per_step"]
    first, last = summary["timed_steps"]
    lines = [
        f"profile of steps {first} to {last} (rank {summary['rank']} of {summary['world_size']}, {summary['device']})"
    ]
    for name in ("total", *PHASES, "other"):
        share = seconds[name] / seconds["total"]
        lines.append(f"  {name.replace('_', ' '):<12}{1000 * seconds[name]:>10.2f} ms/step{share:>8.1%}")
    memory = summary["peak_memory_mib"]
    lines.append(
        f"  peak memory {memory['host']:,.0f} MiB"
        + (f", of the GPU {memory['device']:,.0f} MiB" if memory["device"] is not None else "")
    )
    for each in summary["top_operations"][:_LINES_OF_OPERATIONS]:
        lines.append(
            f"  {each['name'][:40]:<40}{1000 * each['self_seconds_per_step']:>10.2f} ms/step{each['self_share']:>8.1%}"
        )
    if summary["loader_wait_share"] > LOADER_WAIT_TO_ACT_ON:
        lines.append("  HINT: the step waits for the loader; try more data.workers, or data.loader=ffcv or device")
    return lines
