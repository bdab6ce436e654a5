"""Curves of runs as text: braille dots in the terminal's colours, or letters on lines where there are none.

plotille draws the dots and lines (pure Python, MIT, no dependencies); axes, legend and what is drawn are ours.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from plotille import Canvas, color

from harness.errors import HarnessError, nearest
from harness.report.axes import Axis, fit_axis, number, percent, written
from harness.report.charts import Series
from harness.runs import Run, open_run

_SPLITS = {"train": "train", "test": "test", "test_ema": "EMA"}
# What can be drawn: the key in metrics.jsonl, its title, and which splits have it.
QUANTITIES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
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
_FEW = 3  # epochs up to which the steps of the training are drawn too
_DOTS_ACROSS, _DOTS_DOWN = 2, 4  # in a character
_EMPTY = "\u2800"


def has_colours() -> bool:
    """Whether standard output is a terminal that shows colours, and they are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def parse_what(text: str) -> list[str]:
    """The quantities named in a list with commas, each once.

    Raises:
        HarnessError: one is not known, or none is named.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in QUANTITIES:
            raise HarnessError(f'--what: "{name}" is not drawn', hint=nearest(name, QUANTITIES))
    if not names:
        raise HarnessError("--what names nothing", hint=f"Choose of {', '.join(QUANTITIES)}.")
    return names


def draw_runs(paths: Sequence[Path], what: Sequence[str], *, size: os.terminal_size, colours: bool) -> tuple[str, bool]:
    """Curves of runs, drawn over one another, and whether any of the runs is still going.

    Args:
        paths: run directories.
        what: of `QUANTITIES`.
        size: of the terminal, columns and lines.
        colours: write colour codes; letters tell the curves apart otherwise, and where colours do not suffice. Without
            a terminal there are none anyhow.

    Raises:
        HarnessError: a path is no run.
    """
    runs = [open_run(path) for path in dict.fromkeys(paths)]
    lines = []
    for run in runs:
        lines.append(f"{run.label}: {run.state}, {f'epoch {number(run.epoch)}' if run.records else 'no records yet'}")
    lines += [f"  {problem}" for run in runs for problem in run.problems]
    for name in what:
        as_percent = name == "accuracy"
        title = QUANTITIES[name][1]
        lines += ["", draw(title, curves_of(runs, name), size=size, colours=colours, as_percent=as_percent)]
    return "\n".join(lines), any(run.state == "running" for run in runs)


def watch(draw: Callable[[], tuple[str, bool]], *, seconds: float, clear: bool) -> None:
    """Print what `draw` returns, again when it has changed, until it says that nothing is going, or Ctrl-C.

    Args:
        draw: returns the text, and whether it may still change.
        seconds: between two looks.
        clear: clear the terminal before each picture.
    """
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
    """A chart with its title, axes and legend, no wider than the terminal."""
    if not curves:
        return f"{title}\n  no values yet"
    values, places = (np.concatenate([axis(c) for c in curves]) for axis in (_values, lambda c: c.x))
    height = max(4, min(HEIGHT_LINES, size.lines - 6)) if size.lines else HEIGHT_LINES
    y_axis = fit_axis(values, 0, height * _DOTS_DOWN - 1, most=1.0 if as_percent else None)
    labels = _labels(y_axis, height, percent if as_percent else number)
    margin = max(map(len, labels.values())) + 2
    width = max(MIN_WIDTH, min(MAX_WIDTH, size.columns - margin - 1))
    x_axis = fit_axis(places, 0, width * _DOTS_ACROSS - 1, log=log_x)
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
    shades = [COLOURS[i % len(COLOURS)] if colours else None for i in range(len(curves))]
    placed = []
    for curve, shade in zip(curves, shades, strict=True):
        x = x_axis.place(np.array(curve.x)).round().astype(int).tolist()
        y = y_axis.place(_values(curve)).round().astype(int).tolist()
        places = list(zip(x, y, strict=True))
        placed.append(places)
        canvas.point(*places[0], color=shade)
        for (x0, y0), (x1, y1) in itertools.pairwise(places):
            canvas.line(x0, y0, x1, y1, color=shade)
    if not colours or len(curves) > len(COLOURS):
        for i, (places, shade) in enumerate(zip(placed, shades, strict=True)):
            for x, y in _spread(places, width * _DOTS_ACROSS // 6):
                canvas.point(x, y, color=shade, marker=LETTERS[i % len(LETTERS)])
    return str(canvas.plot(linesep="\n")).replace(_EMPTY, " ").split("\n")


def _values(curve: Series) -> np.ndarray:
    return np.clip(curve.y, -LARGEST, LARGEST)


def _spread(places: Sequence[tuple[int, int]], apart: int) -> list[tuple[int, int]]:
    """Some of a curve's places for its letter: the last one, and others at least so many dots apart."""
    chosen = [places[-1]]
    for place in reversed(places):
        if chosen[-1][0] - place[0] >= apart:
            chosen.append(place)
    return chosen


def _labels(axis: Axis, height: int, write: Callable[..., str]) -> dict[int, str]:
    """What is written next to which row; row 0 is the lowest."""
    ticks = axis.ticks(max(3, height // 2))
    rows = (axis.place(np.array(ticks)) / _DOTS_DOWN).astype(int).tolist()
    return {row: text for row, text in zip(rows, written(ticks, write), strict=True) if 0 <= row < height}


def _below(axis: Axis, width: int, margin: int) -> list[str]:
    """The axis of the epochs: a line with marks, and numbers below it that do not touch."""
    line, numbers = ["─"] * width, ""
    ticks = axis.ticks(max(2, width // 12))
    for tick, text in zip(ticks, written(ticks, number), strict=True):
        column = int(axis.place(np.array([tick]))[0] / _DOTS_ACROSS)
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
