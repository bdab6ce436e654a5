"""What survival means: after the fault and a restart by the same command, nothing shows that there was a fault.

The final weights, averaged weights and optimizer state are equal to the undisturbed run's byte for byte; metrics.jsonl
has each record once, with equal values; the undisturbed run itself, a neighbour on the same disk, was not touched.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.fault import Outcome
from tests.faults.runs import TIMING, Process, Stage

CLOCKS = {*TIMING, "train_seconds", "epoch_seconds", "epoch_loader_wait_seconds"}
Record = dict[str, Any]


def records(run: Path) -> list[Record]:
    """The whole lines of metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def reached(run: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    return max((r["step"] for r in records(run) if r["kind"] == "step"), default=0)


def from_step(run: Path) -> int:
    """The step that the latest start went on from."""
    return int(json.loads((run / "provenance.json").read_text())["starts"][-1]["from_step"])


def contents(folder: Path, *, leave_out: Sequence[str] = (".lock",)) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in leave_out and not path.name.endswith(".lock"):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(run: Path, reference: Path) -> list[str]:
    """In what a finished run differs from the undisturbed one; empty when in nothing."""
    if not (run / "result.json").exists():
        return ["there is no result.json"]
    result, wanted = (_without_clocks(json.loads((r / "result.json").read_text())) for r in (run, reference))
    found = [f"result.json: {k}: {result.get(k)} ≠ {v}" for k, v in wanted.items() if result.get(k) != v]
    last, its = (r / "checkpoints" / f"step_{wanted['step']}" for r in (run, reference))
    for file in sorted(its.glob("*.safetensors")):
        if not (last / file.name).is_file() or (last / file.name).read_bytes() != file.read_bytes():
            found.append(f"{file.name} is not equal")
    states = [json.loads((c / "state.json").read_text()) for c in (last, its) if (c / "state.json").exists()]
    if len(states) < 2 or _without_clocks(states[0]) != _without_clocks(states[1]):
        found.append("state.json is not equal")
    return [*found, *_other_metrics(run, reference), *_left_behind(run)]


def _other_metrics(run: Path, reference: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    mine, wanted = records(run), records(reference)
    if len(lines) != len(mine):
        return [f"metrics.jsonl: {len(lines) - len(mine)} lines are no JSON"]
    names, wanted_names = ([(r["kind"], r["split"], r["step"]) for r in x] for x in (mine, wanted))
    if names != wanted_names:
        extra = [n for n in names if names.count(n) != wanted_names.count(n)]
        missing = [n for n in wanted_names if n not in names]
        return [f"metrics.jsonl: missing {missing[:3]}, wrong number of {extra[:3]}"]
    wrong = [n for n, a, b in zip(names, mine, wanted, strict=True) if _without_clocks(a) != _without_clocks(b)]
    return [f"metrics.jsonl: other values in {wrong[:3]}"] if wrong else []


def _left_behind(run: Path) -> list[str]:
    return [f"left behind: {p.name}" for p in (run / "checkpoints").glob("*.tmp")]


def _without_clocks(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_clocks(v) for k, v in data.items() if k not in CLOCKS}
    return [_without_clocks(v) for v in data] if isinstance(data, list) else data


def said_well(text: str) -> list[str]:
    """What is wrong with how a process told of its trouble."""
    found = []
    if "Traceback (most recent call last)" in text:
        found.append("a traceback: " + text.strip().splitlines()[-1])
    if "HINT:" not in text:
        found.append(f"no HINT in {text[-300:]!r}")
    return found


def restarted(
    stage: Stage, process: Process, reference: Path, *, lost_from: int, detect: float | None = None, note: str = ""
) -> Outcome:
    """The outcome of the restart under way: it must finish as if nothing had been."""
    recover = first_new_step_seconds(stage.run, process)
    code = process.wait()
    if code != 0:
        return Outcome(False, 0, detect, recover, f"{note} restart: exit code {code}: {process.text()[-1500:]}")
    wrong = differences(stage.run, reference)
    lost = max(0, lost_from - from_step(stage.run))
    return Outcome(not wrong, lost, detect, recover, "; ".join([note, *wrong]).strip("; "))


def first_new_step_seconds(run: Path, process: Process) -> float | None:
    """Seconds until the process has done a step (or has ended, having none to do)."""
    begin_unix = time.time()
    while process.poll() is None:
        if any(r["kind"] == "step" and r["time_unix_seconds"] >= begin_unix for r in records(run)):
            break
        if time.monotonic() - process.started_at > 300:
            return None
        time.sleep(0.005)
    return time.monotonic() - process.started_at


def wait_for_step(stage: Stage, process: Process, step: int) -> int:
    """Wait until a step is told of, or the process has ended; returns the last step told of."""
    while (now := reached(stage.run)) < step and process.poll() is None:
        time.sleep(0.001)
        assert time.monotonic() - process.started_at < 120, f"no step {step} in two minutes"
    return now
