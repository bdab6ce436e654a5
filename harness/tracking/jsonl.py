"""metrics.jsonl: the truth about a run, a JSON object a line, written as it happens."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

from harness.files import write_text
from harness.tracking.base import NullTracker, Record


class JsonlTracker(NullTracker):
    """Appends records to a file.

    Args:
        path: the file; lines behind `from_step` are dropped first, since a resumed run makes them again.
        from_step: optimizer steps already done.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        _keep_until(path, from_step)
        self._file = path.open("a", buffering=1)

    def log(self, record: Record) -> None:
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n")

    def finish(self, result: Record | None) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been told of
            self._file.close()


def read(path: Path, *, steps: bool = True) -> list[dict[str, object]]:
    """All records of a metrics.jsonl; a last line that was cut off by a crash is left out.

    Args:
        steps: False leaves the records of single steps out, but for the last three lines: most of a file, and most of
            the time that reading it takes.
    """
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if not steps and '"kind": "step"' in line and number < len(lines) - 3:
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return records


def _finite(value: object) -> object:
    """JSON has no NaN or infinity: they become their names, so that a diverged run can still be read."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(r) for r in read(path) if isinstance(at := r.get("step"), int) and at <= step]
    write_text(path, "".join(line + "\n" for line in kept))
