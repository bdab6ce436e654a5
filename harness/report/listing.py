"""`harness runs`: the runs below a folder, a line each: how far they are, how good, and what is wrong with them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.report.axes import epoch_text
from harness.runs import Run

ORDER = "newest last"  # by the latest record
_NO_VALUE = "-"
_LEAST_RUN = 24  # letters: a run id and a little of its folder
_STATES = ("running", "finished", "stopped", "empty", "broken")
_FLUSH_RIGHT = ("EPOCH", "BEST", "EMA", "AGE")


def as_json(run: Run) -> dict[str, Any]:
    """A run of the list; accuracies are the highest on the test split, shares from 0 to 1."""
    return {
        "run": str(run.path),
        "recipe": run.recipe_name,
        "state": _state(run),
        "epoch": run.epoch,
        "epochs": run.length[0],
        "best_accuracy": _best(run, "test"),
        "best_ema_accuracy": _best(run, "test_ema"),
        "updated_unix_seconds": run.updated_unix_seconds,
        "problems": list(run.problems),
    }


def render(runs: Sequence[Run], root: Path, *, width: int | None, now_unix_seconds: float | None = None) -> str:
    """The list as text, in the order given.

    Args:
        root: the folder they are below.
        width: columns of the terminal, to which long names are cut; None cuts nothing.
        now_unix_seconds: for ages; None takes the clock.
    """
    if not runs:
        return f"no runs below {root}"
    columns = _columns(runs, time.time() if now_unix_seconds is None else now_unix_seconds)
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    if width:
        left = width - sum(widths.values()) - 2 * len(widths)
        if "RECIPE" in columns and left < _LEAST_RUN:
            widths["RECIPE"] = max(len("RECIPE"), widths["RECIPE"] - (_LEAST_RUN - left))
            columns["RECIPE"] = [_cut_middle(cell, widths["RECIPE"]) for cell in columns["RECIPE"]]
            left = width - sum(widths.values()) - 2 * len(widths)
        columns["RUN"] = [_cut_middle(str(run.path), max(left, _LEAST_RUN)) for run in runs]
    else:
        columns["RUN"] = [str(run.path) for run in runs]
    lines = [_line(dict(zip(columns, columns, strict=True)), widths)]
    for i, run in enumerate(runs):
        lines.append(_line({name: cells[i] for name, cells in columns.items()}, widths))
        lines += [f"    {problem}" for problem in run.problems]
    states = [_state(run) for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in _STATES if state in states)
    return "\n".join([*lines, f"{len(runs)} run{'s' if len(runs) != 1 else ''} ({counts}), {ORDER}"])


def age(seconds: float) -> str:
    """A time span in its largest unit: 5 s, 12 min, 3 h, 2 d."""
    seconds = max(0.0, seconds)
    for unit, size, until in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86400)} d"


def _columns(runs: Sequence[Run], now_unix_seconds: float) -> dict[str, list[str]]:
    """Cells by the name of their column, but for the run's; a column without any value is left out."""
    # The folder says it already, unless a training was given another one.
    foreign = any(run.path.parent.name != run.recipe_name for run in runs)
    columns = {
        "STATE": [_state(run) for run in runs],
        "EPOCH": [_progress(run) for run in runs],
        "BEST": [_percent(_best(run, "test")) for run in runs],
        "EMA": [_percent(_best(run, "test_ema")) for run in runs],
        "AGE": [age(now_unix_seconds - run.updated_unix_seconds) for run in runs],
        "RECIPE": [run.recipe_name if foreign else _NO_VALUE for run in runs],
    }
    return {name: cells for name, cells in columns.items() if set(cells) != {_NO_VALUE}}


def _line(cells: dict[str, str], widths: dict[str, int]) -> str:
    padded = (
        cell.rjust(widths[name]) if name in _FLUSH_RIGHT else cell.ljust(widths.get(name, 0))
        for name, cell in cells.items()
    )
    return "  ".join(padded).rstrip()


def _state(run: Run) -> str:
    return "broken" if run.is_broken else run.state


def _best(run: Run, split: str) -> float | None:
    best = run.best_in(split)
    return None if best is None else best.value


def _progress(run: Run) -> str:
    epochs, _ = run.length
    return f"{epoch_text(run.epoch)}/{'?' if epochs is None else epoch_text(epochs)}"


def _percent(share: float | None) -> str:
    return _NO_VALUE if share is None else f"{share:.2%}"


def _cut_middle(text: str, most: int) -> str:
    """A text of at most so many letters; of a longer one the beginning goes, since the end tells runs apart."""
    if len(text) <= most:
        return text
    tail = min(most - 2, 21)  # a run id and the slash before it
    return f"{text[: most - tail - 1]}…{text[-tail:]}"
