"""Runs in the terminal: the list of `harness runs`, curves of `harness curves` and of `harness lr-find`, whose page is
here too.

Curves are braille dots in the terminal's colours, or letters on lines where there are none. plotille draws the dots and
lines (pure Python, MIT, no dependencies); axes, legend and what is drawn are ours.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from plotille import Canvas, color

from harness.errors import HarnessError, nearest
from harness.report import page
from harness.report.charts import Axis, Series, epoch_text, fit_axis, line_chart, number, percent
from harness.runs import Run, open_run

if TYPE_CHECKING:
    from harness.training.lr_finder import LrRange  # which imports torch

_SPLITS = {"train": "train", "test": "test", "test_ema": "EMA"}
# What can be drawn: the key in metrics.jsonl, its title, and which splits have it.
QUANTITIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "loss": ("loss", "loss", tuple(_SPLITS)),
    "accuracy": ("accuracy", "accuracy", tuple(_SPLITS)),
    "lr": ("lr", "learning rate", ("train",)),
    "throughput": ("images_per_second", "images per second", ("train",)),
}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = (33, 208, 34, 162, 99, 37, 160, 136)  # of the 256 of terminals, legible on black and on white
HEIGHT_LINES = 14
MIN_WIDTH, MAX_WIDTH = 12, 110
LARGEST = 1e300  # differences of values up to it are finite
HEADROOM = 0.5  # of the fall from the first to the least loss of a range test: as much is drawn above the first
_FEW = 3  # epochs up to which the steps of the training are drawn too
_DOTS_ACROSS, _DOTS_DOWN = 2, 4  # in a character
_EMPTY = "\u2800"


# --- curves of runs


def has_colours() -> bool:
    """Whether standard output is a terminal that shows colours, and they are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def parse_what(text: str) -> list[str]:
    """The quantities named in a list with commas, each once; HarnessError where one is not known, or none is named."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in QUANTITIES:
            raise HarnessError(f'--what: "{name}" is not drawn', hint=nearest(name, QUANTITIES))
    if not names:
        raise HarnessError("--what names nothing", hint=f"Choose of {', '.join(QUANTITIES)}.")
    return names


def draw_runs(paths: Sequence[Path], what: Sequence[str], *, size: os.terminal_size, colours: bool) -> tuple[str, bool]:
    """Curves of runs, drawn over one another, and whether any of the runs is still going; `what` is of `QUANTITIES`."""
    runs = [open_run(path) for path in dict.fromkeys(paths)]
    lines = []
    for run in runs:
        lines.append(f"{run.label}: {run.state}, {f'epoch {number(run.epoch)}' if run.records else 'no records yet'}")
    lines += [f"  {problem}" for run in runs for problem in run.problems]
    for name in what:
        curves, percents = curves_of(runs, name), name == "accuracy"
        lines += ["", draw(QUANTITIES[name][1], curves, size=size, colours=colours, as_percent=percents)]
    return "\n".join(lines), any(run.state == "running" for run in runs)


def watch(draw: Callable[[], tuple[str, bool]], *, seconds: float, clear: bool) -> None:
    """Print the text that `draw` returns, every so many seconds if it has changed, until `draw` says that it will not
    change any more, or Ctrl-C; `clear` clears the terminal before each picture."""
    before = None
    try:
        while True:
            text, is_going = draw()
            if text != before:
                print(f"\x1b[H\x1b[2J{text}" if clear else text, flush=True)
                before = text
            if not is_going:
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()


def curves_of(runs: Sequence[Run], name: str) -> list[Series]:
    """The curves of a quantity, by epochs; in a run's first epochs its training's steps instead."""
    key, _, splits = QUANTITIES[name]
    curves = []
    for run, split in itertools.product(runs, splits):
        points = run.curve(split, key)
        if split == "train" and (len(points) < _FEW or key == "lr"):
            points = run.curve(split, key, kind="step") or points
        words = [run.run_id] if len(runs) > 1 else []
        words += [_SPLITS[split]] if len(splits) > 1 or not words else []
        if points:
            curves.append(Series(" ".join(words), [p.epoch for p in points], [p.value for p in points]))
    return curves


def draw(
    title: str,
    curves: Sequence[Series],
    *,
    size: os.terminal_size,
    colours: bool,
    as_percent: bool = False,
    x_label: str = "epoch",
    log_x: bool = False,
) -> str:
    """A chart with its title, axes and legend, no wider than the terminal; letters tell curves apart where there are no
    colours, or too few."""
    if not curves:
        return f"{title}\n  no values yet"
    height = max(4, min(HEIGHT_LINES, size.lines - 6)) if size.lines else HEIGHT_LINES
    values = np.concatenate([_values(curve) for curve in curves])
    y_axis = fit_axis(values, 0, height * _DOTS_DOWN - 1, most=1.0 if as_percent else None)
    marks = y_axis.written(percent if as_percent else number, max(3, height // 2))
    labels = {int(at / _DOTS_DOWN): text for text, at in marks}  # by the row; 0 is the lowest
    margin = max(map(len, labels.values())) + 2
    width = max(MIN_WIDTH, min(MAX_WIDTH, size.columns - margin - 1))
    x_axis = fit_axis(np.concatenate([curve.x for curve in curves]), 0, width * _DOTS_ACROSS - 1, log=log_x)
    lines = [f"{title} by {x_label}"]
    for above, line in enumerate(_canvas(curves, x_axis, y_axis, width, height, colours)):
        row = height - 1 - above
        lines.append(f"{labels.get(row, ''):>{margin - 2}} {'┤' if row in labels else '│'}{line}".rstrip())
    lines += _below(x_axis, width, margin)
    for i, curve in enumerate(curves):
        value = f"{curve.y[-1]:.2%}" if as_percent else number(curve.y[-1])
        words = f"{value} at {x_label} {number(curve.x[-1])}"
        room = max(6, size.columns - len(words) - 7)
        name = curve.name if len(curve.name) <= room else "…" + curve.name[1 - room :]
        lines.append(f"  {_mark(i, colours, len(curves))} {name}: {words}")
    return "\n".join(lines)


def _canvas(curves: Sequence[Series], x_axis: Axis, y_axis: Axis, width: int, height: int, colours: bool) -> list[str]:
    """The lines of the drawing, from the top."""
    canvas = Canvas(width, height, 0, 0, width * _DOTS_ACROSS, height * _DOTS_DOWN, mode="byte")
    letters = []  # over all lines
    for i, curve in enumerate(curves):
        shade = COLOURS[i % len(COLOURS)] if colours else None
        x, y = x_axis.place(curve.x), y_axis.place(_values(curve))
        places = np.stack([x, y], axis=1).round().astype(int).tolist()
        canvas.point(*places[0], color=shade)
        for one, other in itertools.pairwise(places):
            canvas.line(*one, *other, color=shade)
        if not colours or len(curves) > len(COLOURS):
            places = _spread(places, width * _DOTS_ACROSS // 6)
            letters += [(place, {"color": shade, "marker": LETTERS[i % len(LETTERS)]}) for place in places]
    for place, style in letters:
        canvas.point(*place, **style)
    return str(canvas.plot(linesep="\n")).replace(_EMPTY, " ").split("\n")


def _values(curve: Series) -> np.ndarray:
    return np.clip(curve.y, -LARGEST, LARGEST)


def _spread(places: Sequence[list[int]], apart: int) -> list[list[int]]:
    """Some of a curve's places for its letter: the last one, and others at least so many dots apart."""
    chosen = [places[-1]]
    for place in reversed(places):
        if chosen[-1][0] - place[0] >= apart:
            chosen.append(place)
    return chosen


