"""What survival means: after the fault and a restart by the same command, nothing shows that there was a fault.

The final weights, averaged weights and optimizer state are equal to the undisturbed run's byte for byte; metrics.jsonl
has each record once, with equal values; the undisturbed run itself, a neighbour on the same disk, was not touched.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.faults.runs import Stage
from tests.fork_server import Process

CLOCKS = {
    *("time_unix_seconds", "images_per_second", "milliseconds_per_step", "seconds", "startup_seconds"),
    *("loader_wait_seconds", "train_seconds", "epoch_seconds", "epoch_loader_wait_seconds"),
}
Record = dict[str, Any]


def records(run: Path) -> list[Record]:
    """The whole lines of metrics.jsonl."""
    found = []
    lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines() if (run / "metrics.jsonl").exists() else []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def reached(run: Path) -> int:
    """The last step in metrics.jsonl."""
    return max((r["step"] for r in records(run) if r["kind"] == "step"), default=0)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but locks, by its path in the folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith(".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    left = [f"left behind: {path.name}" for path in (run / "checkpoints").glob("*.tmp")]
    return [*found, *_other_metrics(run, reference), *left]


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


def _without_clocks(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_clocks(v) for k, v in data.items() if k not in CLOCKS}
    return [_without_clocks(v) for v in data] if isinstance(data, list) else data


def says_why(process: Process) -> None:
    """See that a process told of its trouble well."""
    text = process.text()
    assert "Traceback (most recent call last)" not in text, f"a traceback: {text.strip().splitlines()[-1]}"
    assert "HINT:" in text, f"no HINT in {text[-300:]!r}"


def refused(stage: Stage, process: Process, code: int = 2, *, since: float | None = None) -> None:
    """See that a process ends with this code and says why."""
    ended = stage.end(process, since=since)
    assert ended == code, f"exit code {ended}: {process.text()[-500:]}"
    says_why(process)


def restarted(
    stage: Stage,
    *overrides: str,
    env: Mapping[str, str] | None = None,
    lost_from: int | None = None,
    start: Callable[[], Process] | None = None,
    ranks: int = 1,
) -> None:
    """See that a restart by the same command, or by `start`, finishes as if nothing had been.

    Steps up to `lost_from`, or as many as metrics.jsonl has, were done before it.
    """
    reference = stage.reference(*overrides, ranks=ranks)
    done = reached(stage.run) if lost_from is None else lost_from
    process, begin_unix = start() if start else stage.train(*overrides, env=env), time.time()
    while process.poll() is None and not any(_is_step_since(begin_unix, r) for r in records(stage.run)):
        assert time.monotonic() - process.started_at < 300, "no new step in five minutes"
        time.sleep(0.005)
    stage.recover = time.monotonic() - process.started_at
    code = process.wait()
    assert code == 0, f"restart: exit code {code}: {process.text()[-1500:]}"
    wrong = differences(stage.run, reference)
    assert not wrong, "; ".join(wrong)
    latest = json.loads((stage.run / "provenance.json").read_text())["starts"][-1]
    stage.lost = max(0, done - int(latest["from_step"]))


def _is_step_since(begin_unix: float, record: Record) -> bool:
    return record["kind"] == "step" and record["time_unix_seconds"] >= begin_unix


def wait_for_step(stage: Stage, process: Process, step: int) -> int:
    """Wait until a step is recorded, or the process has ended; returns the last one."""
    while (now := reached(stage.run)) < step and process.poll() is None:
        time.sleep(0.001)
        assert time.monotonic() - process.started_at < 120, f"no step {step} in two minutes"
    return now
