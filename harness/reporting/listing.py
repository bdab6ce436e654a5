"""The runs below a folder, a line each: how far they are, how good, and what is wrong with the broken ones.

Nothing here imports torch, and no run can make it raise: what cannot be read is a line like any other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from harness.errors import HarnessError, nearest
from harness.run_directory import CHECKPOINTS, JOB, LOCK, RUN_FILES, RUNS, is_unused
from harness.runs import METRICS, RESULT, Run, is_held, open_run

State = Literal["running", "finished", "stopped", "empty", "broken"]
SIGNS_OF_A_RUN = frozenset({METRICS, RESULT, CHECKPOINTS, *RUN_FILES})
SIGNS_OF_A_RUN_OR_SWEEP = frozenset({LOCK, JOB})  # a sweep keeps them above its runs
ORDER = "newest last"  # by the latest record
_NO_VALUE = "-"
_LEAST_RUN = 24  # letters: a run id and a little of its folder
_FLUSH_RIGHT = ("EPOCH", "BEST", "EMA", "AGE")


@dataclass(frozen=True)
class Entry:
    """A run in the list.

    Attributes:
        run: path of its directory.
        recipe: the recipe's name; the folder above it where the recipe cannot be read.
        state: as `Run.state`; broken where something of it is missing or unreadable and nothing trains in it.
        epoch, epochs: how far it is, and how long it is to be; None where the recipe does not say.
        best_accuracy, best_ema_accuracy: highest test accuracy of the raw and the averaged weights, shares from 0 to 1.
        updated_unix_seconds: of the latest record, else of the folder.
        problems: what is missing or broken, in words.
    """

    run: str
    recipe: str
    state: State
    epoch: float
    epochs: float | None
    best_accuracy: float | None
    best_ema_accuracy: float | None
    updated_unix_seconds: float
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems)}


def list_runs(root: Path = RUNS, *, recipe: str | None = None) -> list[Entry]:
    """The runs below a folder (`root/<recipe>/<run-id>`, `root/<run-id>` or `root` itself), the newest last.

    Raises:
        HarnessError: there is no such folder, or no run of that recipe.
    """
    if not root.is_dir() and root != RUNS:
        raise HarnessError(
            "there is no such folder", where=str(root), hint="Give the folder that the runs are in, such as runs."
        )
    entries = sorted(map(_entry, _candidates(root)), key=lambda entry: (entry.updated_unix_seconds, entry.run))
    if recipe is None:
        return entries
    found = [entry for entry in entries if entry.recipe == recipe]
    if not found:
        names = {entry.recipe for entry in entries}
        raise HarnessError(f'no run of the recipe "{recipe}"', where=str(root), hint=nearest(recipe, names))
    return found


def render(entries: Sequence[Entry], root: Path, *, width: int | None, now_unix_seconds: float | None = None) -> str:
    """The list as text.

    Args:
        entries: in the order to be shown.
        root: the folder they are below.
        width: columns of the terminal, to which long names are cut; None cuts nothing.
        now_unix_seconds: for ages; None takes the clock.
    """
    if not entries:
        return f"no runs below {root}"
    now = time.time() if now_unix_seconds is None else now_unix_seconds
    columns = _columns(entries, now)
    shown = {name: [name, *cells] for name, cells in columns.items() if set(cells) != {_NO_VALUE}}
    widths = {name: max(map(len, cells)) for name, cells in shown.items()}
    room = None
    if width:
        taken = sum(widths.values()) + 2 * len(widths)
        if "RECIPE" in shown and width - taken < _LEAST_RUN:
            widths["RECIPE"] = max(len("RECIPE"), widths["RECIPE"] - (_LEAST_RUN - (width - taken)))
            shown["RECIPE"] = [_cut_middle(cell, widths["RECIPE"]) for cell in shown["RECIPE"]]
        room = max(width - sum(widths.values()) - 2 * len(widths), _LEAST_RUN)
    shown["RUN"] = ["RUN", *(_cut_middle(entry.run, room) for entry in entries)]
    lines = []
    for row, problems in zip(zip(*shown.values(), strict=True), [(), *(e.problems for e in entries)], strict=True):
        cells = (
            cell.rjust(widths[name]) if name in _FLUSH_RIGHT else cell.ljust(widths.get(name, 0))
            for name, cell in zip(shown, row, strict=True)
        )
        lines += ["  ".join(cells).rstrip(), *(f"    {problem}" for problem in problems)]
    return "\n".join([*lines, _footer(entries)])


def _columns(entries: Sequence[Entry], now_unix_seconds: float) -> dict[str, list[str]]:
    """Cells by the name of their column; a column without any value is left out of the list."""
    foreign = any(Path(entry.run).parent.name != entry.recipe for entry in entries)
    return {
        "STATE": [entry.state for entry in entries],
        "EPOCH": [_epochs(entry) for entry in entries],
        "BEST": [_percent(entry.best_accuracy) for entry in entries],
        "EMA": [_percent(entry.best_ema_accuracy) for entry in entries],
        "AGE": [age(now_unix_seconds - entry.updated_unix_seconds) for entry in entries],
        # The folder says it already, unless a training was given another one.
        "RECIPE": [entry.recipe if foreign else _NO_VALUE for entry in entries],
    }


def age(seconds: float) -> str:
    """A time span in its largest unit: 5 s, 12 min, 3 h, 2 d."""
    seconds = max(0.0, seconds)
    for unit, size, until in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86400)} d"


def _footer(entries: Sequence[Entry]) -> str:
    counts = {state: sum(entry.state == state for entry in entries) for state in get_args(State)}
    parts = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{len(entries)} run{'s' if len(entries) != 1 else ''} ({parts}), {ORDER}"


def _candidates(root: Path) -> Iterator[Path]:
    """Every folder that is a run or was one: what is broken beyond recognition is to be told of too."""
    if _signs(root):
        yield root
        return
    for child in _folders(root):
        if _signs(child):
            yield child
        else:
            yield from (path for path in _folders(child) if _signs(path))


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as found:
            return [path / entry.name for entry in found if entry.is_dir()]
    except OSError:
        return []


def _signs(path: Path) -> bool:
    """Whether anything in a folder says that it is a run; one that cannot be looked into may be."""
    try:
        with os.scandir(path) as found:
            names = {entry.name for entry in found}
    except FileNotFoundError:
        return False
    except OSError:
        return True
    if names & SIGNS_OF_A_RUN:
        return True
    return bool(names & SIGNS_OF_A_RUN_OR_SWEEP) and not any(
        _signs(child) for child in _folders(path) if child.name not in SIGNS_OF_A_RUN_OR_SWEEP
    )


def _entry(path: Path) -> Entry:
    try:
        run = open_run(path, steps=False)
    except (HarnessError, OSError) as error:
        begun = is_held(path)
        unused = not isinstance(error, OSError) and is_unused(path)  # such as a job that waits in its queue
        run = Run(path, "running" if begun else "empty", problems=() if unused or begun else (_why_not(path, error),))
    problems = run.problems
    if run.state in ("running", "empty"):  # the first record is still to come
        problems = tuple(problem for problem in problems if problem != f"{METRICS} is missing")
    return Entry(
        run=str(path),
        recipe=run.recipe_name,
        state="broken" if problems and run.state != "running" else run.state,
        epoch=run.epoch,
        epochs=run.length_epochs,
        best_accuracy=_best(run, "test"),
        best_ema_accuracy=_best(run, "test_ema"),
        updated_unix_seconds=run.updated_unix_seconds or _modified(path),
        problems=problems,
    )


def _why_not(path: Path, error: HarnessError | OSError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    missing = [name for name in RUN_FILES if not (path / name).is_file()]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else error.what


def _best(run: Run, split: str) -> float | None:
    return max((point.value for point in run.curve(split, "accuracy")), default=None)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _epochs(entry: Entry) -> str:
    return f"{epoch_text(entry.epoch)}/{'?' if entry.epochs is None else epoch_text(entry.epochs)}"


def epoch_text(epoch: float) -> str:
    """With a tenth where it is not whole: what lies between two epochs is a share of one."""
    return f"{epoch:.1f}".removesuffix(".0") if abs(epoch) < 1e5 else f"{epoch:.4g}"


def _percent(share: float | None) -> str:
    return _NO_VALUE if share is None else f"{share:.2%}"


def _cut_middle(text: str, most: int | None) -> str:
    """A text of at most so many letters; of a longer one the beginning goes, since the end tells runs apart."""
    if most is None or len(text) <= most:
        return text
    tail = min(most - 2, 21)  # a run id and the slash before it
    return f"{text[: most - tail - 1]}…{text[-tail:]}"