def _below(axis: Axis, width: int, margin: int) -> list[str]:
    """The lower axis: a line with marks, and numbers below it that do not touch."""
    line, numbers = ["─"] * width, ""
    for text, at in axis.written(number, max(2, width // 12)):
        column = int(at / _DOTS_ACROSS)
        start = max(0, min(column - len(text) // 2, width - len(text)))
        line[column] = "┬"
        if not numbers or start >= len(numbers) + 2:
            numbers = numbers.ljust(start) + text
    return [" " * (margin - 1) + "└" + "".join(line), " " * margin + numbers]


def _mark(index: int, colours: bool, curves: int) -> str:
    """What a curve is known by: its colour, or its letter; both where there are more curves than colours."""
    letter = LETTERS[index % len(LETTERS)]
    if not colours:
        return letter
    line = "⠤⠤" if curves <= len(COLOURS) else f"⠤{letter}"
    return str(color(line, fg=COLOURS[index % len(COLOURS)], mode="byte"))


# --- the list of runs

ORDER = "newest last"  # by the latest record
_NO_VALUE = "-"
_LEAST_RUN = 24  # letters: a run id and a little of its folder
_STATES = ("running", "finished", "stopped", "empty", "broken")
_COLUMNS = ("STATE", "EPOCH", "BEST", "EMA", "AGE", "RECIPE", "RUN")  # one without any value is left out
_FLUSH_RIGHT = ("EPOCH", "BEST", "EMA", "AGE")


def as_json(run: Run) -> dict[str, Any]:
    """A run of the list; accuracies are the highest on the test split, shares from 0 to 1."""
    best, best_ema = run.best_in("test"), run.best_in("test_ema")
    return {
        "run": str(run.path),
        "recipe": run.recipe_name,
        "state": "broken" if run.is_broken else run.state,
        "epoch": run.epoch,
        "epochs": run.length[0],
        "best_accuracy": best and best.value,
        "best_ema_accuracy": best_ema and best_ema.value,
        "updated_unix_seconds": run.updated_unix_seconds,
        "problems": list(run.problems),
    }


def render(runs: Sequence[Run], root: Path, *, width: int | None, now_unix_seconds: float | None = None) -> str:
    """The list of the runs below a folder, in the order given: a line each, with what is wrong with them; long names
    are cut to the `width` of a terminal."""
    if not runs:
        return f"no runs below {root}"
    # The folder says which recipe it is already, unless a training was given another one.
    foreign = any(run.path.parent.name != run.recipe_name for run in runs)
    now, rows = time.time() if now_unix_seconds is None else now_unix_seconds, []
    for found in map(as_json, runs):
        epochs = "?" if found["epochs"] is None else epoch_text(found["epochs"])
        best = (found["best_accuracy"], found["best_ema_accuracy"])
        percents = [_NO_VALUE if share is None else f"{share:.2%}" for share in best]
        since, recipe = age(now - found["updated_unix_seconds"]), found["recipe"] if foreign else _NO_VALUE
        rows.append([found["state"], f"{epoch_text(found['epoch'])}/{epochs}", *percents, since, recipe, found["run"]])
    columns = [list(column) for column in zip(_COLUMNS, *rows, strict=True) if set(column[1:]) != {_NO_VALUE}]
    if width:
        _fit(columns, width)
    sizes = [max(map(len, column)) if column[0] != "RUN" else 0 for column in columns]
    flush = [str.rjust if column[0] in _FLUSH_RIGHT else str.ljust for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        padded = (pad(cell, size) for pad, cell, size in zip(flush, row, sizes, strict=True))
        lines.append("  ".join(padded).rstrip())
    for place, run in enumerate(runs, start=1):
        lines[place] += "".join(f"\n    {problem}" for problem in run.problems)
    counts = ", ".join(f"{n} {state}" for state in _STATES if (n := columns[0].count(state)))
    return "\n".join([*lines, f"{len(runs)} run{'s' if len(runs) != 1 else ''} ({counts}), {ORDER}"])


def _fit(columns: list[list[str]], width: int) -> None:
    """Cut recipes' names, then runs' paths, to the width of the terminal."""
    *others, paths = columns
    left = width - sum(max(map(len, column)) + 2 for column in others)
    recipes, longest = others[-1], max(map(len, others[-1]))
    if recipes[0] == "RECIPE" and left < _LEAST_RUN:
        most = max(len("RECIPE"), longest - (_LEAST_RUN - left))
        left += longest - most
        recipes[:] = [_cut_middle(name, most) for name in recipes]
    paths[1:] = [_cut_middle(path, max(left, _LEAST_RUN)) for path in paths[1:]]


def age(seconds: float) -> str:
    """A time span in its largest unit: 5 s, 12 min, 3 h, 2 d."""
    seconds = max(0.0, seconds)
    for unit, size, until in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds // 86400)} d"


def _cut_middle(text: str, most: int) -> str:
    """A text of at most so many letters; of a longer one the beginning goes, since the end tells runs apart."""
    if len(text) <= most:
        return text
    tail = min(most - 2, 21)  # a run id and the slash before it
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


# --- the learning-rate range test


def render_curve(found: LrRange, *, size: os.terminal_size, colours: bool) -> str:
    """The smoothed loss over the rate."""
    if not found.smoothed:
        return "no loss was finite"
    curve = Series("smoothed", found.lrs, _capped(found, found.smoothed))
    return draw("training loss", [curve], size=size, colours=colours, x_label="learning rate", log_x=True)


def render_suggestions(found: LrRange) -> str:
    """What the rules say, a line each, and how the test ended."""
    lines = [_end(found)]
    for rule in found.suggestions:
        lines.append(f"none: {rule.reason}" if rule.lr is None else f"{rule.lr:.2e}  ({rule.rule}; {rule.source})")
    return "\n".join(dict.fromkeys(lines))


def curve_page(found: LrRange, recipe_name: str) -> str:
    """A self-contained page: losses, smoothed loss and suggested rates over a logarithmic axis."""
    losses, smoothed = _capped(found, found.losses), _capped(found, found.smoothed)
    series = [Series("loss", found.lrs, losses), Series("smoothed", found.lrs, smoothed)]
    ends = [min([*losses, *smoothed]), max([*losses, *smoothed])] if losses else []
    series += [Series(s.rule, [s.lr] * 2, ends) for s in found.suggestions if s.lr is not None]
    title, rate, loss = "Loss over the learning rate", "learning rate", "training loss"
    chart = line_chart(series, title=title, description=_end(found), x_label=rate, y_label=loss, log_x=True)
    section = page.Section("curve", "Range test", lead=_end(found))
    values = {"chart": chart, "suggestions": found.suggestions, "with_code": _with_code}
    return page.page(f"{recipe_name}: learning-rate range test", [section], template="lr_range.html", **values)


def _with_code(text: str) -> Markup:
    """What stands between backticks set as code."""
    return Markup(re.sub("`(.*?)`", r"<code>\1</code>", str(escape(text))))


def _end(found: LrRange) -> str:
    end = "went to the largest rate" if found.diverged_at is None else f"diverged at lr {found.diverged_at:.2e}"
    return f"{len(found.losses)} steps, {end}; smoothed with beta {found.beta}"


def _capped(found: LrRange, losses: list[float]) -> list[float]:
    """Losses as they are drawn: a diverging end would press all else flat."""
    first, least = (found.smoothed[0], min(found.smoothed)) if found.smoothed else (0.0, 0.0)
    highest = first + max(HEADROOM * (first - least), 1e-6)
    return [min(loss, highest) for loss in losses]
